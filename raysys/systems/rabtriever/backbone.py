"""Backbones of the reranker: documents first, causal, so that a document's states are the same with and without a query.

Shapes: n sequences, L_D / L_Q units of a part (tokens, or vectors of the bridge), e width of a unit, d hidden size, V vocabulary.

Two kinds, one interface (`Backbone`):
- `TokenBackbone`: any Hugging Face causal language model; units are token ids. The paper's own kind [P].
- `BridgeBackbone`: for machines without a pretrained language model. A frozen text encoder turns each part into a few vectors,
  a tiny causal transformer of the same class as Qwen2 reads them, and a learned unit asks for the answer [ours].

Notable choices
- Documents are right-aligned in a window of L_D positions and queries start behind it, so positions depend neither on the
  padding of a batch nor on the document: models with learned absolute positions work, too.
- Only the last position's state is ever needed; the language head is two rows of its matrix, or all for the distillation.
- `Prefix` keeps keys and values of documents: the teacher then reads the query only (LaHoRe's own optimisation [P]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Part(NamedTuple):
    """One part of n prompts: units (n, L) ids or (n, L, e) vectors, and how many of each count: length (n,)."""

    units: Tensor
    length: Tensor

    def pick(self, rows: Tensor, width: int | None = None) -> Part:
        """These rows, cut or padded to `width` units, by default to the longest of them."""
        length = self.length[rows]
        width = int(length.max()) if width is None else width
        units = self.units[rows, :width]
        if (lacking := width - units.shape[1]) > 0:
            units = F.pad(units, (0, 0) * (units.dim() - 2) + (0, lacking))
        return Part(units, length)


class Prefix(NamedTuple):
    """Documents that have been read: keys and values of each layer (n, heads, L, d_head), mask (n, L), states (n, L, d)."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    states: Tensor

    @property
    def last(self) -> Tensor:
        """e_D[-1] (n, d): documents are right-aligned."""
        return self.states[:, -1]

    def pick(self, rows: Tensor) -> Prefix:
        """These documents, in this order."""
        return Prefix([(k[rows], v[rows]) for k, v in self.layers], self.mask[rows], self.states[rows])


def stack_parts(parts: Sequence[Tensor]) -> Part:
    """A part from the units of each text."""
    length = torch.tensor([len(one) for one in parts])
    return Part(pad_sequence(list(parts), batch_first=True), length)


def joined(first: Part, second: Part) -> Part:
    """Both parts, one after the other."""
    width = max(first.units.shape[1], second.units.shape[1])
    parts = [one.pick(torch.arange(len(one.length)), width) for one in (first, second)]
    return Part(torch.cat([one.units for one in parts]), torch.cat([one.length for one in parts]))


