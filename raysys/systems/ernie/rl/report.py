"""Tables, claims and the figure of reinforcement learning: rewards on held-out questions, intervals over paired seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys.runtime.run import Run
from raysys.runtime.statistics import Interval, mean_ci, paired_difference
from raysys.systems.ernie.rl.arms import BASE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Arm to what each seed gave (`jobs.ernie_rl.play`)."""
Rise = tuple[list[float], list[float], Interval]
"""Rewards before and after by seed, and their paired difference."""
TITLES = {
    "arithmetic": "sums in text",
    "count": "digits in an image",
    "tones": "tones in sound",
    "nextframe": "next frame of a clip",
}


def tell(run: Run, results: Results, names: Sequence[str]) -> None:
    """Everything, into a run."""
    seeds = len(results[BASE])
    rises = dict[tuple[str, str], Rise]()
    for place, name in enumerate([*names, "all"]):
        for how in ("drawn", "greedy"):
            before, after = (rewards(results[BASE], when, how, place, len(names)) for when in ("before", "after"))
            rise = paired_difference(after, before)
            run.row(f"{how} reward", mean_ci(before), environment=name, arm=BASE, when="before")
            run.row(f"{how} reward", mean_ci(after), environment=name, arm=BASE, when="after")
            run.row(f"rise of {how} reward", rise, environment=name, arm=BASE, when="after - before")
            rises[name, how] = (before, after, rise)
    run.grid(
        f"Reward on held-out questions, answers drawn at temperature 1 (most likely answers in brackets), {seeds} seed(s)",
        [
            {
                "environment": TITLES.get(name, name),
                "before": _both(rises, name, after=False),
                "after": _both(rises, name, after=True),
                "rise": str(rises[name, "drawn"][2]),
            }
            for name in [*names, "all"]
        ],
    )
    for name in names:
        run.claim(
            f"Unified reinforcement learning raises the reward on {TITLES.get(name, name)}",
            "Section 4",
            rises[name, "drawn"][2].above(0),
            rises[name, "drawn"][2],
        )
    if len(results) > 1:
        run.grid(
            f"Arms: drawn reward on all environments, and against the base arm, {seeds} paired seed(s); masked, clipped, KL"
            " and entropy are of groups that are not all right or all wrong",
            arms(run, results, names),
        )
    run.figure("reinforcement", curves(results, names))


def rewards(found: Sequence[Mapping[str, Any]], when: str, how: str, place: int, count: int) -> list[float]:
    """Of each seed, the held-out reward of an environment, or of all of them (`place` = count)."""
    return [float(np.mean(one[when][how]) if place == count else one[when][how][place]) for one in found]


def arms(run: Run, results: Results, names: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each arm."""
    lines, count = [], len(names)
    base = rewards(results[BASE], "after", "drawn", count, count)
    for name, found in results.items():
        after = rewards(found, "after", "drawn", count, count)
        greedy = rewards(found, "after", "greedy", count, count)
        against = paired_difference(after, base)
        run.row("drawn reward", mean_ci(after), environment="all", arm=name, when="after")
        run.row("difference to the base arm", against, environment="all", arm=name, when="after")
        lines.append(
            {
                "arm": name,
                "drawn": f"{np.mean(after):.3f}",
                "greedy": f"{np.mean(greedy):.3f}",
                "against base": "" if name == BASE else str(against),
                **{part: f"{np.mean(rewards(found, 'after', 'drawn', i, count)):.2f}" for i, part in enumerate(names)},
                "masked": f"{_mean(found, 'masked'):.4f}",
                "clipped": f"{_mean(found, 'clipped'):.3f}",
                "KL": f"{_mean(found, 'kl_train_infer'):.2g}",
                "entropy, last": f"{_mean(found, 'entropy', 5):.2f}",
                "ticks": f"{_mean(found, 'ticks'):.1f}",
                "age": f"{_mean(found, 'age'):.2f}",
            }
        )
    return lines


def curves(results: Results, names: Sequence[str]) -> Figure:
    """Training reward of the base arm by iteration, mean of the seeds and their range, smoothed over 5 iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        rows = np.array([one["rows"][f"reward {name}"] for one in results[BASE]], dtype=float)
        window = min(5, rows.shape[1])
        smooth = np.array([np.convolve(row, np.ones(window) / window, "valid") for row in rows])
        at = np.arange(smooth.shape[1]) + window
        (line,) = axes.plot(
            at, smooth.mean(0), label=TITLES.get(name, name), linestyle=("-", "--", ":", "-.")[number % 4]
        )
        axes.fill_between(at, smooth.min(0), smooth.max(0), color=line.get_color(), alpha=0.15)
    axes.set_xlabel("iteration")
    axes.set_ylabel("reward of training answers (0 to 1)")
    axes.legend()
    return figure


def _both(rises: Mapping[tuple[str, str], Rise], name: str, after: bool) -> str:
    drawn, greedy = (
        float(np.mean(rises[name, how][1] if after else rises[name, how][0])) for how in ("drawn", "greedy")
    )
    return f"{drawn:.3f} ({greedy:.3f})"


def _mean(found: Sequence[Mapping[str, Any]], name: str, last: int = 0) -> float:
    values = [v for one in found for v in one["rows"].get(name, [])[-last:] if v is not None]
    return float(np.mean(values)) if values else 0.0
