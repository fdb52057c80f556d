import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.attacks import ATTACKS, Threat, alie_z_max, make_attack

# Appendix B of the specification: the five honest rows.
HONEST = torch.tensor([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.25)], dtype=torch.float64)


def threat(n=7, f=2, seed=0, **kw):
    return Threat(n=n, f=f, round=kw.pop("round", 0), rng=np.random.default_rng(seed), **kw)


def random_honest(h, d, seed, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((h, d)) + 0.3).to(dtype)


@pytest.mark.parametrize(("n", "f", "z"), [(20, 4, 0.157), (25, 5, 0.253), (100, 20, 0.286), (20, 8, 0.674)])
def test_alie_z_max_table(n, f, z):
    assert alie_z_max(n, f) == pytest.approx(z, abs=5e-4)


def test_alie_shifts_the_mean_by_z_population_standard_deviations():
    rows = make_attack("alie(z=1.5)", 7, 2).craft(HONEST, threat())
    expected = torch.tensor([0.5 - 1.5 * 0.447214, 0.45 - 1.5 * 0.458258], dtype=torch.float64)
    assert torch.allclose(rows, expected.expand(2, 2), atol=1e-5)
    with pytest.raises(ValueError, match="n > 2f, got n=4, f=2"):
        alie_z_max(4, 2)


@pytest.mark.parametrize(
    ("name", "direction", "gamma"),
    [
        ("min_max", "mean", 0.672681),
        ("min_max", "std", 1.048130),
        ("min_max", "sign", 0.474687),
        ("min_sum", "mean", 0.743303),
        ("min_sum", "std", 1.160845),
        ("min_sum", "sign", 0.525595),
    ],
)
def test_min_max_and_min_sum_fixtures(name, direction, gamma):
    v = make_attack(f"{name}(direction={direction})", 7, 2).craft(HONEST, threat())[0]
    mean = HONEST.mean(0)
    p = {"mean": -mean / mean.norm(), "std": -HONEST.std(0, correction=0), "sign": -torch.sign(mean)}[direction]
    assert torch.allclose(v, mean + gamma * p, atol=2e-6)
    distances = (HONEST - v).norm(dim=1)
    if name == "min_max":
        assert float(distances.max()) == pytest.approx(2**0.5, abs=1e-6)
    else:
        assert float((distances**2).sum()) == pytest.approx(4.8125, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["mean", "std", "sign"]))
def test_min_max_and_min_sum_meet_their_constraint_with_equality(h, d, seed, direction):
    honest = random_honest(h, d, seed)
    pair = torch.cdist(honest, honest)
    v = make_attack(f"min_max(direction={direction})", h + 1, 1).craft(honest, threat(h + 1, 1))[0]
    assert float((honest - v).norm(dim=1).max()) == pytest.approx(float(pair.max()), rel=1e-9)
    v = make_attack(f"min_sum(direction={direction})", h + 1, 1).craft(honest, threat(h + 1, 1))[0]
    assert float(((honest - v) ** 2).sum()) == pytest.approx(float((pair**2).sum(1).max()), rel=1e-9)


def test_min_max_of_identical_rows_is_that_row():
    honest = torch.ones(4, 3)
    for name in ("min_max", "min_sum"):
        assert torch.equal(make_attack(name, 5, 1).craft(honest, threat(5, 1)), honest[:1])


def test_sign_flip_and_inner_product_are_multiples_of_the_mean():
    mean = HONEST.mean(0)
    assert torch.equal(make_attack("sign_flip", 7, 2).craft(HONEST, threat())[1], -mean)
    assert torch.equal(make_attack("ipm(epsilon=0.1)", 7, 2).craft(HONEST, threat())[0], -0.1 * mean)
    assert torch.equal(make_attack("foe", 7, 2).craft(HONEST, threat())[0], -10 * mean)
    own = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
    assert torch.equal(make_attack("sign_flip(own=True)", 7, 2).craft(HONEST, threat(own=own)), -own)


def test_no_attack_and_label_flip_send_the_nodes_own_vectors():
    own = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
    assert torch.equal(make_attack("none", 7, 2).craft(HONEST, threat(own=own)), own)
    flip = make_attack("label_flip", 7, 2)
    assert flip.data_level
    assert torch.equal(flip.craft(HONEST, threat(own=own)), own)
    with pytest.raises(ValueError, match=r"needs threat\.own"):
        flip.craft(HONEST, threat())
    assert not make_attack("none", 7, 2).data_level


