"""Generation as steps that can be interleaved, watched and stopped: what `generate` draws to its end.

Shapes: R prompts, V vocabulary, K scales (h_k, w_k), d bits, Q levels, T frames.

Notable choices
- A step is one forward pass: a text token of every row, a scale of a frame, a frame of audio. Who holds the iterator says when
  the next one is computed; closing it ends the generation, and `send` with rows ends those.
- Random numbers are drawn for all places of all rows beforehand and used by inverting the distribution function, so what a row
  gets does not depend on when others end.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.flow import Flow
from raysys.systems.ernie.model import Outputs, UniModel
from raysys.systems.ernie.stream import I64, NONE, Sample, Special, Text, grid
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits

COLD = 1e-3
"""Below this temperature the most likely is taken: logits over a smaller one overflow."""


class Token(NamedTuple):
    """A text token of each row that goes on."""

    rows: Tensor
    """(r,) which rows."""
    ids: Tensor
    """(r,); <eos> ends a row."""
    logp: Tensor
    """(r,) log-probabilities, as `pick` has them."""
    out: Outputs
    """What was computed for it: first of the prompts, then of the token before."""
    valid: Tensor
    """(q, n) bool, the places that `out` is of."""
    read: Tensor
    """(r,) which of the q rows of `out` each was drawn from."""


class Scale(NamedTuple):
    """A scale of a frame of all rows."""

    frame: int
    number: int
    acc: Tensor
    """(R, h, w, d): the frame's code so far."""
    last: bool
    """Whether the frame is finished."""


class Frame(NamedTuple):
    """An audio frame of each row that goes on."""

    rows: Tensor
    """(r,) which rows."""
    codes: Tensor
    """(r, Q)."""


Gone = Collection[int] | None
"""Rows that nobody waits for any more."""


