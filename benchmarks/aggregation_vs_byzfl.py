"""Robust aggregation against byzfl (LPD-EPFL), rule by rule: same inputs, one thread each, both in one run.

    python benchmarks/aggregation_vs_byzfl.py [--json PATH] [--quick] [--minutes M]

byzfl runs in a virtual environment of its own, .venv-peers/byzfl, which is made on first use, as a worker process that draws
the same inputs from the same seed. Ours and theirs alternate; the best processor time of the repetitions counts (one thread
each, so that it is the wall time of an idle machine). A case that
byzfl would need more than CAP seconds for, by its own time at the last smaller size, is left out and said to be.
`reads` is our time over the time of reading the stack once. byzfl's Clipping and ARC overwrite the caller's vectors: the
copy that prevents it is counted as theirs, as ours is counted as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers"
TORCH, BYZFL, BYZPY = "2.13.0", "0.0.11", "0.1.4"
CAP = 12.0


class Case(NamedTuple):
    """ours: our name of the rule. peer: byzfl's, a chain of Python expressions in which f is the number of faulty rows."""

    ours: str
    peer: tuple[str, ...]
    note: str = ""
    """Where the definitions differ, why the results are not compared."""


RULES = [
    Case("mean", ("Average()",)),
    Case("median", ("Median()",)),
    Case("trimmed_mean", ("TrMean(f)",)),
    Case("meamed", ("Meamed(f)",)),
    Case("geometric_median", ("GeometricMedian(nu=1e-6, T=30)",)),
    Case(
        "geometric_median [byzfl T=3]",
        ("GeometricMedian()",),
        "byzfl's default stops after 3 smoothed steps from zero, ours converges",
    ),
    Case("krum", ("Krum(f)",)),
    Case("multi_krum", ("MultiKrum(f)",)),
    # byzfl's float32 norms are 1e-5 off at d=1e6; ours agrees with float64 to 1e-7.
    Case("centered_clipping(radius=100.0)", ("CenteredClipping(L=1, tau=100.0)",)),
    Case("monna", ("MoNNA(f)",)),
    Case("caf", ("CAF(f)",), "byzfl takes one power step from a random vector, ours exact eigenvectors"),
    Case("nnm", ("NNM(f)",)),
    Case("bucketing(size=2)", ("Bucketing(2)",), "another random permutation"),
    Case("clipping(radius=2.0)", ("Clipping(2.0)",)),
    Case("arc", ("ARC(f)",)),
    Case("nnm+trimmed_mean", ("NNM(f)", "TrMean(f)")),
    Case("nnm+median", ("NNM(f)", "Median()")),
    Case("nnm+geometric_median", ("NNM(f)", "GeometricMedian(nu=1e-6, T=30)")),
    Case("nnm+krum", ("NNM(f)", "Krum(f)")),
    Case("arc+nnm+trimmed_mean", ("ARC(f)", "NNM(f)", "TrMean(f)")),
    Case("clipping(radius=2.0)+trimmed_mean", ("Clipping(2.0)", "TrMean(f)")),
    Case("arc+multi_krum", ("ARC(f)", "MultiKrum(f)")),
    Case(
        "bucketing(size=2)+geometric_median", ("Bucketing(2)", "GeometricMedian(nu=1e-6, T=30)"), "another permutation"
    ),
]
COORDINATE = ("median", "trimmed_mean", "meamed")
SUBSETS = [
    (Case("mda", ("MDA(f)",)), 10, 3, 100_000),
    (Case("mda", ("MDA(f)",)), 16, 5, 10_000),
    (Case("mda", ("MDA(f)",)), 20, 4, 10_000),
    (
        Case("smea", ("SMEA(f)",), "byzfl takes one power step from a random vector, ours exact eigenvalues"),
        10,
        3,
        100_000,
    ),
    (Case("smea", ("SMEA(f)",), "one random power step"), 16, 5, 10_000),
    (Case("smea", ("SMEA(f)",), "one random power step"), 20, 4, 10_000),
]
ATTACKED = "nnm+geometric_median"
ATTACK_PEER = (
    "Optimal_ALittleIsEnough(agg=GeometricMedian(nu=1e-6, T=10), pre_agg_list=[NNM(f)], f=f, evals=20)",
    "byzfl: 20 evaluations of a direction with ddof=1, GM at T=10; ours: a finer search, population deviation",
)
# A case is left out where byzfl's NNM would need more memory than this (it makes an (n, n - f, d) copy).
PEER_MEMORY = 4e9


