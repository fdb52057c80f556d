"""The loop on a tabular policy: exact log-probabilities, schedules, resumption, hints, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from policies_for_tests import Tabular, decode, in_process, questions, setting

from raysys.systems.ernie.rl import objective
from raysys.systems.ernie.rl.loop import Loop
from raysys.systems.ernie.rl.policy import mismatched
from raysys.systems.ernie.rl.questions import turns_of
from raysys.systems.ernie.rl.rollout import Call, InProcess, Worker, start

BUFFER = {"batch": 4, "group": 4, "depth": 2, "calls": 2}
MIXED = {"batch": 2, "group": 2, "depth": 3, "slots": 3, "calls": 2}
"""Few slots and small groups: many answers are under way when an iteration ends."""


def loop(given=None, hands=None):
    given = given or setting()
    return Loop(Tabular(8), hands or in_process(given), questions(), given)


def bits(one):
    tensors, meta = one.state()
    return {name: np.asarray(value).tobytes() for name, value in tensors.items()}, meta


def drawn_batches(monkeypatch, one, iterations):
    """What each iteration trained on."""
    found, update = [], one.updater.update

    def kept(t, queries):
        found.append(queries)
        return update(t, queries)

    monkeypatch.setattr(one.updater, "update", kept)
    for _ in range(iterations):
        one.iterate()
    return found


def test_it_learns_the_right_first_words():
    one = loop(setting(iterations=30))
    before = one.evaluate()
    rows = [one.iterate() for _ in range(30)]
    after = one.evaluate()
    assert after["drawn"].mean() > before["drawn"].mean() + 0.3  # .28 -> .94
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    assert one.iteration == 30
    with pytest.raises(IndexError):
        one.iterate()


def test_behaviour_log_probabilities_are_those_of_each_tokens_own_weights(monkeypatch):
    """A query's answers may begin under older weights and go on under newer ones."""
    given = setting(iterations=20, buffer=MIXED)
    one = loop(given)
    versions, iterate = {}, one.iterate

    def remembered():
        versions[one.iteration] = one.updater.policy.module.logits.detach().clone()
        return iterate()

    monkeypatch.setattr(one, "iterate", remembered)
    mixed = 0
    for queries in drawn_batches(monkeypatch, one, 20):
        for query in queries:
            for answer in query.answers:
                assert (np.diff(answer.version) >= 0).all()
                mixed += len(set(answer.version)) > 1
                for place, (token, value, version) in enumerate(
                    zip(answer.ids, answer.logp, answer.version, strict=True)
                ):
                    spread = versions[version][query.asked.prompt, place].log_softmax(-1)
                    assert value == pytest.approx(float(spread[token]), abs=1e-6)
    assert mixed > 5  # some answers were continued under other weights


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_batch_t_has_the_queries_d_t_and_depth_1_has_no_old_tokens(monkeypatch, depth):
    one = loop(setting(iterations=6, buffer={**BUFFER, "depth": depth}))
    expected = [[one.questions.train[one.questions.of_query(q)] for q in range(4 * t, 4 * t + 4)] for t in range(6)]
    for t, queries in enumerate(drawn_batches(monkeypatch, one, 6)):
        assert [query.asked for query in queries] == expected[t]
        ages = [t - v for query in queries for one in query.answers for v in one.version]
        assert min(ages) >= 0
        assert max(ages) <= depth - 1


def test_depth_1_is_the_synchronous_loop_to_the_last_bit(monkeypatch):
    """Against the plain loop: draw the whole batch, then update."""
    given = setting(buffer={**BUFFER, "depth": 1})
    one, hands = loop(given), in_process(given)
    plain = loop(given)
    for t, queries in enumerate(drawn_batches(monkeypatch, one, 6)):
        chosen = [plain.questions.of_query(q) for q in range(4 * t, 4 * t + 4)]
        calls = [Call(t, i, tuple(chosen[i : i + 2]), ((start(np.zeros(0, np.int64)),) * 4,) * 2, None) for i in (0, 2)]
        weights = {n: v.detach().numpy().copy() for n, v in plain.updater.policy.module.state_dict().items()}
        groups = [group for groups in hands.answer(weights, calls) for group in groups]
        for query, group in zip(queries, groups, strict=True):
            for a, b in zip(query.answers, group, strict=True):
                assert (a.ids.tobytes(), a.logp.tobytes(), a.reward) == (b.ids.tobytes(), b.logp.tobytes(), b.reward)
        plain.updater.update(t, queries)
    assert torch.equal(one.updater.policy.module.logits, plain.updater.policy.module.logits)


