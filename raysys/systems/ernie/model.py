"""The unified model: one stack of layers over text, vision and audio, and the heads that predict the next group of each.

Shapes: R rows of T places (P = R T, flat), D width, L layers, E experts, k active; Nt text places, Nb bit places of d bits, Nc
code places of Q levels, each with C codes (level 0 also the end).

Notable choices
- Text is predicted by a softmax, a visual token by d independent bits (Section 2.3, "infinite-vocabulary classifier"), an audio
  frame depth-wise: level q after layer L - Q + q; its code, embedded, is added to the state before the next layer (Section 2.4).
- A token that an elastic row passes over is not computed: neither its attention nor its experts.
- Multi-token prediction is DeepSeek-V3's sequential module of depth one (INFERRED: the paper names only its weight), with a dense
  inner layer; it shares embedding and head.
- `routed` tells for each layer which flat places were routed, and how: balance, reports and replay all read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.nn.moe import MoE, Routed, SwiGLU
from raysys.systems.ernie.batch import Batch
from raysys.systems.ernie.elastic import Elastic
from raysys.systems.ernie.layers import Attention, Cache, Layer, Rotary
from raysys.systems.ernie.look import LookEncoder
from raysys.systems.ernie.setting import ModelSetting, Sizes
from raysys.systems.ernie.stream import MODALITIES, Kind

Choose = Callable[[int, Tensor], Tensor]
"""Level and its logits (Nc, C or C + 1) to codes (Nc,); how a generator takes its own samples."""


class Outputs(NamedTuple):
    """What a batch's places predict."""

    state: Tensor
    """(P, D) after the last layer and norm."""
    text: Tensor
    """(Nt, V) logits at the places of `next`, in order."""
    further: Tensor
    """(Nf, V) logits at the places of `further`; (0, V) without multi-token prediction or where they are not asked for."""
    bits: Tensor
    """(Nb, d) logits."""
    codes: list[Tensor]
    """Q of (Nc, C + 1), then (Nc, C)."""
    chosen: Tensor
    """(Nc, Q) codes that were fed back: given or chosen."""
    routed: list[tuple[Tensor, Routed]]
    """Of each layer: flat places (N,) and their routing."""


