"""Served searches per second: serve/retriever.py against sentence-transformers and faiss in a FastAPI app written by hand.

    python benchmarks/search_vs_fastapi.py [--json PATH] [--quick]

100,000 documents of width 384, queries of 3 to 12 words (sentences of Python's language reference), k = 10. Both sides encode
with the same all-MiniLM-L6-v2, search exactly, speak HTTP and JSON on this machine, and share its cores with the clients:
1, 2, 4, ... of them, each of which waits for its answer before it asks again, over connections that stay open.

- Ours is the app as it ships, key included: keys, limits, durable index, metrics; a retriever whose predictor is the identity,
  so that only serving differs. One front, one encoder, one shard, one thread each. Twice: with Ray Serve as it is, and with its
  own switch RAY_SERVE_THROUGHPUT_OPTIMIZED=1 (without direct ingress, which needs a load balancer).
- The peer is benchmarks/search_fastapi_app.py under uvicorn in .venv-peers/sentence-transformers: one worker whose torch and
  faiss have all cores, and as many workers as cores with one thread each (every one with the model and index in memory); the
  better one counts.
The documents' vectors are those of 2,000 sentences with noise, so that 100,000 need not be encoded. Results are compared on 100
queries. What counts is the highest rate at which 99 of 100 requests are answered in 100 ms; on a machine that does other things
too, the highest rate at all and the requests per second of processor time of a server's processes say more. `curve` has all of
it. Sides alternate; of two repetitions the faster counts for each number of clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np
import peers_st
import results
from adapters_vs_peft import sentences
from aggregation_vs_byzfl import ROOT
from cputime import cpu_seconds

KEY, LIMIT_MS, GOAL, K, NOISE = "a-key-of-the-benchmark-0123", 100.0, 2.0, 10, 0.3
CORES = len(os.sched_getaffinity(0))
OURS = {
    "Serve as it is": {},
    "Serve's throughput switch": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"},
}
PEERS = {f"1 worker, {CORES} threads": (1, CORES), f"{CORES} workers, 1 thread": (CORES, 1)}


class Identity:
    """A retriever whose u(q) is the encoder's vector."""

    fingerprint, width = "minilm", 384

    def __init__(self) -> None:
        from raysys.nn.encoder import TextEncoder
        from raysys.nn.pretrained import load_base

        self.encoder = TextEncoder(load_base())

    def documents(self, texts: Any) -> Any:
        return self.encoder.encode(texts).numpy()

    def queries(self, texts: Any) -> Any:
        return self.documents(texts), np.zeros(len(texts), np.float32)


def load(run: str, device: str) -> Any:
    return Identity()


def write_data(folder: Path, count: int) -> None:
    """Vectors and texts for the peer, an index for us."""
    from raysys.systems.rabtriever.build import Builder
    from raysys.systems.rabtriever.versions import publish

    some = sentences(3, 40, 2000)
    kinds = Identity().documents(some)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(some), size=count)
    z = kinds[rows] + NOISE * rng.standard_normal((count, 384), np.float32) / np.sqrt(384)
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    texts = [some[r] for r in rows]
    np.save(folder / "vectors.npy", z)
    (folder / "texts.json").write_text(json.dumps(texts))
    builder = Builder(folder / "index", "v", 384, Identity.fingerprint)
    builder.put(0, [f"d{i}" for i in range(count)], texts, z)
    builder.finish()
    publish(folder / "index", "v")


def serve_ours(folder: Path, port: int) -> None:
    """Our app, until the process is ended."""
    import ray
    from ray import serve

    from serve.retriever import build

    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"run": "identity", "index": str(folder / "index")}, load), name="retriever")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print("ready", flush=True)
    try:
        signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


def peer_python() -> Path:
    """The environment of peers_st.py with faiss, FastAPI and uvicorn of our versions."""
    python = peers_st.python()
    wanted = [f"{name}=={version(name)}" for name in ("faiss-cpu", "fastapi", "uvicorn")]
    asked = "from importlib.metadata import version as v; print(*(f'{n}=={v(n)}' for n in ('faiss-cpu', 'fastapi', 'uvicorn')))"
    found = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False)
    if found.stdout.split() != wanted:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


