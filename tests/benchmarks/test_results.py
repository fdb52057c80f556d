"""The benchmarks of rounds: their arithmetic on made-up times, the format of their results, and one small real run."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_overhead_is_wall_time_less_the_busiest_host_of_each_round():
    from scale import overhead

    # Two hosts, rounds of 10 s: one works 4 s, then 6 s in every other round, the other 5 s; half of it on the CPU.
    slow_fast = [(t, 10.0 * t, 10.0 * t + (4 if t % 2 else 6), (4 if t % 2 else 6) / 2) for t in range(30)]
    steady = [(t, 10.0 * t + 1, 10.0 * t + 6, 2.5) for t in range(30)]
    out = overhead([slow_fast, steady], 30)
    assert out["window"] == 25
    node = (13 * 6 + 12 * 5) / 25  # rounds 4..28: 13 even, 12 odd
    assert out["node_ms"] == pytest.approx(1e3 * node)
    assert out["round_ms"] == pytest.approx(1e4)
    assert out["overhead_ms"] == pytest.approx(1e4 - 1e3 * node)
    assert out["strict_overhead"] == pytest.approx(1 - node / 20)


def test_several_calls_of_a_round_are_one_round_of_work():
    from scale import overhead

    notes = [(t, 10.0 * t, 10.0 * t + 2, 2.0) for t in range(30)] + [
        (t, 10.0 * t + 7, 10.0 * t + 8, 1.0) for t in range(30)
    ]
    assert overhead([notes], 30)["node_ms"] == pytest.approx(3e3)


def test_a_row_that_lacks_a_field_is_refused():
    import results

    with pytest.raises(ValueError, match=r"'ten' lacks peer, rel_diff"):
        results.result("them", "1", [{"case": "ten", "ours": 2.0, "unit": "rounds/s", "ratio": 2.0}], 0.0)


def test_results_carry_what_readers_expect(tmp_path):
    import results

    rows = [
        {"case": c, "ours": r, "peer": 1.0, "unit": "rounds/s", "ratio": r, "rel_diff": 1e-7}
        for c, r in (("a", 2.0), ("b", 8.0))
    ]
    results.write(tmp_path / "out.json", results.result("them", "1.2", rows, 0.0))
    read = json.loads((tmp_path / "out.json").read_text())
    assert (read["geomean_ratio"], read["min_ratio"], read["max_rel_diff"]) == (pytest.approx(4.0), 2.0, 1e-7)
    assert {"peer", "peer_version", "rows", "wall_s", "machine"} <= set(read)
    assert {"cpu", "cores", "python", "ray", "torch"} <= set(read["machine"])


def test_a_failed_side_says_why_and_memory_counts_children():
    import processes

    with pytest.raises(RuntimeError, match="no such luck"):
        processes.run([sys.executable, "-c", "raise SystemExit('no such luck')"], {})
    child = "x = bytearray(60_000_000); import time; time.sleep(2.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = processes.run([sys.executable, "-c", parent], {})
    assert done.seconds > 2.5
    if Path("/proc/self/smaps_rollup").exists():
        assert done.peak_mb > 60


def test_a_small_run_of_our_side_is_measured(tmp_path):
    import scale

    scale.write_digits(tmp_path)
    out = scale.measure("ours", tmp_path, clients=6, rounds=29, local_steps=1, compared=True)
    assert 0 < out["overhead"] < 1
    assert out["rounds_per_s"] == pytest.approx(1e3 / out["round_ms"])
    assert (out["window"], out["clients"]) == (25, 6)
    assert len(scale.np.load(tmp_path / "ours.npy")) == 64 * 32 + 32 + 32 * 10 + 10