@pytest.mark.parametrize("buffer", [{**BUFFER, "depth": 1}, MIXED])
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_loop_ends_with_the_same_bits(buffer, at):
    given = setting(buffer=buffer, replay_routes=True, hints={"initial": 0.5})
    whole = loop(given)
    whole.prepare()
    for _ in range(6):
        whole.iterate()
    first = loop(given)
    first.prepare()
    for _ in range(at):
        first.iterate()
    tensors, meta = first.state()
    second = loop(given)
    second.load({k: v.clone() if isinstance(v, torch.Tensor) else v.copy() for k, v in tensors.items()}, meta)
    for _ in range(6 - at):
        second.iterate()
    assert bits(second) == bits(whole)


def test_equal_rewards_move_nothing():
    one = loop()
    one.hands.worker.judge.reward = lambda asked, text: 1.0
    before = one.updater.policy.module.logits.detach().clone()
    told = one.iterate()
    assert torch.equal(one.updater.policy.module.logits, before)
    assert told["reward"] == 1
    assert told["gradient"] == 0
    one = loop()
    one.iterate()  # so that there is momentum, which a step would go on with
    before = one.updater.policy.module.logits.detach().clone()
    one.hands.worker.judge.reward = lambda asked, text: 1.0
    while one.iterate()["informative"]:  # answers under way were judged before
        before = one.updater.policy.module.logits.detach().clone()
    assert torch.equal(one.updater.policy.module.logits, before)
    dynamic = loop(setting(objective={"dynamic": True}))
    dynamic.hands.worker.judge.reward = lambda asked, text: 0.0
    assert dynamic.iterate()["informative"] == 0


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_answers_without_gradient_are_counted_and_not_computed(monkeypatch, average):
    """The gradient of one step against the objective over all answers, whose queries of equal rewards have advantage 0."""
    one = loop(
        setting(iterations=12, minibatches=1, clip=1e9, buffer={**BUFFER, "depth": 1}, objective={"average": average})
    )
    logits, seen = one.updater.policy.module.logits, 0
    for _ in range(12):
        start_from = logits.detach().clone()
        (queries,) = drawn_batches(monkeypatch, one, 1)
        monkeypatch.undo()
        rewards = torch.tensor([[a.reward for a in query.answers] for query in queries])
        plain = (rewards == rewards[:, :1]).all(1)
        seen += bool(plain.any() and not plain.all())
        with torch.no_grad():
            after = logits.clone()
            logits.copy_(start_from)
        computed, logits.grad = logits.grad, None
        answers = [a for query in queries for a in query.answers]
        new, mask, entropy = one.updater.policy.answer_logp(
            [query.asked.prompt for query in queries for _ in query.answers], [a.ids for a in answers], temperature=1.0,
            routes=None,
        )  # fmt: skip
        infer = torch.zeros(mask.shape)
        for row, a in enumerate(answers):
            infer[row, : len(a.ids)] = torch.from_numpy(a.logp)
        judged = objective.Judged(
            new,
            new.detach(),
            infer,
            mask,
            objective.group_advantages(rewards.flatten(), 4),
            entropy,
            rewards.mean(1).repeat_interleave(4),
        )
        objective.loss(one.setting.objective, judged)[0].backward()
        if not plain.all():
            torch.testing.assert_close(computed, logits.grad, rtol=1e-5, atol=1e-8)
        logits.grad = None
        with torch.no_grad():
            logits.copy_(after)
    assert seen > 2  # batches of both kinds


class Capricious:
    """A judge who likes some answers and not others, whatever they begin with."""

    def reward(self, asked, text):
        return float(sum(map(ord, text)) % 2)


