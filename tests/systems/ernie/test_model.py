"""Exact checks of the stream and the model: what sees what, where each target is, and that packing changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from streams_for_tests import SCALES, SIZES, SMALL, audio, look, packed, quantiser, samples, small_model, text, vision

from raysys.systems.ernie.batch import first_fit
from raysys.systems.ernie.layers import Rotary, rotate
from raysys.systems.ernie.model import bit_loss, separated
from raysys.systems.ernie.stream import NONE, Kind, Sample, Special, grid, lay


def outputs(out):
    return {"text": out.text, "bits": out.bits, **{f"codes{q}": c for q, c in enumerate(out.codes)}}


def test_a_text_stream_is_plain_causal_language_modelling():
    rng = np.random.default_rng(0)
    one = Sample("lm", (text(rng, 7, True, closed=False),))
    batch = packed([one])
    assert batch.ids[0].tolist() == [Special.BOS, *one.segments[0].ids[:-1]]
    assert batch.next[0].tolist() == one.segments[0].ids.tolist()
    assert torch.equal(batch.visible()[0], torch.ones(7, 7, dtype=torch.bool).tril())
    assert torch.equal(batch.position[0], torch.arange(7.0)[:, None].expand(7, 3))


def test_layout_of_a_captioned_image():
    rng = np.random.default_rng(0)
    one = Sample("t2i", (text(rng, 3, False), vision(rng, 1)))
    laid = lay(one, SCALES)
    # <bos> three words <boi>, scale 2 (4 tokens), scale 3 (16), the sum (16); <eoi> is predicted and ends the sample
    assert laid.kind == [0] * 5 + [Kind.VISUAL] * 36
    assert laid.group == [0, 1, 2, 3, 4] + [5] * 4 + [6] * 16 + [7] * 16
    assert laid.scale == [0] * 5 + [1] * 4 + [2] * 16 + [3] * 16
    assert laid.bit_at == [list(range(4, 25))]  # <boi> predicts scale 1, then every token its own place
    assert [i for i, n in enumerate(laid.next) if n != NONE] == [40]
    assert laid.next[40] == Special.EOI
    assert laid.at == 9  # 5 running places, then the finest grid's 4


def test_video_frames_are_chained_and_given_frames_have_no_loss():
    rng = np.random.default_rng(0)
    laid = lay(Sample("t2v", (text(rng, 1, False), vision(rng, 3, given=1))), SCALES)
    first = laid.visual_start[0]
    assert laid.ids[first - 1] == Special.BOV
    second = first + 36
    # the last token of frame 1's sum predicts the first scale of frame 2, whose scales 2 and 3 are predicted in place
    assert laid.bit_at[0] == [second - 1, *range(second, second + 20), second + 35, *range(second + 36, second + 56)]
    assert [p[0] for p in laid.position[first:]] == [3.0] * 36 + [4.0] * 36 + [5.0] * 36
    assert laid.next[-1] == Special.EOV


def test_layout_of_audio_both_ways():
    rng = np.random.default_rng(0)
    spoken = lay(Sample("t2a", (text(rng, 2, False), audio(rng, 4, True))), SCALES)
    assert spoken.code_at == [[3, 4, 5, 6, 7]]  # <boa> and each frame predict the next one, the last the end
    batch = packed([spoken.sample])
    assert batch.code[-1].tolist() == [SIZES.codes, NONE, NONE]
    assert torch.equal(batch.code[:-1], torch.from_numpy(spoken.sample.segments[1].codes))
    heard = lay(Sample("a2t", (audio(rng, 4, False), text(rng, 2, True))), SCALES)
    assert heard.code_at == []
    assert heard.ids[-4:-2] == [Special.EOA, Special.SEP]
    assert heard.next[-1] == Special.EOS


def test_centres_of_all_scales_agree():
    for h, w in SCALES:
        assert np.allclose(np.mean(grid(h, w, (4, 4), 10.0, 2), 0), (12.0, 11.5, 11.5))


def test_visible_pairs_follow_the_closed_form():
    for one in samples():
        batch = packed([one])
        sizes = np.bincount(batch.group[0])
        assert int(batch.visible().sum()) == sum(int(n) * int(sizes[: g + 1].sum()) for g, n in enumerate(sizes))


def test_uni_rope_with_equal_coordinates_is_rope():
    rotary, x, at = Rotary(16, 1e4), torch.randn(1, 2, 5, 16), torch.arange(5.0)
    got = rotate(x, rotary(at[None, :, None].expand(1, 5, 3)))
    angle = at[:, None] * 1e4 ** (-torch.arange(8) / 8)
    first, second = x.chunk(2, -1)
    want = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    assert torch.equal(got, want)


def test_scores_do_not_change_when_all_positions_move():
    rotary, q, k = Rotary(24, 1e6), torch.randn(1, 2, 7, 24).double(), torch.randn(1, 2, 7, 24).double()
    rotary.double()
    place = torch.rand(1, 7, 3).double() * 10

    def score(at):
        return rotate(q, rotary(at)) @ rotate(k, rotary(at)).transpose(-1, -2)

    moved = score(place + torch.tensor([5.0, -3.0, 11.0]).double())
    assert torch.allclose(score(place), moved, atol=1e-12)


@pytest.mark.parametrize("index", range(7))
def test_no_group_sees_a_later_one(index):
    """The gradient of what a group predicts, with respect to inputs of later groups, is exactly zero; of its own it is not."""
    model, batch = small_model().double(), packed([samples()[index]])
    batch = replace(batch, position=batch.position.double(), visual=batch.visual.double())
    if batch.seen:
        cnn, pixels = batch.seen[0].cnn.double(), batch.seen[0].pixels.double()
        batch = replace(batch, seen=(replace(batch.seen[0], cnn=cnn, pixels=pixels),))
    x = model.embed(batch).detach().requires_grad_()
    model.embed = lambda _: x
    group = batch.group[0]
    for at in range(0, len(group), 3):
        out = model(batch)
        (grad,) = torch.autograd.grad(out.state[at].sum(), x)
        seen = grad[0].abs().sum(-1) > 0
        assert not seen[group > group[at]].any()
        assert seen[group <= group[at]].all()


def test_a_code_changes_only_later_levels_at_its_place():
    """Section 2.4's argument for depth-wise prediction: exactly zero change for levels up to the code's own, and before it."""
    model, batch = small_model(), packed([samples()[5]])
    with torch.no_grad():
        before = model(batch)
        place = 2
        for q in range(SIZES.levels):
            code = batch.code.clone()
            code[place, q] = (code[place, q] + 1) % SIZES.codes
            after = model(replace(batch, code=code))  # the frame as fed back; the frame as input stays
            for level in range(SIZES.levels):
                a, b = before.codes[level], after.codes[level]
                assert torch.equal(a[:place], b[:place])
                assert torch.equal(a[place], b[place]) == (level <= q)


@pytest.mark.parametrize("row", [128, 192, 400])
def test_packed_equals_alone(row):
    """Largest difference seen 2e-6."""
    model, given = small_model(), samples()
    with torch.no_grad():
        together = outputs(model(packed(given, row)))
        alone = [outputs(model(packed([one]))) for one in given]
    order = [i for members in first_fit([len(lay(one, SCALES)) for one in given], row) for i in members]
    for name in ("text",):
        assert torch.allclose(together[name], torch.cat([alone[i][name] for i in order]), atol=1e-5)
    # bits come grouped by the images' shape: one image, then one video
    assert torch.allclose(together["bits"], torch.cat([alone[1]["bits"], alone[3]["bits"]]), atol=1e-5)
    for q in range(SIZES.levels):
        assert torch.allclose(together[f"codes{q}"], alone[5][f"codes{q}"], atol=1e-5)


def test_teacher_forcing_inputs_are_what_earlier_bits_amount_to():
    rng, bits = np.random.default_rng(3), quantiser()
    one = Sample("t2i", (vision(rng, 1),))
    batch, acc, at, seen = packed([one]), None, 0, 0
    for k, (h, w) in enumerate(SCALES):
        chosen = batch.bits[at : at + h * w].view(1, h, w, -1)
        at += h * w
        acc = bits.accumulate(acc, chosen, k)
        size = SCALES[min(k + 1, 2)]
        fed = bits.resized(acc, min(k + 1, 2)).reshape(-1, SIZES.bits)
        assert torch.allclose(batch.visual[seen : seen + size[0] * size[1]], fed, atol=1e-6)
        seen += size[0] * size[1]


def test_multi_token_prediction_has_the_second_next_token_of_text_only():
    for one in samples():
        batch = packed([one])
        n, f = batch.next[0].tolist(), batch.further[0].tolist()
        for i, target in enumerate(f):
            both = i + 1 < len(n) and n[i] != NONE and n[i + 1] != NONE and batch.kind[0, i + 1] == Kind.TEXT
            assert target == (n[i + 1] if both else NONE)
    model, batch = small_model(), packed(samples())
    out = model(batch, further=True)
    assert out.further.shape == (int((batch.further >= 0).sum()), SIZES.vocabulary)


@pytest.mark.parametrize("index", range(7))
def test_multi_token_prediction_sees_the_next_token_and_no_later_one(index):
    """The gradient of what is predicted after next: with respect to the next token it is not zero, to later ones exactly."""
    model, batch = small_model().double(), packed([samples()[index], samples(1)[index]], 400)
    batch = replace(batch, position=batch.position.double(), visual=batch.visual.double())
    if batch.seen:
        cnn, pixels = batch.seen[0].cnn.double(), batch.seen[0].pixels.double()
        batch = replace(batch, seen=(replace(batch.seen[0], cnn=cnn, pixels=pixels),))
    x = model.embed(batch).detach().requires_grad_()
    words = model.embed_text(batch.next.clamp(min=0)).detach().requires_grad_()
    rows = (batch.further >= 0).any(1)
    model.embed = lambda _: x
    model.mtp.register_forward_pre_hook(lambda _, given: (given[0], words[rows], *given[2:]))
    predicts = (batch.further >= 0).nonzero()
    out = model(batch, further=True)
    for n, (row, at) in enumerate(predicts.tolist()):
        by_input, by_word = torch.autograd.grad(out.further[n].sum(), (x, words), retain_graph=True, allow_unused=True)
        seen, heard = by_input.abs().sum(-1) > 0, by_word.abs().sum(-1) > 0
        mine = (batch.doc[row] == batch.doc[row, at]) & batch.valid[row]
        assert not seen[row][~mine | (batch.group[row] > batch.group[row, at])].any()
        assert seen[row][mine & (batch.group[row] <= batch.group[row, at])].all()
        assert heard[row, at]
        assert not heard[row][~mine | (batch.group[row] > batch.group[row, at])].any()
    assert bool(len(predicts)) == (index in (0, 2, 4, 6))


def test_separated_routing_keeps_modalities_apart():
    own = separated(8)
    assert own.sum(0).tolist() == [1] * 8
    assert sorted(own.sum(1).tolist()) == [2, 3, 3]
    model, batch = small_model(SMALL.with_values({"routing": "separated", "active": 2})), packed(samples())
    with torch.no_grad():
        out = model(batch)
    for places, told in out.routed:
        allowed = own[batch.modality.flatten()[places]]
        assert allowed.gather(1, told.experts.clamp(min=0))[told.experts >= 0].all()


def test_scales_are_weighted_by_the_square_root_of_their_area():
    scale = torch.tensor([0] + [1] * 4 + [2] * 16)
    logits, bits = torch.randn(21, 6), torch.rand(21, 6) < 0.5
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, bits.float(), reduction="none").mean(1)
    weight = torch.tensor([4.0] + [2.0] * 4 + [1.0] * 16)
    assert torch.allclose(bit_loss(logits, bits, scale, SCALES), (each * weight).sum() / weight.sum())


def test_fewer_layers_than_levels_are_refused():
    with pytest.raises(ValueError, match="layers: got 2"):
        small_model(SMALL.with_values({"layers": 2}))


def test_a_long_video_is_looked_at_in_windows():
    rng = np.random.default_rng(0)
    laid = lay(Sample("v2t", (look(rng, 8), text(rng, 2, True))), SCALES)
    assert laid.kind.count(Kind.LOOK) == 2 * 16
    with pytest.raises(ValueError, match="multiple of 4"):
        lay(Sample("v2t", (look(rng, 6), text(rng, 2, True))), SCALES)
