"""Pre-training of the backbone: which samples a step has, its losses, and the optimizer.

Shapes: M = 7 tasks.

Notable choices
- Which samples block b of step s gets is a function of (seed, s, b): each task goes through its samples in an order of its own
  for every epoch. So training resumes anywhere, on any number of workers.
- Each task's loss is divided by its usual size ("posterior-based loss weighting" of the paper, by modality and without a formula;
  INFERRED. By task is ours: by modality, the few words of captions were lost beside running text). The size is a trained
  number: its gradient says on which side of it the loss was, so it follows the median of the losses of all workers, and needs
  no message of its own (as the selection bias of a mixture of experts does, see `raysys.nn.moe`).
- History bits are flipped with a strength drawn per image and scale, as in Infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.nn.balance import parameter_groups, switch_loss, z_loss
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.sentences import UserError
from raysys.systems.ernie.batch import Batch, Plan, pack
from raysys.systems.ernie.corpus import SIZE, WINDOW
from raysys.systems.ernie.elastic import sample as sample_elastic
from raysys.systems.ernie.model import Outputs, UniModel, bit_loss
from raysys.systems.ernie.setting import ModelSetting, PretrainSetting, Sizes
from raysys.systems.ernie.stream import TASKS, Laid, Sample, Text, lay
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits

GENERATED = ("t2i", "t2v", "t2a")
FOLLOW = 0.05
"""By how much a usual size may change in a step, as a share of it."""
WHOLE = 8192
"""Samples of a task that are shuffled as a whole; of more, a window of shards at a time."""
NUDGE = 2.0**-40
"""Size of a gradient of which only the sign is used; far below all others, so that it leaves a clipped norm alone."""


class Corpus(Protocol):
    """Tokenised samples by task."""

    def size(self, task: str) -> int: ...

    def get(self, task: str, index: int) -> Sample: ...


class Pretrained(nn.Module):
    """What is trained: the model, and the usual sizes (M,) of the tasks' losses, as logarithms."""

    def __init__(self, model: UniModel) -> None:
        super().__init__()
        self.model = model
        s = model.sizes
        blind = {"t2i": 2, "t2v": 2, "t2a": s.codes}
        self.size = nn.Parameter(torch.tensor([float(np.log(blind.get(task, s.vocabulary))) for task in TASKS]).log())


