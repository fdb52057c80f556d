"""Expert parallelism: each process of a group holds a share of the experts, and tokens travel to their experts and back.

Shapes: N tokens of D numbers in this process, M used assignments, P processes, E experts, E/P of them in each.

Notable choices
- Nothing is padded: processes first tell each other how many rows each expert gets (E numbers), then exchange exactly these
  rows (all-to-all with uneven splits), so a process may send or get nothing. A row travels once for each assignment.
- Gates stay at home: what comes back is weighed and added up there, so experts know nothing of who asked.
- The exchange is its own transpose: the backward pass sends gradients the way the rows came.
- Every process of the group must call a layer equally often, forward and backward, with tokens or without.
- `traffic` counts what leaves this process for others. With A of the M assignments going to experts elsewhere, B of others
  coming here, and s bytes per number: dispatch A D s, combine B D s, and in the backward pass B D s and A D s; the counts
  are 8 E (P - 1) / P.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from raysys.nn import experts


class ExpertParallel:
    """This process's place in a group that shares out experts in their order.

    Args:
        rank: of this process in the group.
        size: P.
        group: of torch.distributed (gloo or NCCL); None for all processes.
    """

    def __init__(self, rank: int, size: int, group: Any = None) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.traffic = Counter[str]()
        """Bytes sent to other processes so far: counts, dispatch, combine, and both with ` backward`."""

    def own(self, whole: Tensor) -> Tensor:
        """A copy of this process's share (E/P, ...) of (E, ...).

        Raises:
            ValueError: E is not a multiple of P.
        """
        if len(whole) % self.size:
            raise ValueError(f"{len(whole)} experts cannot be shared out evenly by {self.size} processes")
        return whole.chunk(self.size)[self.rank].clone()

    def mixture(self, x: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """`experts.mixture` of all E experts, w_in (E/P, D, 2F) and w_out (E/P, F, D) being those of this process."""
        plan = experts.dispatch(chosen, len(w_in) * self.size)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        leaving = plan.counts.view(self.size, -1)
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving.contiguous(), group=self.group)
        self.traffic["counts"] += leaving[0].nbytes * (self.size - 1)
        send, receive = leaving.sum(1).tolist(), coming.sum(1).tolist()
        given = self._exchange(x.to(dtype).index_select(0, plan.rows), send, receive, "dispatch")
        numbers = torch.arange(len(w_in), device=x.device).repeat(self.size)
        mine = torch.repeat_interleave(numbers, coming.reshape(-1))[:, None]
        out = experts.mixture(given, w_in, w_out, mine, torch.ones_like(mine, dtype=gates.dtype))
        back = self._exchange(out, receive, send, "combine")
        wide = torch.promote_types(dtype, torch.float32)
        weighted = back.to(wide) * gates.reshape(-1).index_select(0, plan.order)[:, None].to(wide)
        return torch.zeros(x.shape, dtype=wide, device=x.device).index_add(0, plan.rows, weighted).to(x.dtype)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int], what: str) -> Tensor:
        y: Tensor = _Exchange.apply(rows, send, receive, self, what)  # type: ignore[no-untyped-call]
        return y

    def move(self, rows: Tensor, send: list[int], receive: list[int], what: str) -> Tensor:
        """Rows in the order of their destination, send[p] of them to p: rows (sum receive, D) in the order of their source."""
        self.traffic[what] += (len(rows) - send[self.rank]) * rows.shape[1] * rows.itemsize
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        return out


class _Exchange(torch.autograd.Function):
    """`ExpertParallel.move`; backward is the opposite move."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], parallel: ExpertParallel, what: str
    ) -> Tensor:
        ctx.asked = send, receive, parallel, what
        return parallel.move(rows, send, receive, what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        send, receive, parallel, what = ctx.asked
        return parallel.move(grad, receive, send, f"{what} backward"), None, None, None, None
