"""Comparisons of the elastic study: log ratios over tasks, claims by intervals."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.systems.ernie.setting import ModelSetting
from raysys.systems.ernie.study import SOLVED, claims, ladder, ratio


def result(scale: float) -> dict:
    rungs = {r: {"losses": {"lm": 2.0 * scale, "t2i": 0.5 * scale, "a2t": 1e-4}} for r in ("whole", "k = 1")}
    return {"rungs": rungs}


def results(elastic: float, plain: float, seeds: int = 3) -> list[dict]:
    return [
        {"elastic": result(elastic * (1 + 1e-3 * s)), "plain": result(plain), "alone k = 1": result(plain)}
        for s in range(seeds)
    ]


def test_a_ratio_is_the_mean_log_over_tasks_and_solved_tasks_do_not_drown_it():
    one = ratio(results(1.1, 1.0, 2), ("elastic", "whole"), ("plain", "whole"))
    want = np.mean([2 / 3 * np.log(1.1 * (1 + 1e-3 * s)) for s in range(2)])  # a2t is below SOLVED on both sides
    assert one.mean == pytest.approx(want)
    assert SOLVED > 1e-4


@pytest.mark.parametrize(("elastic", "holds"), [(1.0, True), (1.5, False)])
def test_claims_hold_by_their_intervals(elastic, holds):
    found = {c["claim"]: c["holds"] for c in claims(results(elastic, 1.0), ["whole", "k = 1"])}
    assert found["the whole elastic model is within 2 % of plain training (mean log loss over tasks)"] == holds
    assert found["k = 1: the view is within 5 % of a model trained alone at equal steps"] == holds


def test_the_ladder_reduces_each_dimension_and_all():
    labels = [rung.label for rung in ladder(ModelSetting(), 4)]
    assert labels == ["whole", "k = 2", "k = 1", "half the experts", "2 of 7 layers out", "all three"]
