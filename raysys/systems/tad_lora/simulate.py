"""A run in one process, without Ray: what Tune trials and the units of `compare` use.

The same blocks in the same order as the actors of jobs/tad_lora.py run: a test holds the two equal bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.blocks import blocks
from raysys.systems.tad_lora.evaluation import evaluate
from raysys.systems.tad_lora.task import Task


class Simulation:
    """`step(t)` is one round, `evaluate(t)` measures after it."""

    def __init__(self, task: Task, block: int) -> None:
        self.task = task
        self.blocks = [task.peers(nodes) for nodes in blocks(task.nodes, block)]
        self.messages = self.bytes = 0

    def step(self, t: int) -> None:
        sent = [block.train(t) for block in self.blocks]
        ids = np.concatenate([i for i, _ in sent])
        rows = np.concatenate([r for _, r in sent])
        for block in self.blocks:
            used = sum(len(senders) for senders in block.exchange(t, ids, rows, {}))
            self.messages += used
            self.bytes += used * 4 * rows.shape[1]

    def evaluate(self, t: int) -> dict[str, float]:
        return evaluate(self.task, [block.statistics(t) for block in self.blocks])

    def tests(self, t: int) -> bool:
        """Whether models are tested after round t."""
        return self.blocks[0].tests(t)

    @property
    def interval(self) -> int:
        """T of the methods that alternate by one; 0 for others."""
        return self.blocks[0].interval

    def right(self) -> NDArray[np.float32]:
        """(n, N): how right each peer's model is about each test item."""
        return np.concatenate([block.right() for block in self.blocks])

    def parts(self) -> dict[str, object]:
        """The stateful objects by name, for checkpoints."""
        return {f"peers-{k}": block for k, block in enumerate(self.blocks)}
