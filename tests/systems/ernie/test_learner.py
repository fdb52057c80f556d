"""Pre-training: what a step is made of, the weights of the losses, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_for_tests import SCALES, SIZES, SMALL, audio, packed, quantiser, samples, small_model, text, vision

from raysys.runtime.sentences import UserError
from raysys.runtime.train import TrainConfig, fit_here
from raysys.systems.ernie.corpus import SIZE, WINDOW
from raysys.systems.ernie.learner import (
    NUDGE,
    WHOLE,
    Draw,
    Pretrained,
    Pretraining,
    _Follow,
    code_losses,
    fitted,
    flipped,
    losses,
    shuffled,
)
from raysys.systems.ernie.setting import Counts, PretrainSetting
from raysys.systems.ernie.stream import TASKS, Sample, Special, Text, lay


class Few:
    """A corpus of `count` random samples of each task."""

    def __init__(self, count: int = 6, without: tuple[str, ...] = ()) -> None:
        self.every = {
            t: [samples(i)[TASKS_IN_SAMPLES.index(t)] for i in range(count)] for t in TASKS if t not in without
        }

    def size(self, task):
        return len(self.every.get(task, []))

    def get(self, task, index):
        return self.every[task][index]


TASKS_IN_SAMPLES = [one.task for one in samples()]
ONE_EACH = Counts(lm=1, t2i=1, i2t=1, t2v=1, v2t=1, t2a=1, a2t=1)


def learner(corpus=None, **changes) -> Pretraining:
    setting = PretrainSetting(**{"steps": 4, "warmup": 1, "row": 192, "samples": ONE_EACH, "blocks": 2, **changes})
    return Pretraining(SMALL, setting, SIZES, quantiser(), corpus or Few(), seed=3)


def test_every_sample_comes_once_an_epoch_in_another_order():
    draw = Draw(Few(6), {"lm": 2, "t2i": 0}, blocks=3, seed=1)
    seen = [id(one) for step in range(3) for block in range(3) for one in draw.samples(step, block)]
    assert len(seen) == 18
    epochs = [seen[i : i + 6] for i in (0, 6, 12)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_block_is_a_function_of_step_and_block():
    one, other = learner(), learner()
    other.batch(0, 0)
    other.batch(1, 1)
    for step, block in ((2, 1), (0, 0)):
        a, b = one.batch(step, block), other.batch(step, block)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.visual, b.visual)
        assert torch.equal(a.bits, b.bits)


@given(st.integers(1, 12_000), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_large_corpus_is_shuffled_a_few_shards_at_a_time(size, seed):
    order = shuffled(size, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(size))
    if size > WHOLE:
        place = np.argsort(order)
        for first in range(0, size, SIZE):
            assert np.ptp(place[first : first + SIZE]) < WINDOW * SIZE
        assert (np.diff(order) != 1).mean() > 0.9


@given(st.integers(1, 60), st.booleans(), st.sampled_from(["lm", "t2i", "a2t"]))
@settings(max_examples=60, deadline=None)
def test_a_text_that_is_too_long_for_a_row_is_cut_at_its_end(words, closed, task):
    rng = np.random.default_rng(words)
    said = text(rng, words, task != "t2i", closed)
    segments = {"lm": (said,), "t2i": (said, vision(rng, 1)), "a2t": (audio(rng, 5, False), said)}[task]
    sample = Sample(task, segments)
    whole, laid = lay(sample, SCALES), fitted(sample, 40, SCALES)
    assert len(laid) == min(40, len(whole))
    if len(whole) > 40 and task != "t2i":
        assert laid.ids == whole.ids[:40]
        assert laid.next[:-1] == whole.next[:39]
        assert Special.EOS not in laid.next
    if task == "t2i":
        assert laid.bit_at[0] == [place - len(whole) + len(laid) for place in whole.bit_at[0]]


def test_what_does_not_fit_without_its_text_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"a sample of t2i has \d+ tokens without its text"):
        fitted(Sample("t2i", (text(rng, 3, False), vision(rng, 1))), 20, SCALES)


def test_training_twice_gives_the_same_bits():
    whole = fit_here(None, lambda device: learner(), TrainConfig(clip=1.0))
    again = fit_here(None, lambda device: learner(), TrainConfig(clip=1.0))
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_it_learns_all_modalities():
    """A handful of samples is learned by heart: every loss falls by a good part in 60 steps."""
    made = learner(Few(2), steps=60, lr=5e-3, flip=0.0, unconditional=0.0, blocks=1)
    optimizer, first, last = made.optimizer(), {}, {}
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = made.learning_rate(step) * group.get("lr_scale", 1.0)
        made.loss(step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        last = made._metrics
        first = first or last
    assert set(first) == {*TASKS, "mtp", "end"}
    for name in first:
        assert last[name] < 0.7 * first[name], name


@pytest.mark.parametrize("without", [("t2i", "t2v"), ("t2a",), ("lm", "i2t", "v2t", "a2t")])
def test_a_batch_without_a_modality_has_a_finite_loss(without):
    counts = ONE_EACH.with_values(dict.fromkeys(without, 0))
    made = learner(samples=counts)
    loss = made.loss(0, 0)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.module.parameters() if p.grad is not None)


def test_a_task_without_data_is_refused():
    with pytest.raises(ValueError, match="samples: got 1 of t2a"):
        learner(Few(without=("t2a",)))


def test_each_loss_is_divided_by_its_usual_size():
    made = learner()
    made.module.size.data = torch.linspace(0.5, 2.0, 7).log()
    value, m = made.loss(1, 0), made._metrics
    parts = [m[task] / size for task, size in zip(TASKS, torch.linspace(0.5, 2.0, 7).tolist(), strict=True)]
    assert value.item() == pytest.approx(
        sum(parts) + 0.3 * m["mtp"] / 0.5 + m["end"] / np.log(SIZES.vocabulary), rel=1e-5
    )


def test_sizes_follow_the_median_of_losses():
    """By AdamW's sign steps on a tiny gradient: of a loss that is 1 or 5 and mostly 1, about 1; unseen modalities do not move."""
    size = torch.nn.Parameter(torch.zeros(3) + 1.0)
    optimizer = torch.optim.AdamW([size], lr=0.03, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        seen = torch.tensor([1.0 if rng.random() < 0.7 else 5.0, 0.0, 2.0])
        _Follow.apply(torch.zeros((), requires_grad=True) + 0.0, size, seen).backward()
        assert size.grad.abs().max() == NUDGE
        optimizer.step()
        optimizer.zero_grad()
    assert abs(size[0].exp().item() - 1.0) < 0.2
    assert size[1].item() == 1.0
    assert abs(size[2].exp().item() - 2.0) < 0.1


def test_the_rate_warms_up_stays_and_decays():
    made = learner(steps=100, warmup=10, cooldown=0.3, lr=1.0)
    rates = [made.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:70] == [1.0] * 61
    assert rates[99] == pytest.approx(1 / 30)
    assert np.all(np.diff(rates[70:]) < 0)


def test_captions_are_left_out_as_often_as_asked():
    made = learner(unconditional=0.3)
    n, bare, generator = 2000, 0, torch.Generator().manual_seed(0)
    one = next(s for s in samples() if s.task == "t2i")
    for _ in range(n):
        bare += not any(isinstance(s, Text) for s in made._unconditional(one, generator).segments)
    assert abs(bare / n - 0.3) < 0.04
    text = next(s for s in samples() if s.task == "i2t")
    assert made._unconditional(text, generator) is text


def test_flips_are_as_strong_as_asked_and_none_is_plain():
    bits, z = quantiser(), torch.randn(64, 2, 4, 4, SIZES.bits)
    plain = bits.plan(z)
    same = flipped(bits, z, 0.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(plain.inputs, same.inputs, strict=True))
    strong = flipped(bits, z, 0.3, torch.Generator().manual_seed(0))
    first = (strong.inputs[0][..., 0, 0, :] != plain.inputs[0][..., 0, 0, :]).float().mean()
    assert abs(float(first) - 0.15) < 0.04  # strengths are uniform on 0 .. .3


def test_the_end_of_an_audio_has_no_finer_levels():
    batch = packed([next(s for s in samples() if s.task == "t2a")])
    model = small_model()
    found = code_losses(batch, model(batch))
    assert len(found) == SIZES.levels
    assert all(torch.isfinite(one) for one in found)
    assert losses(model, batch, model(batch)).keys() == {"t2a"}


def test_what_is_saved_holds_model_and_sizes():
    names = dict(Pretrained(small_model()).named_parameters())
    assert "size" in names
    assert "model.layers.0.moe.bias" in names
