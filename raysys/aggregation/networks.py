"""Sorting networks: comparator lists that order n values by min and max alone, so that one SIMD lane sorts one column.

Notable choices
- Batcher's odd-even merge sort for any n (Knuth, TAOCP 3, 5.2.2, Algorithm M): n=20 has 103 comparators, n=100 has 1104.
- Pruned backwards from what the caller reads. Ranks that nobody reads need no order, and ranks that are only summed need
  no order among themselves: the median of 20 keeps 84 comparators, the trimmed mean fewer than a full sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

UNREAD = -1
"""Label of an output rank that nobody reads."""

Comparators = tuple[tuple[int, int], ...]


@cache
def batcher(n: int) -> Comparators:
    """Comparators (a, b), a < b, each meaning (x_a, x_b) <- (min, max); applied in order they sort n values."""
    if n < 1:
        raise ValueError(f"a sorting network needs n >= 1, got n={n}")
    network: list[tuple[int, int]] = []
    top = 1 << max((n - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, gap = top, 0, p
        while True:
            network += [(i, i + gap) for i in range(n - gap) if i & p == r]
            if q == p:
                break
            gap, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(network)


def prune(network: Comparators, labels: Sequence[int]) -> Comparators:
    """The comparators that matter for outputs with these labels.

    labels: one per output rank: `UNREAD`, or a class; ranks of one class are used symmetrically (summed), so that their
    order does not matter. A rank whose exact place matters gets a class of its own.
    """
    label: list[int | None] = list(labels)  # None: feeds a comparator that was kept, so its exact value matters
    kept: list[tuple[int, int]] = []
    for a, b in reversed(network):
        if label[a] is not None and label[a] == label[b]:
            continue
        label[a] = label[b] = None
        kept.append((a, b))
    return tuple(reversed(kept))


@cache
def median_network(n: int) -> Comparators:
    """Puts the middle value (n odd) or the two middle values (n even) in their places."""
    middle = {(n - 1) // 2, n // 2}
    return prune(batcher(n), [0 if k in middle else UNREAD for k in range(n)])


@cache
def trimmed_network(n: int, f: int) -> Comparators:
    """Puts the n - 2f middle values, in any order, in places f..n-f-1."""
    return prune(batcher(n), [0 if f <= k < n - f else UNREAD for k in range(n)])


@cache
def schedule(network: Comparators, n: int, registers: int = 12) -> Comparators:
    """The same network in an order that reuses what was touched last, so that few values leave the registers.

    Greedy: of the comparators whose inputs are ready, the one with most inputs among the last `registers` wires.
    """
    waiting: list[list[int]] = [[] for _ in range(n)]
    for c in range(len(network) - 1, -1, -1):
        for wire in network[c]:
            waiting[wire].append(c)
    recent: dict[int, None] = {}
    out = []
    ready = {c for c, (a, b) in enumerate(network) if waiting[a][-1] == c == waiting[b][-1]}
    while ready:
        c = min(ready, key=lambda c: (-sum(w in recent for w in network[c]), c))
        ready.remove(c)
        out.append(network[c])
        for wire in network[c]:
            waiting[wire].pop()
            recent.pop(wire, None)
            recent[wire] = None
        while len(recent) > registers:
            del recent[next(iter(recent))]
        for wire in network[c]:
            if waiting[wire]:
                following = waiting[wire][-1]
                if all(waiting[w][-1] == following for w in network[following]):
                    ready.add(following)
    return tuple(out)
