"""A sub-model as a model of its own, and what sub-models cost.

Shapes: L layers, n of E experts, k active; A, S, X, Q parameters of a layer's attention, shared expert, one expert and router.

The paper's accounting (Section 3.3): total = V + L (A + S + Q + n X), active = V + L (A + S + Q + k X), V all that is no layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import ModelSetting


class Cost(NamedTuple):
    """Parameters in all, parameters that a token uses, and multiply-add FLOPs of a token in the layers (2 per multiply-add)."""

    total: int
    active: int
    flops: float


def setting_of(setting: ModelSetting, sub: SubModel) -> ModelSetting:
    """The sizes of a sub-model cut out."""
    experts = setting.experts if sub.experts is None else len(sub.experts[0])
    return setting.with_values({"layers": len(sub.layers), "experts": experts, "active": sub.active})


@torch.no_grad()
def cut(model: UniModel, sub: SubModel) -> UniModel:
    """Copy what a sub-model uses into a model of its own, which computes what the view computes.

    Raises:
        ValueError: it is no sub-model of this model, or leaves a modality of separated routing without experts.
    """
    sub.check(model.setting, model.levels)
    if model.setting.routing == "separated" and sub.experts is not None:
        raise ValueError("experts: a model with separated routing keeps all of them")
    own = UniModel(setting_of(model.setting, sub), model.sizes)
    if own.mtp is not None and model.mtp is not None:
        own.mtp = (
            None  # its inner width is that of k experts; it is there for training, and was trained with the whole model
        )
    own.to(model.embed_text.weight.device).train(model.training)
    theirs = model.state_dict()
    state = {}
    for name, value in own.state_dict().items():
        source = name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            source = f"layers.{sub.layers[int(number)]}.{rest}"
            if sub.experts is not None and rest in ("moe.router", "moe.bias", "moe.w_in", "moe.w_out"):
                state[name] = theirs[source][list(sub.experts[int(number)])]
                continue
        state[name] = theirs[source].to(value.dtype)
    own.load_state_dict(state)
    return own


def cost(model: UniModel, sub: SubModel, context: int) -> Cost:
    """What a sub-model of `model` costs.

    Args:
        context: tokens that a token attends to.
    """
    s, layers = model.setting, len(sub.layers)
    experts = s.experts if sub.experts is None else len(sub.experts[0])
    one: Any = model.layers[0]
    parts = (one.attention, one.norm_attention, one.norm_moe)
    attention = sum(p.numel() for part in parts for p in part.parameters())
    shared, routed = 3 * s.width * s.shared_width, 3 * s.width * s.expert_width
    router = experts * (s.width + (s.balance in ("bias", "both")))  # a bias that is not trained is no parameter
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("layers.", "mtp.")))
    total = outside + layers * (attention + shared + router + experts * routed)
    active = outside + layers * (attention + shared + router + sub.active * routed)
    projections = 4 * s.width**2 + experts * s.width + shared + sub.active * routed
    return Cost(total, active, 2.0 * layers * (projections + 2 * context * s.width))