class _Follow(torch.autograd.Function):
    """The identity on the loss, which tells `size` on which side of it each loss was."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, size: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(torch.where(seen > 0, torch.sign(size.exp() - seen), torch.zeros_like(seen)))
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (side,) = ctx.saved_tensors
        return grad, side * NUDGE, None


class Draw:
    """Which samples a block of a step has: `counts[task]` of each task, cycling through seeded orders."""

    def __init__(self, corpus: Corpus, counts: dict[str, int], blocks: int, seed: int) -> None:
        self.corpus, self.blocks, self.seeds = corpus, blocks, Seeds(seed)
        self.counts = {task: count for task, count in counts.items() if count}
        for task in self.counts:
            if not corpus.size(task):
                raise ValueError(f"samples: got {self.counts[task]} of {task}, of which the data has none")
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def samples(self, step: int, block: int) -> list[Sample]:
        found = []
        for task, count in self.counts.items():
            first = (step * self.blocks + block) * count
            found += [self.corpus.get(task, self._index(task, first + i)) for i in range(count)]
        return found

    def _index(self, task: str, position: int) -> int:
        epoch, place = divmod(position, self.corpus.size(task))
        if (task, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == task and key[1] < epoch - 1]:
                del self._orders[old]
            rng = self.seeds.rng(Stream.BATCH, TASKS.index(task), epoch)
            self._orders[task, epoch] = shuffled(self.corpus.size(task), rng)
        return int(self._orders[task, epoch][place])


def shuffled(size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """An order (size,) of a task's samples. Of a large corpus, shards are shuffled, then samples within a window of shards, so
    that each shard is read once in an epoch."""
    if size <= WHOLE:
        return rng.permutation(size)
    shards = [np.arange(first, min(first + SIZE, size)) for first in range(0, size, SIZE)]
    order = rng.permutation(len(shards))
    windows = (order[i : i + WINDOW] for i in range(0, len(order), WINDOW))
    return np.concatenate([rng.permutation(np.concatenate([shards[n] for n in window])) for window in windows])


class Pretraining:
    """A `raysys.runtime.train.Learner` of the backbone."""

    def __init__(
        self, model: ModelSetting, setting: PretrainSetting, sizes: Sizes, bits: MultiScaleBits, corpus: Corpus, seed: int,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.setting, self.bits, self.device, self.seeds = setting, bits, device, Seeds(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.seeds.bits(Stream.INIT, 0, -1, 1)[0, 0] >> np.uint64(1)))
            self.module = Pretrained(UniModel(model, sizes)).to(device).train()
        self.draw = Draw(corpus, setting.samples.model_dump(), setting.blocks, seed)
        self.steps, self.blocks = setting.steps, setting.blocks
        self._metrics: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Nothing is kept from one step for the next."""

    def learning_rate(self, step: int) -> float:
        """Warm-up, stable, decay (Section 5.1)."""
        s = self.setting
        falling = max(1.0, s.cooldown * s.steps)
        return s.lr * min(1.0, (step + 1) / max(1, s.warmup), (s.steps - step) / falling)

    def optimizer(self) -> torch.optim.Optimizer:
        s, model = self.setting, self.module.model
        groups = parameter_groups(model, rate=s.lr, speed=model.setting.bias_speed, weight_decay=s.weight_decay)
        follow = {
            "params": [self.module.size],
            "betas": (0.0, 0.0),
            "eps": 1e-30,
            "weight_decay": 0.0,
            "lr_scale": FOLLOW / s.lr,
        }
        return torch.optim.AdamW([*groups, {"lr": FOLLOW, **follow}], lr=s.lr)

    def batch(self, step: int, block: int) -> Batch:
        """What a block is trained on."""
        generator = self.seeds.generator(Stream.SHUFFLE, block, step)
        samples = [self._unconditional(one, generator) for one in self.draw.samples(step, block)]
        s = self.module.model.sizes

        def planner(latents: Tensor) -> Plan:
            return flipped(self.bits, latents, self.setting.flip, generator)

        laid = [fitted(one, self.setting.row, s.scales) for one in samples]
        return pack(laid, self.setting.row, planner, s.bits, s.levels, s.codes).to(self.device)

    def _unconditional(self, sample: Sample, generator: torch.Generator) -> Sample:
        if sample.task not in GENERATED or not float(torch.rand((), generator=generator)) < self.setting.unconditional:
            return sample
        return replace(sample, segments=tuple(s for s in sample.segments if not isinstance(s, Text)))

    def loss(self, step: int, block: int) -> Tensor:
        model, batch = self.module.model, self.batch(step, block)
        generator = self.seeds.generator(Stream.PARTICIPATION, block, step)
        elastic = sample_elastic(batch.rows, model.setting, model.levels, self.setting.elastic, generator)
        if elastic is not None and self.device != "cpu":
            allowed = None if elastic.allowed is None else elastic.allowed.to(self.device)
            elastic = type(elastic)(elastic.keep.to(self.device), elastic.active.to(self.device), allowed)
        out = model(batch, elastic, further=model.mtp is not None)
        parts = losses(model, batch, out)
        seen = torch.stack([parts[t].detach() if t in parts else self.module.size.new_zeros(()) for t in TASKS])
        scale = self.module.size.detach().exp()
        total = sum((parts[t] / scale[i] for i, t in enumerate(TASKS) if t in parts), scale.new_zeros(()))
        if "mtp" in parts:
            total = total + model.setting.mtp_weight * parts["mtp"] / scale[TASKS.index("lm")]
        if "end" in parts:
            total = total + parts["end"] / float(np.log(model.sizes.vocabulary))
        if model.setting.balance in ("aux", "both"):
            for _, told in out.routed:
                total = total + model.setting.aux_weight * switch_loss(told, model.setting.experts)
                total = total + model.setting.z_weight * z_loss(told.logits)
        self._metrics = {name: float(value.detach()) for name, value in parts.items()}
        followed: Tensor = _Follow.apply(total, self.module.size, seen)  # type: ignore[no-untyped-call]
        return followed

    def metrics(self) -> dict[str, float]:
        """Losses of the tasks that every block has, and so the same keys in all."""
        return {task: self._metrics.get(task, 0.0) for task in self.draw.counts}


