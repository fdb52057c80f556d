"""Handles of the controller: a group of hosts, and the server. They hold references to objects, never the objects.

Notable choices
- Blocks of nodes are dealt to hosts in order; a block never spans two hosts and is stepped the same way anywhere, so the
  number of hosts cannot change a bit of the result.
- Hosts are not restarted by Ray but by `repair`, which the loop of rounds calls: all return to the same barrier together.
- Calls whose answer is only "done" are acknowledgements; the loop waits for these and never fetches a tensor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError

from actors.host import Host, State
from actors.message import Traffic
from actors.process import Process
from actors.server import Evaluate, Server, ServerBlock
from raysys.runtime.participants import Call
from raysys.runtime.rounds import is_loss
from raysys.runtime.session import Session, wait_until

I64 = NDArray[np.int64]
Make = Callable[[I64], Any]
ORDER = itertools.count()
Update = list[ray.ObjectRef]
"""One host's messages of a round: one reference per shard of columns."""


class Crew:
    """Hosts of one role that the loop of rounds can snapshot, restore and repair. `arguments[i]` make host i's role."""

    def __init__(
        self, session: Session, role: type[Host], options: Mapping[str, Any], arguments: Sequence[tuple]
    ) -> None:
        self.session, self.role, self.arguments = session, role, list(arguments)
        self.idle = session.idle.setdefault(repr(sorted(options.items())), [])
        self.remote = ray.remote(Process).options(max_restarts=0, max_task_retries=0, **options)
        self._calls: list[Call] = []
        self._asked: list[ray.ObjectRef] = []
        self._becoming: dict[int, ray.ObjectRef] = {}
        self.hosts = [self._enlist(i) for i in range(len(self.arguments))]

    def ready(self) -> None:
        """Wait until all hosts have built their nodes. Crews start side by side: spawn them all, then ask."""
        self._await_start(range(len(self.hosts)))

    def _enlist(self, host: int, fresh: bool = False) -> Any:
        """A process for one host: one that an earlier crew left, or a new one."""
        process = self.idle.pop() if self.idle and not fresh else self.remote.remote()
        self._becoming[host] = process.become.remote(self.role, *self.arguments[host])
        return process

    def call(
        self, host: int, method: str, *args: Any, returns: int = 1, acknowledged: bool = False
    ) -> list[ray.ObjectRef]:
        """Submit a call; a list of its `returns` references."""
        made = self.hosts[host].do.options(num_returns=returns).remote(method, *args)
        refs = made if isinstance(made, list) else [made]
        self._calls.append(Call(self, host, refs, acknowledged, next(ORDER)))
        return refs

    def each(self, method: str, *args: Any) -> list[Any]:
        """Ask every host and wait for the answers."""
        return ray.get([host.do.remote(method, *args) for host in self.hosts], timeout=self.session.config.timeout_s)

    def taken(self) -> list[Call]:
        calls, self._calls = self._calls, []
        return calls

    def kill(self, host: int) -> None:
        ray.kill(self.hosts[host])

    def ask(self) -> None:
        """Ask every host for a sign of life; `repair` looks at the answers."""
        self._asked = [host.do.remote("where") for host in self.hosts]

    def repair(self) -> list[str]:
        """Replace every host that is dead or does not answer within the session's timeout."""
        asked, self._asked = self._asked, []
        ray.wait(asked, num_returns=len(asked), timeout=self.session.config.timeout_s, fetch_local=False)
        dead = [i for i, ref in enumerate(asked) if not self._answers(ref)]
        for i in dead:
            ray.kill(self.hosts[i])
            self.hosts[i] = self._enlist(i, fresh=True)
        self._await_start(dead)
        return [", ".join(self.arguments[i][1]) for i in dead]

    def _answers(self, ref: ray.ObjectRef) -> bool:
        try:
            ray.get(ref, timeout=0)
        except GetTimeoutError:
            return False
        except RayError as error:
            if not is_loss(error):
                raise
            return False
        return True

    def _await_start(self, hosts: Sequence[int]) -> None:
        """Wait until these hosts have built their nodes; a process that dies before that is replaced.

        Raises:
            TimeoutError: the cluster cannot place them in time.
        """
        deadline = time.monotonic() + self.session.config.start_timeout_s
        for i in hosts:
            while True:
                try:
                    ray.get(self._becoming[i], timeout=wait_until(deadline))
                    break
                except GetTimeoutError as error:
                    limit = self.session.config.start_timeout_s
                    raise TimeoutError(
                        f"{len(hosts)} hosts could not all be started within {limit:g} s; free {free()}"
                    ) from error
                except RayError as error:
                    if not is_loss(error):
                        raise
                    self.hosts[i] = self._enlist(i, fresh=True)

    def snapshot(self) -> Iterator[tuple[str, State]]:
        # One host at a time: the controller holds at most one host's state in memory.
        for host in self.hosts:
            yield from ray.get(host.do.remote("state"), timeout=self.session.config.timeout_s).items()

    def restore(self, states: Mapping[str, State] | None) -> None:
        waiting = []
        for host, (_, blocks, *_) in zip(self.hosts, self.arguments, strict=True):
            if states is None:
                waiting.append(host.do.remote("restart"))
            else:
                waiting.append(host.do.remote("load", {name: states[name] for name in blocks}))
        ray.get(waiting, timeout=self.session.config.start_timeout_s)

    def counters(self) -> dict[str, int]:
        """Messages, bytes and refused messages over all hosts."""
        each: list[dict[str, int]] = self.each("counters")
        return {key: sum(c[key] for c in each) for key in each[0]}

    def link_counts(self) -> Traffic:
        """Messages and bytes by node, over all hosts."""
        each: list[Traffic] = self.each("link_counts")
        return Traffic(sum(t.messages for t in each), sum(t.bytes for t in each))

    def stop(self) -> None:
        """Leave the processes to the next crew that asks for the same resources."""
        self.idle.extend(self.hosts)
        self.hosts = []


