import numpy as np
import pytest
import torch

from raysys.aggregation import make_rule
from raysys.attacks import Threat, make_attack
from raysys.attacks.response import Response, line_search

N, F, D = 12, 3, 40
RULES = [
    "mean",
    "trimmed_mean",
    "median",
    "meamed",
    "krum",
    "multi_krum",
    "geometric_median",
    "caf",
    "centered_clipping(radius=2.0)",
    "nnm+trimmed_mean",
    "arc+nnm+geometric_median",
]
TRYING = [
    "opt_alie",
    "opt_ipm",
    "best_response",
    "best_response(criterion=deviation)",
    "best_response(criterion=stall)",
    "hidden",
]


def honest_rows(seed=0, d=D):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((N - F, d)) + 0.4)


def threat(rule, seed=0, **kw):
    return Threat(n=N, f=F, round=0, rng=np.random.default_rng(seed), rule=rule, **kw)


def deviation(rule, honest, rows, reference=None, seed=3):
    stack = torch.cat([honest, rows])[torch.from_numpy(np.random.default_rng(seed).permutation(N))]
    output = rule(stack, reference=reference)
    return float((output - honest.mean(0)).square().sum())


OWN = """
def trimmed(stack, f):
    return stack.sort(0).values[f:len(stack) - f].mean(0)
"""


@pytest.mark.parametrize("before", ["", "nnm+"])
@pytest.mark.parametrize("name", TRYING)
def test_a_users_own_rule_is_tried_on_whole_stacks_like_the_rule_it_repeats(tmp_path, before, name):
    (tmp_path / "own.py").write_text(OWN)
    own, same = make_rule(f"{before}{tmp_path / 'own.py'}:trimmed", N, F), make_rule(f"{before}trimmed_mean", N, F)
    rows = [make_attack(name, N, F).craft(honest_rows(), threat(rule)) for rule in (own, same)]
    assert torch.allclose(rows[0], rows[1], atol=1e-7)


@pytest.mark.parametrize("spec", RULES)
def test_a_trial_measures_the_true_deviation_of_the_rule(spec):
    honest, rule = honest_rows(), make_rule(spec, N, F)
    reference = honest.mean(0) * 0.8
    rng = np.random.default_rng(5)
    response = Response(honest, honest.std(0, correction=0)[None], threat(rule, reference=reference), "test")
    for _ in range(4):
        coefficients = rng.standard_normal((F, N - F + 1)) * 0.5
        rows = response.combine(coefficients)
        output = rule(torch.cat([honest, rows]), reference=reference)
        change = output - honest.mean(0)
        squared, along = response(coefficients)
        assert squared == pytest.approx(float(change @ change), rel=1e-8, abs=1e-12)
        assert along == pytest.approx(float(change @ honest.mean(0)), rel=1e-8, abs=1e-10)


BADNESS = {
    "deviation": lambda output, mean: float((output - mean).square().sum()),
    "descent": lambda output, mean: -float(output @ mean),
    "stall": lambda output, mean: -float(output @ output),
}


@pytest.mark.parametrize("criterion", sorted(BADNESS))
@pytest.mark.parametrize("spec", RULES)
def test_best_response_is_at_least_as_bad_as_the_members_of_its_family(spec, criterion):
    rule = make_rule(spec, N, F)
    for seed in range(2):
        honest = honest_rows(seed)
        mean = reference = honest.mean(0)
        known = threat(rule, reference=reference)

        def bad(attack, honest=honest, mean=mean, known=known):
            stack = torch.cat([honest, make_attack(attack, N, F).craft(honest, known)])
            order = torch.from_numpy(np.random.default_rng(3).permutation(N))
            return BADNESS[criterion](rule(stack[order], reference=mean), mean)

        best = bad(f"best_response(criterion={criterion})")
        for member in ("alie", "alie(z=1.0)", "ipm(epsilon=0.1)", "ipm", "min_max", "max_bias", "mirror"):
            other = bad(member)
            assert best >= other - 1e-6 * abs(other), member


@pytest.mark.parametrize("spec", RULES)
def test_line_searched_attacks_are_at_least_as_bad_as_their_fixed_forms(spec):
    rule = make_rule(spec, N, F)
    honest = honest_rows(1)
    for optimised, fixed in (("opt_alie", "alie(z=1.6)"), ("opt_ipm", "ipm(epsilon=0.1)")):
        worst, plain = (make_attack(a, N, F).craft(honest, threat(rule)) for a in (optimised, fixed))
        assert deviation(rule, honest, worst) >= deviation(rule, honest, plain) * (1 - 1e-6)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="descent, deviation, stall, got 'x'"):
        make_attack("best_response(criterion=x)", N, F)


