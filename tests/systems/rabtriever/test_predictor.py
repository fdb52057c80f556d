"""The student folds into an inner product exactly, with the rank, the ties and the energy that follow from it (spec 5.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysys.data.retrieval import Queries
from raysys.systems.rabtriever.metrics import measure
from raysys.systems.rabtriever.predictor import COMBINES, HyperPredictor, Predictor, oracle

relaxed = settings(deadline=None, max_examples=40)

D, V, LABELS = 12, 9, (4, 2)


def world(seed: int = 0, d: int = D, n: int = 6, m: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Query states (n, d), document states (m, d) with one coordinate of huge size, a head (V, d), in float64."""
    drawn = torch.Generator().manual_seed(seed)
    scale = torch.ones(d, dtype=torch.float64)
    scale[0] = 50.0
    q, z = (scale * torch.randn(k, d, generator=drawn, dtype=torch.float64) + 2 for k in (n, m))
    return q, z, torch.randn(V, d, generator=drawn, dtype=torch.float64)


def predictor(combine: str, additive: bool, standardised: bool, q: Tensor, z: Tensor, **options: int) -> Predictor:
    torch.manual_seed(1)
    made = Predictor(q.shape[1], combine, additive, hidden=options.get("hidden", 10), layers=options.get("layers", 2))  # type: ignore[arg-type]
    made = made.to(q.dtype)
    if standardised:
        made.standardise("query", q)
        made.standardise("document", z)
    return made


def brute_force(made: Predictor, q: Tensor, z: Tensor, head: Tensor) -> Tensor:
    """Log-odds (n, m) through the whole head, pair by pair, as the paper writes it."""
    rows = []
    for one in q:
        a, b = made(one[None])
        logits = (a * made.document(z) + b) @ head.T
        rows.append(logits[:, LABELS[0]] - logits[:, LABELS[1]])
    return torch.stack(rows)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("standardised", [True, False])