def text_steps(
    model: UniModel,
    prompts: Sequence[Sample],
    *,
    limits: Sequence[int],
    temperature: float,
    draws: Tensor,
    sub: SubModel | None = None,
    begun: Sequence[I64] | None = None,
    opened: Special | None = Special.SEP,
) -> Generator[Token, Gone, None]:
    """Continue prompts by text, each until <eos> or its limit. Rows of the same prompt (the same object) read it together, once.

    Args:
        limits: most tokens of each row, <eos> counted.
        draws: (R, n) uniform numbers, n at least the largest limit.
        begun: first tokens (n,) of each answer, which are given.
        opened: what says that an answer comes; None goes on with the prompt's own text.
    """
    keys = [(id(one), b"" if begun is None else begun[i].tobytes()) for i, one in enumerate(prompts)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    alone = sorted(first.values())
    flow = Flow(
        model, [prompts[i] for i in alone], opened, max(limits), sub,
        begun=None if begun is None else [begun[i] for i in alone],
    )  # fmt: skip
    draws = draws.to(flow.device)
    most = torch.tensor(limits, device=flow.device)
    asked = torch.full_like(flow.prompt.next, NONE)
    asked.view(-1)[flow.last] = 0
    out, valid = flow.start(next=asked), flow.prompt.valid
    rows = torch.arange(len(prompts), device=flow.device)
    read = torch.tensor([alone.index(first[key]) for key in keys], device=flow.device)
    if len(alone) < len(prompts):
        flow.pick(read)
    for i in range(max(limits)):
        token, value = pick(out.text[read], temperature, draws[rows, i])
        gone = yield Token(rows, token, value, out, valid, read)
        on = (token != Special.EOS) & (most[rows] > i + 1)
        if gone:
            on &= ~torch.isin(rows, torch.tensor(sorted(gone), device=flow.device))
        going = on.nonzero().flatten()
        if not len(going):
            return
        if len(going) < len(rows):
            rows, token = rows[going], token[going]
            flow.pick(going)
        out, valid = flow.text(token), torch.ones_like(token, dtype=torch.bool)[:, None]
        read = torch.arange(len(rows), device=flow.device)


def frame_steps(
    model: UniModel,
    bits: MultiScaleBits,
    prompts: Sequence[Sample],
    *,
    frames: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    guidance: float = 0.0,
    given: Tensor | None = None,
    sub: SubModel | None = None,
) -> Generator[Scale, None, None]:
    """Images (frames = 1) or videos, scale by scale; see `generate.draw`."""
    count, full = len(prompts), bits.grid
    bare = [Sample(p.task, tuple(s for s in p.segments if not isinstance(s, Text))) for p in prompts]
    both = [*prompts, *bare] if guidance else list(prompts)
    every = sum(h * w for h, w in bits.scales[1:]) + full[0] * full[1]
    flow = Flow(model, both, Special.BOV if frames > 1 else Special.BOI, frames * every, sub)
    plan = None if given is None else bits.plan(given)
    logits = flow.start(bit_at=flow.last).bits[:, None]
    for frame in range(frames):
        acc: Tensor | None = None
        for k, (h, w) in enumerate(bits.scales):
            if given is not None and plan is not None and frame < given.shape[1]:
                chosen = plan.bits[k][:, frame]
            else:
                share = guidance * k / max(1, len(bits.scales) - 1)
                cond = logits[:count].float()
                mixed = (1 + share) * cond - share * logits[count:].float() if guidance else cond
                chosen = _bits(mixed, temperature, generator).view(count, h, w, -1)
            acc = bits.accumulate(acc, chosen, k)
            last = k + 1 == len(bits.scales)
            yield Scale(frame, k, acc, last)
            if last and frame + 1 == frames:
                return
            size = bits.scales[k] if last else bits.scales[k + 1]
            seen = bits.resized(acc, k if last else k + 1).flatten(1, 2)
            places = torch.tensor(grid(*size, full, 0.0, frame), device=flow.device)
            fed = torch.cat([seen, seen]) if guidance else seen
            logits = flow.visual(fed, places, k + 1, not last).bits.view(len(both), -1, bits.width)


def audio_steps(
    model: UniModel,
    prompts: Sequence[Sample],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    sub: SubModel | None = None,
) -> Generator[Frame, None, None]:
    """Audio after prompts, frame by frame until its end or `limit` frames; a row that has ended is in no further step."""
    flow, levels, end = Flow(model, prompts, Special.BOA, limit, sub), model.levels, model.sizes.codes
    draws = torch.rand(flow.rows, limit, levels, generator=generator).to(flow.device)
    rows = torch.arange(flow.rows, device=flow.device)
    step = 0

    def choose(level: int, logits: Tensor) -> Tensor:
        return pick(logits, temperature, draws[rows, step, level])[0]

    unknown = torch.full((flow.rows, levels), NONE, device=flow.device)
    chosen = flow.start(choose, code_at=flow.last, code=unknown).chosen
    while True:
        going = (chosen[:, 0] != end).nonzero().flatten()
        if not len(going):
            return
        if len(going) < len(rows):
            rows, chosen = rows[going], chosen[going]
            flow.pick(going)
        yield Frame(rows, chosen)
        step += 1
        if step == limit:
            return
        chosen = flow.codes(chosen, choose).chosen


def pick(logits: Tensor, temperature: float, draw: Tensor) -> tuple[Tensor, Tensor]:
    """A choice (R,) from logits (R, V) by uniform numbers (R,), and its log-probability under what it was drawn from (that of
    temperature 1 where the most likely is taken: below COLD)."""
    spread = (logits.float() / (temperature if temperature >= COLD else 1.0)).log_softmax(-1)
    if temperature >= COLD:
        below = spread.double().exp().cumsum(-1)
        chosen = torch.searchsorted(below, (draw.double()[:, None] * below[:, -1:]), right=True).squeeze(1)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    else:
        chosen = spread.argmax(-1)
    return chosen, spread.gather(1, chosen[:, None]).squeeze(1)


def _bits(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits > 0
    drawn = torch.rand(logits.shape, generator=generator).to(logits.device)
    return drawn < (logits / temperature).sigmoid()
