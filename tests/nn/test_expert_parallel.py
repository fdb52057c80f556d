"""Experts shared out over two processes: the outputs and gradients of one, and exactly the bytes of the closed form."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raysys.nn.moe import MoE

HERE = Path(__file__).parent
WIDTH, EXPERTS = 16, 8


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What both processes of experts_for_tests.py measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "experts_for_tests.py"), rank, port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(err[-2000:] for _, err in told)
    return [json.loads(line) for out, _ in told for line in out.splitlines() if line.startswith("{")]


def test_two_processes_give_the_outputs_and_gradients_of_one(found: list[dict[str, Any]]) -> None:
    """However uneven, and where a process has no token at all: it still computes for the other."""
    assert len(found) == 14
    for row in found:
        for key in ("output", "input", "gradients"):
            assert row[key] < (0.05 if row["bf16"] else 1e-5), row  # 5e-7; gates weigh before or after rounding to bf16


def test_the_balance_counts_the_tokens_of_all_processes(found: list[dict[str, Any]]) -> None:
    assert all(row["bias"] == 0 for row in found)


def test_the_traffic_is_its_closed_form(found: list[dict[str, Any]]) -> None:
    for row in found:
        away, visiting = (row[key] * WIDTH * row["size"] for key in ("away", "visiting"))
        assert row["traffic"] == {
            "counts": 8 * EXPERTS // 2, "dispatch": away, "combine": visiting, "combine backward": away,
            "dispatch backward": visiting,
        }, row  # fmt: skip
    assert any(row["away"] == 0 for row in found)
    assert sum(row["away"] for row in found) == sum(row["visiting"] for row in found) > 100


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="9 experts cannot be shared out evenly by 2 processes"):
        MoE(WIDTH, 9, 2, 4, 0).shard(0, 2, None)


def test_shares_are_the_experts_in_their_order() -> None:
    moe = MoE(WIDTH, EXPERTS, 2, 4, 0)
    whole = moe.w_in.detach().clone()
    shares = []
    for rank in range(4):
        part = MoE(WIDTH, EXPERTS, 2, 4, 0)
        part.load_state_dict(moe.state_dict())
        part.shard(rank, 4, None)
        shares.append(part.w_in.detach())
    assert torch.equal(torch.cat(shares), whole)