@contextmanager
def served(name: str, folder: Path, port: int) -> Iterator[tuple[str, int]]:
    """One side's server, until the end of the block; its address and process."""
    from raysys.nn.pretrained import find_model

    env = {
        **os.environ,
        "RAY_ADDRESS": "",
        "RAYSYS_API_KEYS": KEY,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if name in OURS:
        env |= OURS[name]
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), str(port)]
    else:
        workers, threads = PEERS[name]
        env |= {"SEARCH_FOLDER": str(folder), "SEARCH_MODEL": find_model("minilm"), "SEARCH_THREADS": str(threads)}
        env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [
            str(peer_python()),
            "-m",
            "uvicorn",
            "search_fastapi_app:app",
            "--app-dir",
            str(Path(__file__).parent),
        ]
        command += ["--port", str(port), "--workers", str(workers), "--log-level", "warning", "--no-access-log"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}/search", time.monotonic() + 180
        while True:
            try:
                one_query(address, "warm")
                break
            except (httpx.HTTPError, KeyError, ValueError):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"{name} did not start") from None
                time.sleep(0.5)
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def one_query(address: str, text: str) -> list[dict[str, Any]]:
    """The results of one query."""
    headers = {"Authorization": f"Bearer {KEY}"}
    found: list[dict[str, Any]] = httpx.post(address, json={"query": text, "k": K}, headers=headers, timeout=30).json()[
        "results"
    ]
    return found


