"""Rollouts at work: actors that draw answers and judge them, for the learner of a reinforcement learning run.

Notable choices
- Weights are put into the object store once per iteration, and reach every actor by reference; an actor that has them already
  does not read them again. Questions travel once, by reference, too.
- What a call returns is a function of the weights and the call, and both are its arguments. So Ray may start a dead actor again
  and repeat its calls: no result is lost or changed, and the number of actors changes no bit.
- Calls are handed to whichever actor has the fewest unanswered ones, as they are answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.systems.ernie.rl.policy import Weights
from raysys.systems.ernie.rl.rollout import Call, Groups, Worker

RESTARTS = 10
"""Deaths of one actor that are survived; one that dies whenever it starts ends the run."""
AHEAD = 2
"""Calls of one actor under way: the next one waits where it will be answered."""


class Roller:
    """A worker in a process of its own."""

    def __init__(self, make: Callable[..., Worker], given: Sequence[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker = make(*(ray.get(one) if isinstance(one, ray.ObjectRef) else one for one in given))
        self._has: tuple[int, int] | None = None
        self.calls = self.seconds = 0.0

    def answer(self, weights: Weights, stamp: int, call: Call) -> Groups:
        """Answer a call with these weights; `stamp` tells whether they are those of the call before."""
        began = time.perf_counter()
        if self._has != (stamp, call.version):
            self.worker.load(weights, call.version)
            self._has = (stamp, call.version)
        found = self.worker.answer(call)
        self.calls += 1
        self.seconds += time.perf_counter() - began
        return found

    def telemetry(self) -> dict[str, float]:
        """Calls answered since it was started, seconds at work, its process."""
        return {"calls": self.calls, "seconds": self.seconds, "pid": float(os.getpid())}


class Rollers:
    """All rollout actors of a run, as the hands of its loop."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = list(handles)
        self._stamp = 0
        self._weights: tuple[Weights, Any] | None = None

    @classmethod
    def spawn(
        cls, session: Session | None, make: Callable[..., Worker], given: Sequence[Any], *, count: int, cpus: float
    ) -> Rollers:  # fmt: skip
        """Start actors, each of which makes a worker by `make(*given)`; large arguments are best object references.

        Raises:
            UserError: the cluster has not enough CPUs for them.
        """
        have = ray.cluster_resources().get("CPU", 0)
        if session is not None and session.embedded and count * cpus > have + 1e-9:
            raise UserError(
                f"rollout_actors: got {count} of {cpus:g} CPUs; this machine has {have:g}, so lower rollout_actors or"
                " cpus_per_actor"
            )
        options = {"num_cpus": cpus, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        actor = ray.remote(Roller).options(scheduling_strategy="SPREAD", **options)
        threads = max(1, int(cpus))
        return cls([actor.remote(make, list(given), threads) for _ in range(count)])

    def answer(self, weights: Weights, calls: Sequence[Call]) -> list[Groups]:
        """The groups of each call, in the order of the calls."""
        if self._weights is None or self._weights[0] is not weights:
            self._stamp += 1
            self._weights = (weights, ray.put(dict(weights)))
        ref = self._weights[1]
        waiting = list(enumerate(calls))[::-1]
        busy = dict.fromkeys(range(len(self.handles)), 0)
        under_way: dict[Any, tuple[int, int]] = {}
        found: list[Groups | None] = [None] * len(calls)
        while waiting or under_way:
            while waiting and min(busy.values()) < AHEAD:
                place, call = waiting.pop()
                actor = min(busy, key=lambda i: busy[i])
                busy[actor] += 1
                under_way[self.handles[actor].answer.remote(ref, self._stamp, call)] = (place, actor)
            done, _ = ray.wait(list(under_way), num_returns=1)
            for one in done:
                place, actor = under_way.pop(one)
                busy[actor] -= 1
                found[place] = ray.get(one)
        return [groups for groups in found if groups is not None]

    def telemetry(self) -> list[dict[str, float]]:
        """What each actor has done."""
        return ray.get([handle.telemetry.remote() for handle in self.handles])

    def stop(self) -> None:
        """End them: they are not restarted after this."""
        for handle in self.handles:
            ray.kill(handle, no_restart=True)
