"""The environments are proper gymnasium environments, their references are right, and held-out questions are held out."""

import warnings
from zlib import crc32

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from raysys.data.multimodal_embedded import chosen, digits
from raysys.systems.ernie.environments import ENVIRONMENTS, make, register
from raysys.systems.ernie.environments.arithmetic import held_out
from raysys.systems.ernie.environments.registered import IDS

HARDER = {
    "arithmetic": {"terms": 3, "below": 20},
    "count": {"kinds": 3},
    "tones": {"tones": 3},
    "nextframe": {"candidates": 4, "frames": 2, "turns": True},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("harder", [False, True])
def test_gymnasium_finds_nothing_to_warn_of(name, harder):
    register()
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(IDS[name], render_mode="ansi", **(HARDER[name] if harder else {})).unwrapped)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_trace_is_right_and_other_answers_are_not(name):
    env = make(name, **HARDER[name])
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        assert observation in env.observation_space
        assert env.judge(info["trace"]) == env.judge(f"  {info['trace']} ") == 1
        wrong = "" if seed % 2 else info["trace"] + " x"
        _, reward, ended, cut, told = env.step(wrong)
        assert (reward, ended, cut, told["success"]) == (0.0, True, False, False)
        with pytest.raises(RuntimeError, match="answered"):
            env.step(info["answer"])


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_question_is_a_function_of_seed_and_split(name):
    first, second = make(name), make(name)
    second.reset(seed=99)
    for split in ("train", "test"):
        one, told = first.reset(seed=4, options={"split": split})
        two, again = second.reset(seed=4, options={"split": split})
        assert told == again
        for a, b in zip(_arrays(one), _arrays(two), strict=True):
            np.testing.assert_array_equal(a, b)
    train, test = (make(name, split=split).reset(seed=4)[0] for split in ("train", "test"))
    assert any(not np.array_equal(a, b) for a, b in zip(_arrays(train), _arrays(test), strict=True))


@pytest.mark.parametrize("name", ["count", "nextframe"])
def test_held_out_questions_do_not_repeat_the_answers_of_training(name):
    env = make(name)
    pairs = [
        [env.reset(seed=s, options={"split": split})[1]["trace"] for split in ("train", "test")] for s in range(60)
    ]
    assert sum(a == b for a, b in pairs) < 30  # chance gives a quarter or less


def _arrays(observation):
    return [np.asarray(part) for part in (observation.values() if isinstance(observation, dict) else [observation])]


def test_held_out_sums_are_never_asked_in_training():
    env = make("arithmetic")
    train = {env.reset(seed=s)[0] for s in range(300)}
    test = {env.reset(seed=s, options={"split": "test"})[0] for s in range(300)}
    assert not train & test
    for text in train | test:
        a, b, *rest = map(int, text[:-1].split("+"))
        key = "+".join(map(str, [min(a, b), max(a, b), *rest]))
        assert (text in test) == held_out([a, b, *rest]) == held_out([b, a, *rest]) == (crc32(key.encode()) % 5 == 0)
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.35  # of the 100 sums of two digits about a fifth
    text, info = env.reset(seed=0)
    a, b = map(int, text[:-1].split("+"))
    assert int(info["answer"]) == a + b


def test_counted_digits_are_on_the_canvas_and_held_out_ones_are_other_handwriting():
    pictures, labels = digits()
    env = make("count", kinds=3)
    for split in ("train", "test"):
        known = {pictures[i].tobytes(): labels[i] for i in chosen(split == "test")}
        for seed in range(30):
            shown, info = env.reset(seed=seed, options={"split": split})
            found = []
            for top in (0, 8):
                for left in (0, 8):
                    part = np.ascontiguousarray(shown["image"][0, top : top + 8, left : left + 8])
                    if part.any():
                        found.append(known[part.tobytes()])
            asked = ("zero", "one", "two").index(shown["question"].split()[-1].rstrip("?"))
            assert info["answer"] == str(found.count(asked))
            assert len(info["trace"].split()) == len(found) + 1


def test_the_tones_can_be_read_off_the_wave():
    env = make("tones", tones=2)
    right = 0
    for seed in range(40):
        wave, info = env.reset(seed=seed)
        words = []
        for part in np.split(wave, 2):
            pitch = [np.abs(np.fft.rfft(piece * np.hanning(512))).argmax() * 4000 / 512 for piece in np.split(part, 4)]
            words.append("low" if np.median(pitch) < 600 else "high")
            bend = np.log2(pitch[-1] / pitch[0])
            words.append("rising" if bend > 0.35 else "falling" if bend < -0.35 else "steady")
        right += " ".join(words) == info["answer"]
    assert right >= 38  # 40 of 40 here: the question can be answered


@pytest.mark.parametrize("turns", [False, True])
def test_the_right_frame_goes_on_and_the_wrong_ones_do_not(turns):
    env = make("nextframe", candidates=4, turns=turns)
    for seed in range(40):
        shown, info = env.reset(seed=seed)
        centre = [_centre(frame) for frame in shown["frames"]]
        step = centre[-1] - centre[-2]
        np.testing.assert_allclose(centre[1] - centre[0], step, atol=1e-4)
        right = int(info["answer"]) - 1
        moves = [_centre(frame) - centre[-1] for frame in shown["candidates"]]
        np.testing.assert_allclose(moves[right], step, atol=1e-4)
        least = 1.5 if turns else 3.5
        assert all(np.abs(move - step).max() > least for i, move in enumerate(moves) if i != right)
        word = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[
            tuple(np.sign(step.round()).astype(int))
        ]
        assert info["trace"].split()[0] == word


def _centre(frame):
    grey = frame[0].astype(float)
    rows, columns = np.indices(grey.shape)
    return np.array([(rows * grey).sum(), (columns * grey).sum()]) / grey.sum()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("arithmetic", {"terms": 1}, "terms"), ("count", {"kinds": 11}, "kinds"), ("tones", {"tones": 0}, "tones: got 0"),
        ("nextframe", {"candidates": 5}, "candidates"), ("count", {"split": "dev"}, "split: got 'dev'"), ("chess", {}, "chess"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(name, options, says):
    with pytest.raises(ValueError, match=says):
        make(name, **options)
    with pytest.raises(ValueError, match="split"):
        make("arithmetic").reset(options={"split": "all"})
