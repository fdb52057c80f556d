"""What a rule is: plan on n x n numbers, then apply to columns.

Shapes: stack (n, d), m = rows + anchors; coefficients (m,) over [rows; origin; reference]; mixing matrices (n', m).

Notable choices
- `plan` sees only a `Survey`, `Plan.apply` only columns; a server cut over coordinates calls the same two functions as
  a single process does and gets the same bits.
- Rows that are not finite are rejected before anything else and n and f both shrink: a row of NaN proves itself faulty.
- Permutation of rows is the caller's business (a server shuffles every round); ties fall to the lower index or value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import columns
from raysys.aggregation.columns import Coordinatewise
from raysys.aggregation.gram import F64, Survey, survey

Stack = torch.Tensor | NDArray | Sequence[torch.Tensor] | Sequence[NDArray]


class Kappa(NamedTuple):
    """Robustness coefficient: |F(x) - mean_S|^2 <= value * average squared distance in S, for every S of n - f rows."""

    value: float
    kind: str
    """'exact', 'bound' (upper bound, average squared distance), 'bound-lambda' (upper bound, top eigenvalue instead)."""
    source: str


class View(NamedTuple):
    """What a rule decides on: the finite rows of a survey."""

    survey: Survey
    n: int
    f: int
    weights: F64 | None
    rng: np.random.Generator | None
    rows: NDArray[np.intp]
    """The callers' numbers of the rows; those of the stack also after a pre-aggregator that keeps their count."""
    mixed: bool = False
    """Have the rows been through a pre-aggregator?"""

    @property
    def gram(self) -> F64:
        return self.survey.gram


class Combination(NamedTuple):
    """The output is `coefficients` @ [rows; origin; reference]."""

    coefficients: F64


Decision = Combination | Coordinatewise


