"""What the sweep commands of all systems share: the flags, the table, the figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from jobs.cli import ClusterJob
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.runtime.space import check_space, parse_space
from raysys.runtime.statistics import Interval


class SweepFlags(ClusterJob):
    """How a space is searched."""

    space: list[str] = Field(["lr=0.1,0.3,1.0", "momentum=0.0,0.9,0.99"], min_length=1)
    """What varies: field=a,b,c or field=low..high, with :log or :int for a logarithmic or whole range."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How the space is searched; a grid needs lists of values."""
    samples: int = Field(1, ge=1)
    """Trials (random, optuna) or repetitions of the grid."""
    asha: bool = False
    """Stop trials that fall behind. Not where what matters comes late, such as an attack with a warm-up."""
    metric: str = "accuracy"
    """What decides: a measurement of the evaluation."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of the metric is better."""

    def check_search(self, fields: set[str], measured: set[str], steps: int) -> None:
        """Refuse a space, a metric or a search that cannot work.

        Raises:
            ValueError: one sentence for the user.
        """
        if self.metric not in measured:
            raise ValueError(f"metric: got {self.metric!r}; allowed are {', '.join(sorted(measured))}")
        space = parse_space(self.space)
        check_space(space, self.search, self.samples, "asha" if self.asha else None, steps)
        for field in space:
            if field not in fields:
                raise ValueError(
                    f"space: got {field!r}; allowed are the fields of a training run, such as lr or rounds"
                )


def run_sweep(config: SweepFlags, run: Run, session: Session, trial: Callable[..., None], steps: int) -> None:
    """The trials, their table and a figure; the best trial is the last row of the grid."""
    from raysys.runtime.sweep import sweep  # ray.tune takes a second to import, and no other command needs it

    session.release()
    found = sweep(
        trial,
        parse_space(config.space),
        storage=run.storage,
        metric=config.metric,
        mode=config.mode,
        search=config.search,
        samples=config.samples,
        steps=steps,
        scheduler="asha" if config.asha else None,
        seed=config.seed,
    )
    for row in found.rows:
        if row.get(config.metric) is not None:
            run.row(config.metric, exactly(row[config.metric]), **{k: row[k] for k in found.space})
    run.grid("Trials", [*found.rows, found.best | {"error": "<- best"}])
    run.figure("sweep", found.figure())


def exactly(value: float) -> Interval:
    """A value without repetitions."""
    return Interval(value, None, None, 1)