def test_no_attack_without_own_vectors_repeats_honest_rows():
    rows = make_attack("none", 7, 2).craft(HONEST, threat())
    assert torch.equal(rows, HONEST[:2])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 10**6))
def test_max_bias_lies_outside_the_honest_range_against_the_mean(h, d, seed):
    honest = random_honest(h, d, seed)
    v = make_attack("max_bias", h + 1, 1).craft(honest, threat(h + 1, 1))[0]
    up = honest.mean(0) > 0
    assert bool((v[up] <= honest.amin(0)[up]).all())
    assert bool((v[~up] >= honest.amax(0)[~up]).all())


def test_max_bias_makes_the_trimmed_mean_the_mean_of_the_lowest_honest_values():
    honest, f = random_honest(8, 50, 1).abs(), 3
    stack = torch.cat([honest, make_attack("max_bias", 11, f).craft(honest, threat(11, f))])
    trimmed = stack.sort(0).values[f:-f].mean(0)
    assert torch.allclose(trimmed, honest.sort(0).values[: 11 - 2 * f].mean(0))


def test_mimic_row_equals_an_honest_row_and_keeps_its_target_after_warm_up():
    attack = make_attack("mimic(warmup=3)", 10, 2)
    axis = torch.zeros(6, dtype=torch.float64)
    axis[2] = 10.0
    outcomes = []
    for t in range(6):
        honest = random_honest(8, 6, t) + torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] * axis
        rows = attack.craft(honest, threat(10, 2, round=t))
        assert torch.equal(rows[0], rows[1])
        outcomes.append(int((honest == rows[0]).all(1).nonzero()[0]))
    assert set(outcomes) <= {0, 7}  # an end of the direction along which the workers differ most
    assert len(set(outcomes[2:])) == 1
    attack.reset()
    assert set(attack.state_dict()) == {"counters"}
    assert make_attack("mimic", 10, 2).warmup == 100  # as published


def test_mimic_without_warm_up_copies_the_first_worker():
    assert torch.equal(make_attack("mimic(warmup=0)", 7, 2).craft(HONEST, threat()), HONEST[:1].expand(2, 2))


def test_mimic_knows_its_target_by_name_and_copies_the_farthest_row_present_while_it_is_away():
    attack = make_attack("mimic(warmup=2)", 10, 2)
    place = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] * torch.eye(6, dtype=torch.float64)[2] * 10.0

    def copied(t, ids):
        honest = (random_honest(8, 6, t) + place)[torch.from_numpy(ids)]
        rows = attack.craft(honest, threat(10, 2, round=t, ids=ids))
        return int(ids[(honest == rows[0]).all(1).numpy()][0])

    everyone = np.arange(8)
    target = [copied(t, everyone) for t in range(2)][-1]
    assert target in (0, 7)
    second = 6 if target == 7 else 1
    assert copied(2, everyone[::-1].copy()) == target  # another position
    assert copied(3, np.delete(everyone, target)) == second
    assert copied(4, np.array([3, target, 5])) == target
    with pytest.raises(ValueError, match="got 3 ids for 8 rows"):
        attack.craft(random_honest(8, 6, 0), threat(10, 2, ids=np.arange(3)))


def test_ids_follow_the_rows_that_are_usable():
    attack = make_attack("mimic(warmup=0)", 7, 2)
    attack.craft(HONEST, threat(ids=np.array([4, 5, 6, 7, 8])))
    broken = torch.cat([torch.full((1, 2), float("nan"), dtype=torch.float64), HONEST[:3]])
    rows = attack.craft(broken, threat(6, 2, ids=np.array([3, 5, 4, 8])))
    assert torch.equal(rows, HONEST[1:2].expand(2, 2))


def test_mimic_continues_from_its_state():
    first, second = make_attack("mimic(warmup=9)", 10, 2), make_attack("mimic(warmup=9)", 10, 2)
    for t in range(4):
        first.craft(random_honest(8, 6, t), threat(10, 2, round=t))
    second.load_state_dict(first.state_dict())
    for t in range(4, 8):
        honest = random_honest(8, 6, t)
        assert torch.equal(
            first.craft(honest, threat(10, 2, round=t)), second.craft(honest, threat(10, 2, seed=9, round=t))
        )
    with pytest.raises(ValueError, match="counters and direction"):
        second.load_state_dict({"z": torch.zeros(2)})
    with pytest.raises(ValueError, match="keeps no state"):
        make_attack("ipm", 5, 1).load_state_dict({"z": torch.zeros(2)})