def test_the_mean_falls_to_the_best_response_and_the_trimmed_mean_does_not():
    honest = honest_rows()
    norms = {}
    for spec in ("mean", "trimmed_mean"):
        rule = make_rule(spec, N, F)
        rows = make_attack("best_response", N, F).craft(honest, threat(rule))
        norms[spec] = deviation(rule, honest, rows) ** 0.5
    spread = float((honest - honest.mean(0)).square().sum(1).mean()) ** 0.5
    assert norms["mean"] > 5 * spread
    assert norms["trimmed_mean"] < spread


@pytest.mark.parametrize("attack", TRYING)
def test_trying_attacks_repeat_under_their_seed_and_keep_the_type(attack):
    rule = make_rule("bucketing+median", N, F)
    honest = honest_rows().float()
    before = honest.clone()
    first, again = (make_attack(attack, N, F).craft(honest, threat(rule)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert first.shape == (F, D)
    assert torch.equal(honest, before)


@pytest.mark.parametrize("attack", TRYING)
def test_trying_attacks_need_to_know_the_rule(attack):
    with pytest.raises(ValueError, match=r"needs threat\.rule"):
        make_attack(attack, N, F).craft(honest_rows(), threat(None))


@pytest.mark.parametrize("attack", TRYING)
def test_trying_attacks_take_any_callable_and_identical_rows(attack):
    honest = torch.ones(N - F, 5, dtype=torch.float64)
    rows = make_attack(attack, N, F).craft(honest, threat(lambda stack: stack.median(0).values))
    assert rows.isfinite().all()
    assert rows.shape == (F, 5)


@pytest.mark.parametrize("attack", TRYING)
def test_trying_attacks_survive_diverged_rows_and_no_byzantine_node(attack):
    rule = make_rule("trimmed_mean", N, F)
    huge = honest_rows() * 1e200
    assert make_attack(attack, N, F).craft(huge, threat(rule)).shape == (F, D)
    nobody = Threat(n=N - F, f=0, round=0, rng=np.random.default_rng(0), rule=rule)
    assert make_attack(attack, N - F, 0).craft(honest_rows(), nobody).shape == (0, D)


def test_wide_stacks_are_tried_on_a_sample_of_columns_close_to_the_truth():
    honest, rule = honest_rows(d=5000), make_rule("median", N, F)
    response = Response(honest, honest[:0], threat(rule), "test")
    coefficients = -0.5 * response.mean
    squared, _ = response(coefficients)
    true = deviation(rule, honest, response.combine(coefficients).expand(F, -1))
    assert squared == pytest.approx(true, rel=0.15)


def test_hidden_moves_one_coordinate_only_and_keeps_being_selected():
    honest, rule = honest_rows(), make_rule("krum", N, F)
    row = make_attack("hidden", N, F).craft(honest, threat(rule))[0]
    moved = (row - honest.mean(0)).abs() > 1e-9
    assert int(moved.sum()) == 1
    assert int(moved.nonzero()[0]) == int(honest.std(0, correction=0).argmax())
    assert torch.allclose(rule(torch.cat([honest, row.expand(F, -1)])), row)


def test_mirror_rebuilds_the_second_world_of_the_noise_instance():
    value = torch.full((8, 1), 2.0, dtype=torch.float64)
    value[:3] += 1.5  # f = 3 honest workers stick out by z
    rows = make_attack("mirror", 11, 3).craft(value, Threat(n=11, f=3, round=0, rng=np.random.default_rng(0)))
    assert torch.allclose(rows, torch.full((3, 1), 0.5, dtype=torch.float64))


def test_rop_is_orthogonal_to_its_centre_and_close_to_the_reference():
    honest = honest_rows()
    reference = honest.mean(0) + 0.3
    row = make_attack("rop(relocate=1.0)", N, F).craft(honest, threat(None, reference=reference))[0]
    radius = (honest - reference).norm(dim=1).median()
    assert float((row - reference) @ reference) == pytest.approx(0.0, abs=1e-9)
    assert float((row - reference).norm()) == pytest.approx(float(radius))


def test_line_search_finds_the_peak_between_grid_points():
    best = line_search(lambda t: -((np.log(t) - np.log(3.3)) ** 2), [0.5 * 2.0**k for k in range(6)], 12)
    assert best == pytest.approx(3.3, rel=0.01)
    assert line_search(lambda t: -t, [1.0, 2.0], 0) == 1.0
