"""A small job in the shape of a real one, for the tests of run folders; as a program it is also what gets killed.

Each cell walks at random for some rounds with a barrier every 4 and ends with a position: a function of the configuration
alone, so an undisturbed run and one killed at any moments must agree bit for bit.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
from pydantic import Field, model_validator

from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.config import Config, JobConfig, command_line, exits
from raysys.runtime.run import Run
from raysys.runtime.statistics import mean_ci


class Site(Config):
    """Where it runs."""

    hosts: int = Field(2, ge=1)
    """How many host processes."""
    gpu: bool = False
    """Use GPUs."""


class Walk(JobConfig):
    """Random walks, one per cell."""

    free_on_resume = JobConfig.free_on_resume | {"pause", "site"}

    cells: int = Field(3, ge=1, le=1000)
    """How many walks."""
    rounds: int = Field(12, ge=1)
    """Steps of each."""
    rate: float = Field(0.1, gt=0, le=1)
    """Step size."""
    optimizer: str = Field("sgd", pattern="^(sgd|adam)$")
    """Unused, but validated."""
    sizes: tuple[int, ...] = Field((3, 3), min_length=1)
    """Unused, but validated."""
    alpha: float | None = None
    """Unused, but optional."""
    n: int = Field(10, ge=1)
    """Nodes."""
    f: int = Field(2, ge=0)
    """Byzantine nodes among them."""
    pause: float = Field(0.0, ge=0)
    """Seconds per step."""
    site: Site = Site()
    """Where it runs."""

    @model_validator(mode="after")
    def _enough_honest_nodes(self) -> Walk:
        if self.n <= 2 * self.f:
            raise ValueError(f"trimmed mean needs n > 2f, got n={self.n}, f={self.f}")
        return self


class Table(Walk):
    """All cells, as a table."""


COMMANDS: dict[str, type[Config]] = {"walk": Walk, "table": Table}


def walk(run: Run) -> None:
    """Run or go on with every cell, then fill the run's table."""
    config = run.config
    assert isinstance(config, Walk)
    for cell in range(config.cells):
        stage = run.stage(f"nnm+mean/alie/seed{cell}")
        if stage.result is not None:
            continue
        checkpoint = stage.checkpoints.latest()
        start, x = 0, np.zeros(3)
        if checkpoint is not None:
            ((name, digest),) = checkpoint.files.items()
            tensors, _ = read_state(run.storage, name, digest)
            start, x = checkpoint.round, tensors["x"]
        stage.rewind(start)
        for t in range(start, config.rounds):
            x = x + config.rate * np.random.default_rng([config.seed, cell, t]).normal(size=3)
            if config.pause:
                time.sleep(config.pause)
            stage.log(t, norm=np.linalg.norm(x))
            if t % 4 == 3:
                name = f"{stage.checkpoints.folder(t + 1)}/x.safetensors"
                stage.checkpoints.commit(t + 1, {name: write_state(run.storage, name, {"x": x})}, {"t": t})
        run.count(messages=config.rounds, bytes=24 * config.rounds)
        stage.finish({"x": x, "norm": np.linalg.norm(x)})
    norms = [run.stage(f"nnm+mean/alie/seed{cell}").result["norm"] for cell in range(config.cells)]  # type: ignore[index]
    run.row("norm", mean_ci(norms), rule="mean", attack="alie")


@exits
def main(argv: list[str] | None = None) -> None:
    name, config = command_line(COMMANDS, "walk", argv, prog="python -m jobs.walk", description="Walks at random.")
    with Run.open(config, system="walk", command=name) as run:
        walk(run)


def torture(out: str, kills: int, seed: int) -> None:
    """Fork the job, SIGKILL it at a random moment, resume; `kills` times. Prints one line per process."""
    draw = np.random.default_rng(seed)
    common = ["--pause", "0.01", "--rounds", "24", "--cells", "40", "--no-wandb"]
    run = ""
    for _ in range(kills):
        before = set(os.listdir(out))
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(f"{out}/../stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            try:
                main([*common, "--out", out] if not run else ["--resume", run, "--no-wandb"])
            finally:
                os._exit(1)
        time.sleep(float(draw.uniform(0.0, 0.35)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        new = sorted(set(os.listdir(out)) - before)
        if not run and new and os.path.exists(f"{out}/{new[0]}/config.yaml"):
            run = f"{out}/{new[0]}"
        print("killed" if os.WIFSIGNALED(status) else f"exited {os.WEXITSTATUS(status)}", run, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["torture"]:
        torture(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
