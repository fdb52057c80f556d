"""Sweeps over any job's configuration, on Ray Tune.

Notable choices
- A trial is a function of (values, report): it runs anywhere on the cluster, and what it reports is all that comes back.
- Grid, random and Optuna (TPE) search are seeded. ASHA stops trials that fall behind, where trials report as they go.
- A combination that the job refuses (UserError) is recorded as refused and does not stop the sweep; a trial whose worker
  died is tried again. A sweep killed half-way is restored from Tune's own state in the run folder: finished trials are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from raysys.runtime.progress import Progress
from raysys.runtime.sentences import UserError
from raysys.runtime.space import Choice, Range, Space, check_space
from raysys.runtime.storage import Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "tune"
Search = Literal["grid", "random", "optuna"]


class Report(Protocol):
    """What a trial calls to report: `report(step, accuracy=0.9, ...)`, once at the end or as it goes."""

    def __call__(self, step: int, **measured: float) -> None: ...


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. Rows: one per trial, its values, then what it reported last; `error` where it was refused."""

    rows: list[dict[str, Any]]
    space: dict[str, Choice | Range]
    metric: str
    mode: str

    @property
    def best(self) -> dict[str, Any]:
        """The row with the best metric, among trials that went furthest."""
        done = [row for row in self.rows if row.get(self.metric) is not None]
        if not done:
            raise UserError(f"sweep: no trial reported {self.metric}; the first said: {self.rows[0].get('error')}")
        furthest = max(row["step"] for row in done)  # ASHA stops trials early: those are not compared with whole ones
        whole = [row for row in done if row["step"] == furthest]
        choose = max if self.mode == "max" else min
        return choose(whole, key=self._score)

    def _score(self, row: dict[str, Any]) -> float:
        return float(row[self.metric])

    def figure(self) -> Figure:
        """The metric against each varied field, one panel per field, the best trial marked."""
        from raysys.runtime.report import new_figure

        names = list(self.space)
        figure, axes = new_figure(1, len(names), width=1.2 + 3.2 * len(names), height=3.4)
        best = self.best
        done = [row for row in self.rows if row.get(self.metric) is not None]
        for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
            domain = self.space[name]
            values = [row[name] for row in done]
            if isinstance(domain, Choice):
                ticks = [str(value) for value in domain.values]
                axis.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
                values = [ticks.index(str(value)) for value in values]
            elif domain.log:
                axis.set_xscale("log")
            axis.plot(values, [row[self.metric] for row in done], "o", color="#0b3c5d", label="trial")
            axis.plot(values[done.index(best)], best[self.metric], "*", color="#d1495b", markersize=13, label="best")
            axis.set_xlabel(name)
            axis.set_ylabel(self.metric)
        figure.axes[0].legend()
        return figure


def sweep(
    trial: Callable[[dict[str, Any], Report], None],
    space: Space,
    *,
    storage: Storage,
    metric: str,
    mode: Literal["max", "min"] = "max",
    search: Search = "random",
    samples: int = 20,
    steps: int = 1,
    scheduler: Literal["asha"] | None = None,
    seed: int = 0,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
) -> Sweep:
    """Run `trial` over the space on the current Ray cluster, or go on with the sweep that `storage` holds.

    `steps` is the step of a trial's last report (ASHA needs it). `samples` is the number of trials (random, Optuna) or
    of repetitions of the grid.
    """
    _quiet()
    check_space(space, search, samples, scheduler, steps)
    worst = -math.inf if mode == "max" else math.inf

    def run_trial(values: dict[str, Any]) -> None:
        def report(step: int, **measured: float) -> None:
            if metric not in measured:
                raise ValueError(f"a trial must report {metric!r}, got {', '.join(measured)}")
            tune.report({"step": step, "error": None, **measured})

        try:
            trial(dict(values), report)
        except UserError as error:
            tune.report({"step": steps, metric: worst, "error": str(error)})

    trainable = tune.with_resources(run_trial, {"cpu": cpus_per_trial, "gpu": gpus_per_trial})
    where = storage.address(EXPERIMENT)
    count = samples * math.prod(len(domain.values) for domain in space.values() if isinstance(domain, Choice))
    with Progress(count if search == "grid" else samples, "sweep", unit="trials") as progress:
        Announce.shown[:] = [(progress, metric)]
        if tune.Tuner.can_restore(where):
            tuner = tune.Tuner.restore(where, trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_domains(space, search),
                tune_config=tune.TuneConfig(
                    metric=metric, mode=mode, num_samples=samples, reuse_actors=True, search_alg=_searcher(search, seed, space),
                    scheduler=_scheduler(scheduler, steps),
                ),
                run_config=tune.RunConfig(
                    name=EXPERIMENT, storage_path=storage.uri, verbose=0, callbacks=[Announce()],
                    failure_config=tune.FailureConfig(max_failures=1),
                ),
            )  # fmt: skip
        results = tuner.fit()
        Announce.shown.clear()
    rows = []
    for result in results:
        measured = dict(result.metrics or {})
        values = _flat(measured.get("config") or result.config or {})
        reported = {k: v for k, v in measured.items() if k not in _TUNE_OWN and not isinstance(v, dict)}
        error = measured.get("error") or (str(result.error).strip().splitlines()[-1] if result.error else None)
        if error:
            reported[metric] = None
        rows.append({**values, **reported, "error": error})
    rows.sort(key=lambda row: [str(row.get(name)) for name in space])
    return Sweep(rows, dict(space), metric, mode)


_TUNE_OWN = frozenset(
    {
        "checkpoint_dir_name", "config", "date", "done", "error", "experiment_tag", "hostname", "iterations_since_restore",
        "node_ip", "pid", "should_checkpoint", "time_since_restore", "time_this_iter_s", "time_total_s", "timestamp",
        "training_iteration", "trial_id",
    }
)  # fmt: skip


def _domains(space: Space, search: str) -> dict[str, Any]:
    domains: dict[str, Any] = {}
    for name, domain in space.items():
        if isinstance(domain, Choice):
            grid = search == "grid"
            domains[name] = tune.grid_search(list(domain.values)) if grid else tune.choice(list(domain.values))
        elif domain.integer:
            draw = tune.lograndint if domain.log else tune.randint
            domains[name] = draw(int(domain.low), int(domain.high) + 1)
        else:
            domains[name] = (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    return domains


def _searcher(search: str, seed: int, space: Space) -> Any:
    if search == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return OptunaSearch(seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _scheduler(name: str | None, steps: int) -> Any:
    if name is None:
        return None
    return ASHAScheduler(time_attr="step", max_t=steps, grace_period=max(1, steps // 9), reduction_factor=3)


class Announce(tune.Callback):  # type: ignore[misc]
    """Shows finished trials on the progress bar. Tune pickles its callbacks, so the bar is found here and not kept."""

    shown: ClassVar[list[tuple[Progress, str]]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for progress, metric in self.shown:
            last = trial.last_result.get(metric)
            progress.note(f"last {metric} {last:.4g}" if isinstance(last, float) else "")
            progress.advance()


def _quiet() -> None:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, dict)}
