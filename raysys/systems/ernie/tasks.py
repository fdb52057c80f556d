"""Every task on held-out items: what is measured, what chance would give, and the values item by item.

Shapes: n items of a task.

Notable choices
- A fact (which digit, where, which way; low or high, rising or falling) is right if the judge reads it off what was generated, or
  the caption says it. Judges never saw the model.
- Next frames are measured by their squared error over that of repeating the last frame: 1 is no better than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.data.multimodal import Item
from raysys.data.multimodal_embedded import DIRECTIONS, PLACES, REGISTERS, SHAPES
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.artifact import Bundle
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.evaluate import bits_per_byte, captions, pictures, sounds
from raysys.systems.ernie.judges import Facts, ToneJudge, digit_judge, facts_of
from raysys.systems.ernie.stream import Sample, Vision

F64 = NDArray[np.float64]


class Measure(NamedTuple):
    """A measure of a task: its name for people, chance, and whether more is better."""

    task: str
    fact: str
    label: str
    chance: float
    more: bool = True


MEASURES = (
    Measure("lm", "bits per byte", "text: bits per byte (chance: 8)", 8.0, more=False),
    Measure("i2t", "digit", "caption an image: digit", 0.1),
    Measure("i2t", "place", "caption an image: place", 1 / len(PLACES)),
    Measure("t2i", "digit", "draw an image: digit (judged)", 0.1),
    Measure("t2i", "place", "draw an image: place (judged)", 1 / len(PLACES)),
    Measure("v2t", "digit", "caption a video: digit", 0.1),
    Measure("v2t", "direction", "caption a video: direction", 1 / len(DIRECTIONS)),
    Measure("t2v", "error", "next frames: squared error over repeating the last", 1.0, more=False),
    Measure("a2t", "register", "transcribe a tone: register", 1 / len(REGISTERS)),
    Measure("a2t", "shape", "transcribe a tone: shape", 1 / len(SHAPES)),
    Measure("t2a", "register", "sound a tone: register (judged)", 1 / len(REGISTERS)),
    Measure("t2a", "shape", "sound a tone: shape (judged)", 1 / len(SHAPES)),
)


class Tested(NamedTuple):
    """Held-out items of a task and their samples, in the same order."""

    items: Sequence[Item]
    samples: Sequence[Sample]


def right(told: Sequence[Facts], items: Sequence[Item]) -> dict[str, F64]:
    """For each fact of the items (n,): 1 where it was told, 0 where not."""
    names = sorted({name for item in items for name in item.facts})
    return {
        name: np.array(
            [float(facts.get(name) == item.facts.get(name)) for facts, item in zip(told, items, strict=True)]
        )
        for name in names
    }


def measure(bundle: Bundle, task: str, tested: Tested, seed: int = 0, sub: SubModel | None = None) -> dict[str, F64]:
    """Each measure of a task (n,), with `exact` (the caption is the expected one) for tasks that write."""
    items, samples = tested
    generator = Seeds(seed).generator(Stream.ATTACK)
    if task == "lm":
        return {"bits per byte": bits_per_byte(bundle, [item.text for item in items], sub)}
    if task in ("i2t", "v2t", "a2t"):
        said = captions(bundle, samples, sub)
        found = right([facts_of(text) for text in said], items)
        return {
            **found,
            "exact": np.array([float(a.strip() == b.text.strip()) for a, b in zip(said, items, strict=True)]),
        }
    if task == "t2i":
        drawn = pictures(bundle, samples, generator, temperature=0.3, guidance=1.0, sub=sub).numpy()
        return right(digit_judge()(drawn), items)
    if task == "t2v":
        given, shown = given_of(bundle, samples)
        drawn = pictures(bundle, samples, generator, temperature=0.0, given=given, sub=sub).numpy()
        return {
            "error": next_frames(drawn, np.stack([item.frames for item in items if item.frames is not None]), shown)
        }
    waves = sounds(bundle, samples, generator, temperature=0.5, limit=2 * longest(samples), sub=sub)
    return right(judged_tones(waves, bundle.form.rate), items)


def longest(samples: Sequence[Sample]) -> int:
    """Frames of the longest audio of samples."""
    return max(len(s.codes) for one in samples for s in one.segments if hasattr(s, "codes"))


def judged_tones(waves: Sequence[NDArray[np.float32]], rate: int) -> list[Facts]:
    """Facts of waves of any length; one too short to be judged tells nothing."""
    judge = ToneJudge(rate)
    return [judge(wave[None])[0] if len(wave) >= 4 * judge.window else Facts() for wave in waves]


def given_of(bundle: Bundle, samples: Sequence[Sample]) -> tuple[int, int]:
    """First latent frames that samples give, and the frames that these are."""
    (given,) = {s.given for one in samples for s in one.segments if isinstance(s, Vision)}
    return given, 1 + (given - 1) * bundle.visual.tau if given else 0


def next_frames(drawn: NDArray[np.float32], truth: NDArray[np.float32], given: int) -> F64:
    """(n,) squared error of the frames after the given ones over that of repeating the last given one; (n, T, C, H, W) each."""
    ours = np.square(drawn[:, given:] - truth[:, given:]).mean((1, 2, 3, 4))
    copied = np.square(truth[:, given - 1 : given] - truth[:, given:]).mean((1, 2, 3, 4))
    return np.asarray(ours / np.maximum(copied, 1e-6), dtype=np.float64)


@torch.no_grad()
def ceilings(bundle: Bundle, tested: Mapping[str, Tested]) -> dict[str, float]:
    """What the tokenizers alone reach: the judges' agreement on reconstructions of real images and tones, and the error of
    reconstructed next frames; by "task fact"."""
    found: dict[str, float] = {}
    for task in ("t2i", "t2v"):
        if task in tested:
            items = tested[task].items
            frames = torch.from_numpy(np.stack([item.frames for item in items if item.frames is not None]))
            back = bundle.visual.reconstruct(frames).numpy()
            if task == "t2v":
                shown = given_of(bundle, tested[task].samples)[1]
                found["t2v error"] = float(next_frames(back, frames.numpy(), shown).mean())
            else:
                found |= {f"t2i {name}": float(v.mean()) for name, v in right(digit_judge()(back), items).items()}
    if "t2a" in tested:
        items = tested["t2a"].items
        waves = torch.from_numpy(np.stack([item.wave for item in items if item.wave is not None]))
        back = bundle.audio.decode(bundle.audio.encode(waves)).numpy()
        told = judged_tones(list(back), bundle.form.rate)
        found |= {f"t2a {name}": float(v.mean()) for name, v in right(told, items).items()}
    return found