async def drive(port: int, texts: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Closed loop of so many clients for so long, after a fifth of it to warm up. A client of few lines: it shares the cores."""
    head = "POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: "
    asks = []
    for text in texts:
        body = json.dumps({"query": text, "k": K})
        asks.append(f"{head}{len(body)}\r\n\r\n{body}".encode())
    latencies: list[float] = []
    count = 0
    start = time.perf_counter() + 0.2 * seconds
    end = start + seconds

    async def client(number: int) -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        i = number * 37
        while (began := time.perf_counter()) < end:
            writer.write(asks[i % len(asks)])
            i += 1
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.decode())
            length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            now = time.perf_counter()
            count += 1
            if start < now < end:
                latencies.append(now - began)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    rate = len(latencies) / seconds
    return {"clients": clients, "rate": rate, "p50_ms": float(p50), "p99_ms": float(p99), "count": count}


def curve(name: str, folder: Path, port: int, steps: list[int], seconds: float, texts: list[str]) -> dict[str, Any]:
    """The rate and latencies at each number of clients, and the results of some queries."""
    points = []
    with served(name, folder, port) as (address, pid):
        found = [one_query(address, text) for text in texts[:100]]
        for clients in steps:
            before = cpu_seconds(pid)
            point = asyncio.run(drive(port, texts, clients, seconds))
            points.append(point | {"per_cpu_s": point["count"] / (cpu_seconds(pid) - before)})
    for point in points:
        rate, p50, p99 = point["rate"], point["p50_ms"], point["p99_ms"]
        per_cpu = f"{point['per_cpu_s']:6.1f} per s of processor time"
        clients = f"{name:28s} {point['clients']:3.0f} clients"
        print(f"{clients} {rate:7.1f}/s  p50 {p50:6.1f}  p99 {p99:6.1f} ms  {per_cpu}", flush=True)
    return {"points": points, "found": found}


def better(curves: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each number of clients, the repetition with the highest rate."""
    return [
        max(points, key=lambda point: point["rate"]) for points in zip(*(one["points"] for one in curves), strict=True)
    ]


def in_time(points: list[dict[str, float]]) -> dict[str, float]:
    """The point of the highest rate whose p99 is within the limit; nothing per second if there is none."""
    nothing = {"clients": 0, "rate": 0.0, "p50_ms": 0.0, "p99_ms": 0.0, "per_cpu_s": 0.0}
    return max(
        (point for point in points if point["p99_ms"] <= LIMIT_MS), key=lambda point: point["rate"], default=nothing
    )


def fastest(points: list[dict[str, float]]) -> dict[str, float]:
    """The point of the highest rate."""
    return max(points, key=lambda point: point["rate"])


def cheapest(points: list[dict[str, float]]) -> dict[str, float]:
    """The point of the most requests per second of processor time of the server, which hardly depends on other programs."""
    best = max(points, key=lambda point: point["per_cpu_s"])
    return best | {"rate": best["per_cpu_s"]}


WITHIN = f"at p99 within {LIMIT_MS:g} ms"
PICKS = {WITHIN: in_time, "at the highest rate": fastest, "per s of processor time": cheapest}


def differing(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> float:
    """The largest relative difference of two sides' scores."""
    both = zip(ours[0]["found"], peer[0]["found"], strict=True)
    pairs = [([r["score"] for r in a], [r["score"] for r in b]) for a, b in both]
    return max(float(np.abs(np.array(a) / np.array(b) - 1).max()) for a, b in pairs)


def row(side: str, case: str, pick: Any, points: dict[str, list[dict[str, float]]], differs: float) -> dict[str, Any]:
    """One of our sides against the better peer."""
    mine = pick(points[side])
    theirs = max((pick(points[one]) for one in PEERS), key=lambda point: point["rate"])
    return {
        "case": f"{side}, {case}", "ours": mine["rate"], "peer": theirs["rate"], "unit": "requests/s",
        "ratio": mine["rate"] / theirs["rate"] if theirs["rate"] else 0.0, "rel_diff": differs,
        "ours_clients": mine["clients"], "peer_clients": theirs["clients"], "ours_p99_ms": mine["p99_ms"],
        "peer_p99_ms": theirs["p99_ms"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="5000 documents, few clients, one repetition")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.serve:
        serve_ours(Path(arguments.serve[0]), int(arguments.serve[1]))
        return
    began = time.monotonic()
    count, steps, seconds, repeats = (
        (5000, [1, 8], 2.0, 1) if arguments.quick else (100_000, [1, 2, 4, 8, 16, 32, 64], 6.0, 2)
    )
    texts = sentences(3, 12, 500, seed=1)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in [*OURS, *PEERS]}
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), count)
        for repeat in range(repeats):
            for place, side in enumerate(curves):
                port = 8760 + 10 * repeat + place
                curves[side].append(curve(side, Path(name), port, steps, seconds, texts))
    points = {side: better(some) for side, some in curves.items()}
    peer = max(PEERS, key=lambda side: in_time(points[side])["rate"])
    rows = []
    for side in OURS:
        differs = differing(curves[side], curves[peer])
        rows += [row(side, case, pick, points, differs) for case, pick in PICKS.items()]
    unmeasured = [one["case"] for one in rows if not one["ours"] or not one["peer"]]
    for case in unmeasured:
        print(
            f"not measured: {case}: a side never answered 99 of 100 requests in time; the machine is too busy or too slow"
        )
    rows = [one for one in rows if one["case"] not in unmeasured]
    goals = [
        {"goal": f"{GOAL:g} times the requests: {one['case']}", "measured": one["ratio"], "limit": GOAL,
         "met": one["ratio"] >= GOAL}
        for one in rows if "processor" not in one["case"]
    ]  # fmt: skip
    against = "sentence-transformers + faiss + FastAPI"
    result = results.result(
        against,
        peers_st.SENTENCE_TRANSFORMERS,
        rows,
        began,
        documents=count,
        curve=points,
        goals=goals,
        unmeasured=unmeasured,
    )
    for one in rows:
        rates = f"{one['ours']:7.1f} {one['peer']:7.1f} requests/s  x{one['ratio']:5.2f}"
        p99 = f"p99 {one['ours_p99_ms']:5.0f} and {one['peer_p99_ms']:5.0f} ms"
        print(f"{one['case']:56s} {rates}  {p99}  differ {one['rel_diff']:.1e}")
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    print(f"{result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
