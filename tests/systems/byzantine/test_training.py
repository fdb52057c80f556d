"""The algorithm in one process: closed forms, reductions, and what each option does."""

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from raysys.runtime.blocks import blocks
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.claims import matrix_claims, matrix_rows, tail_gradient
from raysys.systems.byzantine.setting import Setting
from raysys.systems.byzantine.simulate import simulation
from raysys.systems.byzantine.task import Task
from raysys.systems.byzantine.workers import participants


def run(seed=0, **values):
    simulated = simulation(Task(Setting.of(values), seed))
    for t in range(simulated.task.setting.rounds):
        simulated.step(t)
    return simulated


def test_mean_without_attack_is_plain_sgd_on_the_average_loss():
    simulated = run(rule="mean", attack="none", byzantine=0, workers=6, rounds=15, momentum_at="none", lr=0.3)
    task = Task(simulated.task.setting, 0)
    theta = task.problem.init()
    for t in range(15):
        g = torch.stack([task.problem.gradients(theta, np.array([i]), t)[0] for i in range(6)])
        theta = theta - task.setting.step_size(t) * g.double().mean(0).float()
    np.testing.assert_allclose(simulated.model, theta.numpy(), atol=2e-6)


def test_local_momentum_with_mean_equals_server_momentum_started_alike():
    one = run(rule="mean", attack="none", byzantine=0, rounds=20, momentum_at="worker", momentum=0.9)
    # m^0 = g^0 at the workers; the server's velocity starts at zero, so its first rounds are smaller: undo that.
    task, beta = Task(one.task.setting, 0), 0.9
    theta, m = task.problem.init().double().numpy(), None
    for t in range(20):
        g = task.problem.gradients(torch.from_numpy(theta).float(), task.honest, t).double().numpy().mean(0)
        m = g if m is None else beta * m + (1 - beta) * g
        theta = theta - task.setting.step_size(t) * m
    np.testing.assert_allclose(one.model, theta, atol=1e-5)


def test_fedavg_step_is_the_average_of_local_models():
    values = {"rule": "mean", "attack": "none", "byzantine": 0, "workers": 4, "momentum_at": "none", "rounds": 1}
    simulated = run(**values, local_steps=3, local_lr=0.2, lr=0.6, lr_decay=1.0)
    task = Task(simulated.task.setting, 0)
    ends = []
    for i in range(4):
        theta = task.problem.init()
        for step in range(3):
            theta = theta - 0.2 * task.problem.gradients(theta, np.array([i]), 0, step)[0]
        ends.append(theta)
    np.testing.assert_allclose(simulated.model, torch.stack(ends).mean(0).numpy(), atol=1e-6)


def test_blocks_of_any_size_give_the_same_model_to_rounding():
    models = [run(block=b, rounds=20).model for b in (1, 5, 16)]
    for model in models[1:]:
        np.testing.assert_allclose(model, models[0], atol=1e-5)


def test_batches_are_those_of_the_stateless_stream_whatever_is_asked_together():
    task = Task(Setting(), 4)
    theta = task.problem.init()
    whole = task.problem.gradients(theta, np.arange(16), 7)
    part = task.problem.gradients(theta, np.array([11, 2]), 7)
    torch.testing.assert_close(part, whole[[11, 2]], rtol=1e-5, atol=1e-7)


def test_label_flip_nodes_train_on_mirrored_labels():
    task = Task(Setting(attack="label_flip"), 0)
    byzantine, honest = task.byzantine[0], 0
    rows = torch.from_numpy(task.partition.indices[byzantine])
    assert torch.equal(task.problem._labels(rows, np.array([byzantine])), 9 - task.problem.y[rows])
    rows = torch.from_numpy(task.partition.indices[honest])
    assert torch.equal(task.problem._labels(rows, np.array([honest])), task.problem.y[rows])


@pytest.mark.parametrize(("g", "b"), [(1.0, 0.0), (2.0, 0.7), (0.0, 1.5)])
def test_planted_quadratics_have_their_dissimilarity_everywhere(g, b):
    task = Task(Setting(problem="quadratic", dissimilarity_g=g, dissimilarity_b=b, hidden=6), 1)
    for scale in (0.0, 1.0, 30.0):
        theta = torch.randn(6, generator=torch.Generator().manual_seed(3)) * scale
        _, grads = task.problem.full_gradients(theta, task.honest)
        mean = grads.double().mean(0)
        spread = (grads.double() - mean).square().sum(1).mean()
        assert float(spread) == pytest.approx(g**2 + b**2 * float(mean @ mean), rel=1e-4, abs=1e-6)


