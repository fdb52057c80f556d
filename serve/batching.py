"""Requests in, batches out; and values loaded when first needed. For one asyncio loop each.

Notable choices
- The next batch is whatever has come while the last one was computed. `ray.serve.batch` closes a batch when its timer ends, also
  while the model is busy, so that under load small batches queue up behind each other, just when large ones are needed.
- A batch that fails is computed again item by item: only those that fail alone are failed.
- What can wait (`later`) is computed one item at a time, and only when nothing else is there: long work, cut into short items,
  so holds the rest up by one item at most.
- Work runs in a thread: the loop goes on taking requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from serve.refusal import Refused

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")
Waiting = tuple[T, asyncio.Future[R], float]
"""An item, who waits for its result, and since when."""
log = logging.getLogger("ray.serve")


class Batcher(Generic[T, R]):
    """Calls `work(items)` with up to `limit` items at a time; `await batcher(item)` gives that item's result.

    Args:
        work: a list of items to the list of their results, in order. It is called from one thread, one call at a time.
        wait_s: how long the first of a batch waits for company while the model is idle.
    """

    def __init__(self, work: Callable[[list[T]], Sequence[R]], limit: int, wait_s: float) -> None:
        self.work, self.limit, self.wait_s = work, limit, wait_s
        self._queue: deque[Waiting[T, R]] = deque()
        self._later: deque[Waiting[T, R]] = deque()
        self._thread = ThreadPoolExecutor(1, "model")
        self._more = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    async def __call__(self, item: T, later: bool = False) -> R:
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        (self._later if later else self._queue).append((item, future, time.monotonic()))
        self._more.set()
        return await future

    async def _run(self) -> None:
        while True:
            await self._company()
            taken = [self._queue.popleft() for _ in range(min(self.limit, len(self._queue)))]
            await self._answer(taken or [self._later.popleft()])

    async def _answer(self, taken: list[Waiting[T, R]]) -> None:
        """Compute a batch and tell everyone in it; if it fails, each item by itself, so that one does not fail the others."""
        taken = [one for one in taken if not one[1].done()]  # whoever gave up is not computed
        if not taken:
            return
        items, loop = [item for item, _, _ in taken], asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self.work, items)
            if len(results) != len(taken):
                raise RuntimeError(f"a batch of {len(taken)} items gave {len(results)} results")
        except Exception as wrong:  # noqa: BLE001 (it is raised again where each item was asked for)
            if len(taken) > 1 and not isinstance(wrong, Refused):
                log.warning(
                    "a batch of %d failed, each is tried alone: %s: %s", len(taken), type(wrong).__name__, wrong
                )
                for one in taken:
                    await self._answer([one])
                return
            for _, future, _ in taken:
                if not future.done():
                    future.set_exception(wrong)
            return
        for (_, future, _), result in zip(taken, results, strict=True):
            if not future.done():
                future.set_result(result)

    async def _company(self) -> None:
        """Until there is a full batch, or something and its time of waiting is over, or only what can wait."""
        while len(self._queue) < self.limit:
            left = 0.0 if self._later else None
            if self._queue:
                left = self._queue[0][2] + self.wait_s - time.monotonic()
            if left is not None and left <= 0:
                return
            self._more.clear()
            try:
                async with asyncio.timeout(left):
                    await self._more.wait()
            except TimeoutError:
                return


class Lazy(Generic[K, T]):
    """Values by name, loaded in threads when first asked for; the `limit` used last are kept.

    Several who ask for the same name wait for one load. A load that fails is told to all of them and not remembered.
    """

    def __init__(self, load: Callable[[K], T], limit: int, threads: int = 4) -> None:
        self.load, self.limit = load, limit
        self.evicted = 0
        self._kept: OrderedDict[K, T] = OrderedDict()
        self._loading: dict[K, asyncio.Task[T]] = {}
        self._threads = ThreadPoolExecutor(threads, "load")

    def __len__(self) -> int:
        return len(self._kept)

    async def __call__(self, name: K) -> T:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load(name))
        return await asyncio.shield(self._loading[name])  # one who gives up must not stop it for the others

    async def _load(self, name: K) -> T:
        try:
            value = await asyncio.get_running_loop().run_in_executor(self._threads, self.load, name)
            self._kept[name] = value
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
                self.evicted += 1
            return value
        finally:
            del self._loading[name]


class Gatherer(Generic[T, R]):
    """Calls `work(items)`, which waits for others, with all items that came since; `await gatherer(item)` gives its result.

    Args:
        work: a list of items to the list of their results or refusals, in order.
        limit: items in one call at most.
        under_way: calls at once at most. With two, one is computed while the answers of the other are on their way.
    """

    def __init__(
        self, work: Callable[[list[T]], Awaitable[Sequence[R | Refused]]], limit: int, under_way: int = 2
    ) -> None:
        self.work, self.limit, self.under_way = work, limit, under_way
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def __call__(self, item: T) -> R:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if len(self._calls) < self.under_way:
            call = asyncio.create_task(self._run())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        return await future

    async def _run(self) -> None:
        while self._queue:
            taken = [self._queue.popleft() for _ in range(min(self.limit, len(self._queue)))]
            taken = [one for one in taken if not one[1].done()]  # whoever gave up is not asked for
            if taken:
                await self._call(taken)

    async def _call(self, taken: list[tuple[T, asyncio.Future[R]]]) -> None:
        wrong: BaseException | None = None
        results: Sequence[R | Refused] = []
        try:
            results = await self.work([item for item, _ in taken])
        except Exception as error:  # noqa: BLE001 (it is raised again where each item was asked for)
            wrong = error
        for i, (_, future) in enumerate(taken):
            if future.done():
                continue
            if wrong is not None:
                future.set_exception(wrong)
            elif isinstance(result := results[i], Refused):
                future.set_exception(result)
            else:
                future.set_result(result)
