"""Figures of the TAD-LoRA system: rows in, matplotlib Figure out. Series differ in marker and line style: all reads in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys.runtime.report import COLOURS, LINES, MARKERS, new_figure
from raysys.runtime.statistics import mean_ci

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Curves = Mapping[str, Sequence[Sequence[Row]]]
"""Method -> one curve (rows with "round") per seed."""


def reported(score: str) -> list[tuple[str, str, float, int]]:
    """Measurement, its column, the factor it is shown with, digits."""
    unit, digits, sign = (100.0, 1, " (%)") if score == "accuracy" else (1.0, 4, "")
    return [
        (score, f"{score}{sign}", unit, digits),
        (f"worst_{score}", f"worst peer{sign}", unit, digits),
        (f"spread_{score}", "std over peers", unit, digits),
        (f"consensus_{score}", f"averaged model{sign}", unit, digits),
        ("relative_cross_term", "|C| / |BA|", 1.0, 3),
    ]


def score_curves(curves: Curves, score: str) -> Figure:
    """Accuracy (or relative error) of the peers' own models over rounds, means of paired seeds with 95 % bands."""
    figure, ax = _one("round", "mean accuracy of the peers' models" if score == "accuracy" else "relative error")
    _bands(ax, curves, score)
    if score == "error":
        ax.set_yscale("log")
    ax.legend()
    return figure


def cross_term_curves(curves: Curves) -> Figure:
    """||C||_F over rounds."""
    figure, ax = _one("round", "cross term $||C||_F$")
    _bands(ax, curves, "cross_term")
    ax.legend()
    return figure


def accuracy_over_rho(cells: Mapping[str, Sequence[tuple[float, Sequence[float]]]], ylabel: str) -> Figure:
    """One line per method: (rho, values by seed) points with 95 % bars, over 1 / (1 - rho)."""
    figure, ax = _one("1 / (1 - rho): dense to sparse", ylabel)
    for k, (method, points) in enumerate(cells.items()):
        means = [mean_ci(values) for _, values in points]
        half = [0.0 if m.low is None else m.mean - m.low for m in means]
        x = [1 / (1 - rho) for rho, _ in points]
        ax.errorbar(x, [m.mean for m in means], half, **_style(k), capsize=3, label=method)
    ax.set_xscale("log")
    ax.legend()
    return figure


def accuracy_over_bytes(points: Mapping[str, tuple[float, Sequence[float]]]) -> Figure:
    """One mark per method: megabytes sent in all, and accuracy with its 95 % bar."""
    figure, ax = _one("sent by all peers (MB)", "mean accuracy of the peers' models")
    for k, (method, (sent, values)) in enumerate(points.items()):
        m = mean_ci(values)
        half = 0.0 if m.low is None else m.mean - m.low
        ax.errorbar([sent / 1e6], [m.mean], [half], **_style(k), capsize=3, label=method)
    ax.legend()
    return figure


def interval_sweep(sweeps: Mapping[str, list[Row]], name: str, ylabel: str) -> Figure:
    """A measurement over the switching interval T, one line per topology, means of seeds with 95 % bars."""
    figure, ax = _one("switching interval T (rounds)", ylabel)
    for k, (topology, rows) in enumerate(sweeps.items()):
        tried = [row for row in rows if row["method"] == "tad"]
        means = [mean_ci(row[name]) for row in tried]
        half = [0.0 if m.low is None else m.mean - m.low for m in means]
        ax.errorbar(
            [row["interval"] for row in tried], [m.mean for m in means], half, **_style(k), capsize=2, label=topology
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend()
    return figure


def best_interval_figure(rho: Sequence[float], best: Sequence[int], chosen: Sequence[int]) -> Figure:
    """The best T found and the one that the law chooses, over 1 / sqrt(1 - rho)."""
    figure, ax = _one(r"$1 / \sqrt{1 - \rho}$", "switching interval T (rounds)")
    x = [(1 - r) ** -0.5 for r in rho]
    ax.plot(x, best, **_style(0), label="best T measured")
    ax.plot(x, chosen, **_style(1), label="T chosen by kappa / sqrt(1 - rho)")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend()
    return figure


def _bands(ax: Axes, curves: Curves, name: str) -> None:
    for k, (method, seeds) in enumerate(curves.items()):
        by_round: dict[int, list[float]] = {}
        for curve in seeds:
            for row in curve:
                if row.get(name) is not None:
                    by_round.setdefault(int(row["round"]), []).append(float(row[name]))
        rounds = sorted(by_round)
        means = [mean_ci(by_round[t]) for t in rounds]
        style = _style(k) | {"markevery": max(1, len(rounds) // 8)}
        ax.plot(rounds, [m.mean for m in means], **style, label=method)
        if all(m.low is not None for m in means):
            low, high = np.array([[m.low, m.high] for m in means], dtype=float).T
            ax.fill_between(rounds, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _style(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": LINES[k % len(LINES)]}


def _one(x: str, y: str) -> tuple[Figure, Axes]:
    figure, ax = new_figure()
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    return figure, ax
