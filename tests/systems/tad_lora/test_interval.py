import numpy as np
import pytest

from raysys.systems.tad_lora.interval import select_interval


def test_interval_is_a_divisor_of_the_rounds_and_at_most_a_quarter():
    for rounds in (1, 7, 30, 150):
        for rho in np.linspace(0, 1, 21):
            interval = select_interval(float(rho), 2.5, rounds)
            assert rounds % interval == 0
            assert 1 <= interval <= max(1, rounds // 4)


def test_interval_grows_with_rho_as_one_over_the_root():
    found = [select_interval(rho, 2.5, 150) for rho in (0.152, 0.428, 0.788, 0.907, 0.96, 0.99, 1.0)]
    assert found == [3, 3, 5, 6, 10, 25, 30]
    assert select_interval(0.0, 1.0, 150) == 1


@pytest.mark.parametrize(
    ("rho", "kappa", "rounds"), [(1.1, 1, 10), (-0.1, 1, 10), (0.5, 0, 10), (0.5, 1, 0), (np.nan, 1, 9)]
)
def test_a_wrong_interval_is_refused_with_its_value(rho, kappa, rounds):
    with pytest.raises(ValueError, match=f"got rho={rho}, kappa={kappa}, rounds={rounds}"):
        select_interval(rho, kappa, rounds)
