"""What a model can do on held-out data: losses by task, and tasks done and judged by others than the model.

Shapes: n items of a task.

Notable choices
- Images and tones are judged by classifiers trained on real training data (`judges`), never by the model; their ceiling on what
  the tokenizer alone reconstructs is told beside.
- Text is measured in bits per byte, which does not depend on the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raysys.systems.ernie.artifact import Bundle
from raysys.systems.ernie.batch import Batch, pack
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.generate import draw, speak, write
from raysys.systems.ernie.model import Outputs
from raysys.systems.ernie.stream import TASKS, Audio, Laid, Sample, Text, Vision, lay

F64 = NDArray[np.float64]


def batches(bundle: Bundle, samples: Sequence[Sample], row: int = 192, rows: int = 8) -> list[Batch]:
    """Samples in batches of about `rows` rows, in order, without flips; rows are wider than `row` where a sample is."""
    s, laid = bundle.model.sizes, [lay(one, bundle.model.sizes.scales) for one in samples]
    found, part, length = list[Batch](), list[Laid](), 0
    row = max(row, *map(len, laid))
    for one in laid:
        if part and length + len(one) > row * rows:
            found.append(pack(part, row, bundle.visual.quantiser.plan, s.bits, s.levels, s.codes))
            part, length = [], 0
        part.append(one)
        length += len(one)
    return [*found, pack(part, row, bundle.visual.quantiser.plan, s.bits, s.levels, s.codes)]


@torch.no_grad()
def held_out_losses(bundle: Bundle, samples: Sequence[Sample], sub: SubModel | None = None) -> dict[str, float]:
    """Mean loss of each task: nats a token of text tasks (lm, i2t, v2t, a2t), a bit (t2i, t2v), a code (t2a).

    Unweighted over scales and levels; teacher forcing.
    """
    model = bundle.model.eval()
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for batch in batches(bundle, samples):
        out = model(batch, None if sub is None else sub.rows(batch.rows, model.setting))
        for task, values in per_task(batch, out).items():
            total[task] = total.get(task, 0.0) + float(values.double().sum())
            count[task] = count.get(task, 0) + values.numel()
    return {task: total[task] / count[task] for task in TASKS if task in total}


def per_task(batch: Batch, out: Outputs) -> dict[str, Tensor]:
    """Losses of all targets of each task in a batch: of generating tasks those of their own modality only."""
    flat, found = batch.task.flatten(), dict[str, list[Tensor]]()
    wanted = (batch.next >= 0).flatten()
    texts = F.cross_entropy(out.text.float(), batch.next.flatten()[wanted], reduction="none")
    bits = F.binary_cross_entropy_with_logits(out.bits.float(), batch.bits.float(), reduction="none").mean(-1)
    for tasks, losses, places in (
        (("lm", "i2t", "v2t", "a2t"), texts, wanted.nonzero().flatten()),
        (("t2i", "t2v"), bits, batch.bit_at),
        *(
            (("t2a",), F.cross_entropy(logits[batch.code[:, q] >= 0].float(), batch.code[:, q][batch.code[:, q] >= 0],
             reduction="none"), batch.code_at[batch.code[:, q] >= 0])
            for q, logits in enumerate(out.codes)
        ),
    ):  # fmt: skip
        for task in tasks:
            mine = losses[flat[places] == TASKS.index(task)]
            if len(mine):
                found.setdefault(task, []).append(mine)
    return {task: torch.cat(parts) for task, parts in found.items()}


@torch.no_grad()
def bits_per_byte(bundle: Bundle, texts: Sequence[str], sub: SubModel | None = None) -> F64:
    """(n,) bits per UTF-8 byte of texts, each from <bos> on, cut into pieces that fit a row."""
    model, found = bundle.model.eval(), []
    for text in texts:
        ids = bundle.text.encode(text)
        pieces = [Sample("lm", (Text(part, True, closed=False),)) for part in np.split(ids, range(160, len(ids), 160))]
        nats = 0.0
        for batch in batches(bundle, pieces):
            out = model(batch, None if sub is None else sub.rows(batch.rows, model.setting))
            nats += float(F.cross_entropy(out.text.float(), batch.next[batch.next >= 0], reduction="sum"))
        found.append(nats / np.log(2) / len(text.encode()))
    return np.array(found)


def prompt(sample: Sample) -> Sample:
    """A sample without what is to be predicted."""
    kept = (s for s in sample.segments if not (isinstance(s, Vision) or (isinstance(s, Text | Audio) and s.predicted)))
    return Sample(sample.task, tuple(kept))


def captions(bundle: Bundle, samples: Sequence[Sample], sub: SubModel | None = None, limit: int = 24) -> list[str]:
    """Most likely text after the prompts of text tasks."""
    generator = torch.Generator().manual_seed(0)
    found: list[str] = []
    for i in range(0, len(samples), 64):
        part = [prompt(one) for one in samples[i : i + 64]]
        written = write(bundle.model.eval(), part, limit=limit, temperature=0.0, generator=generator, sub=sub)
        found += [bundle.text.decode(ids) for ids in written.ids]
    return found


def pictures(
    bundle: Bundle,
    samples: Sequence[Sample],
    generator: torch.Generator,
    *,
    temperature: float,
    guidance: float = 0.0,
    given: int = 0,
    sub: SubModel | None = None,
) -> Tensor:
    """Frames (n, T, C, H, W) in [0, 1] drawn after the captions of samples, the first `given` ones taken from them."""
    latents = [next(s for s in one.segments if isinstance(s, Vision)).latents for one in samples]
    first = torch.from_numpy(np.stack([one[:given] for one in latents])) if given else None
    acc = draw(
        bundle.model.eval(), bundle.visual.quantiser, [prompt(one) for one in samples], frames=len(latents[0]),
        generator=generator, temperature=temperature, guidance=guidance, given=first, sub=sub,
    )  # fmt: skip
    with torch.no_grad():
        return bundle.visual.decode(acc)


def sounds(
    bundle: Bundle, samples: Sequence[Sample], generator: torch.Generator, *, temperature: float, limit: int = 64,
    sub: SubModel | None = None,
) -> list[NDArray[np.float32]]:  # fmt: skip
    """Waves (n,) after the captions of samples."""
    codes = speak(
        bundle.model.eval(), [prompt(one) for one in samples], limit=limit, temperature=temperature, generator=generator,
        sub=sub,
    )  # fmt: skip
    return [bundle.hear(one) for one in codes]
