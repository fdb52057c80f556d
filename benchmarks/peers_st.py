"""The Python with sentence-transformers that benchmarks compare with: .venv-peers/sentence-transformers, made on first use.

torch is pinned first and to our own version, so that no later package brings another build of it (one for GPUs weighs
gigabytes); transformers and tokenizers are ours too, so that both sides run the same model code.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / ".venv-peers"
SENTENCE_TRANSFORMERS = "6.2.0"
OURS = ("transformers", "tokenizers", "numpy")


def python() -> Path:
    """The interpreter, whose environment is made or completed if it is not there; a second process that asks waits.

    Raises:
        RuntimeError: pip cannot install it.
    """
    folder = PEERS / "sentence-transformers"
    found = folder / "bin" / "python"
    torch = version("torch").split("+")[0]
    wanted = [
        f"torch=={torch}",
        f"sentence-transformers=={SENTENCE_TRANSFORMERS}",
        *(f"{n}=={version(n)}" for n in OURS),
    ]
    stamp = folder / ".installed"
    PEERS.mkdir(exist_ok=True)
    with (PEERS / "sentence-transformers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == " ".join(wanted):
            return found
        print(f"making {folder} with {' '.join(wanted)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for step in (wanted[:1], wanted):
            done = subprocess.run(
                [str(found), "-m", "pip", "install", "-q", *step], capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
                raise RuntimeError(f"pip install {' '.join(step)}: {reason[-1][:200]}")
        stamp.write_text(" ".join(wanted))
    return found


if __name__ == "__main__":
    print(python())