def test_hints_are_given_not_trained_and_fade(monkeypatch):
    one = loop(setting(iterations=6, hints={"initial": 0.7, "gamma": 2.0, "floor": 0.5}, buffer={**BUFFER, "depth": 1}))
    one.prepare()
    assert one.passed.max() > 0
    batches = drawn_batches(monkeypatch, one, 6)
    first = [answer for query in batches[0] for answer in query.answers]
    assert all(answer.hint == 2 and answer.ids[:2].tolist() == [3, 4] for answer in first)
    assert all((answer.version[:2] == -1).all() and not answer.logp[:2].any() for answer in first)
    assert all(answer.hint == 0 for query in batches[-1] for answer in query.answers)
    given = setting(iterations=4, hints={"initial": 0.7, "gamma": 0.0}, buffer={**BUFFER, "depth": 1})
    fresh = loop(given, InProcess(Worker(Tabular(8), questions(), Capricious(), decode, given, 0)))
    before = fresh.updater.policy.module.logits.detach().clone()
    for _ in range(4):  # where all answers of a query earn the same, nothing moves
        fresh.iterate()
    moved = (fresh.updater.policy.module.logits.detach() - before).abs().amax((0, 2))
    assert moved[:2].tolist() == [0, 0]  # no loss on the hint's places
    assert moved[2:].max() > 0


def test_routes_are_those_of_the_call_that_drew_the_next_token(monkeypatch):
    one = loop(setting(iterations=20, replay_routes=True, buffer=MIXED))
    for queries in drawn_batches(monkeypatch, one, 20):
        for answer in (answer for query in queries for answer in query.answers):
            ended = answer.ids[-1] == 2
            assert len(answer.routes) == 1 + len(answer.ids) - 1  # the prompt's one place, and all but the last token
            assert ended or len(answer.ids) == 10
            begins = [next(i for i, v in enumerate(answer.version) if v == version) for version in answer.version]
            assert (
                answer.routes[:, 0, 0].tolist() == begins
            )  # the place before token i was read by the call that drew it


def test_an_injected_mismatch_is_seen_in_the_kl_and_absent_without_it():
    exact = loop(setting(buffer={**BUFFER, "depth": 1})).iterate()
    assert exact["kl_train_infer"] < 1e-12
    rounded = loop(setting(mismatch="bf16", buffer={**BUFFER, "depth": 1})).iterate()
    assert 1e-9 < rounded["kl_train_infer"] < 1e-3


def test_router_noise_touches_routers_only_and_is_drawn_anew_for_each_version():
    weights = {"a.router": np.arange(6, dtype=np.float32), "a.w": np.ones(3, np.float32)}
    one, two = (mismatched(weights, "router", 0.5, 0, version) for version in (1, 2))
    assert np.array_equal(one["a.w"], weights["a.w"])
    assert not np.array_equal(one["a.router"], two["a.router"])
    assert np.array_equal(one["a.router"], mismatched(weights, "router", 0.5, 0, 1)["a.router"])
    third = np.float32(1) / 3
    assert mismatched({"x": np.array([third])}, "bf16", 0, 0, 0)["x"][0] == float(torch.tensor(third).bfloat16())


def test_environments_take_turns_by_their_weights_and_each_asks_its_own_questions_in_seeded_epochs():
    assert turns_of((1, 1, 1)) == (0, 1, 2)
    assert turns_of((2, 1, 1)) == (0, 1, 2, 0)
    assert sorted(turns_of((6, 1, 3, 3))) == [0] * 6 + [1] + [2] * 3 + [3] * 3
    two = questions()
    weighted = replace(two, turns=turns_of((3, 1)))
    each = len(two.train) // 2
    asked = [weighted.of_query(q) for q in range(4 * each)]
    first = [q for q in asked if q < each]
    assert sorted(first[:each]) == list(range(each))  # an epoch of the environment with three turns of four
    assert len(first) == 3 * each
    assert sorted(q for q in asked if q >= each) == list(range(each, 2 * each))
    alone = [q for q in (two.of_query(i) for i in range(2 * each)) if q < each]
    assert first[:each] == alone  # the order is the environment's own, whatever the others' turns
