"""Figures of the Rabtriever system: rows in, matplotlib Figure out; all reads in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys.runtime.report import COLOURS, LINES, MARKERS, new_figure
from raysys.systems.rabtriever.claims import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recall_bars(results: Sequence[dict[str, Any]], methods: Sequence[str], title: str) -> Figure:
    """R@1 of each method with its interval; beside it, where documents were withheld, R@1 on queries that need one of them."""
    parts = [part for part in ("all", "withheld") if interval(results, methods[0], "recall@1", part) is not None]
    figure, ax = new_figure(width=7.2, height=1.2 + 0.32 * len(methods))
    place = np.arange(len(methods))[::-1]
    thick = 0.8 / len(parts)
    for k, part in enumerate(parts):
        found = [interval(results, method, "recall@1", part) for method in methods]
        means = np.array([np.nan if one is None else 100 * one.mean for one in found])
        low = np.array([0.0 if one is None or one.low is None else 100 * (one.mean - one.low) for one in found])
        label = "all test queries" if part == "all" else "queries whose document was withheld"
        ax.barh(
            place + (len(parts) - 1) * thick / 2 - k * thick, means, thick, xerr=low, color=COLOURS[k], label=label,
            hatch=("", "//")[k], edgecolor="white", error_kw={"ecolor": "black", "capsize": 2},
        )  # fmt: skip
    ax.set_yticks(place, methods)
    ax.set_xlim(0, 100)
    ax.set_xlabel("R@1 (%), mean with 95 % interval")
    ax.set_title(title)
    if len(parts) > 1:
        ax.legend(loc="lower right")
    return figure


def cost_curves(rows: Sequence[Mapping[str, Any]], pool: int) -> Figure:
    """Milliseconds per query over document length, one line per way of scoring a pool; dashed: the FLOP model, scaled to fit."""
    figure, ax = new_figure(width=6.8, height=4.4)
    ways = list(dict.fromkeys(str(row["way"]) for row in rows))
    for k, way in enumerate(ways):
        own = [row for row in rows if row["way"] == way]
        x = np.array([row["document_length"] for row in own], dtype=float)
        y = np.array([row["ms"] for row in own], dtype=float)
        flops = np.array([row["flops"] for row in own], dtype=float)
        ax.plot(x, y, linestyle=LINES[k], marker=MARKERS[k], color=COLOURS[k], label=way)
        scale = np.exp(np.mean(np.log(y / flops)))
        ax.plot(x, flops * scale, linestyle=(0, (1, 2)), color=COLOURS[k], linewidth=1.0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("document length $L_D$ (tokens)")
    ax.set_ylabel(f"CPU time per query over {pool:,} documents (ms)")
    ax.legend(title="dotted: operations, scaled", fontsize=8)
    return figure
