"""Figures of the Byzantine system: rows in, matplotlib Figure out.

Notable choices
- Series differ in marker and line style as well as in shade, and cells carry their numbers: all reads in grey.
- A claim of the theory is drawn as a line, what was measured as a mark on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys.runtime.report import COLOURS, LINES, new_figure
from raysys.runtime.report import MARKERS as MARKS
from raysys.runtime.statistics import mean_ci

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def matrix_heat_map(rows: Iterable[Row], title: str = "", unit: str = "test accuracy (%)") -> Figure:
    """Rule x attack table of accuracies in percent with the half-width of their interval.

    rows: {"rule", "attack", "interval"}, accuracies in [0, 1], in the order to be shown; the attack "worst" is set apart as
    the last column. A cell without a row is blank.
    """
    cells = {(str(r["rule"]), str(r["attack"])): r["interval"] for r in rows}
    names = list(dict.fromkeys(rule for rule, _ in cells))
    attacks = list(dict.fromkeys(attack for _, attack in cells if attack != "worst"))
    columns = attacks + ["worst"] * any(attack == "worst" for _, attack in cells)
    shown = np.array([[100.0 * cells[r, a].mean if (r, a) in cells else math.nan for a in columns] for r in names])
    figure, axes = new_figure(width=3.0 + 0.72 * len(columns), height=1.6 + 0.42 * len(names))
    image = axes.imshow(shown, cmap="cividis", aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("attack")
    axes.set_ylabel("rule")
    axes.axvline(len(attacks) - 0.5, color="white", linewidth=4)
    middle = (np.nanmin(shown) + np.nanmax(shown)) / 2 if np.isfinite(shown).any() else 0.0
    for i, j in np.argwhere(np.isfinite(shown)):
        interval = cells[names[i], columns[j]]
        half = "" if interval.low is None else f"\n±{50.0 * (interval.high - interval.low):.1f}"
        shade = "black" if shown[i, j] > middle else "white"
        axes.text(j, i, f"{shown[i, j]:.1f}{half}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axes, label=unit)
    axes.set_title(title)
    return figure


def training_curves(curves: Mapping[str, Sequence[Sequence[Row]]]) -> Figure:
    """What is scored, and ||grad L_H||^2 where it was measured, over rounds: means of paired seeds with 95% bands.

    curves: {arm: [curve of a seed, ...]}, a curve being rows with "round" and "accuracy" (or "excess_loss") and maybe
    "gradient_sq".
    """
    first = next(iter(curves.values()))[0][-1]
    score, label, log = (
        ("accuracy", "test accuracy (%)", False) if "accuracy" in first else ("excess_loss", "L$_H$ − L*", True)
    )
    panels = [(score, label, 100.0 if score == "accuracy" else 1.0, log)]
    if "gradient_sq" in first:
        panels.append(("gradient_sq", "‖∇L$_H$‖²", 1.0, True))
    figure, axes = new_figure(columns=len(panels), width=5.2 * len(panels))
    for ax, (key, name, scale, logarithmic) in zip(np.atleast_1d(axes), panels, strict=True):
        for k, (arm, seeds) in enumerate(curves.items()):
            _band(ax, [[(r["round"], scale * r[key]) for r in rows if key in r] for rows in seeds], arm, k, logarithmic)
        ax.set_xlabel("round")
        ax.set_ylabel(name)
        ax.set_yscale("log" if logarithmic else "linear")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    return figure


def _band(ax: Axes, series: Sequence[Sequence[tuple[int, float]]], name: str, k: int, logarithmic: bool) -> None:
    rounds = sorted(set.intersection(*(set(dict(points)) for points in series)))
    values = np.array([[dict(points)[t] for t in rounds] for points in series])
    colour, every = COLOURS[k % 8], max(1, len(rounds) // 8)
    ax.plot(rounds, values.mean(0), color=colour, linestyle=LINES[k % 8], marker=MARKS[k % 8], markevery=every,
            markersize=4, label=name)  # fmt: skip
    if len(series) > 1:
        intervals = [mean_ci(list(column)) for column in values.T]
        low = np.array([math.nan if i.low is None else i.low for i in intervals])
        high = np.array([math.nan if i.high is None else i.high for i in intervals])
        low = np.maximum(low, values.min(0) / 2) if logarithmic else low
        ax.fill_between(rounds, low, high, color=colour, alpha=0.18, linewidth=0)


def floors_figure(rows: Iterable[Row], rule: str = "trimmed_mean") -> Figure:
    """Measured floors against f/n for each B, with lower and upper bound and the breakdown points 1/(2 + B^2)."""
    chosen = [r for r in rows if r["rule"] == rule]
    figure, axes = _one("fraction of Byzantine workers f/n", "floor of ‖∇L$_H$‖² / G²")
    for k, B in enumerate(sorted({r["B"] for r in chosen})):
        some = sorted(
            (r for r in chosen if r["B"] == B and math.isfinite(r["lower_bound"])), key=lambda r: r["f_over_n"]
        )
        if not some:
            continue
        x, scale = [r["f_over_n"] for r in some], some[0]["G"] ** 2
        edge = 1.0 / (2.0 + B**2)
        dense = np.linspace(0.25 * min(x), edge * 0.999, 300)
        colour = COLOURS[k % 8]
        bound = dense / (1 - (2 + B**2) * dense)
        axes.plot(dense, bound, color=colour, linestyle=LINES[k % 8], marker="", label=f"bounds, B = {B:g}")
        measured = [r["measured"] / scale for r in some]
        axes.plot(x, measured, color=colour, linestyle="", marker=MARKS[k % 8], label=f"measured, B = {B:g}")
        axes.axvline(edge, color=colour, linewidth=0.8, linestyle=":")
        axes.text(edge, 0.012, f"1/(2+{B:g}²)", rotation=90, va="bottom", ha="right", fontsize=7, color=colour)
    axes.set_yscale("log")
    axes.set_ylim(0.01, 30)
    axes.set_title(f"{rule}: the floor meets both bounds up to breakdown")
    axes.legend(fontsize=7, ncols=2, loc="upper left")
    return figure


def momentum_figure(rows: Iterable[Row]) -> Figure:
    """Noise floor against the momentum weight, under kappa sigma^2 alpha/(2 - alpha); the heterogeneity floor beside it."""
    found = list(rows)
    figure, axes = _one("momentum weight α = 1 − β", "floor of ‖∇L$_H$‖²")
    noise = [r for r in found if r["part"] == "noise"]
    if noise:
        alphas = np.geomspace(min(r["alpha"] for r in noise) * 0.8, 1.0, 100)
        top = max(noise, key=lambda r: r["alpha"])
        axes.plot(alphas, top["bound"] / top["alpha"] * (2 - top["alpha"]) * alphas / (2 - alphas), color="black", marker="",
                  linestyle="-", label="bound κσ²α/(2−α)")  # fmt: skip
    k = 0
    for part, marker_filled in (("noise", True), ("heterogeneity", False)):
        for rule in dict.fromkeys(r["rule"] for r in found if r["part"] == part):
            some = sorted((r for r in found if r["part"] == part and r["rule"] == rule), key=lambda r: r["alpha"])
            y = np.array([r["measured"] for r in some])
            error = np.array([[r["measured"] - r["measured_low"], r["measured_high"] - r["measured"]] for r in some]).T
            axes.errorbar([r["alpha"] for r in some], y, error, color=COLOURS[k % 8], marker=MARKS[k % 8], capsize=2,
                          linestyle=LINES[(k + 1) % 8], markerfacecolor=COLOURS[k % 8] if marker_filled else "none",
                          label=f"{part}, {rule}")  # fmt: skip
            k += 1
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("local momentum shrinks the noise floor and only that")
    axes.legend(fontsize=7)
    return figure


def gossip_figure(rows: Iterable[Row]) -> Figure:
    """Variance left after robust gossip against 2b/mu_2, with the guarantee (1/2) and the impossibility (1) marked."""
    found = list(rows)
    figure, axes = _one("2b / μ₂ (Byzantine neighbours against connectivity)", "honest variance, last / first round")
    for k, key in enumerate(dict.fromkeys((r["rule"], r["attack"], r["knows_rule"]) for r in found)):
        some = sorted((r for r in found if (r["rule"], r["attack"], r["knows_rule"]) == key), key=lambda r: r["limit"])
        axes.plot([r["limit"] for r in some], [min(max(r["ratio"], 1e-25), 1e6) for r in some],
                  linestyle="", marker=MARKS[k % 8],
                  color=COLOURS[k % 8], markerfacecolor=COLOURS[k % 8] if k % 2 == 0 else "none", markersize=8 - 2 * (k % 2),
                  label=f"{key[0]}, {key[1]}{', rule known' if key[2] == 'yes' else ''}")  # fmt: skip
    axes.axvline(0.5, color="black", linestyle=":", linewidth=1)
    axes.axvline(1.0, color="black", linestyle="-", linewidth=1)
    axes.text(0.48, 1e-5, "clip-2b is safe below", rotation=90, ha="right", va="center", fontsize=7)
    axes.text(1.12, 1e-8, "no rule beyond", rotation=90, ha="right", va="center", fontsize=7)
    axes.set_yscale("log")
    axes.set_title("clip-2b on two cliques: safe below μ₂/2, broken from μ₂ on, in between it depends")
    axes.legend(fontsize=7)
    return figure


def misspecified_figure(rows: Iterable[Row]) -> Figure:
    """The floor of trimmed mean set to a wrong f, against f_hat / (n - f - f_hat)."""
    found = list(rows)
    figure, axes = _one("assumed number of Byzantine workers f̂", "floor of ‖∇L$_H$‖² / G²")
    right = sorted((r for r in found if math.isfinite(r["floor"])), key=lambda r: r["f_hat"])
    wrong = [r for r in found if not math.isfinite(r["floor"])]
    axes.plot(
        [r["f_hat"] for r in right],
        [r["floor"] for r in right],
        color="black",
        linestyle="-",
        marker="",
        label="f̂/(n − f − f̂)",
    )
    axes.plot(
        [r["f_hat"] for r in right],
        [r["measured"] for r in right],
        color=COLOURS[0],
        linestyle="",
        marker="o",
        label="measured",
    )
    if wrong:
        axes.plot([r["f_hat"] for r in wrong], [r["measured"] for r in wrong], color=COLOURS[1], linestyle="", marker="x",
                  label="measured, f̂ < f: grows with the attack")  # fmt: skip
    if right:
        axes.axvline(right[0]["f"], color="grey", linestyle=":", label="true f")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return figure


def partition_figure(counts: np.ndarray, title: str = "", labels: Sequence[str] | None = None) -> Figure:
    """Who has which data: counts (nodes, classes) as stacked bars, one bar a node."""
    table = np.asarray(counts)
    if table.ndim != 2:
        raise ValueError(f"a partition is counted as (nodes, classes), got shape {table.shape}")
    figure, axes = _one("node", "examples", width=2.5 + 0.22 * len(table))
    names = list(labels) if labels else [str(k) for k in range(table.shape[1])]
    bottom = np.zeros(len(table))
    hatches = ("", "//", "..", "xx", "\\\\", "--", "++", "oo", "||", "**")
    for k in range(table.shape[1]):
        shade = 0.15 + 0.75 * k / max(table.shape[1] - 1, 1)
        axes.bar(range(len(table)), table[:, k], bottom=bottom, color=(shade, shade * 0.9 + 0.05, 1.0 - 0.6 * shade),
                 hatch=hatches[k % 10], edgecolor="white", linewidth=0.3, label=names[k])  # fmt: skip
        bottom += table[:, k]
    axes.set_xticks(range(len(table)))
    axes.legend(title="class", fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        axes.set_title(title)
    return figure


def _one(x: str, y: str, width: float = 6.4) -> tuple[Figure, Axes]:
    figure, axes = new_figure(width=width, height=4.2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_axisbelow(True)
    return figure, axes