def fitted(sample: Sample, row: int, scales: Sequence[tuple[int, int]]) -> Laid:
    """A sample laid out; text or a caption that is too long for a row is cut at its end.

    Raises:
        UserError: it does not fit without its text either.
    """
    laid = lay(sample, scales)
    over = len(laid) - row
    if over <= 0:
        return laid
    for i, text in enumerate(sample.segments):
        if isinstance(text, Text):
            freed = text.predicted and text.closed  # the place that predicts <eos>
            left = len(text.ids) - over + freed
            cut = Text(text.ids[: max(0, left)], text.predicted, closed=False)
            laid = lay(replace(sample, segments=(*sample.segments[:i], cut, *sample.segments[i + 1 :])), scales)
    if len(laid) > row:
        raise UserError(f"pretrain.row: got {row}; a sample of {sample.task} has {len(laid)} tokens without its text")
    return laid


def flipped(bits: MultiScaleBits, latents: Tensor, most: float, generator: torch.Generator) -> Plan:
    """Bits and inputs of latents (S, T, h, w, d) with flips in the history: for each image, frame and scale a strength from
    {0, .01, ..., most}."""
    steps = round(most * 100) + 1
    if steps == 1:
        return bits.plan(latents)
    strength = torch.randint(0, steps, (*latents.shape[:2], len(bits.scales)), generator=generator) / 100.0
    return bits.plan(latents, strength, generator)


def losses(model: UniModel, batch: Batch, out: Outputs) -> dict[str, Tensor]:
    """Mean losses, as far as the batch has them: of writing tasks in nats a token, of t2i and t2v in nats a bit with early scales
    weighted up, of t2a in nats a code (mean over levels); of the second next token (mtp); of the end after an image or video."""
    found, task = dict[str, Tensor](), batch.task.flatten()
    wanted = (batch.next >= 0).flatten()
    each, writes = F.cross_entropy(out.text.float(), batch.next.flatten()[wanted], reduction="none"), task[wanted]
    for t, name in enumerate(TASKS):
        if name in GENERATED:
            mine = task[batch.bit_at] == t
            if bool(mine.any()):
                scales = model.sizes.scales
                found[name] = bit_loss(out.bits[mine], batch.bits[mine], batch.bit_scale[mine], scales)
        elif bool((writes == t).any()):
            found[name] = each[writes == t].mean()
    if len(batch.code_at):
        found["t2a"] = torch.stack(code_losses(batch, out)).mean()
    ends = torch.isin(writes, torch.tensor([TASKS.index(name) for name in GENERATED], device=writes.device))
    if bool(ends.any()):
        found["end"] = each[ends].mean()
    if len(out.further):
        found["mtp"] = F.cross_entropy(out.further.float(), batch.further[batch.further >= 0])
    return found


def code_losses(batch: Batch, out: Outputs) -> list[Tensor]:
    """Mean cross-entropy of each level."""
    found = []
    for q, logits in enumerate(out.codes):
        there = batch.code[:, q] >= 0
        found.append(F.cross_entropy(logits[there].float(), batch.code[there, q]))
    return found
