"""Independent units of work as Ray tasks: cells of a matrix, experiments of a theory page.

Notable choices
- Each unit is a stage of the run: it is recorded the moment it is done, and skipped when the run is resumed.
- A task whose worker or machine dies is run again by Ray; its result is a function of its arguments, so that is harmless.
- Results are handed out in the order of `units`, whatever order they arrived in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray

from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.session import Session

RETRIES = 5


def run_stages(
    run: Run,
    session: Session,
    units: Mapping[str, tuple[Callable[..., Mapping[str, Any]], tuple[Any, ...]]],
    description: str,
) -> dict[str, dict[str, Any]]:
    """Run `units` (stage name -> function and arguments), as many at a time as the cluster has CPUs.

    Functions run in worker processes and return what JSON can hold. An exception in one is raised here, after the
    stages that were already done are recorded.
    """
    session.release()
    todo = {name: unit for name, unit in units.items() if run.stage(name).result is None}
    with Progress(len(units), description, unit="units", done=len(units) - len(todo)) as progress:
        waiting = iter(todo.items())
        under_way: dict[ray.ObjectRef, str] = {}
        remote = ray.remote(_call).options(max_retries=RETRIES, num_cpus=1)
        while True:
            # Two per CPU, so that a worker that ends one finds the next already there; some more wait where nodes are yet to
            # start, for an autoscaler to see.
            width = max(16, 2 * int(ray.cluster_resources().get("CPU", 0)))
            while len(under_way) < width and (unit := next(waiting, None)) is not None:
                name, (function, args) = unit
                under_way[remote.remote(function, *args)] = name
            if not under_way:
                break
            done, _ = ray.wait(list(under_way), num_returns=1)
            for ref in done:
                run.stage(under_way.pop(ref)).finish(ray.get(ref))
                progress.advance()
    return {name: _result(run, name) for name in units}


def _call(function: Callable[..., Mapping[str, Any]], *args: Any) -> Mapping[str, Any]:
    return function(*args)


def _result(run: Run, name: str) -> dict[str, Any]:
    result = run.stage(name).result
    assert result is not None
    return result
