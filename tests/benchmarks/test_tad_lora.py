"""The benchmarks of adapters: all sides train on the same batches to the same factors, and their arithmetic is right."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_sides_of_the_loop_benchmark_end_at_the_same_factors(monkeypatch):
    import grouped_vs_peft as benchmark

    monkeypatch.setattr(benchmark, "CLIENTS", 2)
    monkeypatch.setattr(benchmark, "EXAMPLES", 64)
    monkeypatch.setattr(benchmark, "SGD_STEPS", 2)
    differs = benchmark.differences("grammar", ["pad 32", "kept states", "grouped"])
    assert max(differs.values()) < 1e-5


def test_the_first_repetition_is_not_counted_and_steps_are():
    import grouped_vs_peft as benchmark

    calls = []

    def work():
        began = time.process_time()
        while time.process_time() - began < (0.5 if not calls else 0.02):
            pass
        calls.append(1)

    rate = benchmark.timed({"one": work}, {"one": 3}, 2)["one"]
    assert len(calls) == 3
    assert rate == pytest.approx(benchmark.CLIENTS * 3 / 0.02, rel=0.3)


def test_seconds_per_round_leave_out_the_warm_up():
    import tad_lora_vs_flower as benchmark

    assert benchmark.per_round(np.array([0.0, 10.0, 12.0, 14.0]), 1) == 2.0


def test_names_of_peft_and_flat_factors_are_two_orders_of_the_same_numbers():
    import tad_lora_vs_flower as benchmark

    from raysys.systems.tad_lora.setting import Setting
    from raysys.systems.tad_lora.task import Task

    task = Task(Setting.of({"peers": 2, "method": "lora", "topology": "complete"}), 0)
    a, b = (x.numpy() for x in task.start(-1))
    b = b + np.arange(len(b), dtype=np.float32)
    saved = {f"last.{key}": value for key, value in benchmark.named(task, a, b).items()}
    assert np.array_equal(benchmark.adapters(task, "flower", saved)[0], np.concatenate([a, b]))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor time is read from /proc")
def test_processor_time_counts_descendants():
    import subprocess

    from cputime import cpu_seconds

    before = cpu_seconds(os.getpid())
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert 0.4 < cpu_seconds(os.getpid()) - before < 2
