"""LoRA on any Hugging Face model: the factors of many nodes as flat buffers, stepped together or one peft model at a time.

Shapes: k nodes of a call, m adapted linear layers, r rank; of layer l: A (k, r, d_in), B (k, d_out, r), W0 (d_out, d_in).

Notable choices
- All layers' factors of a node are one flat float32 vector for A and one for B: that is what is mixed, sent and saved.
- Which layers are adapted, and their names, is peft's own choice for the kind of model; a file written here is what
  `PeftModel.from_pretrained` reads.
- `Grouped` adds every node's low-rank term to its own rows of one batch, by two batched products; everything else of the
  model works row by row and never knows that the rows belong to different nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raysys.runtime.storage import Storage

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layout:
    """Where the factors of each adapted layer lie in the flat buffers: W0 + (alpha / r) B A (Hu et al. 2021, eq. 3)."""

    modules: tuple[str, ...]
    """Full names of the adapted layers in the base model, in its order."""
    shapes: tuple[tuple[int, int], ...]
    """(d_out, d_in) of each."""
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    @property
    def size_a(self) -> int:
        """Numbers in one node's A."""
        return self.rank * sum(d_in for _, d_in in self.shapes)

    @property
    def size_b(self) -> int:
        """Numbers in one node's B."""
        return self.rank * sum(d_out for d_out, _ in self.shapes)

    def init(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A (size_a,) uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5, peft's own start) and B (size_b,) zero."""
        drawn = [(2 * torch.rand(self.rank * d_in, generator=generator) - 1) / d_in**0.5 for _, d_in in self.shapes]
        return torch.cat(drawn), torch.zeros(self.size_b)

    def split_a(self, flat: Tensor) -> list[Tensor]:
        """Views (..., r, d_in) of a flat buffer (..., size_a), one per layer."""
        parts = torch.split(flat, [self.rank * d_in for _, d_in in self.shapes], dim=-1)
        return [
            part.reshape(*part.shape[:-1], self.rank, d_in) for part, (_, d_in) in zip(parts, self.shapes, strict=True)
        ]

    def split_b(self, flat: Tensor) -> list[Tensor]:
        """Views (..., d_out, r) of a flat buffer (..., size_b), one per layer."""
        parts = torch.split(flat, [d_out * self.rank for d_out, _ in self.shapes], dim=-1)
        return [
            part.reshape(*part.shape[:-1], d_out, self.rank)
            for part, (d_out, _) in zip(parts, self.shapes, strict=True)
        ]

    def join(self, factors: Sequence[Tensor]) -> Tensor:
        """The flat buffer (..., size) of one matrix (..., p, q) per layer: what `split_a` and `split_b` cut."""
        return torch.cat([matrix.flatten(-2) for matrix in factors], dim=-1)

    def lowest(self, stack: str) -> int:
        """Index of the lowest adapted layer within the stack of layers named `stack`."""
        return min(int(name[len(stack) + 1 :].split(".")[0]) for name in self.modules)


def layer_stack(model: nn.Module) -> str:
    """Name of the list of a model's transformer layers.

    Raises:
        ValueError: there is none with as many entries as the configuration says.
    """
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise ValueError(f"model: {type(model).__name__} has no list of {depth} layers, so its top layers cannot be told")


def find_layout(model: nn.Module, targets: Sequence[str], layers: int, rank: int, alpha: float) -> Layout:
    """Adapt the linear layers whose name ends in one of `targets`, in the top `layers` transformer layers (0: all).

    Args:
        targets: endings such as `query`; empty for peft's own choice for this kind of model.

    Raises:
        ValueError: no such layer, or a kind that is not torch's Linear.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    config: Any = model.config
    kind, depth = config.model_type, config.num_hidden_layers
    endings = tuple(targets) or tuple(KNOWN.get(kind, ()))
    if not endings:
        raise ValueError(f"targets: peft knows no default for models of type {kind}; name the layers to adapt")
    if not 0 <= layers <= depth:
        raise ValueError(f"layers: got {layers}; this model has {depth}, and 0 means all")
    stack = layer_stack(model)
    lowest = depth - layers if layers else 0
    names, shapes = [], []
    for name, module in model.named_modules():
        inside = name.startswith(stack + ".")
        if name.split(".")[-1] not in endings or not inside or int(name[len(stack) + 1 :].split(".")[0]) < lowest:
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(f"targets: {name} is a {type(module).__name__}; only torch.nn.Linear can be adapted")
        names.append(name)
        shapes.append((module.out_features, module.in_features))
    if not names:
        raise ValueError(f"targets: got {', '.join(endings)}; no layer of {type(model).__name__} has such a name")
    return Layout(tuple(names), tuple(shapes), rank, alpha)


class Grouped(nn.Module):
    """A frozen linear layer with the low-rank terms of k nodes: rows of node i get x W0^T + s (x A_i^T) B_i^T.

    The batch holds k groups of equally many rows, node after node. `shift` (d_out, d_in), if any, is added to W0 for all.
    """

    def __init__(self, frozen: nn.Module, scale: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.shift: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x)
        if self.shift is not None:
            y = y + x @ self.shift.T
        if self.a is None or self.b is None:
            return y
        groups = x.reshape(len(self.a), -1, x.shape[-1])
        low = torch.bmm(torch.bmm(groups, self.a.transpose(1, 2)), self.b.transpose(1, 2))
        return y + self.scale * low.view(y.shape)


class HalfFrozen(nn.Module):
    """A frozen linear layer computed in bfloat16 from and to float32: faster where the CPU or GPU has such units."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)


class GroupedLora:
    """A base model whose adapted layers take the factors of k nodes at once. Changes `model` in place."""

    def __init__(self, model: nn.Module, layout: Layout, bf16: bool = False) -> None:
        self.layout = layout
        if bf16:
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear):
                    _replace(model, name, HalfFrozen(module))
        self.layers = [Grouped(model.get_submodule(name), layout.scale) for name in layout.modules]
        for name, layer in zip(layout.modules, self.layers, strict=True):
            _replace(model, name, layer)

    @contextmanager
    def factors(self, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Within: the model's rows belong to the nodes whose factors a (k, size_a), b (k, size_b) are."""
        shifts = [None] * len(self.layers) if shift is None else list(shift)
        for layer, a_l, b_l, s_l in zip(
            self.layers, self.layout.split_a(a), self.layout.split_b(b), shifts, strict=True
        ):
            layer.a, layer.b, layer.shift = a_l, b_l, s_l
        try:
            yield
        finally:
            for layer in self.layers:
                layer.a = layer.b = layer.shift = None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def peft_model(model: Any, layout: Layout) -> Any:
    """A peft model of its own with the same adapted layers (adapter `default`, no dropout). Changes `model` in place."""
    from peft import get_peft_model

    return get_peft_model(model, _lora_config(layout, model.config._name_or_path))


def _lora_config(layout: Layout, base: str) -> Any:
    from peft import LoraConfig

    alpha: Any = int(layout.alpha) if float(layout.alpha).is_integer() else layout.alpha
    return LoraConfig(
        r=layout.rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(layout.modules),
        base_model_name_or_path=base, inference_mode=True, task_type="FEATURE_EXTRACTION",
    )  # fmt: skip


def peft_factors(model: Any, layout: Layout) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters A and B of a peft model, layer by layer in the layout's order."""
    layers = [model.base_model.model.get_submodule(name) for name in layout.modules]
    return [x.lora_A["default"].weight for x in layers], [x.lora_B["default"].weight for x in layers]


def load_factors(model: Any, layout: Layout, a: Tensor, b: Tensor) -> None:
    """Copy flat factors (size_a,), (size_b,) into a peft model."""
    with torch.no_grad():
        for parameters, parts in zip(peft_factors(model, layout), (layout.split_a(a), layout.split_b(b)), strict=True):
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part)


