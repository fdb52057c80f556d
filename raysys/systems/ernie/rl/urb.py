"""The unbiased replay buffer U-RB: which query is answered when, and what an iteration trains on [spec 2.10].

Queries 0, 1, 2, ... have a fixed order, and iteration t trains on exactly D_t = {t BS, ..., (t+1) BS - 1}. The inference pool
holds D_t to D_{t+N-1}: slots that short answers free begin queries of later iterations, and what is not finished when D_t is
goes on under the next weights. So a batch never depends on how long answers take: no bias. N = 1 is the synchronous baseline.

APRIL, the other baseline, begins as many as there are slots and trains on whichever are finished first: fast, and biased to
short answers.

Notable choices
- Time is counted in ticks: every query that holds a slot draws one token of each of its answers in a tick. The schedule is
  thereby a function of the answers alone; neither machines nor the number of rollout actors can change it, and the same code
  runs a simulation (`simulate`) and the real rollouts, which come in through `advance`.
- Queries that begin in the same tick are advanced by one call, so that they can be batched and spread over actors.

Shapes: q queries, I iterations.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


class Progress(NamedTuple):
    """How far a query came in one call: ticks used, and whether all its answers are finished."""

    ticks: int
    done: bool


Advance = Callable[[Sequence[int], int | None], Sequence[Progress]]
"""Let queries draw for at most so many ticks (None: until they are finished). A query uses fewer only if it is finished."""


@dataclass
class Buffer:
    """The state of U-RB between iterations; plain numbers, so a checkpoint can hold it.

    Args:
        queries: how many there are in all.
        batch: BS, a divisor of `queries`.
        depth: N.
        slots: queries that hold a slot at the same time at most.
    """

    queries: int
    batch: int
    depth: int
    slots: int
    iteration: int = 0
    begun: int = 0
    """Queries 0 to begun - 1 have been begun: the order is fixed."""
    held: list[int] = field(default_factory=list)
    """Begun and not finished, in order."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.queries % self.batch:
            raise ValueError(f"queries: got {self.queries}; expected a multiple of the batch, {self.batch}")
        if self.depth < 1 or self.slots < 1:
            raise ValueError(f"depth and slots must be at least 1, got {self.depth} and {self.slots}")

    @property
    def due(self) -> range:
        """D_t."""
        return range(self.iteration * self.batch, (self.iteration + 1) * self.batch)

    @property
    def pool(self) -> range:
        """D_t to D_{t+N-1}: what may be in work."""
        return range(self.due.start, min(self.queries, self.due.start + self.batch * self.depth))

    def run(self, advance: Advance) -> int:
        """Answer until D_t is finished, and go on to the next iteration. Returns the ticks that took.

        All of D_t is begun before anything later. So while D_t lacks slots nothing later holds any, and D_t's own end, the
        horizon T, can be found first; then the rest of the pool fills the slots up to T.

        Raises:
            IndexError: there is no further iteration.
        """
        if self.due.start >= self.queries:
            raise IndexError(f"iteration {self.iteration}: there are only {self.queries // self.batch}")
        due, later = self.due, [q for q in self.held if q not in self.due]
        free = [0] * (self.slots - len(self.held))
        mine = [q for q in self.held if q in due]
        ends = self._advance(advance, mine, 0, None, free) + self._fill(advance, due.stop, free, None)
        horizon = max(ends, default=0)
        self.held = []
        if horizon:
            self._advance(advance, later, 0, horizon, free)
            self._fill(advance, self.pool.stop, free, horizon)
        else:
            self.held = later
        self.held.sort()
        self.iteration += 1
        return horizon

    def _fill(self, advance: Advance, stop: int, free: list[int], horizon: int | None) -> list[int]:
        """Begin queries below `stop` as slots become free, up to the horizon; the ticks at which they ended."""
        ends: list[int] = []
        while self.begun < stop and free and (horizon is None or free[0] < horizon):
            now = free[0]
            count = min(sum(tick == now for tick in free), stop - self.begun)
            for _ in range(count):
                heapq.heappop(free)
            chosen = list(range(self.begun, self.begun + count))
            self.begun += count
            ends += self._advance(advance, chosen, now, horizon, free)
        return ends

    def _advance(
        self, advance: Advance, queries: Sequence[int], now: int, horizon: int | None, free: list[int]
    ) -> list[int]:
        """One call from tick `now`: slots of finished queries become free, others stay held."""
        if not queries:
            return []
        ends = []
        for query, told in zip(queries, advance(queries, None if horizon is None else horizon - now), strict=True):
            if told.done:
                heapq.heappush(free, now + told.ticks)
                ends.append(now + told.ticks)
            elif horizon is None:
                raise RuntimeError(f"query {query} was to be finished and is not")
            else:
                self.held.append(query)
        return ends