def test_quadratic_losses_and_gradients_agree():
    task = Task(Setting(problem="quadratic", dissimilarity_b=0.5, hidden=4), 1)
    theta, step = torch.tensor([0.3, -1.0, 2.0, 0.1]), 1e-3
    _, grads = task.problem.full_gradients(theta, np.array([3]))
    for j in range(4):
        move = torch.zeros(4)
        move[j] = step
        up, _ = task.problem.full_gradients(theta + move, np.array([3]))
        down, _ = task.problem.full_gradients(theta - move, np.array([3]))
        assert float((up - down) / (2 * step)) == pytest.approx(float(grads[0, j]), rel=1e-3, abs=1e-4)


def test_quadratic_noise_has_its_variance():
    task = Task(Setting(problem="quadratic", sigma=2.0, hidden=5), 1)
    theta = torch.zeros(5)
    exact = task.problem.full_gradients(theta, task.honest)[1]
    noise = torch.stack([task.problem.gradients(theta, task.honest, t) - exact for t in range(500)])
    assert float(noise.square().sum(2).mean()) == pytest.approx(4.0, rel=0.05)
    assert float(noise.mean(dim=(0, 1)).abs().max()) < 0.06


def test_sampling_takes_exactly_as_many_and_everyone_in_turn():
    setting = Setting(sample=7)
    seen = np.stack([participants(setting, Seeds(0), t) for t in range(200)])
    assert (seen.sum(1) == 7).all()
    assert seen.any(0).all()


def test_byzantine_workers_never_drop_out():
    setting = Setting(dropout=0.5)
    seen = np.stack([participants(setting, Seeds(0), t) for t in range(100)])
    assert seen[:, 16:].all()
    assert 0.4 < seen[:, :16].mean() < 0.6


def test_sampling_tells_the_rule_the_hypergeometric_bound():
    task = Task(Setting(workers=100, byzantine=10, sample=30, rounds=200, sample_failure=0.05), 0)
    assert task.rule.n == 30
    tail = [200 * hypergeom(100, 10, 30).sf(f) for f in range(11)]  # union bound over the rounds
    assert tail[task.rule.f] <= 0.05 < tail[task.rule.f - 1]


def test_remembering_absent_workers_sees_everyone_after_their_first_message():
    simulated = run(dropout=0.3, remember=True, rounds=25)
    assert simulated.server.known.all()
    assert simulated.server.skipped == 0


def test_who_remembers_everyone_is_told_the_f_of_everyone():
    task = Task(Setting(workers=100, byzantine=30, sample=60, remember=True), 0)
    assert (task.rule.n, task.rule.f) == (100, 30)


def test_a_problem_moves_parameters_to_its_device():
    task = Task(Setting(attack="alie"), 0, device="meta")
    assert task.problem.gradients(torch.zeros(650), np.arange(3), 0).device.type == "meta"


def test_normalised_steps_have_the_length_of_the_step_size():
    simulated = simulation(Task(Setting(normalised=True, attack="alie"), 0))
    before = simulated.model.copy()
    simulated.step(0)
    assert np.linalg.norm(simulated.model - before) == pytest.approx(0.5, rel=1e-4)


def test_non_finite_rows_are_rejected_and_counted():
    simulated = run(attack="non_finite", rounds=5)
    assert simulated.server.rejected == 20
    assert np.isfinite(simulated.model).all()


def test_order_of_arrival_changes_no_bit():
    a, b = (simulation(Task(Setting(rule="krum"), 0)) for _ in range(2))
    for t in range(3):
        sent = [c.train(t) for c in a.clients]
        who, rows = (np.concatenate(each) for each in zip(*sent, strict=True))
        ids = np.concatenate([who, a.adversaries.nodes])
        rows = np.concatenate([rows, a.adversaries.corrupt(t, who, rows)[1]])
        order = np.random.default_rng(t).permutation(len(ids))
        assert np.array_equal(a.server.aggregate(t, ids, rows), b.server.aggregate(t, ids[order], rows[order]))


