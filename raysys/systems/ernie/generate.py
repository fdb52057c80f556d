"""Generation, group by group: text, images and frames, audio.

Shapes: R prompts, V vocabulary, K scales (h_k, w_k), d bits, Q levels, T frames.

Notable choices
- Random numbers are drawn for all places of all rows beforehand and used by inverting the distribution function, so what a row
  gets does not depend on when others end.
- Guidance, as in VideoAR and VAR: logits (1 + g) conditional - g unconditional, where g grows from 0 at the first scale to its
  full size at the last. The unconditional half runs as rows of its own.
- A temperature of 0 takes the most likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.systems.ernie.batch import Batch, pack
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.flow import Flow, no_vision
from raysys.systems.ernie.model import Outputs, UniModel
from raysys.systems.ernie.stream import F32, I64, NONE, Sample, Special, Text, grid, lay
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits


class Written(NamedTuple):
    """Texts that were written after prompts."""

    ids: list[I64]
    """Without <eos>."""
    logp: list[F32]
    """Log-probability of each token drawn, under the distribution it was drawn from; that of <eos> comes last."""
    ended: list[bool]
    """Whether <eos> was drawn before the limit."""
    routes: list[NDArray[np.int16]] | None
    """(n, L, k): experts of every place that was read, prompt and answer, for `answer_logp`; only of the whole model."""


@torch.no_grad()
def write(
    model: UniModel,
    prompts: Sequence[Sample],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    sub: SubModel | None = None,
    routes: bool = False,
    begun: Sequence[I64] | None = None,
    told: Callable[[Tensor, Tensor], None] | None = None,
) -> Written:
    """Continue prompts by text, until <eos> or `limit` tokens.

    Args:
        begun: first tokens (n,) of each answer, which are given (a hint, or what was written before); not in what is returned.
        told: called with rows and their tokens as they are drawn (streaming).
    """
    flow = Flow(model, prompts, Special.SEP, limit, sub, begun=begun)
    draws = torch.rand(flow.rows, limit, generator=generator).to(flow.device)
    asked = torch.full_like(flow.prompt.next, NONE)
    asked.view(-1)[flow.last] = 0
    out = flow.start(next=asked)
    read = _routes(out, flow.prompt.valid) if routes else None
    ids, logp = [list[int]() for _ in prompts], [list[float]() for _ in prompts]
    ended = [False] * len(prompts)
    rows = torch.arange(flow.rows, device=flow.device)
    for i in range(limit):
        token, value = pick(out.text, temperature, draws[rows, i])
        if told is not None:
            told(rows, token)
        for row, t, v in zip(rows.tolist(), token.tolist(), value.tolist(), strict=True):
            logp[row].append(v)
            if t == Special.EOS:
                ended[row] = True
            else:
                ids[row].append(t)
        going = (token != Special.EOS).nonzero().flatten()
        if i + 1 == limit or not len(going):
            break
        if len(going) < len(rows):
            rows, token = rows[going], token[going]
            flow.pick(going)
        out = flow.text(token)
        if read is not None:
            for row, more in zip(
                rows.tolist(), _routes(out, torch.ones_like(token, dtype=torch.bool)[:, None]), strict=True
            ):
                read[row] = np.concatenate([read[row], more])
    return Written([np.array(one, np.int64) for one in ids], [np.array(one, np.float32) for one in logp], ended, read)


def pick(logits: Tensor, temperature: float, draw: Tensor) -> tuple[Tensor, Tensor]:
    """A choice (R,) from logits (R, V) by uniform numbers (R,), and its log-probability under what it was drawn from (that of
    temperature 1 where the most likely is taken)."""
    spread = (logits.float() / (temperature if temperature > 0 else 1.0)).log_softmax(-1)
    if temperature > 0:
        below = spread.double().exp().cumsum(-1)
        chosen = torch.searchsorted(below, (draw.double()[:, None] * below[:, -1:]), right=True).squeeze(1)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    else:
        chosen = spread.argmax(-1)
    return chosen, spread.gather(1, chosen[:, None]).squeeze(1)


def _routes(out: Outputs, valid: Tensor) -> list[NDArray[np.int16]]:
    """Experts (n, L, k) of each row's places (R, T)."""
    every = torch.stack([told.experts for _, told in out.routed], 1).to(torch.int16).cpu().numpy()  # (N, L, k)
    return np.split(every, np.cumsum(valid.sum(1).cpu().numpy())[:-1])


def answer_batch(model: UniModel, prompts: Sequence[Sample], answers: Sequence[I64]) -> Batch:
    """Prompts with their answers, each in a row of its own; an answer ends with <eos>, or goes on."""
    laid = []
    for prompt, answer in zip(prompts, answers, strict=True):
        closed = bool(len(answer)) and int(answer[-1]) == Special.EOS
        text = Text(answer[:-1] if closed else answer, True, closed)
        laid.append(lay(Sample(prompt.task, (*prompt.segments, text)), model.sizes.scales))
    s = model.sizes
    return pack(laid, None, no_vision, s.bits, s.levels, s.codes)