@dataclass(frozen=True)
class Plan:
    """What to do with every column. Made by `Rule.plan`; small, picklable."""

    n: int
    rejected: tuple[int, ...]
    weights: F64 | None = None
    """(n,) share of each row in the output; None for coordinate-wise rules. Shares sum to one unless rows were clipped
    towards the origin or the output leans on the reference."""
    bias: float = 0.0
    """Share of the reference in the output (centred clipping)."""
    coordinate: Coordinatewise | None = None
    matrix: F64 | None = None
    """(n', n + 2) map that makes the rows a coordinate-wise rule works on out of [stack; origin; reference]."""
    base: int = 0
    """Row around which mixing is done: a row amid the others, so that equal rows mix to themselves exactly; -1 for zero,
    if rows are only scaled."""

    def apply(self, stack: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
        """The output (d,) for these columns of the stack (n, d); any slice of the columns gives that slice of the output."""
        return self.apply_checked(stack, reference)[0]

    def apply_checked(self, stack: torch.Tensor, reference: torch.Tensor | None = None) -> tuple[torch.Tensor, bool]:
        """The output, and False only if a coordinate-wise rule met a value that is not finite (a survey tells beforehand)."""
        if stack.shape[0] != self.n:
            raise ValueError(f"the plan was made for {self.n} rows, the stack has {stack.shape[0]}")
        if self.bias != 0.0 and reference is None:
            raise ValueError("this plan leans on the reference it was made with; pass it to apply")
        if self.weights is not None:
            out = columns.combine(stack, self.weights, reference, self.bias)
            return out, True
        assert self.coordinate is not None
        if self.matrix is None:
            return columns.coordinate(stack, self.coordinate)
        return columns.mixed_coordinate(stack, self.coordinate, self.matrix, self.base, reference), True


class Aggregation(NamedTuple):
    """A rule's output with who made it."""

    vector: Any
    weights: F64 | None
    rejected: tuple[int, ...]


class Rule:
    """A map (n, d) -> (d,) that tolerates f arbitrary rows. Subclasses say `decide`, `requires`, `kappa`."""

    name: ClassVar[str]
    needs_products: ClassVar[bool] = True
    """Does the plan need inner products, or only which rows are finite?"""
    sees: str | None = None
    """'norms' if norms and distances to the reference are all that the plan looks at."""
    weighted: ClassVar[bool] = False
    """Has the rule a form for rows of unequal weight?"""
    trusts_first: ClassVar[bool] = False
    """Does the rule trust one row by its number? Where rows are shuffled, as on a server, that row is anybody's."""

    def __init__(self, n: int, f: int) -> None:
        if not 0 <= f <= n or n < 1:
            raise ValueError(f"a rule needs n >= 1 rows of which 0 <= f <= n are faulty, got n={n}, f={f}")
        self.n, self.f = n, f
        self.requires(n, f)

    def __repr__(self) -> str:
        return f"{self.name}(n={self.n}, f={self.f})"

    @property
    def plannable(self) -> bool:
        """Can the rule be planned on a survey? If not it sees whole rows: call `aggregate`."""
        return True

    @property
    def least(self) -> bool | str:
        """The cheapest survey the rule can be planned on; a fuller one gives the same plan up to rounding."""
        return self.needs_products if self.sees is None else self.sees

    def requires(self, n: int, f: int) -> None:
        """Raises ValueError if the rule is not defined for n rows of which f are faulty."""
        if not 2 * f < n:
            raise ValueError(f"{self.name.replace('_', ' ')} needs n > 2f, got n={n}, f={f}")

    def breakdown(self, n: int) -> int:
        """The largest f the rule tolerates among n rows."""
        for f in range(n, 0, -1):
            try:
                self.requires(n, f)
            except ValueError:
                continue
            return f
        return 0

    def kappa(self, n: int, f: int) -> Kappa | None:
        """The rule's robustness coefficient with its source, or None if none is known.

        n rows of which f are faulty, for a rule that was told that f; only the trimmed mean tells apart the f it was told
        (`self.f`) and the true one.
        """
        return None

    def decide(self, view: View) -> Decision:
        raise NotImplementedError

    def plan(self, survey: Survey, *, weights: F64 | None = None, rng: np.random.Generator | None = None) -> Plan:
        """Decide what to do with the columns.

        survey: of the whole stack (join shards first), with products if `needs_products`. weights: (n,) positive, any scale,
        for rules that are `weighted`. rng: for rules that draw (bucketing, dnc).
        Raises ValueError if too many rows are rejected for the rule to stand.
        """
        n, f = survey.n, self.f
        everyone = bool(survey.finite.all())
        kept = np.arange(n) if everyone else np.flatnonzero(survey.finite)
        rejected = () if everyone else tuple(int(i) for i in np.flatnonzero(~survey.finite))
        f = max(0, f - len(rejected))
        try:
            if len(kept) == 0:
                raise ValueError("a rule needs at least one finite row")
            self.requires(len(kept), f)
        except ValueError as error:
            if rejected:
                raise ValueError(f"{error}, after rejecting {len(rejected)} of {n} rows that are not finite") from None
            raise
        shares = None if weights is None else self._shares(np.asarray(weights, np.float64), n)[kept]
        if shares is not None:
            shares = shares / shares.sum()
        view = View(survey if everyone else survey.restrict(kept), len(kept), f, shares, rng, kept)
        decision, matrix = self.compose(view)
        if isinstance(decision, Combination):
            coefficients = decision.coefficients if matrix is None else decision.coefficients @ matrix
            full = np.zeros(n)
            full[kept] = coefficients[: len(kept)]
            bias = float(coefficients[len(kept) + 1]) if survey.has_reference else 0.0
            return Plan(n, rejected, full, bias)
        if matrix is None:
            rows = kept if decision.rows is None else kept[decision.rows]
            return Plan(n, rejected, coordinate=decision._replace(rows=rows))
        matrix = matrix[: len(matrix) - 1 - survey.has_reference]
        wide = np.zeros((len(matrix), n + 2))
        wide[:, kept] = matrix[:, : len(kept)]
        if survey.has_reference:
            wide[:, n + 1] = matrix[:, len(kept) + 1]
        return Plan(
            n,
            rejected,
            coordinate=decision,
            matrix=wide,
            base=int(kept[medoid(view)]) if self.least is True else -1,
        )

    def compose(self, view: View) -> tuple[Decision, F64 | None]:
        """The decision, and the matrix (n' + anchors, m) of pre-aggregation it applies to or None for none."""
        return self.decide(view), None

    def _shares(self, weights: F64, n: int) -> F64:
        if not self.weighted:
            raise ValueError(
                f"{self.name} has no weighted form; those that have: mean, median, trimmed_mean, geometric_median, ctma"
            )
        if weights.shape != (n,):
            raise ValueError(f"weights have shape {weights.shape}, the stack needs ({n},)")
        if not np.all(np.isfinite(weights)) or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"weights are finite, not negative and not all zero, got {weights.tolist()}")
        return weights

    def aggregate(
        self,
        stack: Stack,
        *,
        weights: F64 | None = None,
        reference: Any = None,
        rng: np.random.Generator | None = None,
    ) -> Aggregation:
        """The output with each row's share and the rejected rows. Takes what `__call__` takes."""
        tensor, back = as_stack(stack)
        ref = None if reference is None else as_vector(reference, tensor)
        if not self.needs_products and tensor.ndim == 2 and tensor.is_floating_point():
            # One pass: take all rows for finite, look again only if the pass met a value that was not.
            plan = self.plan(Survey(np.ones(len(tensor), bool), None, False), weights=weights, rng=rng)
            vector, finite = plan.apply_checked(tensor)
            if finite and (plan.weights is None or isfinite(vector.sum().item())):
                return Aggregation(back(vector), plan.weights, ())
        plan = self.plan(survey(tensor, ref, products=self.least), weights=weights, rng=rng)
        return Aggregation(back(plan.apply(tensor, ref)), plan.weights, plan.rejected)

    def __call__(
        self,
        stack: Stack,
        *,
        weights: F64 | None = None,
        reference: Any = None,
        rng: np.random.Generator | None = None,
    ) -> Any:
        """The robust aggregate of n vectors.

        stack: (n, d) tensor or array, or a list of n vectors; never written to. weights: (n,) for weighted rules.
        reference: (d,) previous output, for rules that use one. Returns a (d,) vector of the same kind and type.
        """
        return self.aggregate(stack, weights=weights, reference=reference, rng=rng).vector


