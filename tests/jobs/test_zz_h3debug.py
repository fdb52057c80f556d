import numpy as np, torch, pytest
from pathlib import Path
import importlib.util, sys

spec = importlib.util.spec_from_file_location("t_rl", Path(__file__).parent / "test_ernie_rl.py")
t = importlib.util.module_from_spec(spec)
sys.modules["t_rl"] = t
spec.loader.exec_module(t)
made = t.made
from jobs.ernie_rl import *


def test_dbg(ray_cluster, made, tmp_path):
    b = load(made)
    session = t.Session(t.ClusterConfig())
    res = {}
    for e in ("inprocess", "inprocess2", "actors"):
        c = RLConfig.of(
            {
                **t.SMALL,
                "run": made,
                "out": str(tmp_path / e),
                "execution": e.rstrip("2"),
                "rollout_actors": 2,
                "cpus_per_actor": 0.25,
                "train": {"cpus_per_worker": 0.5},
            }
        )
        m = gather(c, b)
        with Run.open(c, system="ernie", command="rl") as run:
            shared = ray.put(m) if e == "actors" else m
            res[e] = (
                m,
                warm_start(c, run, session, shared, m, weights_of(b.model), 0),
                [r for r in run.metrics._rows] if hasattr(run.metrics, "_rows") else None,
            )
    a = res["inprocess"]
    for e in ("inprocess2", "actors"):
        z = res[e]
        d = [
            (k, float(np.abs(a[1][k].astype(float) - z[1][k].astype(float)).max()))
            for k in a[1]
            if a[1][k].tobytes() != z[1][k].tobytes()
        ]
        print("DBG", e, "warm", len(d), d[:6])
        n = 0
        for x, y in zip(a[0].warm, z[0].warm):
            for s, u in zip(x.prompt.segments, y.prompt.segments):
                for k in vars(s):
                    v = getattr(s, k)
                    o = getattr(u, k)
                    if isinstance(v, np.ndarray) and v.tobytes() != o.tobytes():
                        n += 1
        print("DBG prompts", n, torch.get_num_threads())


import safetensors.torch as st


def test_dbg2(ray_cluster, made, tmp_path):
    session = t.Session(t.ClusterConfig())
    one = t.ran(made, tmp_path, session, execution="inprocess")
    two = t.ran(
        made,
        tmp_path,
        session,
        execution="actors",
        rollout_actors=2,
        cpus_per_actor=0.25,
        train={"cpus_per_worker": 0.5},
    )
    three = t.ran(made, tmp_path, session, execution="inprocess")
    for z in (two, three):
        a, b = st.load(one[0]), st.load(z[0])
        d = [(k, float((a[k].float() - b[k].float()).abs().max())) for k in a if not torch.equal(a[k], b[k])]
        print("DBG2", len(d), d[:6])
        print("DBG2", one[1] == z[1])
        for k in one[1]["seed0/base"]["rows"]:
            x, y = one[1]["seed0/base"]["rows"][k], z[1]["seed0/base"]["rows"][k]
            if x != y:
                print("DBG2", k, x, y)
        print("DBG2", one[1]["seed0/base"]["rows"]["gradient"])