@torch.no_grad()
def test_the_inner_product_is_the_heads_difference_and_ranks_alike(
    combine: str, additive: bool, standardised: bool
) -> None:  # (9)
    q, z, head = world()
    made = predictor(combine, additive, standardised, q, z)
    direction = head[LABELS[0]] - head[LABELS[1]]
    u, c = made.fold(q, direction)
    expected = brute_force(made, q, z, head)
    torch.testing.assert_close(u @ z.T + c[:, None], expected, atol=1e-9, rtol=1e-9)
    if combine != "none":  # there all are equal up to rounding
        assert torch.equal((u @ z.T).argsort(-1), expected.argsort(-1))
    single = made.float()
    u, c = single.fold(q.float(), direction.float())
    reference = brute_force(single, q.float(), z.float(), head.float())
    scale = float(reference.abs().max().clamp_min(1))
    torch.testing.assert_close((u @ z.float().T + c[:, None]) / scale, reference / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("d", [2, 5])
@torch.no_grad()
def test_scores_less_their_row_means_have_rank_d_at_most(d: int, additive: bool) -> None:  # (10)
    q, z, head = world(d=d, n=40, m=60)
    made = predictor("mul", additive, True, q, z)
    scores = brute_force(made, q, z, head)
    assert torch.linalg.matrix_rank(scores - scores.mean(1, keepdim=True), rtol=1e-10) <= d


@torch.no_grad()
def test_one_dimension_allows_two_orders_of_documents_over_all_queries() -> None:  # (10)
    q, z, head = world(d=1, n=200, m=20)
    made = predictor("mul", True, True, q, z, layers=1)
    torch.nn.init.zeros_(made.slope[0].bias)  # type: ignore[index, arg-type]
    scores = brute_force(made, q, z, head)
    orders = {tuple(row) for row in scores.argsort(1).tolist()}
    assert len(orders) == 2
    first, second = orders
    assert first == second[::-1]


@pytest.mark.parametrize("m", [1, 4, 10])
@torch.no_grad()
def test_without_multiplication_all_documents_tie_and_measures_are_those_of_chance(m: int) -> None:  # (12)
    q, z, head = world(n=5, m=m)
    made = predictor("none", True, False, q, z).float()
    u, c = made.fold(q.float(), (head[LABELS[0]] - head[LABELS[1]]).float())
    scores = (u @ z.float().T + c[:, None]).numpy()
    assert (scores == scores[:, :1]).all()
    assert len(set(scores[:, 0])) == 5
    queries = Queries(("q",) * 5, ("q",) * 5, tuple((i % m,) for i in range(5)), ((1,),) * 5, np.full(5, -1))
    found = measure(scores, queries)
    np.testing.assert_allclose(found["recall@1"], 1 / m)
    np.testing.assert_allclose(found["mrr@10"], sum(1 / k for k in range(1, m + 1)) / m)


@pytest.mark.parametrize("combine", ["mul", "add", "film"])
@torch.no_grad()
def test_a_slope_that_ignores_the_query_gives_one_ranking(combine: str) -> None:  # (13)
    q, z, head = world()
    made = predictor(combine, True, True, q, z)
    if made.slope is not None:
        torch.nn.init.zeros_(made.slope[-1].weight)  # type: ignore[arg-type]
        torch.nn.init.ones_(made.slope[-1].bias)  # type: ignore[arg-type]
    assert len({tuple(row) for row in brute_force(made, q, z, head).argsort(1).tolist()}) == 1


@torch.no_grad()
def test_a_slope_of_one_without_shift_is_the_document_itself() -> None:  # (13)
    q, z, _ = world()
    made = predictor("mul", False, False, q, z)
    torch.nn.init.zeros_(made.slope[-1].weight)  # type: ignore[index, arg-type]
    torch.nn.init.ones_(made.slope[-1].bias)  # type: ignore[index, arg-type]
    a, b = made(q)
    assert torch.equal(a[0] * z + b[0], z)


@torch.no_grad()
def test_a_students_score_of_a_document_does_not_depend_on_the_others() -> None:  # (5)
    q, z, head = world()
    made = predictor("mul", True, True, q, z)
    whole = brute_force(made, q, z, head)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(brute_force(made, q, z[order], head), whole[:, order], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(brute_force(made, q.flip(0), z[:1], head), whole.flip(0)[:, :1], atol=1e-12, rtol=1e-12)


@relaxed
@given(st.integers(0, 10_000), st.booleans())
def test_the_oracle_is_least_squares_coordinate_by_coordinate(seed: int, additive: bool) -> None:  # (14)
    drawn = torch.Generator().manual_seed(seed)
    z, target = (torch.randn(7, 3, generator=drawn, dtype=torch.float64) for _ in range(2))
    a, b, residual = oracle(z, target, additive)
    total = 0.0
    for k in range(3):
        design = torch.stack([z[:, k], torch.ones(7, dtype=torch.float64)], 1) if additive else z[:, k : k + 1]
        solved = torch.linalg.lstsq(design, target[:, k : k + 1]).solution[:, 0]
        torch.testing.assert_close(a[k], solved[0])
        torch.testing.assert_close(b[k], solved[1] if additive else torch.zeros_like(b[k]))
        total += float(((design @ solved - target[:, k]) ** 2).sum())
    assert residual.item() == pytest.approx(total / 21)


def test_the_oracle_of_a_coordinate_that_never_varies_is_its_mean() -> None:
    z = torch.zeros(5, 2)
    a, b, residual = oracle(z, torch.full((5, 2), 3.0), True)
    assert a.tolist() == [0, 0]
    assert b.tolist() == [3, 3]
    assert residual == 0


def fitted(made: Predictor, q: Tensor, z: Tensor, target: Tensor, steps: int) -> Tensor:
    """Least squares by L-BFGS: the mean squared residual that was reached."""
    optimizer = torch.optim.LBFGS(
        made.parameters(), max_iter=steps, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-14, tolerance_change=1e-18,
    )  # fmt: skip

    def loss() -> Tensor:
        a, b = made(q)
        return ((a[:, None] * made.document(z) + b[:, None] - target) ** 2).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call, arg-type]
    return loss().detach()


@pytest.mark.parametrize(
    ("combine", "additive"), [("mul", False), ("mul", True), ("film", True), ("gated", True), ("add", True)]
)
def test_no_trained_predictor_has_less_energy_than_the_closed_form(combine: str, additive: bool) -> None:  # (14)
    drawn = torch.Generator().manual_seed(2)
    q, z = (torch.randn(k, 4, generator=drawn, dtype=torch.float64) for k in (3, 6))
    target = torch.randn(3, 6, 4, generator=drawn, dtype=torch.float64)
    made = predictor(combine, additive, True, q, z, hidden=32)
    best = torch.stack([oracle(made.document(z).detach(), one, made.shift is not None)[2] for one in target]).mean()
    reached = fitted(made, q, z, target, 300)
    assert reached >= best - 1e-12
    if combine == "mul":  # three queries and a wide network: the bound is reached
        assert reached == pytest.approx(best.item(), rel=1e-3)


def test_states_made_as_slope_times_document_are_met_exactly() -> None:  # (14)
    drawn = torch.Generator().manual_seed(3)
    q, z = (torch.randn(k, 5, generator=drawn, dtype=torch.float64) for k in (40, 9))
    truth = torch.randn(5, 5, generator=drawn, dtype=torch.float64)
    target = (q @ truth)[:, None] * z
    made = predictor("mul", False, False, q, z, layers=1)
    assert fitted(made, q, z, target, 200) < 1e-6
    a, _ = made(q)
    torch.testing.assert_close(a[:, None] * z, target, atol=1e-3, rtol=1e-3)
    direction = torch.randn(5, generator=drawn, dtype=torch.float64)
    torch.testing.assert_close(made.fold(q, direction)[0] @ z.T, target @ direction, atol=1e-3, rtol=1e-3)


def test_the_linear_case_is_the_solution_of_the_normal_equations() -> None:  # (15)
    drawn = torch.Generator().manual_seed(4)
    q, z = (torch.randn(k, 3, generator=drawn, dtype=torch.float64) for k in (20, 8))
    target = torch.randn(20, 8, 3, generator=drawn, dtype=torch.float64)
    made = predictor("mul", False, False, q, z, layers=1)
    fitted(made, q, z, target, 500)
    linear = made.slope[0]  # type: ignore[index]
    with_one = torch.cat([q, torch.ones(20, 1, dtype=torch.float64)], 1)
    for k in range(3):
        design = (with_one[:, None] * z[None, :, k, None]).reshape(-1, 4)
        y = target[:, :, k].reshape(-1)
        solved = torch.linalg.solve(design.T @ design, design.T @ y)
        torch.testing.assert_close(torch.cat([linear.weight[k], linear.bias[k : k + 1]]), solved, atol=1e-6, rtol=1e-6)  # type: ignore[index, operator, arg-type]


NETWORKS = (
    ("mul", False, 1), ("mul", True, 2), ("film", False, 1), ("film", True, 2), ("gated", False, 2), ("add", False, 1),
    ("none", False, 1),
)  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("combine", "additive", "networks"), NETWORKS)
def test_the_number_of_trained_numbers_is_the_closed_form(
    combine: str, additive: bool, networks: int, layers: int
) -> None:  # (4)
    d, h = 6, 5
    one = {1: d * d + d, 2: 2 * d * h + h + d, 3: 2 * d * h + h * h + 2 * h + d}[layers]
    made = Predictor(d, combine, additive, layers, h)  # type: ignore[arg-type]
    assert sum(p.numel() for p in made.parameters()) == networks * one


@torch.no_grad()
def test_standardised_documents_have_mean_zero_and_variance_one_and_constants_stay_small() -> None:
    _, z, _ = world()
    z[:, 3] = 7.0
    made = predictor("mul", True, True, z, z)
    seen = made.document(z)
    torch.testing.assert_close(seen.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-5, rtol=0)
    spread = seen.std(0, correction=0)
    torch.testing.assert_close(spread[[0, 1, 2, 4]], torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert spread[3] < 1e-3


def test_unknown_forms_and_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="combine: got 'times'; allowed are mul, film"):
        Predictor(4, "times")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: got 4"):
        Predictor(4, layers=4)


@torch.no_grad()
def test_a_network_made_by_the_query_goes_beyond_rank_d() -> None:
    torch.manual_seed(0)
    d = 2
    model = HyperPredictor(d, units=16).double()
    q, z = torch.randn(40, d).double(), torch.randn(60, d).double()
    scores = model(q, z.expand(40, -1, -1))
    assert torch.linalg.matrix_rank(scores - scores.mean(1, keepdim=True), rtol=1e-8) > d
    torch.testing.assert_close(model(q[:1], z[None, 5:6])[0, 0], scores[0, 5])