class NodeGroup(Crew):
    """Virtual nodes of one role, spread over hosts."""

    @classmethod
    def spawn(
        cls,
        session: Session,
        role: type[Host],
        make: Make,
        blocks: Sequence[I64],
        links: int,
        *more: Any,
        name: str,
        hosts: int | None = None,
    ) -> Self:
        """Start hosts for `blocks` of node ids.

        Args:
            make: builds one block from its ids; sent to every host, so it must be small.
            links: number of nodes in the whole run, for the counts per link.
            more: what the role's constructor takes besides these.
            name: states are called `<name>-<number of the block>`.
            hosts: how many; the session decides where None. Helper groups (adversaries) take one and reserve no CPU.
                Where there are no nodes (f = 0) there is no host: an empty answer would cost every round a hop.
        """
        blocks = [block for block in blocks if len(block)]
        count = min(len(blocks), hosts or session.hosts_for(len(blocks)))
        named = [(f"{name}-{k}", block) for k, block in enumerate(blocks)]
        dealt = [dict(named[len(named) * i // count : len(named) * (i + 1) // count]) for i in range(count)]
        c = session.config
        options = {"num_cpus": 0} if hosts else {"num_cpus": c.cpus_per_host, "num_gpus": c.gpus_per_host}
        return cls(
            session, role, options | {"scheduling_strategy": "SPREAD"}, [(make, each, links, *more) for each in dealt]
        )

    def train(self, t: int, cuts: Sequence[int] | None = None) -> list[Update]:
        """Updates of round t, cut into column shards where there is a server."""
        if cuts is None:
            return [self.call(i, "train", t) for i in range(len(self.hosts))]
        return [self.call(i, "train", t, list(cuts), returns=len(cuts) - 1) for i in range(len(self.hosts))]

    def corrupt(self, t: int, updates: Sequence[Update], cuts: Sequence[int] | None = None) -> list[Update]:
        """What the Byzantine nodes send, having seen the honest `updates`: with a server in the same form as these,
        without one a single reference to what is told on each edge."""
        seen = [ref for update in updates for ref in update]
        if cuts is None:
            told = [self.call(i, "corrupt", t, *seen) for i in range(len(self.hosts))]
            return told or [[ray.put((t, {}))]]
        return [self.call(i, "corrupt", t, list(cuts), *seen, returns=len(cuts) - 1) for i in range(len(self.hosts))]

    def receive(self, t: int, model: Update) -> None:
        """Hand the new model to all nodes."""
        for i in range(len(self.hosts)):
            self.call(i, "receive", t, *model, acknowledged=True)

    def exchange(self, t: int, updates: Sequence[Update], told: Update | None = None) -> None:
        """Hand every host what all hosts sent (it uses its nodes' neighbours') and what was told on each edge, if anything."""
        seen = [ref for update in updates for ref in update]
        for i in range(len(self.hosts)):
            self.call(i, "exchange", t, told[0] if told else (t, {}), *seen, acknowledged=True)

    def statistics(self, t: int) -> list[ray.ObjectRef]:
        """What the evaluation needs of every host."""
        return [self.call(i, "statistics", t)[0] for i in range(len(self.hosts))]

    def evaluate(self, statistics: Sequence[ray.ObjectRef]) -> ray.ObjectRef:
        """Measurements from the statistics of all hosts, made by the first."""
        return self.call(0, "evaluate", *statistics)[0]


class ServerGroup(Crew):
    """A server cut by columns into shards, each its own actor; one shard is a whole server."""

    @classmethod
    def spawn(
        cls,
        session: Session,
        make: Callable[[slice], ServerBlock],
        dimension: int,
        links: int,
        evaluate: Evaluate,
        *,
        shards: int = 1,
        align: int = 1,
    ) -> Self:
        """Start the shards; each gets whole multiples of `align` columns, so there may be fewer than asked for."""
        units = -(-dimension // align)
        shards = min(shards, units)
        cuts = [min(dimension, align * (units * s // shards)) for s in range(shards + 1)]
        arguments = [
            (Shard(make, slice(cuts[s], cuts[s + 1])), {f"server-{s}": np.empty(0, np.int64)}, links, evaluate)
            for s in range(shards)
        ]
        group = cls(session, Server, {"num_cpus": 0, "scheduling_strategy": "SPREAD"}, arguments)
        group.cuts = cuts
        return group

    cuts: list[int]

    def aggregate(self, t: int, updates: Sequence[Update]) -> Update:
        """The new model, one reference per shard."""
        if len(self.hosts) == 1:
            return self.call(0, "aggregate", t, *[update[0] for update in updates])
        shards = range(len(self.hosts))
        surveys = [self.call(s, "survey", t, *[update[s] for update in updates])[0] for s in shards]
        plan = self.call(0, "plan", t, *surveys)[0]
        return [self.call(s, "step", t, plan)[0] for s in shards]

    def evaluate(self, model: Update, statistics: Sequence[ray.ObjectRef]) -> ray.ObjectRef:
        """Measurements of a model."""
        return self.call(0, "evaluate", len(model), *model, *statistics)[0]


class Shard:
    """Builds the block of one shard: Host's `make` takes node ids, a server's takes columns."""

    def __init__(self, make: Callable[[slice], ServerBlock], columns: slice) -> None:
        self.make, self.columns = make, columns

    def __call__(self, ids: I64) -> ServerBlock:
        return self.make(self.columns)


def free() -> str:
    """What the cluster has left, in words."""
    have = ray.available_resources()
    return f"CPU {have.get('CPU', 0):g}, GPU {have.get('GPU', 0):g}"
