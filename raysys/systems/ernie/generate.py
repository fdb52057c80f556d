"""Generation, group by group: text, images and frames, audio.

Shapes: R prompts, V vocabulary, K scales (h_k, w_k), d bits, Q levels, T frames.

Notable choices
- The steps themselves are in `steps`, for who wants to hold them in hand (serving).
- Guidance, as in VideoAR and VAR: logits (1 + g) conditional - g unconditional, where g grows from 0 at the first scale to its
  full size at the last. The unconditional half runs as rows of its own.
- A temperature of 0 takes the most likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.systems.ernie.batch import Batch, first_fit, pack
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.flow import no_vision
from raysys.systems.ernie.model import Outputs, UniModel
from raysys.systems.ernie.steps import audio_steps, frame_steps, text_steps
from raysys.systems.ernie.stream import F32, I64, Sample, Special, Text, lay
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
) -> Written:
    """Continue prompts by text, until <eos> or `limit` tokens.

    Args:
        begun: first tokens (n,) of each answer, which are given (a hint, or what was written before); not in what is returned.
    """
    draws = torch.rand(len(prompts), limit, generator=generator)
    steps = text_steps(
        model, prompts, limits=[limit] * len(prompts), temperature=temperature, draws=draws, sub=sub, begun=begun
    )
    ids, logp = [list[int]() for _ in prompts], [list[float]() for _ in prompts]
    ended = [False] * len(prompts)
    read = [list[NDArray[np.int16]]() for _ in prompts] if routes else None
    for rows, token, value, out, valid, seen in steps:
        for row, t, v in zip(rows.tolist(), token.tolist(), value.tolist(), strict=True):
            logp[row].append(v)
            if t == Special.EOS:
                ended[row] = True
            else:
                ids[row].append(t)
        if read is not None:
            every = _routes(out, valid)
            for row, place in zip(rows.tolist(), seen.tolist(), strict=True):
                read[row].append(every[place])
    found = None if read is None else [np.concatenate(one) for one in read]
    return Written([np.array(one, np.int64) for one in ids], [np.array(one, np.float32) for one in logp], ended, found)


def _routes(out: Outputs, valid: Tensor) -> list[NDArray[np.int16]]:
    """Experts (n, L, k) of the places (q, T) of each row of `out`."""
    every = torch.stack([told.experts for _, told in out.routed], 1).to(torch.int16).cpu().numpy()  # (N, L, k)
    return np.split(every, np.cumsum(valid.sum(1).cpu().numpy())[:-1])


def answer_batch(model: UniModel, prompts: Sequence[Sample], answers: Sequence[I64]) -> tuple[Batch, list[int]]:
    """Prompts with their answers, packed; and in which order the answers lie there. One ends with <eos>, or goes on."""
    laid = []
    for prompt, answer in zip(prompts, answers, strict=True):
        closed = bool(len(answer)) and int(answer[-1]) == Special.EOS
        text = Text(answer[:-1] if closed else answer, True, closed)
        laid.append(lay(Sample(prompt.task, (*prompt.segments, text)), model.sizes.scales))
    s, lengths = model.sizes, [len(one) for one in laid]
    order = [i for members in first_fit(lengths, max(lengths)) for i in members]
    return pack(laid, max(lengths), no_vision, s.bits, s.levels, s.codes, shared=True), order


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
    batch, order = answer_batch(model, prompts, answers)
    batch = batch.to(str(model.embed_text.weight.device))
    replay = None
    if routes is not None:
        every = torch.from_numpy(np.concatenate([routes[i] for i in order]).astype(np.int64)).to(batch.ids.device)
        replay = list(every.unbind(1))
    spread = (model(batch, replay=replay).text.float() / temperature).log_softmax(-1)
    drawn = spread.gather(1, batch.next[batch.next >= 0][:, None]).squeeze(1)
    entropy = -(spread.exp() * spread).sum(-1)
    places = [(i, j) for i in order for j in range(len(answers[i]))]
    if len(drawn) != len(places):
        raise RuntimeError(f"{len(drawn)} places predict text, for {len(places)} tokens of the answers")
    row, column = torch.tensor(places, dtype=torch.int64, device=drawn.device).view(-1, 2).unbind(1)
    empty = drawn.new_zeros(len(answers), max(map(len, answers)))
    mask = empty.bool().index_put((row, column), torch.ones_like(row, dtype=torch.bool))
    return empty.index_put((row, column), drawn), mask, empty.index_put((row, column), entropy.detach())


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
) -> Tensor:
    """Images (frames = 1) or videos after prompts without images.

    Args:
        given: (R, g, h, w, d) normalised latents of first frames to go on from.

    Returns:
        (R, T, h, w, d) accumulated codes, which the visual tokenizer decodes.
    """
    steps = frame_steps(
        model, bits, prompts, frames=frames, generator=generator, temperature=temperature, guidance=guidance,
        given=given, sub=sub,
    )  # fmt: skip
    return torch.stack([step.acc for step in steps if step.last], 1)


@torch.no_grad()
def speak(
    model: UniModel,
    prompts: Sequence[Sample],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    sub: SubModel | None = None,
) -> list[I64]:
    """Audio after prompts: codes (n, Q) of each, until its end or `limit` frames."""
    found = [list[Tensor]() for _ in prompts]
    for rows, chosen in audio_steps(model, prompts, limit=limit, temperature=temperature, generator=generator, sub=sub):
        for row, one in zip(rows.tolist(), chosen.cpu(), strict=True):
            found[row].append(one)
    return [torch.stack(one).numpy() if one else np.zeros((0, model.levels), np.int64) for one in found]