def draw(n: int, d: int, f: int, seed: int) -> np.ndarray:
    """(n, d) float32: honest normals around a common mean, and f rows that lean away from it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d), dtype=np.float32)
    x += np.float32(0.5) * rng.standard_normal(d, dtype=np.float32)
    x[:f] += np.float32(0.8)
    return x[rng.permutation(n)]


# ---------------------------------------------------------------- the peer's side, in its own environment


def worker() -> None:
    """Reads one JSON request a line, answers one a line: draw a stack, time a rule on it, save the result."""
    import torch

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        # byzfl's data loaders import it; with a CPU-only torch its binary may not load. No rule uses it.
        sys.modules["torchvision"] = MagicMock()
    import byzfl

    torch.set_num_threads(1)
    names = {k: getattr(byzfl, k) for k in dir(byzfl)}
    stack = torch.zeros(0)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        ask = json.loads(line)
        f = ask["f"]
        try:
            if ask["what"] == "draw":
                stack = torch.from_numpy(draw(ask["n"], ask["d"], f, ask["seed"]))
                reply: dict[str, Any] = {"ok": True}
            else:
                # New objects each time: CenteredClipping keeps state.
                chain = [eval(part, {**names, "f": f}) for part in ask["chain"]]
                value = stack[: len(stack) - f] if ask["what"] == "attack" else stack
                torch.manual_seed(0)
                began = time.process_time()
                if ask["chain"][0].startswith(("Clipping", "ARC")):
                    value = value.clone()  # they overwrite their input; what keeps it is part of the work
                for part in chain:
                    value = part(value)
                reply = {"ok": True, "s": time.process_time() - began}
                if ask["save"]:
                    np.save(ask["save"], value.numpy())
        except (RuntimeError, MemoryError) as error:
            reply = {"ok": False, "error": str(error)[:120]}
        answer.write(json.dumps(reply) + "\n")
        answer.flush()


class Peer:
    """The worker process."""

    def __init__(self, python: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [str(python), str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"byzfl's worker died (exit code {self.process.wait()}) on {request}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(name: str, *requirements: str) -> Path | str:
    """The Python of .venv-peers/<name>, made and filled if it is not there; or, in words, why there is none."""
    python = PEERS / name / "bin" / "python"
    stamp = PEERS / name / ".installed"
    if stamp.exists() and stamp.read_text() == " ".join(requirements):
        return python
    print(f"making {PEERS / name} with {' '.join(requirements)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS / name)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", *requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        return reason[-1][:200]
    stamp.write_text(" ".join(requirements))
    return python


# ---------------------------------------------------------------- our side


def build(name: str, n: int, f: int) -> Any:
    """Our callable of a rule, or of a chain of pre-aggregators alone."""
    from raysys.aggregation import PREAGGREGATORS, make_rule
    from raysys.aggregation.registry import parse_item

    name = name.split(" [")[0]
    head, options = parse_item(name) if "+" not in name else ("", {})
    return PREAGGREGATORS[head](n, f, **options) if head in PREAGGREGATORS else make_rule(name, n, f)


def craft(n: int, f: int) -> Any:
    """Our line-searched ALIE against the attacked chain, on the honest rows."""
    from raysys.aggregation import make_rule
    from raysys.attacks import Threat, make_attack

    attack, rule = make_attack("opt_alie", n, f), make_rule(ATTACKED, n, f)
    return lambda x: attack.craft(x[: n - f], Threat(n=n, f=f, round=0, rng=np.random.default_rng(0), rule=rule))[0]


class Bench:
    def __init__(self, peer: Peer, minutes: float) -> None:
        self.peer, self.deadline = peer, time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.peer_seconds: dict[tuple[str, int], tuple[int, float]] = {}
        self.folder = tempfile.TemporaryDirectory()

    def load(self, n: int, d: int, f: int) -> Any:
        import torch

        self.n, self.d, self.f = n, d, f
        self.peer.ask(what="draw", n=n, d=d, f=f, seed=n + d)
        self.stack = torch.from_numpy(draw(n, d, f, n + d))
        self.read = min(self.timed(lambda x: x.sum(dtype=torch.float32))[0] for _ in range(3))

    def timed(self, function: Any) -> tuple[float, Any]:
        began = time.process_time()
        out = function(self.stack)
        return time.process_time() - began, out

    def run(self, case: Case, what: str = "rule") -> None:
        n, d, f = self.n, self.d, self.f
        label = f"{case.ours} n={n} d={d:.0e}".replace("e+0", "e")
        last = self.peer_seconds.get((case.ours, n))
        expected = last[1] * d / last[0] if last else 0.0
        memory = 4.0 * n * (n - f) * d if any(p.startswith("NNM") for p in case.peer) or what == "attack" else 0.0
        if expected > CAP or memory > PEER_MEMORY or time.monotonic() > self.deadline:
            why = (
                f"byzfl would take {expected:.0f} s" if expected > CAP
                else f"byzfl would need {memory / 1e9:.0f} GB" if memory > PEER_MEMORY else "out of time"
            )  # fmt: skip
            print(f"{label:52s} left out: {why}", flush=True)
            return
        function = craft(n, f) if what == "attack" else build(case.ours, n, f)
        self.timed(function)  # compile
        saved = str(Path(self.folder.name) / "out.npy")
        ours, theirs, out, spent = [], [], None, 0.0
        while len(ours) < 2 or (spent < 1.5 and len(ours) < 7):
            seconds, out = self.timed(function)
            ours.append(seconds)
            if len(theirs) < 1 or theirs[0] < 4.0:
                reply = self.peer.ask(what=what, n=n, d=d, f=f, chain=case.peer, save="" if theirs else saved)
                if not reply["ok"]:
                    print(f"{label:52s} left out: byzfl failed: {reply['error']}", flush=True)
                    return
                theirs.append(reply["s"])
                spent += reply["s"]
            spent += seconds
        self.peer_seconds[(case.ours, n)] = (d, min(theirs))
        want, got = np.load(saved).astype(np.float64), out.numpy().astype(np.float64)
        difference = float(np.abs(got - want).max() / np.abs(want).max()) if got.shape == want.shape else None
        row = {
            "case": label, "ours": 1e3 * min(ours), "peer": 1e3 * min(theirs), "unit": "ms",
            "ratio": min(theirs) / min(ours), "reads": min(ours) / self.read, "rel_diff": difference,
            "compared": not case.note, "note": case.note,
        }  # fmt: skip
        self.rows.append(row)
        shown = f"{difference:.1e}" if difference is not None and not case.note else case.note
        print(
            f"{label:52s} {row['ours']:9.2f} {row['peer']:10.2f} ms  x{row['ratio']:7.2f}  {row['reads']:5.1f} reads  {shown}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="small sizes only, under a minute")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no case after this long")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    began = time.monotonic()
    python = environment("byzfl", f"torch=={TORCH}", f"byzfl=={BYZFL}")
    if isinstance(python, str):
        print(f"error: byzfl {BYZFL} cannot be installed: {python}", file=sys.stderr)
        sys.exit(2)
    import torch

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    bench = Bench(Peer(python), arguments.minutes)
    counts = (20,) if arguments.quick else (20, 50, 100)
    print(f"{'case':52s} {'ours':>9s} {'byzfl':>10s}", flush=True)
    for n in counts:
        bench.load(n, 10**5, n // 5)
        for case in RULES:
            bench.run(case)
    for case, n, f, d in SUBSETS[:1] if arguments.quick else SUBSETS:
        bench.load(n, d, f)
        bench.run(case)
    for d in (10**5,) if arguments.quick else (10**5, 10**6):
        bench.load(20, d, 4)
        bench.run(Case("opt_alie against " + ATTACKED, (ATTACK_PEER[0],), ATTACK_PEER[1]), "attack")
    for n, d in [] if arguments.quick else [*((n, 10**6) for n in counts), (20, 10**7)]:
        bench.load(n, d, n // 5)
        for case in RULES:
            bench.run(case)
    bench.peer.close()
    byzpy = "not tried in a quick run" if arguments.quick else byzpy_beside(bench)
    print(f"ByzPy {BYZPY}: {byzpy}")
    rows = bench.rows
    ratios = np.array([r["ratio"] for r in rows])
    compared = [r["rel_diff"] for r in rows if r["compared"] and r["rel_diff"] is not None]
    # A stack of 1e5 columns is in the cache, where reading it costs next to nothing.
    coordinate = [
        r["reads"] for r in rows if r["case"].split()[0] in COORDINATE and (arguments.quick or "d=1e5" not in r["case"])
    ]
    result = {
        "peer": "byzfl", "peer_version": BYZFL, "rows": rows, "geomean_ratio": float(np.exp(np.log(ratios).mean())),
        "min_ratio": float(ratios.min()), "max_rel_diff": max(compared),
        "max_coordinate_reads": round(max(coordinate), 2) if coordinate else None,
        "byzpy": byzpy, "wall_s": time.monotonic() - began,
        "machine": {
            "cpu": cpu(), "cores": os.cpu_count(), "threads": 1, "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    print(
        f"\n{len(rows)} cases: geometric mean x{result['geomean_ratio']:.1f}, least x{result['min_ratio']:.2f}, "
        f"largest difference of compared results {result['max_rel_diff']:.1e}, coordinate rules at most "
        f"{result['max_coordinate_reads']} reads, {result['wall_s']:.0f} s"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def byzpy_beside(bench: Bench) -> str:
    """ByzPy's Krum, NNM and median at n=20, d=1e5, where it installs; else why not."""
    python = environment("byzpy", f"byzpy=={BYZPY}")
    if isinstance(python, str):
        return f"does not install here: {python}"
    script = (
        "import sys, time, json, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
        "from aggregation_vs_byzfl import draw;"
        "from byzpy.aggregators.coordinate_wise import CoordinateWiseMedian, CoordinateWiseTrimmedMean;"
        "from byzpy.aggregators.geometric_wise import Krum;"
        "rows = list(torch.from_numpy(draw(20, 100000, 4, 100020))); out = {}\n"
        "for name, rule in (('median', CoordinateWiseMedian()), ('trimmed_mean', CoordinateWiseTrimmedMean(f=4)),"
        " ('krum', Krum(f=4))):\n"
        "    best = 9e9\n"
        "    for _ in range(5):\n"
        "        t = time.process_time(); rule.aggregate(rows); best = min(best, time.process_time() - t)\n"
        "    out[name] = round(1e3 * best, 2)\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [str(python), "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        return f"installs but fails: {done.stderr.strip().splitlines()[-1][:200]}"
    ours = {r["case"]: r["ours"] for r in bench.rows}
    theirs = json.loads(done.stdout)
    return "n=20 d=1e5, ms, ours and ByzPy's: " + ", ".join(
        f"{name} {ours.get(f'{name} n=20 d=1e5', float('nan')):.2f} {value}" for name, value in theirs.items()
    )


if __name__ == "__main__":
    main()