def export_adapter(storage: Storage, folder: str, layout: Layout, a: Tensor, b: Tensor, base: str) -> None:
    """Write flat factors (size_a,), (size_b,) as a peft adapter folder, which `PeftModel.from_pretrained` loads."""
    tensors = {}
    for name, a_l, b_l in zip(layout.modules, layout.split_a(a), layout.split_b(b), strict=True):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_l.detach().float().cpu().contiguous().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_l.detach().float().cpu().contiguous().clone()
    config = _lora_config(layout, base).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    storage.write_bytes(f"{folder}/{WEIGHTS}", safetensors.torch.save(tensors, {"format": "pt"}), durable=False)
    storage.write_bytes(f"{folder}/{CONFIG}", json.dumps(plain, indent=1, default=str).encode(), durable=False)


def import_adapter(
    storage: Storage, folder: str, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Layout, Tensor, Tensor]:
    """Read a peft LoRA adapter: its layout and flat factors (size_a,), (size_b,).

    Args:
        shapes: (d_out, d_in) of the base model's linear layers by name, which the adapter must fit.

    Raises:
        ValueError: damaged, no plain LoRA, or made for another base model; the text names what is wrong.
    """
    try:
        config = json.loads(storage.read_bytes(f"{folder}/{CONFIG}"))
        tensors = safetensors.torch.load(storage.read_bytes(f"{folder}/{WEIGHTS}"))
        rank, alpha, kind = int(config["r"]), float(config["lora_alpha"]), config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"adapter {folder}: is no whole peft adapter ({type(error).__name__}: {error})") from error
    unusual = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if kind != "LORA" or unusual:
        raise ValueError(
            f"adapter {folder}: expected plain LoRA, got {kind} with {', '.join(unusual) or 'nothing else'}"
        )
    if rank < 1 or not 0 < alpha < float("inf"):
        raise ValueError(f"adapter {folder}: got r {rank}, lora_alpha {alpha:g}; r >= 1, finite lora_alpha > 0 work")
    names = [name for name in shapes if f"{PREFIX}{name}.lora_A.weight" in tensors]
    layout = Layout(tuple(names), tuple(shapes[name] for name in names), rank, alpha)
    if not names or len(tensors) != 2 * len(names):
        raise ValueError(
            f"adapter {folder}: has {len(tensors)} tensors, of which {2 * len(names)} fit layers of the base model"
        )
    parts_a = [tensors[f"{PREFIX}{name}.lora_A.weight"].float() for name in names]
    parts_b = [tensors.get(f"{PREFIX}{name}.lora_B.weight", torch.empty(0)).float() for name in names]
    for name, part_a, part_b, (d_out, d_in) in zip(names, parts_a, parts_b, layout.shapes, strict=True):
        if part_a.shape != (rank, d_in) or part_b.shape != (d_out, rank):
            raise ValueError(
                f"adapter {folder}: {name} has factors {tuple(part_a.shape)} and {tuple(part_b.shape)},"
                f" expected {(rank, d_in)} and {(d_out, rank)}"
            )
        if not (part_a.isfinite().all() and part_b.isfinite().all()):
            raise ValueError(f"adapter {folder}: {name} holds numbers that are not finite")
    return layout, layout.join(parts_a), layout.join(parts_b)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of a model's linear layers by name, those already wrapped here included."""
    shapes = {}
    for name, module in model.named_modules():
        plain = module.frozen if isinstance(module, Grouped) else module
        if isinstance(plain, nn.Linear):
            shapes[name] = (plain.out_features, plain.in_features)
    return {name: shape for name, shape in shapes.items() if not name.endswith(".frozen")}
