"""The visual tokenizer: images are videos of one frame, time is causal, chunks are the whole; and it can be trained."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from raysys.data.multimodal import load_multimodal
from raysys.runtime.config import UserError
from raysys.systems.ernie.tokenizers.visual import CausalConv, VisualSetting, VisualTokenizer
from raysys.systems.ernie.tokenizers.visual_training import VisualLearner, report

SMALL = VisualSetting(width=8, bits=6, image_steps=12, video_steps=6, batch=8)


CHUNKS = [(1, (1, 1, 1, 1, 1)), (1, (2, 3)), (1, (3, 2)), (2, (1, 2, 2)), (2, (3, 2)), (4, (1, 4))]


def made(moving: bool = True, tau: int = 1, channels: int = 1, height: int = 16, width: int = 16) -> VisualTokenizer:
    """An untrained codec; `moving`: with kernels over time that are not zero."""
    torch.manual_seed(0)
    codec = VisualTokenizer(SMALL.with_values({"time_stride": tau}), channels, height, width)
    if moving:
        for module in codec.modules():
            if isinstance(module, CausalConv) and module.before is not None:
                torch.nn.init.normal_(module.before, std=0.1)
    return codec


def clip(frames: int = 5, channels: int = 1, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(2, frames, channels, height, width, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_the_convolution_is_a_padded_3d_convolution(span: int) -> None:
    torch.manual_seed(0)
    conv = CausalConv(3, 5, 3, span)
    if conv.before is not None:
        torch.nn.init.normal_(conv.before)
    x = torch.randn(2, 6, 3, 7, 7)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (1, 1, 1, 1, span - 1, 0))
    expected = torch.nn.functional.conv3d(padded, conv.kernel, conv.bias).transpose(1, 2)
    assert torch.allclose(conv(x), expected, atol=1e-4)


def test_a_fresh_codec_treats_frames_one_by_one() -> None:
    codec, x = made(moving=False), clip()
    each = torch.cat([codec.encode(x[:, t : t + 1]) for t in range(5)], 1)
    assert close(codec.encode(x), each)
    assert close(codec.decode(each), torch.cat([codec.decode(each[:, t : t + 1]) for t in range(5)], 1))


def test_training_on_images_leaves_time_alone() -> None:
    learner = VisualLearner(SMALL.with_values({"video_steps": 0}), clip()[:, 0])
    optimizer = learner.optimizer()
    for step in range(3):
        learner.before(step)
        learner.loss(step, 0).backward()
        optimizer.step()
    fresh = VisualTokenizer.of(learner.module.config)
    assert not close(learner.module.coarse.now, fresh.coarse.now)
    assert learner.module.coarse.before is not None
    assert not learner.module.coarse.before.any()
    x = clip()
    each = torch.cat([learner.module.encode(x[:, t : t + 1]) for t in range(5)], 1)
    assert close(learner.module.encode(x), each)


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_later_frames_change_nothing_before(tau: int) -> None:
    codec, x = made(tau=tau), clip()
    for t in range(1, 5):
        other = x.clone()
        other[:, t:] = torch.rand(other[:, t:].shape)
        known = len(range(0, t, tau))  # latent frames made of frames before t
        a, b = codec.encode(x), codec.encode(other)
        assert close(a[:, :known], b[:, :known])
        assert not close(a[:, known:], b[:, known:])
        mixed = torch.cat([a[:, :known], b[:, known:]], 1)
        shown = 1 + (known - 1) * tau
        assert close(codec.decode(a)[:, :shown], codec.decode(mixed)[:, :shown])


@pytest.mark.parametrize(("tau", "chunks"), CHUNKS)
def test_chunks_are_the_whole(tau: int, chunks: tuple[int, ...]) -> None:
    codec, x, past, found, at = made(tau=tau), clip(), None, [], 0
    for n in chunks:
        latents, past = codec.encode_chunk(x[:, at : at + n], past)
        found.append(latents)
        at += n
    whole = codec.encode(x)
    assert close(torch.cat(found, 1), whole)
    past, back = None, []
    for latents in found:
        frames, past = codec.decode_chunk(latents, past)
        back.append(frames)
    assert close(torch.cat(back, 1), codec.decode(whole))
    assert codec.decode(whole).shape == x.shape


@pytest.mark.parametrize("tau", [1, 2])
def test_an_image_is_a_video_of_one_frame(tau: int) -> None:
    codec, x = made(tau=tau), clip()
    assert close(codec.encode(x[:, :1]), codec.encode(x)[:, :1])
    assert close(codec.features(x)[:, 2:3], codec.features(x[:, 2:3]))


@pytest.mark.parametrize(
    ("height", "width", "channels"), [(16, 16, 1), (8, 8, 3), (24, 16, 3), (20, 12, 1), (32, 32, 3)]
)
def test_other_canvases(height: int, width: int, channels: int) -> None:
    codec = made(channels=channels, height=height, width=width)
    x = clip(2, channels, height, width)
    z = codec.encode(x)
    assert z.shape == (2, 2, height // 4, width // 4, 6)
    assert codec.scales[-1] == (height // 4, width // 4)
    assert codec.features(x).shape == (2, 2, height // 2, width // 2, codec.feature_width)
    back = codec.reconstruct(x)
    assert back.shape == x.shape
    assert 0 <= back.min() <= back.max() <= 1


def test_gradients_pass_the_quantiser() -> None:
    codec = made()
    loss, told = codec.loss(clip())
    loss.backward()
    assert set(told) == {"reconstruction", "commitment", "entropy"}
    unused = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_the_loss_changes_no_buffer() -> None:
    learner = VisualLearner(SMALL, clip()[:, 0], clip())
    learner.before(0)
    before = {name: b.clone() for name, b in learner.module.named_buffers()}
    for step in (0, 15):
        a = learner.loss(step, 1)
        assert torch.equal(a, learner.loss(step, 1))
    assert all(torch.equal(b, before[name]) for name, b in learner.module.named_buffers())


def test_a_saved_codec_gives_the_same_latents() -> None:
    learner = VisualLearner(SMALL, clip()[:, 0], clip())
    learner.before(0)
    again = VisualTokenizer.of(learner.module.config)
    again.load_state_dict(learner.module.state_dict())
    assert torch.equal(again.encode(clip()), learner.module.encode(clip()))


def test_wrong_shapes_are_refused() -> None:
    for frames in (clip()[0], clip(channels=3), clip(height=20)):
        with pytest.raises(ValueError, match="expected"):
            made().encode(frames)
    with pytest.raises(ValueError, match="multiple of 2"):
        made(tau=2).encode(clip(4))
    with pytest.raises(ValueError, match="multiples of 4"):
        made(height=18)
    with pytest.raises(UserError):
        VisualSetting.of({"bits": 63})


def test_a_little_training_reconstructs_held_out_digits() -> None:
    """The default setting reaches 26.8 dB on these (and 25.5 dB on videos)."""
    from raysys.runtime.train import TrainConfig, fit_here

    data = load_multimodal()
    images = torch.from_numpy(np.stack([x.frames[0] for x in data.train("t2i")[:2000]]))
    setting = VisualSetting(image_steps=150, video_steps=0, width=16, batch=32)
    state = fit_here(None, partial(_learner, setting, images), TrainConfig())
    codec = VisualTokenizer(setting)
    codec.load_state_dict(state)
    test = torch.from_numpy(np.stack([x.frames for x in data.test("t2i")[:200]]))
    told = report(codec, test)
    assert told["PSNR"] > 19
    assert told["bit entropy 4 x 4"] > 0.9
    flat = -10 * float((test - images.mean(0)).square().mean().log10())
    assert told["PSNR"] > flat + 6


def _learner(setting: VisualSetting, images: Tensor, device: str) -> VisualLearner:
    return VisualLearner(setting, images, device=device)
