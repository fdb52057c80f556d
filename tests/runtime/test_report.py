"""Reports: everything in one page, nothing that a value can break."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jobs_for_tests import Walk

from raysys.runtime.report import COLOURS, DASHES, MARKERS, duration, figure_png, heat_map, new_figure, number, traffic
from raysys.runtime.run import Run
from raysys.runtime.statistics import Interval


def page(tmp_path: Path) -> str:
    with Run.open(Walk(out=str(tmp_path), wandb=False), system="walk", command="walk") as run:
        for i in range(50):
            run.row(
                "accuracy", Interval(0.9, 0.85 + i / 1000, 0.95, 3), rule=f"krum{i}", attack="<script>alert(1)</script>"
            )
        run.row("accuracy", Interval(0.9, None, None, 1), rule="mean")
        run.claim("the mean <breaks>", "§ 3 & App. B", False, [0.1, 0.2])
        run.grid(
            "rules & attacks", [{"rule": "mean", "alie": 0.123456, "ipm": None}, {"rule": "krum", "ipm": "0.9 ± 0.1"}]
        )
        run.event("host died", host=3)
        run.figure("one", new_figure()[0])
    return run.storage.read_bytes("report.html").decode()


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<link" not in text
    assert "@import" not in text


def test_values_are_escaped(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<script" not in text
    assert "the mean &lt;breaks&gt;" in text


def test_the_page_is_well_formed(tmp_path: Path) -> None:
    stack: list[str] = []
    void = {"meta", "img", "br", "!doctype"}

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Check().feed(page(tmp_path))
    assert stack == []


def test_the_page_holds_claims_table_configuration_versions_and_events(tmp_path: Path) -> None:
    text = page(tmp_path)
    for part in (
        "does not hold",
        "0.9 [0.85, 0.95]",
        "krum49",
        "cells: 3",
        "torch",
        "host died",
        "0.1235",
        "0.9 ± 0.1",
    ):
        assert part in text


def test_the_console_shows_the_grid_and_the_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page(tmp_path)
    said = capsys.readouterr().out
    assert "rules & attacks" in said
    assert "0.1235" in said
    assert "does not hold" in said
    assert "krum49" not in said


def test_a_figure_has_style_without_a_display() -> None:
    figure, axes = new_figure(1, 2)
    for i in range(3):
        axes[0].plot([i, 1], label=str(i))
    assert figure_png(figure).startswith(b"\x89PNG")
    lines = axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 3
    assert len(COLOURS) == len(MARKERS) == 2 * len(DASHES)


def test_a_heat_map_leaves_absent_values_blank() -> None:
    figure = heat_map(np.array([[1.0, np.nan], [0.5, 0.0]]), ["a", "b"], ["x", "y"], title="t", unit="accuracy")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.00", "0.50", "1.00"]


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (0.123456, 12345678, None, True, "x")] == ["0.1235", "12345678", "–", "yes", "x"]
    assert [traffic(v) for v in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]
    assert [duration(v) for v in (3.21, 61, 7300)] == ["3.2 s", "1 min 1 s", "2 h 1 min"]