class UniModel(nn.Module):
    """The backbone with its embeddings and heads.

    Raises:
        ValueError: fewer layers than code levels.
    """

    def __init__(self, setting: ModelSetting, sizes: Sizes) -> None:
        super().__init__()
        if setting.layers < sizes.levels:
            raise ValueError(f"layers: got {setting.layers}; audio of {sizes.levels} levels needs as many")
        self.setting, self.sizes = setting, sizes
        s, width = setting, setting.width
        self.embed_text = nn.Embedding(sizes.vocabulary, width)
        self.embed_bits, self.embed_scale = nn.Linear(sizes.bits, width), nn.Embedding(len(sizes.scales) + 1, width)
        self.embed_codes = nn.Parameter(torch.randn(sizes.levels, sizes.codes + 1, width))
        self.look = LookEncoder(sizes.cnn, sizes.channels, width, s.heads)
        self.rotary = Rotary(width // s.heads, s.rope_base)
        balanced = s.balance in ("bias", "both")
        self.experts_of: Tensor
        self.register_buffer("experts_of", separated(s.experts), persistent=False)
        pool = self.experts_of.int().argmax(0) if s.routing == "separated" else None
        self.layers = nn.ModuleList(
            Layer(
                width, s.heads,
                MoE(width, s.experts, s.active, s.expert_width, s.shared_width, score=s.score, balanced=balanced, pool=pool),
            )
            for _ in range(s.layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(width)
        self.text, self.bits = nn.Linear(width, sizes.vocabulary, bias=False), nn.Linear(width, sizes.bits)
        self.norm_codes = nn.ModuleList(nn.RMSNorm(width) for _ in range(sizes.levels))
        self.codes = nn.ModuleList(nn.Linear(width, sizes.codes + (q == 0)) for q in range(sizes.levels))
        self.mtp = Further(width, s.heads, s.active * s.expert_width + s.shared_width) if s.mtp_weight else None
        self._start()

    def _start(self) -> None:
        for embedding in (self.embed_text, self.embed_scale):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.normal_(self.embed_codes, std=0.5)
        scale = (2 * self.setting.layers) ** -0.5
        for layer in self.layers:
            for weight in (layer.attention.out.weight, layer.moe.w_out):  # type: ignore[union-attr]
                weight.data.mul_(scale)  # type: ignore[operator]
            if layer.moe.shared is not None:  # type: ignore[union-attr]
                layer.moe.shared.w_out.weight.data.mul_(scale)  # type: ignore[union-attr,operator]

    @property
    def levels(self) -> int:
        return self.sizes.levels

    def cache(self, rows: int, room: int) -> Cache:
        """An empty cache for `rows` rows of up to `room` places."""
        s, weight = self.setting, self.embed_text.weight
        return Cache(s.layers, rows, s.heads, s.width // s.heads, room, str(weight.device), weight.dtype)

    def forward(
        self,
        batch: Batch,
        elastic: Elastic | None = None,
        *,
        cache: Cache | None = None,
        choose: Choose | None = None,
        replay: Sequence[Tensor] | None = None,
        further: bool = False,
    ) -> Outputs:
        """
        Args:
            elastic: the sub-model of each row; the whole model by default.
            cache: places before this batch; the batch is added to it.
            choose: picks the codes to feed back; those of the batch by default.
            replay: (L) of (N, k) experts to repeat, for the places that each layer routes, in their order.
            further: also predict the token after the next (training).
        """
        x = self.embed(batch)
        width = x.shape[-1]
        turn = self.rotary(batch.position)
        visible = batch.visible() if cache is None else cache.extend(batch.valid, batch.group)
        routed, code_logits, chosen = list[tuple[Tensor, Routed]](), list[Tensor](), list[Tensor]()
        first, every, nothing = self.setting.layers - self.levels, self._span(batch, None, elastic), None
        kept_by = [batch.rows] * self.setting.layers if elastic is None else elastic.keep.sum(0).tolist()
        for number, layer in enumerate(self.layers):
            if not kept_by[number]:
                nothing = nothing or self._nothing(x)
                routed.append(nothing)
                if (
                    self.training
                ):  # workers that share out experts call every mixture equally often, forwards and backwards
                    y, _ = layer.moe(x.new_zeros(0, width))  # type: ignore[operator]
                    x = x.reshape(-1, width).index_add(0, nothing[0], y.to(x.dtype)).view(x.shape)
            else:
                span = every
                if elastic is not None and kept_by[number] < batch.rows:
                    span = self._span(batch, elastic.keep[:, number].nonzero().flatten(), elastic)
                x, told = self._layer(layer, number, x, turn, visible, span, elastic, cache, replay)  # type: ignore[arg-type]
                routed.append(told)
            if number >= first and len(batch.code_at):
                x, logits, code = self._level(number - first, x, batch, choose)
                code_logits.append(logits)
                chosen.append(code)
        flat = x.reshape(-1, width)
        state = self.norm(flat)
        return Outputs(
            state,
            self.text(state[(batch.next >= 0).flatten()]),
            self._further(batch, flat, visible, turn) if further else state.new_zeros(0, self.sizes.vocabulary),
            self.bits(state[batch.bit_at])
            if self.training or len(batch.bit_at)
            else state.new_zeros(0, self.sizes.bits),
            code_logits,
            torch.stack(chosen, 1) if chosen else batch.code.new_zeros(0, self.levels),
            routed,
        )

    def embed(self, batch: Batch) -> Tensor:
        """(R, T, D): the input of every place."""
        x = self.embed_text(batch.ids)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        if not self.training and not (len(batch.visual_at) or batch.seen or len(batch.audio_at)):
            return x.view(shape)  # text alone: what every step of writing feeds
        x = torch.where((batch.kind == Kind.TEXT).reshape(-1, 1), x, torch.zeros((), dtype=x.dtype, device=x.device))
        x = x.index_add(0, batch.visual_at, (self.embed_bits(batch.visual) + self.embed_scale(batch.scale)).to(x.dtype))
        for seen in batch.seen:
            x = x.index_add(0, seen.places, self.look(seen.cnn, seen.pixels).flatten(0, 1)[seen.which].to(x.dtype))
        if len(batch.audio_at):
            levels = torch.arange(self.levels, device=x.device)
            x = x.index_add(0, batch.audio_at, self.embed_codes[levels, batch.codes].sum(1).to(x.dtype))
        return x.view(shape)

    def _span(self, batch: Batch, kept: Tensor | None, elastic: Elastic | None) -> _Span:
        """Where a layer is computed that `kept` rows keep (None: all)."""
        valid = batch.valid if kept is None else batch.valid[kept]
        whole = kept is None and bool(valid.all())
        inside = torch.arange(valid.numel(), device=valid.device) if whole else valid.flatten().nonzero().flatten()
        row = inside // valid.shape[1]
        row = row if kept is None else kept[row]
        places = inside if kept is None else row * valid.shape[1] + inside % valid.shape[1]
        active = counted = None
        if elastic is not None:
            if bool((elastic.active < self.setting.active).any()):
                active = elastic.active[row]
            if active is not None or elastic.allowed is not None:
                counted = elastic.counted(self.setting.active)[row]
        own = None
        if self.setting.routing == "separated":
            own = self.experts_of[batch.modality.flatten()[places]]
        return _Span(kept, whole, inside, row, places, active, counted, own)

    def _layer(
        self, layer: Layer, number: int, x: Tensor, turn: tuple[Tensor, Tensor], visible: Tensor,
        span: _Span, elastic: Elastic | None, cache: Cache | None, replay: Sequence[Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Routed]]:  # fmt: skip
        """One layer on the rows that keep it."""
        kept = span.kept
        if kept is not None:
            if cache is not None:
                raise ValueError("with a cache, all rows keep the same layers")
            everything, x = x, x[kept]
            turn, visible = (turn[0][kept], turn[1][kept]), visible[kept]
        x = x + layer.attention(layer.norm_attention(x), turn, visible, cache, number)
        flat = x.reshape(-1, x.shape[-1])
        allowed = span.own
        if elastic is not None and elastic.allowed is not None:
            mine = elastic.allowed[number, span.row]
            allowed = mine if allowed is None else mine & allowed
        y, told = layer.moe(
            layer.norm_moe(flat if span.whole else flat[span.inside]),
            active=span.active, allowed=allowed, counted=span.counted, replay=None if replay is None else replay[number],
        )  # fmt: skip
        y = y.to(flat.dtype)
        x = (flat + y if span.whole else flat.index_add(0, span.inside, y)).view(x.shape)
        return (x if kept is None else everything.index_copy(0, kept, x)), (span.places, told)

    def _nothing(self, x: Tensor) -> tuple[Tensor, Routed]:
        k, e = self.setting.active, self.setting.experts
        empty = x.new_zeros(0, dtype=torch.int64)
        return empty, Routed(empty.view(0, k), x.new_zeros(0, k), x.new_zeros(0, e), x.new_zeros(0, e), None)

    def _level(self, q: int, x: Tensor, batch: Batch, choose: Choose | None) -> tuple[Tensor, Tensor, Tensor]:
        """Predict level q after its layer, and feed its code back."""
        flat = x.reshape(-1, x.shape[-1])
        logits = self.codes[q](self.norm_codes[q](flat[batch.code_at]))
        code = batch.code[:, q] if choose is None else choose(q, logits)
        if q + 1 < self.levels:
            there = (code >= 0)[:, None]
            fed = torch.where(there, self.embed_codes[q, code.clamp(min=0)], torch.zeros((), device=x.device))
            flat = flat.index_add(0, batch.code_at, fed.to(flat.dtype))
        return flat.view(x.shape), logits, code

    def _further(self, batch: Batch, flat: Tensor, visible: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of the token after the next where both are text, rows without such places left out."""
        wanted = batch.further >= 0
        rows = wanted.any(1).nonzero().flatten()
        if self.mtp is None or not len(rows):
            return flat.new_zeros(0, self.sizes.vocabulary)
        x = flat.view(*batch.ids.shape, -1)[rows]
        following = self.embed_text(batch.next[rows].clamp(min=0))
        state = self.mtp(x, following, (turn[0][rows], turn[1][rows]), visible[rows])
        logits: Tensor = self.text(self.norm(state[wanted[rows]]))
        return logits


class _Span(NamedTuple):
    """Where a layer is computed, and how its tokens are routed."""

    kept: Tensor | None
    """Rows; None for all."""
    whole: bool
    """Whether all places of all rows are."""
    inside: Tensor
    """(N,) flat places within the kept rows."""
    row: Tensor
    """(N,) row of each."""
    places: Tensor
    """(N,) flat places within the batch."""
    active: Tensor | None
    """(N,) active experts, or None for k."""
    counted: Tensor | None
    """(N,) whether a token counts for the balance, or None for all."""
    own: Tensor | None
    """(N, E) experts of each token's modality, where they are kept apart."""


class Further(nn.Module):
    """DeepSeek-V3's module: state of a place and the token after it, to the state that predicts the token after that."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm_state, self.norm_token = nn.RMSNorm(width), nn.RMSNorm(width)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.norm_attention, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.norm_inner, self.inner = nn.RMSNorm(width), SwiGLU(width, inner)

    def forward(self, state: Tensor, following: Tensor, turn: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """state and following (R, T, D): (R, T, D)."""
        x = self.join(torch.cat([self.norm_state(state), self.norm_token(following)], -1))
        x = x + self.attention(self.norm_attention(x), turn, visible, None, 0)
        y: Tensor = x + self.inner(self.norm_inner(x))
        return y


def separated(experts: int) -> Tensor:
    """(M, E) bool: the experts of each modality, in equal parts, the first modalities getting what is left over."""
    own = torch.arange(experts) * len(MODALITIES) // max(1, experts)
    return own[None] == torch.arange(len(MODALITIES))[:, None]


def bit_loss(logits: Tensor, bits: Tensor, scale: Tensor, scales: Sequence[tuple[int, int]]) -> Tensor:
    """Mean binary cross-entropy of bits (Nb, d), early scales weighted up: scale k by sqrt(area_K / area_k) (Infinity's rule for
    the paper's "emphasise early-stage predictions"), weights normalised to mean 1."""
    area = torch.tensor([h * w for h, w in scales], device=logits.device, dtype=torch.float32)
    weight = (area[-1] / area[scale]).sqrt()
    loss = F.binary_cross_entropy_with_logits(logits.float(), bits.float(), reduction="none").mean(-1)
    return (loss * weight).sum() / weight.sum().clamp(min=1e-12)
