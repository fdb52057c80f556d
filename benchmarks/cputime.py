"""Processor time of a process and all its descendants: unlike wall time, it hardly depends on what else the machine is doing.

Read from /proc and therefore known on Linux only. A descendant that has ended counts through the parent that waited for it.
"""

from __future__ import annotations

import os
from pathlib import Path

from processes import tree

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(root: int) -> float:
    """Seconds of processor time, user and system, of the tree under a process."""
    total = 0
    for pid in tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended in between
            continue
        total += sum(int(field) for field in fields[11:15])
    return total / TICKS