def test_non_finite_sends_nan_and_both_infinities():
    rows = make_attack("non_finite", 9, 3).craft(HONEST, threat(9, 3))
    assert rows[0].isnan().all()
    assert rows[1].isposinf().all()
    assert rows[2].isneginf().all()
    assert (make_attack("non_finite(value=1e30)", 9, 3).craft(HONEST, threat(9, 3)) == 1e30).all()


def test_gaussian_rows_are_independent_with_the_stated_spread():
    rows = make_attack("gaussian(sigma=2.0)", 8, 3).craft(torch.ones(5, 4000), threat(8, 3))
    assert rows.dtype == torch.float32
    assert float(rows.std()) == pytest.approx(2.0, rel=0.03)
    assert abs(float((rows[0] * rows[1]).mean())) < 0.3
    around = make_attack("gaussian(sigma=0.0, around_mean=True)", 8, 3).craft(torch.ones(5, 4), threat(8, 3))
    assert torch.equal(around, torch.ones(3, 4))


FREE = sorted(
    set(ATTACKS) - {"opt_alie", "opt_ipm", "best_response", "hidden", "dissensus", "spectral", "equivocation"}
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FREE)
def test_attacks_keep_type_and_inputs_and_repeat_under_their_seed(name, dtype):
    honest = random_honest(8, 12, 0, dtype)
    before = honest.clone()
    own = torch.ones(3, 12, dtype=dtype)
    rows = [make_attack(name, 11, 3).craft(honest, threat(11, 3, own=own)) for _ in range(2)]
    assert rows[0].shape == (3, 12)
    assert rows[0].dtype == dtype
    assert torch.equal(rows[0].nan_to_num(), rows[1].nan_to_num())
    assert torch.equal(honest, before)
    rows[0].zero_()  # what is returned shares nothing with the inputs
    assert torch.equal(honest, before)
    assert torch.equal(own, torch.ones(3, 12, dtype=dtype))


@pytest.mark.parametrize("name", FREE)
def test_no_byzantine_node_sends_nothing(name):
    assert make_attack(name, 8, 0).craft(random_honest(8, 5, 0), threat(8, 0)).shape == (0, 5)


@pytest.mark.parametrize("name", FREE)
def test_diverged_honest_rows_do_not_crash_an_attack(name):
    own = torch.ones(3, 4)
    honest = torch.full((8, 4), float("nan"))
    assert make_attack(name, 11, 3).craft(honest, threat(11, 3, own=own)).shape == (3, 4)
    honest[1] = 2.0
    rows = make_attack(name, 11, 3).craft(honest, threat(11, 3, own=own))
    assert name == "non_finite" or bool(rows.isfinite().all())


def half_negated(honest, threat):
    return -0.5 * honest.mean(0)


def wrong_shape(honest, threat):
    return honest


def test_a_users_function_is_an_attack():
    attack = make_attack(f"{__name__}:half_negated", 7, 2)
    assert torch.equal(attack.craft(HONEST, threat())[0], -0.5 * HONEST.mean(0))
    with pytest.raises(ValueError, match=r"must return a \(2, 2\) tensor, got \(5, 2\)"):
        make_attack(f"{__name__}:wrong_shape", 7, 2).craft(HONEST, threat())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("alei", "unknown attack 'alei', the attacks are alie"),
        ("alie(zz=1)", "no option 'zz'; it has z"),
        ("none(k=1)", "has no option 'k'; it has none"),
        ("alie(1.5)", "key=value"),
        ("alie(z=__import__('os'))", r"needs z of type float \| None, got \"__import__\('os'\)\""),
        ("mimic(warmup=2.5)", "needs warmup of type int, got 2.5"),
        ("sign_flip(own=1)", "needs own of type bool, got 1"),
        ("min_max(direction=2)", "needs direction of type str, got 2"),
        ("no_such_module:attack", "cannot load no_such_module"),
        ("math:pi", "math has no function pi"),
        ("min_max(direction=up)", "mean, std, sign, got 'up'"),
        ("gaussian(sigma=-1)", "sigma >= 0, got -1"),
        ("mimic(warmup=-1)", "warmup >= 0 rounds, got -1"),
    ],
)
def test_a_wrong_attack_is_refused_with_its_value(spec, message):
    with pytest.raises(ValueError, match=message):
        make_attack(spec, 10, 2)


def test_more_byzantine_nodes_than_nodes_are_refused():
    with pytest.raises(ValueError, match="n=3, f=4"):
        make_attack("none", 3, 4)
    with pytest.raises(ValueError, match="n=3, f=4"):
        threat(3, 4)
