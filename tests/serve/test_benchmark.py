"""The arithmetic of benchmarks/adapters_vs_peft.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_a_stream_is_answered_whole_in_order_with_so_many_waiting_at_a_time() -> None:
    from adapters_vs_peft import CLIENTS, drive

    taken = []

    def engine(asks: list[tuple[str, str]]) -> list[list[float]]:
        taken.append(len(asks))
        return [[float(text)] for text, _ in asks]

    out = drive(engine, 24, [(str(i), "a") for i in range(100)])
    assert out["rows"] == [[float(i)] for i in range(100)]
    assert sum(taken) == 100
    assert max(taken) == 24 <= CLIENTS
    assert 0 < out["p50_ms"] <= out["p99_ms"]


def test_sentences_have_the_words_asked_for_and_are_the_same_each_time() -> None:
    from adapters_vs_peft import sentences

    some = sentences(3, 12, 50)
    assert len(set(some)) > 40
    assert all(3 <= len(one.split()) <= 12 for one in some)
    assert some == sentences(3, 12, 50)


def test_the_fastest_repetition_counts_and_the_sides_alternate() -> None:
    from adapters_vs_peft import best

    order, rates = [], iter([1.0, 5.0, 3.0, 2.0])

    def side(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": next(rates)}

    assert best({"a": lambda: side("a"), "b": lambda: side("b")}, 2) == {"a": {"rate": 3.0}, "b": {"rate": 5.0}}
    assert order == ["a", "b", "a", "b"]
    assert "adapters_vs_peft" in sys.modules