def answer_logp(
    model: UniModel,
    prompts: Sequence[Sample],
    answers: Sequence[I64],
    *,
    temperature: float = 1.0,
    routes: Sequence[NDArray[np.int16]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of answers (with <eos>, where it was drawn) token by token, with gradients.

    Args:
        routes: repeat these choices of experts, as `write` recorded them (R3).

    Returns:
        (R, n) log-probabilities, 0 where there is no token; (R, n) bool, where there is one; (R, n) entropies.
    """
    batch = answer_batch(model, prompts, answers).to(str(model.embed_text.weight.device))
    replay = None
    if routes is not None:
        every = torch.from_numpy(np.concatenate(routes).astype(np.int64)).to(batch.ids.device)
        replay = list(every.unbind(1))
    spread = (model(batch, replay=replay).text.float() / temperature).log_softmax(-1)
    wanted = batch.next >= 0
    drawn = spread.gather(1, batch.next[wanted][:, None]).squeeze(1)
    entropy = -(spread.exp() * spread).sum(-1)
    count = wanted.sum(1)
    mask = torch.arange(int(count.max()), device=count.device) < count[:, None]
    empty = torch.zeros(mask.shape, device=count.device)
    return empty.masked_scatter(mask, drawn), mask, empty.masked_scatter(mask, entropy.detach())


@torch.no_grad()
def draw(
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
    told: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images (frames = 1) or videos after prompts without images.

    Args:
        given: (R, g, h, w, d) normalised latents of first frames to go on from.
        told: called with each finished frame's number and accumulated code (R, h, w, d) (streaming).

    Returns:
        (R, T, h, w, d) accumulated codes, which the visual tokenizer decodes.
    """
    count, full = len(prompts), bits.grid
    bare = [Sample(p.task, tuple(s for s in p.segments if not isinstance(s, Text))) for p in prompts]
    both = [*prompts, *bare] if guidance else list(prompts)
    every = sum(h * w for h, w in bits.scales[1:]) + full[0] * full[1]
    flow = Flow(model, both, Special.BOV if frames > 1 else Special.BOI, frames * every, sub)
    plan = None if given is None else bits.plan(given)
    logits = flow.start(bit_at=flow.last).bits[:, None]
    done = []
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
            size = bits.scales[k] if last else bits.scales[k + 1]
            seen = bits.resized(acc, k if last else k + 1).flatten(1, 2)
            places = torch.tensor(grid(*size, full, 0.0, frame), device=flow.device)
            if last and frame + 1 == frames:
                break
            fed = torch.cat([seen, seen]) if guidance else seen
            logits = flow.visual(fed, places, k + 1, not last).bits.view(len(both), -1, bits.width)
        assert acc is not None
        done.append(acc)
        if told is not None:
            told(frame, acc)
    return torch.stack(done, 1)


def _bits(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits > 0
    drawn = torch.rand(logits.shape, generator=generator).to(logits.device)
    return drawn < (logits / temperature).sigmoid()


@torch.no_grad()
def speak(
    model: UniModel,
    prompts: Sequence[Sample],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    sub: SubModel | None = None,
    told: Callable[[Tensor, Tensor], None] | None = None,
) -> list[I64]:
    """Audio after prompts: codes (n, Q) of each, until its end or `limit` frames.

    Args:
        told: called with rows and the codes (rows, Q) of their next frame (streaming).
    """
    flow, levels, end = Flow(model, prompts, Special.BOA, limit, sub), model.levels, model.sizes.codes
    draws = torch.rand(flow.rows, limit, levels, generator=generator).to(flow.device)
    rows = torch.arange(flow.rows, device=flow.device)
    found = [list[Tensor]() for _ in prompts]
    step = 0

    def choose(level: int, logits: Tensor) -> Tensor:
        return pick(logits, temperature, draws[rows, step, level])[0]

    unknown = torch.full((flow.rows, levels), NONE, device=flow.device)
    chosen = flow.start(choose, code_at=flow.last, code=unknown).chosen
    while True:
        going = (chosen[:, 0] != end).nonzero().flatten()
        if not len(going):
            break
        if len(going) < len(rows):
            rows, chosen = rows[going], chosen[going]
            flow.pick(going)
        if told is not None:
            told(rows, chosen)
        for row, one in zip(rows.tolist(), chosen.cpu(), strict=True):
            found[row].append(one)
        step += 1
        if step == limit:
            break
        chosen = flow.codes(chosen, choose).chosen
    return [torch.stack(one).numpy() if one else np.zeros((0, levels), np.int64) for one in found]