@dataclass(frozen=True)
class Timeline:
    """What a simulation saw, by iteration."""

    batches: I64
    """(I, BS) the queries trained on, each batch in ascending order."""
    ticks: I64
    """(I,) how long each iteration's rollouts took."""
    began: I64
    """(I, BS) the iteration in which each of them was begun."""
    train: float
    """Ticks of a training step."""

    @property
    def throughput(self) -> float:
        """Queries trained on per tick."""
        return self.batches.size / float(self.ticks.sum() + self.train * len(self.ticks))

    @property
    def staleness(self) -> float:
        """Mean iterations between a query's beginning and its training."""
        return float((np.arange(len(self.began))[:, None] - self.began).mean())


def simulate(lengths: I64, batch: int, depth: int, slots: int, train: float = 0.0) -> Timeline:
    """U-RB over queries of known lengths (q,) >= 1, as many whole iterations as there are queries for."""
    iterations = len(lengths) // batch
    buffer = Buffer(iterations * batch, batch, depth, slots)
    left = lengths.astype(np.int64).copy()
    began = np.full(len(lengths), -1)

    def advance(queries: Sequence[int], budget: int | None) -> list[Progress]:
        told = []
        for q in queries:
            began[q] = buffer.iteration if began[q] < 0 else began[q]
            used = int(left[q] if budget is None else min(left[q], budget))
            left[q] -= used
            told.append(Progress(used, bool(left[q] == 0)))
        return told

    batches, ticks = [], []
    for _ in range(iterations):
        batches.append(list(buffer.due))
        ticks.append(buffer.run(advance))
    done = np.array(batches, dtype=np.int64)
    return Timeline(done, np.array(ticks), began[done], train)


def simulate_april(lengths: I64, batch: int, slots: int, iterations: int, train: float = 0.0) -> Timeline:
    """APRIL over queries of known lengths: all slots busy, an iteration trains on the `batch` that are finished first (ties: by
    number), the unfinished go on.

    Raises:
        ValueError: there are too few slots for a batch, or too few queries.
    """
    if slots < batch or len(lengths) < iterations * batch + slots:
        raise ValueError(
            f"April needs slots >= batch and queries >= iterations * batch + slots, got {slots} slots, {len(lengths)} queries"
        )
    running: list[tuple[int, int]] = []  # (tick of its end, query)
    began = np.zeros(len(lengths), dtype=np.int64)
    begun, now = 0, 0
    batches, ticks = [], []
    for iteration in range(iterations):
        start, chosen = now, list[int]()
        while len(chosen) < batch:
            while len(running) < slots:
                heapq.heappush(running, (now + int(lengths[begun]), begun))
                began[begun] = iteration
                begun += 1
            now, query = heapq.heappop(running)
            chosen.append(query)
        batches.append(sorted(chosen))
        ticks.append(now - start)
    done = np.array(batches, dtype=np.int64)
    return Timeline(done, np.array(ticks), began[done], train)


def mean_lengths(timeline: Timeline, lengths: I64, iterations: int) -> float:
    """Mean length of what the first iterations train on: below the population's, training is biased to short answers."""
    return float(lengths[timeline.batches[:iterations]].mean())
