"""Batches form while the model is busy; values are loaded once and the least used are dropped."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve.batching import Batcher, Gatherer, Lazy
from serve.refusal import Refused


def test_each_asks_alone_and_gets_its_own_result() -> None:
    async def ask() -> list[int]:
        double: Batcher[int, int] = Batcher(lambda items: [2 * item for item in items], 7, 0.001)
        return await asyncio.gather(*map(double, range(100)))

    assert asyncio.run(ask()) == [2 * i for i in range(100)]


def test_what_comes_while_the_model_is_busy_is_the_next_batch() -> None:
    sizes = []

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        time.sleep(0.1)
        return items

    async def ask() -> None:
        batcher = Batcher(work, 8, 0.0)
        asked = []
        for i in range(13):  # one by one, all within the first batch's time
            asked.append(asyncio.create_task(batcher(i)))
            await asyncio.sleep(0.004)
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert sizes == [1, 8, 4]


def test_an_idle_model_waits_for_company_but_not_for_long() -> None:
    sizes = []

    async def ask() -> float:
        batcher = Batcher(lambda items: sizes.append(len(items)) or items, 100, 0.05)
        began = time.monotonic()
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batcher(1))
        return time.monotonic() - began

    assert 0.04 < asyncio.run(ask()) < 1.0
    assert sizes == [2]


def test_a_failing_batch_fails_its_own_items_only_and_those_who_gave_up_are_not_computed() -> None:
    seen = []

    def work(items: list[int]) -> list[int]:
        time.sleep(0.02)
        seen.extend(items)
        if 1 in items:
            raise ValueError("one is too few")
        return items

    async def ask() -> None:
        batcher = Batcher(work, 1, 0.0)
        tasks = [asyncio.create_task(batcher(i)) for i in range(4)]
        await asyncio.sleep(0.01)
        tasks[2].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in results] == [int, ValueError, asyncio.CancelledError, int]

    asyncio.run(ask())
    assert seen == [0, 1, 3]


@pytest.mark.parametrize(("wrong", "asked", "failed"), [(ValueError, 1 + 4, [2]), (Refused, 1, [0, 1, 2, 3])])
def test_an_item_that_fails_its_batch_fails_alone_unless_the_batch_is_refused(
    wrong: type[Exception], asked: int, failed: list[int]
) -> None:
    calls = []

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        if 2 in items:
            raise Refused(503, "two") if wrong is Refused else wrong("two")
        return [10 * item for item in items]

    async def ask() -> list[object]:
        batcher = Batcher(work, 4, 0.05)
        return await asyncio.gather(*map(batcher, range(4)), return_exceptions=True)

    results = asyncio.run(ask())
    assert [i for i, one in enumerate(results) if isinstance(one, wrong)] == failed
    assert all(one == 10 * i for i, one in enumerate(results) if i not in failed)
    assert len(calls) == asked


def test_a_value_is_loaded_once_for_all_who_ask_and_never_on_the_loop() -> None:
    loads = []

    def load(name: str) -> str:
        loads.append((name, threading.current_thread() is threading.main_thread()))
        time.sleep(0.05)
        return name.upper()

    async def ask() -> float:
        lazy = Lazy(load, 2)
        asked = asyncio.gather(*(lazy(name) for name in "aabbab"))
        began, longest = time.monotonic(), 0.0
        while not asked.done():  # the loop keeps turning meanwhile
            await asyncio.sleep(0.001)
            now = time.monotonic()
            began, longest = now, max(longest, now - began)
        assert await asked == list("AABBAB")
        assert await lazy("a") == "A"
        assert await lazy("c") == "C"  # b was used least recently
        assert await lazy("a") == "A"
        assert len(lazy) == 2
        assert await lazy("b") == "B"
        return longest

    assert asyncio.run(ask()) < 0.05
    assert loads == [("a", False), ("b", False), ("c", False), ("b", False)]


def test_a_failed_load_is_told_and_tried_again_and_outlives_who_gave_up() -> None:
    tries = []

    def load(name: str) -> str:
        tries.append(name)
        time.sleep(0.02)
        if len(tries) == 1:
            raise OSError("away")
        return name

    async def ask() -> None:
        lazy = Lazy(load, 2)
        with pytest.raises(OSError, match="away"):
            await lazy("a")
        impatient = asyncio.create_task(lazy("a"))
        patient = asyncio.create_task(lazy("a"))
        await asyncio.sleep(0.005)
        impatient.cancel()
        assert await patient == "a"

    asyncio.run(ask())
    assert tries == ["a", "a"]


def test_what_comes_while_calls_are_under_way_goes_in_one_call() -> None:
    calls: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        calls.append(items)
        await asyncio.sleep(0.05)
        return [2 * item for item in items]

    async def run() -> list[int]:
        gather = Gatherer(work, limit=8, under_way=2)
        return await asyncio.gather(*(gather(i) for i in range(20)))

    assert asyncio.run(run()) == [2 * i for i in range(20)]
    assert sorted(len(call) for call in calls) == [4, 8, 8]
    assert [item for call in calls for item in call] == list(range(20))


def test_a_refusal_is_for_one_and_an_error_for_all_of_a_call_and_the_next_call_is_made() -> None:
    async def work(items: list[int]) -> list[int | Refused]:
        if 7 in items:
            raise OSError("away")
        return [Refused(422, "no") if item == 1 else item for item in items]

    async def run() -> tuple[list, list, int]:
        gather = Gatherer(work, limit=4, under_way=1)
        first = await asyncio.gather(*(gather(i) for i in (0, 1, 2)), return_exceptions=True)
        second = await asyncio.gather(*(gather(i) for i in (6, 7)), return_exceptions=True)
        return first, second, await gather(3)

    first, second, third = asyncio.run(run())
    assert (first[0], first[2], third) == (0, 2, 3)
    assert isinstance(first[1], Refused)
    assert all(isinstance(one, OSError) for one in second)


def test_whoever_gave_up_is_not_asked_for() -> None:
    calls: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        calls.append(items)
        await asyncio.sleep(0.05)
        return items

    async def run() -> int:
        gather = Gatherer(work, limit=4, under_way=1)
        first = asyncio.create_task(gather(0))
        await asyncio.sleep(0.01)
        second, third = asyncio.create_task(gather(1)), asyncio.create_task(gather(2))
        await asyncio.sleep(0.01)
        second.cancel()
        await first
        return await third

    assert asyncio.run(run()) == 2
    assert calls == [[0], [2]]