class Backbone(nn.Module):
    """A causal model with a language head without bias.

    Args:
        body: a Hugging Face decoder that takes inputs_embeds.
        head: (V, d).
        labels: rows of the head that answer yes and no.
        window: positions L_D that are kept for the document.
    """

    body: nn.Module
    head: nn.Linear
    labels: tuple[int, int]
    window: int

    def __init__(self, body: nn.Module, head: nn.Linear, labels: tuple[int, int], window: int) -> None:
        super().__init__()
        if head.bias is not None:
            raise ValueError("model: its language head has a bias; the folded score needs a head without one")
        self.body, self.head = body, head
        self.labels, self.window = labels, window

    @property
    def width(self) -> int:
        """Hidden size d."""
        return int(self.head.weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def direction(self) -> Tensor:
        """W_T - W_F (d,), float32: the log-odds of an answer state h are <W_T - W_F, h>."""
        return (self.head.weight[self.labels[0]] - self.head.weight[self.labels[1]]).float()

    def log_odds(self, states: Tensor) -> Tensor:
        """l_T - l_F (n,) of answer states (n, d), in float32 under autocast, too."""
        return (states.float() * self.direction).sum(-1)

    def embed_documents(self, part: Part) -> tuple[Tensor, Tensor]:
        """Embeddings (n, L, d) and lengths (n,) of document parts."""
        raise NotImplementedError

    def embed_queries(self, part: Part) -> tuple[Tensor, Tensor]:
        """Embeddings (n, L, d) and lengths (n,) of query parts, the question behind them."""
        raise NotImplementedError

    def auxiliary(self, documents: Part, read: Prefix, queries: Part) -> Tensor:
        """A loss that keeps states informative, of documents that have just been read and of queries (n', each once)."""
        raise NotImplementedError

    def read(self, documents: Part, keep: bool = False) -> Prefix:
        """Read documents alone: M(D). Keys and values are there with `keep` only."""
        embedded, mask, positions = self._documents(documents)
        out = self.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=keep)
        layers = [(one.keys, one.values) for one in out.past_key_values.layers] if keep else []
        return Prefix(layers, mask, out.last_hidden_state)

    def answer(self, queries: Part, prefix: Prefix | None = None) -> Tensor:
        """Answer states (n, d) of queries alone, M(Q)[-1], or each behind the document of the same row of `prefix`."""
        embedded, mask, positions = self._queries(queries)
        cache = None
        if prefix is not None:
            from transformers import DynamicCache

            cache = DynamicCache()
            for number, (k, v) in enumerate(prefix.layers):
                cache.update(k, v, number)
            mask = torch.cat([prefix.mask, mask], 1)
        out = self.body(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=prefix is not None,
        )
        return _last(out.last_hidden_state, mask[:, mask.shape[1] - embedded.shape[1] :].sum(1))

    def pairs(self, documents: Part, queries: Part) -> Tensor:
        """Answer states (n, d) of pairs read as one sequence, M([D; Q])[-1]."""
        (d, d_mask, d_at), (q, q_mask, q_at) = self._documents(documents), self._queries(queries)
        out = self.body(
            inputs_embeds=torch.cat([d, q], 1),
            attention_mask=torch.cat([d_mask, q_mask], 1),
            position_ids=torch.cat([d_at, q_at], 1),
            use_cache=False,
        )
        return _last(out.last_hidden_state[:, d.shape[1] :], q_mask.sum(1))

    def _documents(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        embedded, length = self.embed_documents(part)
        n, longest = embedded.shape[:2]
        if longest > self.window:
            raise ValueError(f"document: got {longest} units; the window takes {self.window}")
        column = torch.arange(longest, device=embedded.device)
        shift = longest - length  # right-aligned: unit i of a document goes to column i + shift
        source = (column - shift[:, None]).clamp_min(0)
        mask = (column >= shift[:, None]).long()
        embedded = embedded.gather(1, source[..., None].expand_as(embedded))
        return embedded, mask, (column + self.window - longest).expand(n, -1)

    def _queries(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        embedded, length = self.embed_queries(part)
        column = torch.arange(embedded.shape[1], device=embedded.device)
        return embedded, (column < length[:, None]).long(), (column + self.window).expand(len(embedded), -1)


def _last(states: Tensor, length: Tensor) -> Tensor:
    """The state (n, d) of the last position that counts, of (n, L, d) left-aligned ones."""
    return states[torch.arange(len(states), device=states.device), length - 1]


class TokenBackbone(Backbone):
    """A Hugging Face causal language model. Units are token ids (int64)."""

    def __init__(self, model: nn.Module, labels: tuple[int, int], window: int) -> None:
        whole: Any = model
        super().__init__(whole.get_decoder(), whole.get_output_embeddings(), labels, window)

    def _embed(self, part: Part) -> tuple[Tensor, Tensor]:
        table: Any = self.body  # its table is asked for each time: kept here, it would be saved twice
        return table.get_input_embeddings()(part.units), part.length

    def embed_documents(self, part: Part) -> tuple[Tensor, Tensor]:
        return self._embed(part)

    def embed_queries(self, part: Part) -> tuple[Tensor, Tensor]:
        return self._embed(part)

    def auxiliary(self, documents: Part, read: Prefix, queries: Part) -> Tensor:
        """Mean next-token loss over the documents: keeps their states informative while the model learns to answer."""
        logits = self.head(read.states[:, :-1]).float()
        shift = read.mask.shape[1] - documents.length
        column = torch.arange(read.mask.shape[1], device=logits.device)
        ids = documents.units.gather(1, (column - shift[:, None]).clamp_min(0))
        target = ids[:, 1:].masked_fill(read.mask[:, :-1] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


class BridgeBackbone(Backbone):
    """A tiny Qwen2 over the vectors of a frozen text encoder. Units are vectors (e,).

    Args:
        unit: width e of the vectors.
        width, layers, heads: of the causal transformer (random start).
        window: most vectors of a document.
    """

    VOCABULARY = 8

    def __init__(self, unit: int, width: int = 128, layers: int = 2, heads: int = 4, window: int = 1) -> None:
        from transformers import Qwen2Config, Qwen2Model

        config = Qwen2Config(
            vocab_size=self.VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=False,
            use_sliding_window=False, attention_dropout=0.0,
        )  # fmt: skip
        head = nn.Linear(width, self.VOCABULARY, bias=False)
        super().__init__(Qwen2Model(config), head, (0, 1), window)
        self.unit = unit
        self.enter = nn.ModuleDict({kind: nn.Linear(unit, width) for kind in ("document", "query")})
        self.ask = nn.Parameter(torch.zeros(width))
        self.leave = nn.ModuleDict({kind: nn.Linear(width, unit) for kind in ("document", "query")})

    def embed_documents(self, part: Part) -> tuple[Tensor, Tensor]:
        return self.enter["document"](part.units), part.length

    def embed_queries(self, part: Part) -> tuple[Tensor, Tensor]:
        """The vectors, and behind the last of each query the unit that asks for the answer."""
        embedded = F.pad(self.enter["query"](part.units), (0, 0, 0, 1))
        asks = torch.arange(embedded.shape[1], device=embedded.device) == part.length[:, None]
        return torch.where(asks[..., None], self.ask, embedded), part.length + 1

    def auxiliary(self, documents: Part, read: Prefix, queries: Part) -> Tensor:
        """Mean squared error of the units of documents and of queries alone, read back from their last states by a linear map.

        It stands in for the language modelling that a pretrained model has had: trained on answers alone, the last layer's
        document states get no gradient at all and stay random features (spec, section 8), and a query without a document is
        something the model has never seen. Unlike a contrastive loss over the documents of a pool it has no end, and the states
        stay a nearly linear picture of the text: what was withheld from training is met again in the same coordinates [ours].
        """
        return self._recalled("document", read.last, documents) + self._recalled("query", self.answer(queries), queries)

    def _recalled(self, kind: str, states: Tensor, part: Part) -> Tensor:
        inside = torch.arange(part.units.shape[1], device=states.device) < part.length[:, None]
        mean = (part.units * inside[..., None]).sum(1) / part.length[:, None]
        return F.mse_loss(self.leave[kind](states), mean)
