"""Sweeps: the space as it is written, the searches of Tune, and what a second call finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysys.runtime.sentences import UserError
from raysys.runtime.space import Choice, Range, parse_space
from raysys.runtime.storage import Storage


def test_a_space_is_read_from_words() -> None:
    space = parse_space(
        ["lr=1e-3..1:log", "n=5..50:int", "rule=krum,median", "f=1,2", "x=-1..1.5", "on=true,false", "a=1e-3"]
    )
    assert space == {
        "lr": Range(1e-3, 1.0, log=True),
        "n": Range(5, 50, integer=True),
        "rule": Choice(("krum", "median")),
        "f": Choice((1, 2)),
        "x": Range(-1, 1.5),
        "on": Choice((True, False)),
        "a": Choice((0.001,)),
    }


@pytest.mark.parametrize("item", ["lr", "lr=", "=1,2", "lr=2..1", "lr=0..1:log", "lr=a..b", "n=1.5..3:int"])
def test_a_malformed_space_is_one_sentence(item: str) -> None:
    with pytest.raises(UserError, match=r"space: got .*; expected"):
        parse_space([item])


def _trial(values: dict[str, Any], report: Any) -> None:
    if values.get("rule") == "bad":
        raise UserError("rule: got bad; expected good")
    for step in range(1, 4):
        report(step, accuracy=1.0 - (values["lr"] - 0.3) ** 2)


@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_tries_all_values_records_refusals_and_is_not_run_again(tmp_path: Path) -> None:
    from raysys.runtime.sweep import sweep

    space = parse_space(["lr=0.1,0.3", "rule=good,bad"])

    def counted(values: dict[str, Any], report: Any) -> None:
        with (tmp_path / "calls").open("a") as file:
            file.write(".")
        _trial(values, report)

    for _ in range(2):
        found = sweep(
            counted, space, storage=Storage(tmp_path / "s"), metric="accuracy", search="grid", samples=1, steps=3
        )
        assert [(row["lr"], row["rule"], row["accuracy"]) for row in found.rows] == [
            (0.1, "bad", None),
            (0.1, "good", pytest.approx(0.96)),
            (0.3, "bad", None),
            (0.3, "good", 1.0),
        ]
        assert found.rows[0]["error"] == "rule: got bad; expected good"
        assert (found.best["lr"], found.best["rule"]) == (0.3, "good")
    assert (tmp_path / "calls").read_text() == "...."
    figure = found.figure()
    assert [axes.get_xlabel() for axes in figure.axes] == ["lr", "rule"]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("search", "scheduler"), [("optuna", None), ("random", "asha")])
def test_a_seeded_search_stays_in_its_ranges(tmp_path: Path, search: Any, scheduler: Any) -> None:
    from raysys.runtime.sweep import sweep

    space = {"lr": Range(0.01, 1.0, log=True), "rule": Choice(("a", "b"))}
    found = sweep(
        _trial,
        space,
        storage=Storage(tmp_path),
        metric="accuracy",
        search=search,
        samples=3,
        steps=3,
        cpus_per_trial=2,
        scheduler=scheduler,
    )
    assert len(found.rows) == 3
    assert all(0.01 <= row["lr"] <= 1.0 and row["rule"] in ("a", "b") for row in found.rows)
    assert found.best["step"] == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": {}}, "space: got nothing"),
        ({"search": "grid", "space": {"lr": Range(0, 1)}}, "a grid search needs values"),
        ({"samples": 0}, "samples: got 0"),
        ({"scheduler": "asha", "steps": 1}, "it needs trials that report"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    from raysys.runtime.sweep import sweep

    call = {"space": {"lr": Choice((1,))}, "storage": Storage(tmp_path / "s"), "metric": "accuracy", **changes}
    with pytest.raises(UserError, match=sentence):
        sweep(_trial, **call)
    assert not (tmp_path / "s").exists()