def test_worker_order_is_shuffled_anew_every_round():
    orders = [Seeds(0).rng(Stream.SHUFFLE, 0, t).permutation(20).tolist() for t in range(5)]
    assert len({tuple(o) for o in orders}) == 5


def test_plain_mean_fails_where_a_robust_rule_holds():
    attacked = run(rule="mean", rounds=60).evaluate(59)["accuracy"]
    robust = run(rule="nnm+trimmed_mean", rounds=60).evaluate(59)["accuracy"]
    assert attacked < 0.3
    assert robust > 0.85


def test_peers_agree_and_learn_under_attack():
    simulated = run(
        topology="complete", workers=10, byzantine=2, attack="dissensus", lr=0.3, rounds=80, peer_rule="nna"
    )
    measured = simulated.evaluate(79)
    assert measured["worst_accuracy"] > 0.85
    assert measured["consensus"] < 0.05


def test_rpel_pulls_as_many_random_peers_as_it_says_and_is_told_b_hat():
    values = {"topology": "complete", "workers": 30, "byzantine": 6, "peer_rule": "rpel(pulls=15)", "rounds": 200}
    task = Task(Setting.of({**values, "attack": "dissensus"}), 0)
    simulated = simulation(task)
    peers = simulated.peers[0]
    assert peers.b == 6  # the table of spec 2.7: n = 30, b = 6, s = 15
    ids, models = peers.train(0)
    others = [p.train(0) for p in simulated.peers[1:]]
    ids = np.concatenate([ids, *[i for i, _ in others]])
    models = np.concatenate([models, *[m for _, m in others]])
    told = simulated.adversaries.corrupt(0, ids, models)
    heard = [peers.exchange(t, ids, models, told) for t in range(2)]
    assert {len(h) for h in heard[0]} == {15}
    assert heard[0][0].tolist() != heard[0][1].tolist() != heard[1][1].tolist()
    assert any((h >= 24).any() for h in heard[0])


def test_rpel_learns_with_half_the_messages_under_attack():
    values = {"topology": "complete", "workers": 20, "byzantine": 2, "lr": 0.3, "rounds": 60, "attack": "dissensus"}
    measured = run(**values, peer_rule="rpel(pulls=9)").evaluate(59)
    assert measured["worst_accuracy"] > 0.85


def test_state_dicts_restore_every_bit():
    values = {"attack": "mimic", "rule": "centered_clipping", "dropout": 0.2, "remember": True}
    whole = run(**values, rounds=20)
    half = simulation(Task(Setting.of({**values, "rounds": 20}), 0))
    for t in range(9):
        half.step(t)
    fresh = simulation(Task(Setting.of({**values, "rounds": 20}), 0))
    for name, part in half.parts().items():
        fresh.parts()[name].load_state_dict({k: np.array(v, copy=True) for k, v in part.state_dict().items()})
    for t in range(9, 20):
        fresh.step(t)
    assert np.array_equal(fresh.model, whole.model)


def test_blocks_cover_the_nodes_in_order():
    assert [b.tolist() for b in blocks(np.arange(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_tail_is_the_average_of_the_last_quarter():
    assert tail_gradient([{"gradient_sq": v} for v in (9, 9, 9, 9, 9, 9, 1, 3)]) == 2


def test_worst_attack_is_chosen_per_seed():
    cells = {
        ("iid", "mean", "none"): [{"accuracy": 0.9}, {"accuracy": 0.9}],
        ("iid", "mean", "a"): [{"accuracy": 0.1}, {"accuracy": 0.8}],
        ("iid", "mean", "b"): [{"accuracy": 0.7}, {"accuracy": 0.15}],
        ("iid", "median", "a"): [{"accuracy": 0.88}, {"accuracy": 0.89}],
        ("iid", "median", "b"): [{"accuracy": 0.87}, {"accuracy": 0.87}],
    }
    worst = {r["rule"]: r["interval"].mean for r in matrix_rows(cells) if r["attack"] == "worst"}
    assert worst["mean"] == pytest.approx(0.125)
    first, second = matrix_claims(cells)
    assert first["holds"]  # .87 - (.1, .15): the interval of the paired differences lies above 15 points
    assert second["holds"]
