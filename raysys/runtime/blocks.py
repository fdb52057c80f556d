"""Blocks of nodes: the unit that is stepped together and never split over hosts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blocks(nodes: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Consecutive groups of `size` nodes; the last may be smaller."""
    return [nodes[i : i + size] for i in range(0, len(nodes), size)]
