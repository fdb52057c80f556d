"""Judges agree with the truth on real held-out data, and say so where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken_for_tests import SpokenJudge, agreement, ceiling

from raysys.data.multimodal import Form, load_multimodal
from raysys.systems.ernie.judges import (
    ToneJudge,
    digit_judge,
    facts_of,
)

DATA = load_multimodal()


def frames(task: str, count: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    items = list(DATA.test(task)[:count])
    return np.stack([x.frames for x in items]), [dict(x.facts) for x in items]


def test_digits_of_held_out_images_are_read() -> None:
    shown, truth = frames("t2i", 1440)
    told = agreement(digit_judge()(shown), truth)
    assert told["digit"] > 0.975  # 0.986
    assert told["place"] == 1


def test_digits_of_held_out_videos_are_read() -> None:
    shown, truth = frames("t2v", 400)
    told = agreement(digit_judge()(shown), truth)
    assert told["digit"] > 0.975  # 0.990
    assert told["direction"] == 1


def test_other_canvases_and_colour_make_no_difference() -> None:
    form = Form(height=24, width=32, channels=3)
    items = list(load_multimodal(form=form).test("t2i")[:300])
    told = agreement(digit_judge()(np.stack([x.frames for x in items])), [x.facts for x in items])
    assert told["digit"] > 0.96
    assert told["place"] == 1


def test_noise_is_judged_at_chance() -> None:
    """A judge must not find what is not there: 10 digits, so a tenth of the truth is met by chance."""
    _, truth = frames("t2i", 600)
    noise = np.random.default_rng(0).uniform(size=(600, 1, 1, 16, 16)).astype(np.float32)
    assert agreement(digit_judge()(noise), truth)["digit"] < 0.16  # standard error 0.012
    blank = digit_judge()(np.zeros((2, 4, 1, 16, 16), np.float32))
    assert set(blank[0]) == {"digit", "place", "direction"}


@pytest.mark.parametrize("rate", [4000, 8000])
def test_tones_are_told_apart(rate: int) -> None:
    items = list(load_multimodal(form=Form(rate=rate, samples=2048 * rate // 4000)).test("t2a")[:300])
    told = agreement(ToneJudge(rate)(np.stack([x.wave for x in items])), [x.facts for x in items])
    assert told == {"register": 1, "shape": 1}


@given(st.floats(120, 1800))
@settings(max_examples=40, deadline=None)
def test_the_track_is_the_frequency(hertz: float) -> None:
    wave = np.sin(2 * np.pi * hertz * np.arange(2048) / 4000).astype(np.float32)[None]
    track, _ = ToneJudge().track(wave)
    assert np.abs(track - hertz).max() < 2


def test_spoken_digits_are_read(shared_data: object) -> None:
    data = load_multimodal(f"{shared_data}/fsdd")
    judge, test = SpokenJudge(list(data.train("a2t"))), list(data.test("a2t"))
    told = agreement(judge(np.stack([x.wave for x in test])), [{"digit": x.facts["digit"]} for x in test])
    assert told["digit"] > 0.94  # 0.98 of 150


@pytest.mark.parametrize("task", ["t2i", "t2v", "t2a"])
def test_captions_claim_the_facts_of_their_item(task: str) -> None:
    for item in DATA.train(task)[:200]:
        assert facts_of(item.text) == item.facts


def test_words_that_claim_nothing() -> None:
    assert facts_of("") == {}
    assert facts_of("the weather is steady") == {"shape": "steady"}
    assert facts_of("a Seven, at the TOP left!") == {"digit": "7", "place": "top left"}
    assert facts_of("left") == {}
    assert facts_of("a one or a seven moving left") == {"digit": "several", "direction": "left"}


def test_agreement_counts_missing_facts_as_wrong() -> None:
    truth = [{"digit": "1", "place": "x"}, {"digit": "2"}]
    assert agreement([{"digit": "1"}, {"digit": "2"}], truth) == {"digit": 1.0, "place": 0.0}
    assert agreement([{"digit": "3", "place": "x"}, {}], truth) == {"digit": 0.0, "place": 1.0}
    for told, against in (([], []), ([{}], truth)):
        with pytest.raises(ValueError, match="as many"):
            agreement(told, against)


def test_ceilings_are_of_originals_and_of_what_is_left_of_them() -> None:
    shown, truth = frames("t2i", 100)
    told = ceiling(digit_judge(), shown, np.zeros_like(shown), truth)
    assert told["place"][0] == 1
    assert told["place"][1] < 0.5


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="frames"):
        digit_judge()(np.zeros((2, 1, 16, 16), np.float32))
    with pytest.raises(ValueError, match="waves"):
        ToneJudge()(np.zeros((2, 100), np.float32))
    with pytest.raises(ValueError, match="two or more"):
        SpokenJudge(list(DATA.train("t2a")[:5]))
    assert digit_judge()(np.zeros((0, 1, 1, 16, 16), np.float32)) == []
