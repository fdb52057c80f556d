"""One block of peers: they train one or both factors, send what their method mixes, and mix what their neighbours sent.

Shapes: k peers of a block, n peers in all, m senders of a round; flat factors A (k, size_a), B (k, size_b), float32.

Notable choices
- A peer that is absent, sends nothing, or sends what is not finite is alone in that round, and the mixing weights are computed
  without it: at both ends of each of its edges, so the weights stay doubly stochastic and the mean of the others is kept.
- Mixing is in float32, neighbours in ascending order. A peer without neighbours keeps its factors to the bit.
- On directed processes peers keep the mass of push-sum (Assran et al. 2019); on undirected ones it is 1 and not sent.
- Where the interval comes from a probe, the first rounds carry probe messages; training starts when all peers know T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.graph import Matrix, Probe, Process
from raysys.graph.gossip import mix, push_sum, to_csr
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora.combine import low_rank, mean_product, rotated, stacked
from raysys.systems.tad_lora.interval import select_interval
from raysys.systems.tad_lora.learners import Learner, Moments
from raysys.systems.tad_lora.policies import Policy, make_policy
from raysys.systems.tad_lora.setting import Setting

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
State = dict[str, NDArray]
Restart = Callable[[int], tuple[Tensor, Tensor]]
"""Round -> the common flat factors (size_a,), (size_b,) that peers start from."""


Mixing = Callable[[int, NDArray[np.bool_]], Matrix]
"""Round of training (negative: of the probe before it) and who sent something usable -> W (n, n)."""
PROBING = 1 << 40
"""Added to the numbers of probing rounds, which count up to -1: training sees the same graphs with and without a probe."""


def present(setting: Setting, seeds: Seeds, t: int) -> NDArray[np.bool_]:
    """(n,) who is here in a round of training (t >= 0) or of the probe before it: the same answer everywhere."""
    everyone = np.arange(setting.peers)
    return seeds.uniform(Stream.PARTICIPATION, everyone, t if t >= 0 else t + PROBING, 1)[:, 0] >= setting.absence


class Peers:
    """A block of peers. `interval`: T where it is known from the start; else `probe` finds it before training."""

    def __init__(
        self, learner: Learner, restart: Restart, setting: Setting, seeds: Seeds, nodes: I64, process: Process | None,
        mixing: Mixing, interval: int, probe: Probe | None,
    ) -> None:  # fmt: skip
        self.learner, self.restart, self.setting, self.seeds, self.nodes = learner, restart, setting, seeds, nodes
        self.process, self.mixing, self.interval, self.probe = process, mixing, interval, probe
        a, b = restart(-1)
        self.a = a.repeat(len(nodes), 1).numpy()
        self.b = b.repeat(len(nodes), 1).numpy()
        self.mass = np.ones(len(nodes), np.float64)
        self.moments: Moments = {}
        self.shift: list[Tensor] | None = None
        if self._policy().changes_base:
            self.shift = [torch.zeros(shape) for shape in learner.layout.shapes]
        self.refused = self.unsettled = 0
        self.intervals = np.full(len(nodes), interval, np.int64)
        self._tested: tuple[int, F32] | None = None

    @property
    def delay(self) -> int:
        """Rounds of probing before the first round of training."""
        return 0 if self.probe is None else self.probe.rounds

    def _policy(self) -> Policy:
        return make_policy(self.setting.method, max(self.interval, 1))

    def _here(self, t: int) -> I64:
        return np.flatnonzero(present(self.setting, self.seeds, t - self.delay)[self.nodes])

    def _agreed(self) -> None:
        """Take the interval from the probe, once it has ended."""
        if self.probe is not None and not self.interval:
            s = self.setting
            self.intervals = self.probe.interval(lambda rho: select_interval(rho, s.kappa, s.rounds))
            self.interval = int(self.intervals.max())
            self.unsettled = int((~self.probe.settled | (self.intervals != self.interval)).sum())

    def train(self, round: int) -> tuple[I64, F32]:
        """Local steps; ids (k',) of the peers here, and the rows (k', width) they send."""
        here = self._here(round)
        if self.probe is not None and round < self.delay:
            return self.nodes[here], self.probe.message(round)[here]
        self._agreed()
        t, policy = round - self.delay, self._policy()
        if not len(here):
            return self.nodes[here], self._row(policy.mixes(t))[here]
        mine = {key: value[here] for key, value in self.moments.items()}
        a, b = self.learner.train(
            self.nodes[here], torch.from_numpy(self.a[here]), torch.from_numpy(self.b[here]), t, policy.trains(t), mine,
            self.shift,
        )  # fmt: skip
        # Push-sum steps act on mass times z (Assran et al. 2019, algorithm 1), so z moves by the step over the mass; elsewhere 1.
        mass = self.mass[here, None].astype(np.float32)
        self.a[here] = np.where(mass == 1, a.numpy(), self.a[here] + (a.numpy() - self.a[here]) / mass)
        self.b[here] = np.where(mass == 1, b.numpy(), self.b[here] + (b.numpy() - self.b[here]) / mass)
        self.moments.update(mine)  # moments are kept only where nobody is ever absent
        return self.nodes[here], self._row(policy.mixes(t))[here]

    def _row(self, factors: str) -> F32:
        """What is sent: the named factors, and on directed graphs the mass."""
        parts = [{"A": self.a, "B": self.b}[name] for name in factors]
        if self.process is not None and self.process.directed and factors:
            high = self.mass.astype(np.float32)  # the mass in two float32: it is conserved to more than one can hold
            parts.append(np.stack([high, (self.mass - high).astype(np.float32)], 1))
        return np.concatenate(parts, 1) if parts else np.empty((len(self.nodes), 0), np.float32)

    def exchange(self, round: int, ids: I64, rows: F32, edges: object) -> Sequence[I64]:
        """Mix what the others sent.

        Args:
            ids, rows: senders (m,) and what they sent (m, width), this block's own among them.

        Returns:
            For each peer of the block, whose messages it used.
        """
        nobody = [np.empty(0, np.int64) for _ in self.nodes]
        probing = self.probe is not None and round < self.delay
        factors = "" if probing else self._policy().mixes(round - self.delay)
        if self.process is None or not (probing or factors):
            return nobody
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            self.refused += int((~finite).sum())
            ids, rows = ids[finite], rows[finite]
        sent = np.zeros(self.setting.peers, bool)
        sent[ids] = True
        weights = self.mixing(round - self.delay, sent)
        if probing:
            assert self.probe is not None
            self.probe.mix(round, ids, rows, weights[self.nodes])
        else:
            self._combine(round - self.delay, factors, ids, rows, weights)
        used = weights[self.nodes] != 0
        return [
            np.setdiff1d(np.flatnonzero(row), [node]) if sent[node] else none
            for row, node, none in zip(used, self.nodes, nobody, strict=True)
        ]

    def _combine(self, t: int, factors: str, ids: I64, rows: F32, weights: Matrix) -> None:
        how = self._policy().how
        mine = np.flatnonzero(np.isin(self.nodes, ids))
        local = weights[np.ix_(self.nodes[mine], ids)]
        if how == "factors":
            self._mix_factors(factors, mine, rows, local)
            return
        a, b = self._layers(rows)
        if how in ("stack", "residual"):
            self._change_base(how, t, a, b)
            return
        for k, w in zip(mine, torch.from_numpy(local), strict=True):
            senders = w.nonzero()[:, 0]
            if len(senders) < 2:
                continue
            own = int(np.flatnonzero(ids == self.nodes[k])[0])
            new = [
                _together(how, a_l[senders], b_l[senders], a_l[own], w[senders]) for a_l, b_l in zip(a, b, strict=True)
            ]
            self.a[k] = self.learner.layout.join([x for x, _ in new]).float().numpy()
            self.b[k] = self.learner.layout.join([x for _, x in new]).float().numpy()

    def _mix_factors(self, factors: str, mine: I64, rows: F32, local: Matrix) -> None:
        assert self.process is not None
        if self.process.directed:
            mixed, self.mass[mine] = push_sum(rows[:, :-2], rows[:, -2:].astype(np.float64).sum(1), local)
        else:
            mixed = mix(rows, *to_csr(local))
        at = 0
        for name in factors:
            mixed_factor = self.a if name == "A" else self.b
            width = mixed_factor.shape[1]
            mixed_factor[mine] = mixed[:, at : at + width]
            at += width

    def _layers(self, rows: F32) -> tuple[list[Tensor], list[Tensor]]:
        """Factors per layer (m, r, d_in), (m, d_out, r) in float64 of rows that carry both."""
        whole = torch.from_numpy(rows).double()
        layout = self.learner.layout
        a, b = whole[:, : layout.size_a], whole[:, layout.size_a : layout.size_a + layout.size_b]
        return layout.split_a(a), layout.split_b(b)

    def _change_base(self, how: str, t: int, a: list[Tensor], b: list[Tensor]) -> None:
        """Everyone hears everyone: the exact mean product enters W0 (stack), or what the mean factors lack of it (residual)."""
        w = torch.full((len(a[0]),), 1.0 / max(len(a[0]), 1), dtype=torch.float64)
        if not len(w):
            return
        assert self.shift is not None
        scale = self.learner.layout.scale
        means = [(torch.tensordot(w, a_l, 1), torch.tensordot(w, b_l, 1)) for a_l, b_l in zip(a, b, strict=True)]
        for shift, a_l, b_l, (a_mean, b_mean) in zip(self.shift, a, b, means, strict=True):
            kept = 0.0 if how == "stack" else b_mean @ a_mean
            shift += (scale * (mean_product(a_l, b_l, w) - kept)).float()
        if how == "stack":
            new_a, new_b = self.restart(t)
        else:
            new_a = self.learner.layout.join([x for x, _ in means]).float()
            new_b = self.learner.layout.join([x for _, x in means]).float()
        self.a[:], self.b[:] = new_a.numpy(), new_b.numpy()

    def tests(self, round: int) -> bool:
        """Whether models are tested after a round: every so many of training, and the last."""
        t = round - self.delay
        return t >= 0 and ((t + 1) % self.setting.evaluate_every == 0 or t == self.setting.rounds - 1)

    def statistics(self, round: int) -> State:
        """Factors, and how right each peer's model is on the test items where a test is due."""
        found = {"a": self.a, "b": self.b, "round": np.array(round - self.delay)}
        if self.tests(round):
            if self._tested is None or self._tested[0] != round:
                self._tested = round, self.right()
            found["right"] = self._tested[1]
        return found if self.shift is None else found | {f"shift.{i}": s.numpy() for i, s in enumerate(self.shift)}

    def right(self) -> F32:
        """(k, N): 1 where a peer's model is right about a test text; (k, 1) relative error of the regression."""
        return self.learner.evaluate(self.nodes, torch.from_numpy(self.a), torch.from_numpy(self.b), self.shift)

    def outcomes(self) -> dict[str, int]:
        """Rows that were not finite and so not used; peers that a probe left unsure of what the others found."""
        return {"not_finite": self.refused, "unsettled": self.unsettled}

    def state_dict(self) -> State:
        state: State = {"a": self.a, "b": self.b, "mass": self.mass, "refused": np.array(self.refused)}
        state |= {
            "interval": np.array(self.interval),
            "unsettled": np.array(self.unsettled),
            "intervals": self.intervals,
        }
        state |= {f"moments.{key}": value for key, value in self.moments.items()}
        if self.shift is not None:
            state |= {f"shift.{i}": s.numpy() for i, s in enumerate(self.shift)}
        if self.probe is not None:
            state |= {f"probe.{key}": value for key, value in self.probe.state_dict().items()}
        return state

    def load_state_dict(self, state: State) -> None:
        self.a, self.b, self.mass = state["a"].copy(), state["b"].copy(), state["mass"].copy()
        self.refused, self.interval = int(state["refused"]), int(state["interval"])
        self.unsettled, self.intervals = int(state["unsettled"]), state["intervals"].copy()
        self.moments = {key[8:]: value.copy() for key, value in state.items() if key.startswith("moments.")}
        if self.shift is not None:
            self.shift = [torch.from_numpy(state[f"shift.{i}"].copy()) for i in range(len(self.shift))]
        if self.probe is not None:
            self.probe.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("probe.")})


def _together(how: str, a: Tensor, b: Tensor, reference: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    if how == "product":
        return low_rank(*stacked(a, b, w), a.shape[1])
    a, b = rotated(a, b, reference)
    return torch.tensordot(w, a, 1), torch.tensordot(w, b, 1)
