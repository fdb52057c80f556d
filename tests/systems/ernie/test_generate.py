"""Generation over a cache equals reading everything again, for every modality and sub-model."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from streams_for_tests import SCALES, SIZES, SMALL, audio, look, packed, quantiser, samples, small_model, text, vision
from test_elastic import SUBS

from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.generate import answer_batch, answer_logp, draw, speak, write
from raysys.systems.ernie.steps import pick, text_steps
from raysys.systems.ernie.stream import Audio, Sample, Special, Text, Vision


def prompts():
    rng = np.random.default_rng(5)
    return [
        Sample("i2t", (look(rng, 1),)),
        Sample("a2t", (audio(rng, 5, False),)),
        Sample("v2t", (look(rng, 4),)),
        Sample("lm", (text(rng, 6, False),)),
    ]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_written_log_probabilities_equal_those_of_reading_the_answers():
    """Ragged prompts, rows that end early; largest difference seen 2e-6."""
    model = small_model()
    found = write(model, prompts(), limit=40, temperature=1.0, generator=generator(1))
    assert any(found.ended)
    answers = [np.append(i, Special.EOS) if e else i for i, e in zip(found.ids, found.ended, strict=True)]
    logp, mask, entropy = answer_logp(model, prompts(), answers)
    for row, (one, told) in enumerate(zip(logp, found.logp, strict=True)):
        assert int(mask[row].sum()) == len(told)
        assert torch.allclose(one[mask[row]], torch.from_numpy(told), atol=1e-5)
    assert (entropy[mask] > 0).all()


def test_what_a_prompt_gets_does_not_depend_on_its_company():
    model = small_model()
    together = write(model, prompts(), limit=8, temperature=0.0, generator=generator())
    for i, prompt in enumerate(prompts()):
        alone = write(model, [prompt], limit=8, temperature=0.0, generator=generator())
        assert np.array_equal(alone.ids[0], together.ids[i])


def test_replayed_routes_give_the_same_logits_and_change_them_under_other_weights():
    model = small_model()
    found = write(model, prompts(), limit=6, temperature=1.0, generator=generator(1), routes=True)
    answers = [np.append(i, Special.EOS) if e else i for i, e in zip(found.ids, found.ended, strict=True)]
    plain, mask, _ = answer_logp(model, prompts(), answers)
    again, _, _ = answer_logp(model, prompts(), answers, routes=found.routes)
    assert torch.allclose(plain[mask], again[mask], atol=1e-5)
    other = [np.where(r >= 0, (r + 1) % SMALL.experts, r).astype(np.int16) for r in found.routes]
    changed, _, _ = answer_logp(model, prompts(), answers, routes=other)
    assert (changed[mask] - plain[mask]).abs().max() > 1e-3
    (changed.sum()).backward()
    assert model.layers[0].moe.router.grad.abs().max() > 0  # gates of replayed experts still reach the router


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("sub", [None, "depth", "sparsity", "all"])
def test_drawn_bits_are_the_most_likely_of_a_full_reading(sub, given):
    """Greedy frames, read again whole under teacher forcing: every bit on the side its logit says."""
    model, bits, rng = small_model(), quantiser(), np.random.default_rng(2)
    chosen = None if sub is None else SUBS[sub]
    asked = [Sample("t2v", (text(rng, n, False),)) for n in (2, 5)]
    first = torch.from_numpy(np.stack([vision(rng, 1).latents for _ in asked])) if given else None
    acc = draw(model, bits, asked, frames=3, generator=generator(), temperature=0.0, given=first, sub=chosen)
    assert acc.shape == (2, 3, *SCALES[-1], SIZES.bits)
    whole = [
        Sample("t2v", (*one.segments, Vision(latents.numpy(), given))) for one, latents in zip(asked, acc, strict=True)
    ]
    batch = packed(whole)
    # an accumulated code is its own latent: planning it gives back the bits it is made of
    with torch.no_grad():
        out = model(batch, None if chosen is None else chosen.rows(2, SMALL))
    clear = out.bits.abs() > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal((out.bits > 0)[clear], batch.bits[clear])


def test_spoken_codes_are_the_most_likely_of_a_full_reading():
    model, rng = small_model(), np.random.default_rng(2)
    asked = [Sample("t2a", (text(rng, n, False),)) for n in (2, 5)]
    found = speak(model, asked, limit=7, temperature=0.0, generator=generator())
    whole = [Sample("t2a", (*a.segments, Audio(c, True))) for a, c in zip(asked, found, strict=True)]
    batch = packed(whole)
    with torch.no_grad():
        out = model(batch)
    inside = batch.code[:, 0] < SIZES.codes  # whether the end follows depends on the limit
    for q, logits in enumerate(out.codes):
        assert torch.equal(logits.argmax(1)[inside], batch.code[inside, q])


def test_sampling_inverts_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(20_000, -1)
    draws = torch.rand(20_000, generator=generator())
    chosen, logp = pick(logits, 0.7, draws)
    p = (logits[0] / 0.7).softmax(0)
    assert (torch.bincount(chosen, minlength=4) / 20_000 - p).abs().max() < 0.015
    assert torch.allclose(logp.exp(), p[chosen])
    assert pick(logits[:1], 0.0, draws[:1])[0].item() == 1


def test_no_guidance_is_guidance_zero_and_guidance_changes_images():
    model, bits, rng = small_model(), quantiser(), np.random.default_rng(2)
    asked = [Sample("t2i", (text(rng, 4, False),))]
    plain = draw(model, bits, asked, frames=1, generator=generator(), temperature=0.0)
    small = draw(model, bits, asked, frames=1, generator=generator(), temperature=0.0, guidance=1e-9)
    large = draw(model, bits, asked, frames=1, generator=generator(), temperature=0.0, guidance=8.0)
    assert torch.equal(plain, small)
    assert not torch.equal(plain, large)


def test_an_answer_without_its_end_predicts_all_its_tokens():
    model = small_model()
    answer = np.array([12, 13, 14])
    logp, mask, _ = answer_logp(model, prompts()[:1], [answer])
    ended, longer, _ = answer_logp(model, prompts()[:1], [np.append(answer, Special.EOS)])
    assert int(mask.sum()) == 3
    assert int(longer.sum()) == 4
    assert torch.allclose(logp[0, :3], ended[0, :3], atol=1e-6)


def test_a_sub_model_writes_as_it_reads():
    model, sub = small_model(), SUBS["all"]
    found = write(model, prompts(), limit=6, temperature=0.0, generator=generator(), sub=sub)
    whole = [
        Sample(p.task, (*p.segments, Text(i, True, closed=False))) for p, i in zip(prompts(), found.ids, strict=True)
    ]
    batch = packed(whole)
    with torch.no_grad():
        out = model(batch, sub.rows(4, SMALL))
    assert torch.equal(out.text.argmax(1), batch.next[batch.next >= 0])


def test_all_tasks_are_covered():
    assert {one.task for one in samples()} == {"lm", "t2i", "i2t", "t2v", "v2t", "t2a", "a2t"}
    assert SubModel.full(SMALL).active == SMALL.active


def test_steps_can_be_stopped_row_by_row_and_each_row_has_its_own_limit():
    model, draws = small_model(), torch.rand(4, 12, generator=generator(8))
    alone = []
    for i, prompt in enumerate(prompts()):
        steps = text_steps(model, [prompt], limits=[12], temperature=1.0, draws=draws[i : i + 1])
        with torch.no_grad():
            alone.append([int(step.ids[0]) for step in steps])
    found, limits = [list[int]() for _ in alone], [12, 3, 12, 5]
    steps = text_steps(model, prompts(), limits=limits, temperature=1.0, draws=draws)
    gone = None
    with torch.no_grad():
        while True:
            try:
                step = steps.send(gone)
            except StopIteration:
                break
            for row, id in zip(step.rows.tolist(), step.ids.tolist(), strict=True):
                found[row].append(id)
            gone = {2} if len(found[2]) == 2 else None
    assert found == [alone[0], alone[1][:3], alone[2][:2], alone[3][:5]]


@pytest.mark.parametrize("hinted", [False, True])
def test_answers_of_one_prompt_read_it_once_and_are_those_of_copies(hinted, monkeypatch):
    """A group's prompt is read once, and its images are looked at once: the same tokens, experts and log-probabilities."""
    model, own = small_model(), prompts()
    given = [own[i] for i in (0, 2, 0, 1, 0, 2)]
    begun = [np.array([7][: i // 3], np.int64) for i in range(len(given))] if hinted else None
    rows, forward = list[int](), model.forward

    def counted(batch, *more, **named):
        rows.append(len(batch.ids))
        return forward(batch, *more, **named)

    monkeypatch.setattr(model, "forward", counted)
    written = []
    for each in (given, [deepcopy(one) for one in given]):
        rows.append(0)
        written.append(write(model, each, limit=6, temperature=1.0, generator=generator(3), routes=True, begun=begun))
    rows = [rows[i + 1] for i, one in enumerate(rows) if one == 0]
    assert rows == ([5, 6] if hinted else [3, 6])  # of the copies each is read
    for a, b in zip(written[0].ids, written[1].ids, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("logp", "routes"):
        for a, b in zip(getattr(written[0], name), getattr(written[1], name), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_answers_are_packed_in_any_order_and_an_image_of_several_is_looked_at_once():
    """Short answers share rows: order and routes are not those of the arguments. Largest difference seen 7e-7."""
    model, own = small_model(), prompts()
    given = [own[i] for i in (0, 3, 0, 1, 3)]
    rng = np.random.default_rng(4)
    answers = [np.append(rng.integers(20, 40, n - 1), Special.EOS) for n in (7, 2, 4, 3, 1)]
    batch, order = answer_batch(model, given, answers)
    assert order != sorted(order)
    assert len(batch.ids) < len(given)
    assert [len(seen.cnn) for seen in batch.seen] == [1]
    written = write(
        model, given, limit=1, temperature=0.0, generator=generator(), routes=True, begun=[a[:-1] for a in answers]
    )
    for routes in (None, written.routes):
        logp, mask, entropy = answer_logp(model, given, answers, routes=routes)
        for row, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
            of_row = None if routes is None else [routes[row]]
            alone, _, spread = answer_logp(model, [prompt], [answer], routes=of_row)
            n = len(answer)
            assert mask[row].tolist() == [True] * n + [False] * (mask.shape[1] - n)
            assert not logp[row, n:].any()
            torch.testing.assert_close(logp[row, :n], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropy[row, :n], spread[0], atol=1e-5, rtol=1e-5)
