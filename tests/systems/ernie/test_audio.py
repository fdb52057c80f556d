"""The lapped transform, the residual quantiser and the codec: exact where they are exact, then trained a little."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken_for_tests import SpokenJudge, ceiling
from torch import Tensor

from raysys.data.multimodal import Form, load_multimodal
from raysys.systems.ernie.judges import ToneJudge
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.audio_training import AudioLearner, report
from raysys.systems.ernie.tokenizers.lapped import Lapped
from raysys.systems.ernie.tokenizers.residual import ResidualQuantiser

SMALL = AudioSetting(hop=32, width=16, latent=8, codes=8, levels=3, bands=4, steps=5, batch=8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hop", [2, 16, 128])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_transform_is_orthogonal(hop: int, frames: int) -> None:
    lapped = Lapped(hop)
    matrix = lapped(torch.eye(hop * frames)).flatten(1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(hop * frames), atol=2e-6)
    sound = drawn(3, hop * frames)
    assert torch.allclose(lapped.inverse(lapped(sound)), sound, atol=1e-5)


def test_inner_frames_are_those_of_the_definition() -> None:
    """X[k] = sqrt(2/h) sum_n w[n] x[n] cos(pi/h (n + 1/2 - h/2)(k + 1/2)), w the sine window over 2 h samples."""
    hop = 16
    sound = drawn(5 * hop)
    n, k = torch.arange(2 * hop) + 0.5, torch.arange(hop) + 0.5
    basis = math.sqrt(2 / hop) * torch.cos(math.pi / hop * (n[None] - hop / 2) * k[:, None])
    window = torch.sin(math.pi / (2 * hop) * n)
    found = Lapped(hop)(sound)
    for t in range(1, 4):
        part = sound[t * hop - hop // 2 : (t + 1) * hop + hop // 2]
        assert torch.allclose(found[t], basis @ (window * part), atol=1e-5)


def test_the_alias_of_a_frame_cancels_against_the_next() -> None:
    """One frame alone does not give its samples back; with both neighbours it does (TDAC)."""
    hop, lapped, sound = 16, Lapped(16), drawn(5 * 16)
    found = lapped(sound)
    alone, three = torch.zeros_like(found), torch.zeros_like(found)
    alone[2], three[1:4] = found[2], found[1:4]
    inner = slice(2 * hop, 3 * hop)
    assert not torch.allclose(lapped.inverse(alone)[inner], sound[inner], atol=0.1)
    assert torch.allclose(lapped.inverse(three)[inner], sound[inner], atol=1e-5)


def test_an_error_of_coefficients_is_one_of_samples() -> None:
    lapped, sound, noise = Lapped(32), drawn(2, 256), drawn(2, 8, 32, seed=1)
    error = lapped.inverse(lapped(sound) + noise) - sound
    assert float(error.square().sum()) == pytest.approx(float(noise.square().sum()), rel=1e-5)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_error_never_rises_with_a_level(seed: int, size: float, levels: int) -> None:
    """For each vector and whatever codebooks, also for vectors unlike any that they have seen."""
    made = ResidualQuantiser(levels, 5, 3)
    made.observe(drawn(50, 3), seeded(seed))
    vectors = size * drawn(40, 3, seed=seed)
    codes = made.encode(vectors)
    errors = [vectors.square().sum(-1)] + [
        (vectors - made.decode(codes, k)).square().sum(-1) for k in range(1, levels + 1)
    ]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-6).all()


def test_code_zero_stays_nothing() -> None:
    made = ResidualQuantiser(3, 4, 2)
    for step in range(20):
        made.observe(drawn(30, 2, seed=step) + 5, seeded(step))
    assert not made.codebooks[:, 0].any()
    assert not made.decode(torch.zeros(1, 3, dtype=torch.long)).any()


def test_codes_are_the_nearest_vectors() -> None:
    made = ResidualQuantiser(1, 16, 4)
    made.observe(drawn(100, 4), seeded())
    vectors = drawn(50, 4, seed=1)
    apart = (vectors[:, None] - made.codebooks[0][None]).square().sum(-1)
    assert torch.equal(made.encode(vectors)[:, 0], apart.argmin(-1))


def test_codebooks_find_clusters() -> None:
    centres = torch.tensor([[4.0, 4.0], [-4.0, 4.0], [4.0, -4.0], [-4.0, -4.0]])
    made = ResidualQuantiser(1, 9, 2, momentum=0.8)
    for step in range(60):
        which = torch.randint(4, (200,), generator=seeded(step))
        made.observe(centres[which] + 0.1 * drawn(200, 2, seed=step), seeded(step))
    found = made.decode(made.encode(centres))
    assert torch.allclose(found, centres, atol=0.1)


def test_dead_codes_start_again_where_the_vectors_are() -> None:
    made = ResidualQuantiser(1, 8, 2, momentum=0.5)
    made.observe(drawn(100, 2), seeded())
    away = drawn(100, 2, seed=1) + 50  # all codes but the nearest one die
    for step in range(12):
        made.observe(away, seeded(step), restart=False)
    assert int((made.usage(made.encode(away)) > 0).sum()) <= 2
    for step in range(12):
        made.observe(away, seeded(step))
    assert int((made.usage(made.encode(away)) > 0).sum()) >= 6


def test_codebooks_are_a_function_of_what_was_observed() -> None:
    books = []
    for _ in range(2):
        made = ResidualQuantiser(2, 8, 3)
        for step in range(5):
            made.observe(drawn(20, 3, seed=step), seeded(step))
        books.append(made.codebooks)
    assert torch.equal(*books)


def test_shapes_and_gradients_of_the_codec() -> None:
    learner = AudioLearner(SMALL, 0.3 * drawn(20, 320))
    learner.before(0)
    codes = learner.module.encode(learner.waves[:2])
    assert codes.shape == (2, 10, 3)
    assert codes.dtype == torch.int64
    assert learner.module.decode(codes).shape == (2, 320)
    learner.loss(0, 1).backward()
    unused = [name for name, p in learner.module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_the_loss_changes_no_buffer() -> None:
    learner = AudioLearner(SMALL, 0.3 * drawn(20, 320))
    learner.before(0)
    before = {name: b.clone() for name, b in learner.module.named_buffers()}
    assert torch.equal(learner.loss(0, 0), learner.loss(0, 0))
    assert all(torch.equal(b, before[name]) for name, b in learner.module.named_buffers())


def test_meaning_reaches_the_first_level_only() -> None:
    """The semantic loss reads the first code's vector: other levels' codes do not change it."""
    codec = AudioLearner(SMALL, 0.3 * drawn(20, 320)).module
    codec.quantiser.observe(codec.latents(drawn(8, 320)), seeded())
    codes = codec.encode(drawn(1, 320))
    other = codes.clone()
    other[..., 1:] = (other[..., 1:] + 1) % 8
    assert torch.equal(codec.quantiser.decode(codes, 1), codec.quantiser.decode(other, 1))
    assert not torch.equal(codec.decode(codes), codec.decode(other))


def test_a_sine_has_the_log_magnitude_of_its_amplitude() -> None:
    codec = AudioCodec(AudioSetting())
    t = torch.arange(2048) / 4000
    told = codec.spectrum(torch.sin(2 * math.pi * 500 * t)[None])  # bin 32 exactly
    assert told.shape == (1, 16, 129)
    assert float(told[0, 8].max()) == pytest.approx(math.log(1.02), abs=1e-3)
    assert int(told[0, 8].argmax()) == 32
    assert torch.allclose(codec.pool.sum(0), torch.ones(16))
    assert (codec.pool.sum(1) > 0).all()


def test_a_saved_codec_gives_the_same_codes() -> None:
    learner = AudioLearner(SMALL, 0.3 * drawn(20, 320))
    learner.before(0)
    again = AudioCodec.of(learner.module.config)
    again.load_state_dict(learner.module.state_dict())
    assert torch.equal(again.encode(learner.waves), learner.module.encode(learner.waves))


def test_wrong_shapes_are_refused() -> None:
    codec = AudioCodec(SMALL)
    for call, told in (
        (lambda: codec.encode(drawn(2, 33)), "multiple of 32"),
        (lambda: codec.encode(drawn(64)), r"\(B, n\)"),
        (lambda: codec.decode(torch.zeros(1, 2, 4, dtype=torch.long)), "expected"),
        (lambda: codec.decode(torch.full((1, 2, 3), 8)), "0 to 7"),
        (lambda: codec.decode(torch.full((1, 2, 3), -1)), "0 to 7"),
        (lambda: codec.decode(torch.zeros(2, 3, dtype=torch.long)), "frames"),
        (lambda: Lapped(15), "even"),
        (lambda: Lapped(16)(drawn(17)), "multiple of 16"),
        (lambda: ResidualQuantiser(1, 1, 4), "at least 2"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def trained(setting: AudioSetting, waves: Tensor) -> AudioCodec:
    from raysys.runtime.train import TrainConfig, fit_here

    codec = AudioCodec(setting)
    codec.load_state_dict(fit_here(None, lambda device: AudioLearner(setting, waves, device=device), TrainConfig()))
    return codec


def test_tones_survive_the_codec() -> None:
    """250 narrow steps; the default setting (600) has SNR 6.3 dB, distance 1.7 dB, and all tones are judged right."""
    data = load_multimodal()
    setting = AudioSetting(steps=250, width=64)
    codec = trained(setting, torch.from_numpy(np.stack([x.wave for x in data.train("t2a")[:600]])))
    items = list(data.test("t2a")[:150])
    waves = np.stack([x.wave for x in items])
    told = report(codec, torch.from_numpy(waves))
    assert told["SNR"] > 1.5
    assert told["log-spectral distance"] < 4
    assert all(told[f"level {k} entropy"] > 4.5 for k in range(1, 5))  # of 6 bits
    assert all(told[f"level {k} unused"] <= 6 for k in range(1, 5))  # of 64
    with torch.no_grad():
        back = codec.reconstruct(torch.from_numpy(waves)).numpy()
    for original, rebuilt in ceiling(ToneJudge(), waves, back, [x.facts for x in items]).values():
        assert original == 1
        assert rebuilt > 0.9


@pytest.mark.slow
def test_speech_can_be_coded(shared_data: object) -> None:
    """Spoken digits at 8 kHz, 16 ms frames: SNR 3.9 dB, 41 % of digits read (72 % after 1200 steps; chance is 10 %)."""
    data = load_multimodal(f"{shared_data}/fsdd", form=Form(rate=8000, samples=4096))
    setting = AudioSetting(rate=8000, steps=300, spectral=1.0)
    codec = trained(setting, torch.from_numpy(np.stack([x.wave for x in data.train("t2a")])))
    items = list(data.test("t2a"))
    waves = np.stack([x.wave for x in items])
    told = report(codec, torch.from_numpy(waves))
    assert told["SNR"] > 2.5
    assert all(told[f"level {k} unused"] <= 6 for k in range(1, 5))
    with torch.no_grad():
        back = codec.reconstruct(torch.from_numpy(waves)).numpy()
    judge = SpokenJudge(list(data.train("a2t")))
    original, rebuilt = ceiling(judge, waves, back, [{"digit": x.facts["digit"]} for x in items])["digit"]
    assert original > 0.94
    assert rebuilt > 0.2
