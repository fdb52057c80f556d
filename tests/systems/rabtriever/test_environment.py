"""The robot environment: it is a proper gymnasium environment, plans solve it, chance does not."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from raysys.data.datasets import DataError
from raysys.data.plans import progress
from raysys.systems.rabtriever.environment import ID, SkillRetrieval, queries_of, register, success_rate


def oracle(env):
    number = {skill.text: i for i, skill in enumerate(env.skills)}
    known = {}
    for errand in env.errands:
        steps = errand.plan()
        known |= {progress(errand.text, steps[:i]): number[step] for i, step in enumerate(steps)}
    return lambda texts: np.eye(len(number), dtype=np.float32)[[known[text] for text in texts]]


def chance(env, seed=0):
    rng = np.random.default_rng(seed)
    return lambda texts: rng.random((len(texts), len(env.skills))).astype(np.float32)


def asked(text):
    """The instruction in an observation."""
    return text.split("; asked: ")[1].split("; before: ")[0]


def test_gymnasium_finds_nothing_to_warn_of():
    register()
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ID, render_mode="ansi").unwrapped)


def test_a_plan_solves_every_errand_without_the_allow_list_and_chance_solves_none_or_few():
    env = SkillRetrieval()
    assert success_rate(oracle(env), len(env.errands), 0, env, allow=False).tolist() == [1.0] * len(env.errands)
    assert success_rate(chance(env), 100, 0, env).mean() < 0.05
    assert success_rate(chance(env), 100, 0, env, allow=False).mean() < 0.05


def test_saycans_plans_solve_their_own_instructions(shared_data):
    folder = shared_data / "saycan"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    env = SkillRetrieval(str(folder))
    for number, errand in enumerate(env.errands):  # one by one: an instruction occurs twice, with different plans
        env.reset(options={"errand": number})
        texts = [skill.text for skill in env.skills]
        for step in errand.plan():
            _, reward, done, _, info = env.step(texts.index(step))
        assert (reward, done, info["success"]) == (1.0, True, True)
    assert len(env.errands) >= 16
    assert queries_of(env).documents == tuple(texts)


def test_a_skill_that_cannot_be_done_is_refused_costs_reward_and_does_nothing():
    env = SkillRetrieval(limit=3)
    first, info = env.reset(options={"errand": 0})
    blocked = int(np.flatnonzero(~info["feasible"])[0])
    text, reward, done, late, info = env.step(blocked)
    assert (text, reward, done, late) == (first, -0.05, False, False)
    assert info["refused"] == env.world.refusal(env.skills[blocked]) != ""
    env.step(blocked)
    assert env.step(blocked)[3] is True


def test_done_too_early_ends_the_episode_without_reward():
    env = SkillRetrieval()
    env.reset(seed=3)
    done = [skill.text for skill in env.skills].index("done")
    _, reward, ended, late, info = env.step(done)
    assert (reward, ended, late, info["success"]) == (0.0, True, False, False)


def test_the_seed_decides_the_errand_and_observations_lie_in_their_space():
    a, b = SkillRetrieval(), SkillRetrieval()
    assert [a.reset(seed=i)[0] for i in range(5)] == [b.reset(seed=i)[0] for i in range(5)]
    score = chance(a)
    for _ in range(40):
        text, info = a.reset()
        over = False
        while not over:
            assert a.observation_space.contains(text)
            row = np.where(info["feasible"], score([text])[0], -1)
            text, _, done, late, info = a.step(int(row.argmax()))
            over = done or late


def test_what_to_train_on_has_the_actions_as_documents_and_its_own_instructions_as_test():
    env = SkillRetrieval("skills(seed=2)")
    data = queries_of(env)
    assert data.documents == tuple(skill.text for skill in env.skills)
    told = {errand.text for errand in env.errands}
    assert {asked(text) for text in data.test.texts} <= told
    assert told.isdisjoint(asked(text) for text in data.train.texts)
    step = oracle(env)(list(data.test.texts)).argmax(1)
    assert step.tolist() == [right[0] for right in data.test.relevant]


def test_episodes_are_in_the_order_of_the_seed_and_leave_the_environment_as_it_was():
    env = SkillRetrieval()
    before = env.reset(seed=1)[0]
    a, b = (success_rate(oracle(env), 5, 7, env) for _ in range(2))
    assert np.array_equal(a, b)
    assert env.observation() == before
    asked = []
    success_rate(lambda texts: asked.append(texts) or oracle(env)(texts), 8, 7, env)
    assert len(set(asked[0])) == 8


def test_no_errand_is_carried_out_twice_however_many_episodes_are_asked_for():
    env = SkillRetrieval("skills(test=40)")
    asked = []
    met = success_rate(lambda texts: asked.append(texts) or oracle(env)(texts), len(env.errands) + 50, 7, env)
    assert met.shape == (len(env.errands),)
    assert len(set(asked[0])) == len(asked[0]) == len(env.errands)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SkillRetrieval(limit=0), ValueError, "limit: got 0"),
        (lambda: SkillRetrieval("rationale"), DataError, "expected skills"),
        (lambda: SkillRetrieval("/no/folder"), DataError, "allowed are rationale, facts, skills"),
        (lambda: SkillRetrieval().reset(options={"errand": 9999}), ValueError, "errand: got 9999"),
        (lambda: success_rate(chance(SkillRetrieval()), 0, 0), ValueError, "episodes: got 0"),
        (lambda: success_rate(lambda texts: np.zeros((1, 3), np.float32), 1, 0), ValueError, r"got shape \(1, 3\)"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
