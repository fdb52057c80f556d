"""Dividing the training examples among nodes: IID, Dirichlet, label shards, gamma-similarity, label skew, natural groups.

Every partition is an exact disjoint cover: each example belongs to one node, and each node has at least `minimum` of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
RETRIES = 200
FORMS = "iid, dirichlet(ALPHA), shards(PER_NODE), gamma(SIMILARITY), skew, natural"


@dataclass(frozen=True)
class Partition:
    """`indices[i]` are the examples of node i, sorted; `spec` is the text it was made from."""

    spec: str
    indices: tuple[I64, ...]

    def counts(self, labels: I64, classes: int) -> NDArray[np.int64]:
        """How many examples of each class each node holds: (nodes, classes)."""
        return np.stack([np.bincount(labels[i], minlength=classes) for i in self.indices])


def parse_partition(spec: str) -> tuple[str, float]:
    """The form and its parameter (0 where it has none).

    Raises:
        ValueError: unknown form, missing or forbidden or out-of-range parameter.
    """
    match = re.fullmatch(r"(iid|skew|natural)|(dirichlet|shards|gamma)\(([0-9.eE+-]+)\)", spec.replace(" ", ""))
    if match is None:
        raise ValueError(f"partition: got {spec!r}; allowed are {FORMS}")
    if match[1]:
        return match[1], 0.0
    try:
        value = float(match[3])
    except ValueError:
        raise ValueError(f"partition: got {spec!r}; {match[3]!r} is not a number") from None
    if match[2] == "dirichlet" and not 0 < value < np.inf:
        raise ValueError(f"partition: got {spec!r}; Dirichlet's alpha must be a positive number")
    if match[2] == "shards" and (value < 1 or value != int(value)):
        raise ValueError(f"partition: got {spec!r}; the shards per node must be a whole number of at least 1")
    if match[2] == "gamma" and not 0 <= value <= 1:
        raise ValueError(f"partition: got {spec!r}; the similarity must lie in [0, 1]")
    return match[2], value


def make_partition(
    spec: str, labels: I64, nodes: int, rng: np.random.Generator, group: I64 | None = None, minimum: int = 2
) -> Partition:
    """Divide examples with `labels` (N,) among `nodes`.

    Args:
        spec: `iid`; `dirichlet(a)`: each class is divided in proportions drawn from Dirichlet(a) (Hsu et al. 2019), a -> 0
            gives one-class nodes; `shards(s)`: sorted by label, cut into s*nodes shards, s per node (McMahan et al. 2017);
            `gamma(g)`: a fraction g is dealt IID, the rest sorted by label (Karimireddy et al. 2020; byzfl);
            `skew`: the fixed label mixtures of FFA-LoRA (Sun et al. 2024) and TAD-LoRA, see `skew_mixtures`;
            `natural`: whole groups of the source, e.g. hospitals; needs as many groups as nodes or more.
        rng: the partition stream.
        group: natural group of each example (N,).
        minimum: least number of examples a node may have. Dirichlet draws again up to RETRIES times; what is then still
            missing moves over from the largest nodes.
    Raises:
        ValueError: the request cannot be met; the message gives the numbers.
    """
    form, value = parse_partition(spec)
    total = len(labels)
    if nodes < 1 or total < nodes * minimum:
        raise ValueError(f"partition: {total} examples cannot give each of {nodes} nodes at least {minimum}")
    if form == "natural":
        return Partition(spec, _natural(group, nodes, minimum, rng))
    for _ in range(RETRIES):
        if form == "iid":
            parts = np.array_split(rng.permutation(total), nodes)
        elif form == "dirichlet":
            parts = _dirichlet(labels, nodes, value, rng)
        elif form == "skew":
            parts = _skew(labels, nodes, minimum, rng)
        elif form == "shards":
            parts = _shards(labels, nodes, int(value), rng)
        else:
            parts = _gamma(labels, nodes, value, rng)
        if form != "dirichlet" or min(map(len, parts)) >= minimum:
            break
    return Partition(spec, _fill(parts, minimum))


def _dirichlet(labels: I64, nodes: int, alpha: float, rng: np.random.Generator) -> list[I64]:
    parts: list[list[I64]] = [[] for _ in range(nodes)]
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        # Gamma draws underflow to an all-zero row at tiny alpha: its limit, one node takes the whole class.
        share = rng.gamma(alpha, size=nodes)
        share = share / share.sum() if share.sum() > 0 else np.eye(nodes)[rng.integers(nodes)]
        cuts = np.round(np.cumsum(share)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(p) for p in parts]


def skew_mixtures(nodes: int, classes: int) -> NDArray[np.float64]:
    """The share of each class on each node: (nodes, classes), rows sum to 1.

    As published for 10 nodes (arXiv 2602.00451, after FFA-LoRA): two classes, 3 nodes [.9, .1], 3 nodes [.1, .9], 4 nodes
    [.5, .5]; three classes, 4 nodes [.9, .05, .05], 3 nodes [.05, .9, .05], 3 nodes [.05, .05, .9].
    Ours, for other numbers: two classes, 3/10 of the nodes (rounded) prefer each class and the rest neither; more classes,
    the nodes are cut into one run per class, the first runs longer where it does not divide, and a node has .9 of the
    class of its run and .1 shared evenly among the others. One class or one node has no skew.
    """
    if classes == 1 or nodes == 1:
        return np.full((nodes, classes), 1 / classes)
    if classes == 2:
        prefer = max(1, round(0.3 * nodes))
        row = [[0.9, 0.1]] * prefer + [[0.1, 0.9]] * prefer + [[0.5, 0.5]] * (nodes - 2 * prefer)
        return np.array(row)
    run = np.repeat(np.arange(classes), [len(r) for r in np.array_split(np.arange(nodes), classes)])
    return np.where(run[:, None] == np.arange(classes), 0.9, 0.1 / (classes - 1))


def _skew(labels: I64, nodes: int, minimum: int, rng: np.random.Generator) -> list[I64]:
    """The mixtures of `skew_mixtures`, each example used once.

    With more classes than nodes the classes are cut, in order, into one block per node, and a block is dealt as if it were
    one class [ours]. Equal node sizes and the class totals seldom allow the exact mixtures together, so the sizes give way:
    they solve mixtures^T sizes = totals with the least change from equal sizes, and every count is then within 1 of
    size x share (that number itself where all are whole). Where no such sizes exist (a class too large or too small for the
    recipe), each class is divided in proportion to the shares of the nodes: all examples are used, the skew is distorted.
    """
    blocks = np.array_split(np.unique(labels), min(nodes, len(np.unique(labels))))
    block = np.searchsorted([b[-1] for b in blocks], labels)
    totals = np.bincount(block).astype(np.float64)
    mixture = skew_mixtures(nodes, len(totals))
    equal = np.full(nodes, len(labels) / nodes)
    sizes = equal + np.linalg.lstsq(mixture.T, totals - mixture.T @ equal, rcond=None)[0]
    exact = np.allclose(mixture.T @ sizes, totals) and sizes.min() >= minimum
    share = mixture * sizes[:, None] / totals if exact else mixture / mixture.sum(0)
    parts: list[list[I64]] = [[] for _ in range(nodes)]
    for b in range(len(blocks)):
        members = rng.permutation(np.flatnonzero(block == b))
        # The 1e-9 keeps a whole count whole after the rounding of the sums.
        cuts = np.floor(np.cumsum(share[:, b])[:-1] * len(members) + 0.5 + 1e-9).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(p) for p in parts]


def _fill(parts: list[I64], minimum: int) -> tuple[I64, ...]:
    """Move examples, one at a time, from the largest node to each that has fewer than `minimum`."""
    lists = [list(p) for p in parts]
    for part in lists:
        while len(part) < minimum:
            part.append(max(lists, key=len).pop())
    return tuple(np.sort(np.array(p, dtype=np.int64)) for p in lists)


def _shards(labels: I64, nodes: int, per_node: int, rng: np.random.Generator) -> list[I64]:
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    if nodes * per_node > len(order):
        raise ValueError(f"partition: {nodes} nodes x {per_node} shards exceed the {len(order)} examples")
    pieces = np.array_split(order, nodes * per_node)
    deal = rng.permutation(nodes * per_node).reshape(nodes, per_node)
    return [np.concatenate([pieces[j] for j in row]) for row in deal]


def _gamma(labels: I64, nodes: int, similarity: float, rng: np.random.Generator) -> list[I64]:
    order = rng.permutation(len(labels))
    shared = round(similarity * len(order))
    rest = order[shared:]
    rest = rest[np.argsort(labels[rest], kind="stable")]
    pairs = zip(np.array_split(order[:shared], nodes), np.array_split(rest, nodes), strict=True)
    return [np.concatenate(pair) for pair in pairs]


def _natural(group: I64 | None, nodes: int, minimum: int, rng: np.random.Generator) -> tuple[I64, ...]:
    if group is None:
        raise ValueError("partition: natural needs data with groups, and this data has none")
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    if len(members) < nodes:
        raise ValueError(f"partition: natural gives at most one group to a node: {len(members)} groups, {nodes} nodes")
    parts: list[list[I64]] = [[] for _ in range(nodes)]
    for k, g in enumerate(sorted(rng.permutation(len(members)), key=lambda g: -len(members[g]))):
        # Largest first to the node that has least: near-equal sizes without splitting a group.
        target = k if k < nodes else min(range(nodes), key=lambda i: sum(map(len, parts[i])))
        parts[target].append(members[g])
    filled = tuple(np.sort(np.concatenate(p)) for p in parts)
    if min(map(len, filled)) < minimum:
        raise ValueError(
            f"partition: the smallest natural group has {min(map(len, filled))} examples, {minimum} are needed"
        )
    return filled
