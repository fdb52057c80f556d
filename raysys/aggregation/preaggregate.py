"""Pre-aggregators: linear maps on the rows, done before a rule (spec 2.5).

Shapes: matrix (n', m) over [rows; origin; reference].
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from raysys.aggregation import columns
from raysys.aggregation.gram import F64, Survey, survey
from raysys.aggregation.robustness import arc_kappa, nnm_kappa
from raysys.aggregation.rule import Kappa, Stack, View, as_stack, medoid, norms_of, squared_distances


class PreAggregator:
    """A map (n, d) -> (n', d) whose coefficients depend on inner products only."""

    name: ClassVar[str]
    weighted: ClassVar[bool] = False
    """Do row weights keep their meaning through it?"""
    sees: ClassVar[str] = "products"
    """'products': all inner products; 'norms': norms only, and the map is diagonal; 'nothing': the map is drawn."""

    def __init__(self, n: int, f: int) -> None:
        self.n, self.f = n, f

    def count(self, n: int, f: int) -> int:
        """Rows that come out of n; f of them are faulty at most."""
        return n

    def kappa(self, n: int, f: int, inner: Kappa | None) -> Kappa | None:
        """kappa of a rule with this before it, from the rule's own for `count(n, f)` rows."""
        return None

    def matrix(self, view: View) -> F64:
        raise NotImplementedError

    def __call__(self, stack: Stack, *, rng: np.random.Generator | None = None) -> Any:
        """The mixed rows (n', d); same kind and type as the stack, which is not written to. Rows must be finite."""
        tensor, back = as_stack(stack)
        if self.sees == "products":
            seen = survey(tensor)
        elif self.sees == "norms":
            norms = columns.norms(tensor)
            seen = Survey(np.isfinite(norms), np.diag(np.append(norms, 0.0) ** 2)[None], False)
        else:
            seen = survey(tensor, products=False)
        if not seen.finite.all():
            raise ValueError(
                f"{self.name} alone needs finite rows, got {np.flatnonzero(~seen.finite).tolist()} not finite"
            )
        matrix = self.matrix(View(seen, seen.n, self.f, None, rng, np.arange(seen.n)))
        if self.sees == "norms":
            return back(columns.scale(tensor, np.diag(matrix).copy()))
        if self.sees == "nothing":
            if tensor.is_cuda:
                return back(torch.stack([columns.combine(tensor, row[: seen.n], None, 0.0) for row in matrix]))
            out = torch.empty((len(matrix), tensor.shape[1]), dtype=tensor.dtype)
            for into, row in zip(out, matrix, strict=True):
                columns.combine(tensor, row[: seen.n], None, 0.0, into)
            return back(out)
        view = View(seen, seen.n, self.f, None, rng, np.arange(seen.n))
        return back(columns.mix(tensor, np.pad(matrix, ((0, 0), (0, 1))), medoid(view)))


def _diagonal(view: View, factors: F64) -> F64:
    out = np.zeros((view.n, view.n + 1 + view.survey.has_reference))
    np.fill_diagonal(out, factors)
    return out


class Nnm(PreAggregator):
    """Nearest-neighbour mixing: each row becomes the mean of the n - f rows nearest to it (Allouah et al., 2302.01772).

    Helps under heterogeneity on average; in the worst case its kappa is up to 4 times that of the rule alone (spec 2.5).
    """

    name = "nnm"

    def kappa(self, n: int, f: int, inner: Kappa | None) -> Kappa | None:
        return None if inner is None else Kappa(nnm_kappa(n, f, inner.value), "bound", "2302.01772, recalled")

    def matrix(self, view: View) -> F64:
        n, kept = view.n, view.n - view.f
        nearest = np.argsort(squared_distances(view.gram, n), axis=1, kind="stable")[:, :kept]
        out = np.zeros((n, n + 1 + view.survey.has_reference))
        np.put_along_axis(out, nearest, 1.0 / kept, axis=1)
        return out


class Bucketing(PreAggregator):
    """Means of buckets of `size` rows, drawn by a random permutation (Karimireddy et al., 2006.09365).

    size: 2 by default if the rule then still faces a minority of bad buckets, else 1. Without an rng the permutation is
    that of a fixed seed: pass the round's own.
    """

    name = "bucketing"
    sees = "nothing"

    def __init__(self, n: int, f: int, size: int | None = None) -> None:
        super().__init__(n, f)
        if size is not None and not 1 <= size <= n:
            raise ValueError(f"bucketing needs 1 <= size <= n, got size={size}, n={n}")
        self.size = size

    def _size(self, n: int, f: int) -> int:
        return min(self.size, n) if self.size is not None else 2 if 2 * f < -(-n // 2) else 1

    def count(self, n: int, f: int) -> int:
        return -(-n // self._size(n, f))

    def matrix(self, view: View) -> F64:
        size = self._size(view.n, view.f)
        rng = np.random.default_rng(0) if view.rng is None else view.rng
        order = rng.permutation(view.n)
        out = np.zeros((self.count(view.n, view.f), view.n + 1 + view.survey.has_reference))
        for b in range(len(out)):
            bucket = order[b * size : (b + 1) * size]
            out[b, bucket] = 1.0 / len(bucket)
        return out


class Clipping(PreAggregator):
    """Rows longer than `radius` are scaled down to it. With `mean` after it: the norm-bounded (weighted) mean."""

    name = "clipping"
    weighted = True
    sees = "norms"

    def __init__(self, n: int, f: int, radius: float = 1.0) -> None:
        super().__init__(n, f)
        if not radius > 0:
            raise ValueError(f"clipping needs radius > 0, got radius={radius}")
        self.radius = radius

    def matrix(self, view: View) -> F64:
        return _diagonal(view, np.minimum(1.0, self.radius / np.maximum(norms_of(view), 1e-300)))


class Arc(PreAggregator):
    """Adaptive clipping: the k = floor(2 (f/n) (n-f)) longest rows are cut to the (k+1)-th norm (Allouah et al., 2405.14432)."""

    name = "arc"
    weighted = True
    sees = "norms"

    def kappa(self, n: int, f: int, inner: Kappa | None) -> Kappa | None:
        return None if inner is None else Kappa(arc_kappa(n, f, inner.value), "bound", "2405.14432, recalled")

    def matrix(self, view: View) -> F64:
        norms = norms_of(view)
        k = 2 * view.f * (view.n - view.f) // view.n
        radius = np.sort(norms)[view.n - 1 - k]
        return _diagonal(view, np.where(norms > radius, radius / np.maximum(norms, 1e-300), 1.0))