def medoid(view: View) -> int:
    """The row with the least median distance to the others."""
    distances = squared_distances(view.gram, view.n)
    return int(np.argmin(np.partition(distances, (view.n - 1) // 2, axis=1)[:, (view.n - 1) // 2]))


def norms_of(view: View) -> F64:
    """(n,) Euclidean norms: distances to the origin, which is row n."""
    gram, n = view.gram, view.n
    squares = np.diag(gram)[:n] + gram[n, n] - 2.0 * gram[n, :n]
    out: F64 = np.sqrt(np.maximum(squares, 0.0))
    return out


def squared_distances(gram: F64, n: int | None = None) -> F64:
    """(n, n) squared distances between the first n rows behind a Gram matrix; never negative, zero on the diagonal."""
    inner = gram[:n, :n]
    norms = np.diag(inner)
    out: F64 = np.maximum(norms[:, None] + norms[None, :] - 2.0 * inner, 0.0)
    np.fill_diagonal(out, 0.0)
    return out


def as_stack(stack: Stack) -> tuple[torch.Tensor, Any]:
    """The stack as an (n, d) tensor and a function that turns the output into the caller's kind of vector."""
    if isinstance(stack, torch.Tensor):
        return stack.detach(), lambda vector: vector
    if isinstance(stack, np.ndarray):
        return torch.from_numpy(stack), lambda vector: vector.numpy()
    if len(stack) == 0:
        raise ValueError("a stack needs at least one vector, got an empty list")
    if isinstance(stack[0], torch.Tensor):
        return torch.stack([torch.as_tensor(row) for row in stack]).detach(), lambda vector: vector
    return torch.from_numpy(np.stack([np.asarray(row) for row in stack])), lambda vector: vector.numpy()


def as_vector(vector: Any, like: torch.Tensor) -> torch.Tensor:
    """A (d,) vector as a tensor of the stack's type and device."""
    tensor = vector.detach() if isinstance(vector, torch.Tensor) else torch.from_numpy(np.asarray(vector))
    return tensor.to(dtype=like.dtype, device=like.device)
