"""The gossip probe: peers estimate rho of the mixing they live under and agree on it, with nobody in the middle.

Every peer uses its own random numbers and what its neighbours sent, in rounds before the training, through the same mixing.

    measure: each peer draws signs s_i; they mix for a turn; x_i = s_i(turn / 2) - s_i(turn) sums to zero over the peers,
        because mixing keeps the mean, so that its energy V = sum_i ||x_i||^2 is all disagreement; x mixes for another
        turn, and E[V(t + 1) | x(t)] <= rho V(t), with equality where peers are exchangeable (Erdos-Renyi, matchings), and
        in the limit of power iteration where the graph is fixed (half a turn of it is in x already). Two groups of
        signs take turns, so one of them is measured in every round but those of the first turn.
    average: energies are local; gossip averages them like everything else, and each peer has rho as the mean of V(t+1)/V(t),
        step t of a turn with weight t + 1.
    agree: the largest rho spreads: a peer keeps the largest it heard.

Source: specs/tad_lora.md section 2.5 (iii); the paper searches the interval on a grid instead. Decay of gossiped random
vectors as an estimate of an eigenvalue: power iteration, e.g. Kempe & McSherry (2004).

Notable choices
- The difference of two times needs no estimate of the mean, nor the number of peers. Steps whose energy has sunk to where
  float32 rounding moves the mean (FLOOR) are left out; no step left means an exact average (rho = 0) or no contact (1).
- Of a round only the senders with a weight are read. What a missing or not finite sender would have got stays with oneself.
- On fixed graphs whose slow directions are close to each other rho comes out low, by up to some hundredths.
- Whether all agree is not certain but likely: see `settled`.

Shapes: k peers of this block, n peers in all, c signs in a group, width floats in a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.graph.mixing import Matrix
from raysys.runtime.seeds import Seeds, Stream

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

SIGNS = 16
"""Signs a peer draws for a group: enough to look in all directions of ten peers."""
TURNS = 4
FLOOR = 1e-10
"""Energy per sign (it starts at 1) below which float32 rounding is felt."""
STATE = ("state", "half", "met", "differed", "rho", "agreed")
OWN = 1 << 40
"""Added to the peers' numbers: the stream GRAPH of nodes 0, 1, ... belongs to the graph itself."""


class Probe:
    """A block of peers. Drive it with `message` and `mix` for rounds 0..rounds-1, in order.

    Args:
        nodes: (k,) numbers of the block's peers.
        rounds: how many rounds to spend, at least 20: four tenths to measure, three to average, three to agree.

    After the last round `rho` (k,) holds each peer's own estimate, `agreed` (k,) the largest it heard of.
    """

    def __init__(self, nodes: I64, seeds: Seeds, rounds: int) -> None:
        if rounds < 20:
            raise ValueError(f"a probe needs at least 20 rounds, got {rounds}")
        self.nodes, self.seeds, self.rounds = np.asarray(nodes, dtype=np.int64), seeds, rounds
        self.turn = rounds // 10
        self.measured = TURNS * self.turn
        self.averaged = rounds - 3 * self.turn
        self.slots = self.turn + 2  # per turn: V(0), ..., V(turn), and whether anything moved
        self.width = 2 * SIGNS + (TURNS - 1) * self.slots
        k = len(self.nodes)
        self.state = np.zeros((k, self.width), dtype=np.float32)
        self.half = np.zeros((k, SIGNS), dtype=np.float32)
        self.rho, self.agreed = np.full(k, np.nan), np.full(k, np.nan)
        self.met, self.differed = np.zeros(k, dtype=bool), np.zeros(k, dtype=bool)
        self._begin(0)

    def message(self, round: int) -> F32:
        """(k, width) what each peer sends to its neighbours."""
        return self.state.copy()

    def mix(self, round: int, ids: I64, rows: F32, weights: Matrix) -> None:
        """Take in a round: ids (m,) senders, rows (m, width) their messages, weights (k, n) this block's rows of W.

        Senders are read where the weight is not zero; one that is not among `ids` or whose message is not finite is not.
        """
        there = np.full(weights.shape[1], -1)
        there[ids] = np.arange(len(ids))
        there[ids[~np.isfinite(rows).all(1)]] = -1
        mixed = np.empty_like(self.state)
        for i, node in enumerate(self.nodes):
            senders = np.flatnonzero((weights[i] != 0.0) & (there >= 0))
            senders = senders[senders != node]
            heard = rows[there[senders]].astype(np.float64)
            if round < self.averaged:
                share = weights[i, senders, None]
                mixed[i] = (share * heard).sum(0) + (1.0 - share.sum()) * self.state[i]
            else:
                mixed[i] = np.vstack([self.state[i : i + 1], heard]).max(0)
                if len(heard) and 2 * round >= self.averaged + self.rounds:
                    self.met[i] = True
                    self.differed[i] |= bool((heard[:, 0] != self.state[i, 0]).any())
        self.state = mixed
        self._begin(round + 1)

    @property
    def settled(self) -> NDArray[np.bool_]:
        """(k,) True for peers that in the second half of the agreement met somebody, and nobody of another opinion.

        Not a proof: parts of a graph that never met are each settled. False says that more rounds are needed.
        """
        return self.met & ~self.differed

    def interval(self, law: Callable[[float], int]) -> I64:
        """(k,) `law` of the rho each peer heard of last: equal at all peers where the agreement got through."""
        return np.array([law(float(rho)) for rho in self.agreed], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {name: np.array(getattr(self, name)) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, np.array(state[name]))

    def _signs(self, turn: int) -> F32:
        """(k, c) the signs drawn at the start of a turn."""
        bits = self.seeds.bits(Stream.GRAPH, self.nodes + OWN, turn, 1)
        return np.where(bits >> np.arange(SIGNS, dtype=np.uint64) & np.uint64(1), 1, -1).astype(np.float32)

    def _begin(self, round: int) -> None:
        """What peers do on their own before a round."""
        if round <= self.measured:
            self._measure(round)
        if round == self.averaged:
            self.rho = self._estimate()
            self.state[:, 0] = self.rho
        if round == self.rounds:
            self.agreed = self.state[:, 0].astype(np.float64)

    def _measure(self, round: int) -> None:
        signs = self.state[:, : 2 * SIGNS].reshape(-1, 2, SIGNS)  # a view, as is the ledger
        ledger = self.state[:, 2 * SIGNS :].reshape(-1, TURNS - 1, self.slots)
        before, step = divmod(round - 1, self.turn)
        if before >= 1:
            ledger[:, before - 1, step + 1] = _energy(signs[:, 1 - before % 2])
        turn, step = divmod(round, self.turn)
        if turn < TURNS and step == self.turn // 2:
            self.half = signs[:, turn % 2].copy()
        if turn < TURNS and step == 0:
            signs[:, turn % 2] = self._signs(turn)
            if turn >= 1:
                mixed = signs[:, 1 - turn % 2]
                ledger[:, turn - 1, -1] = _energy(mixed - self._signs(turn - 1))
                signs[:, 1 - turn % 2] = self.half - mixed
                ledger[:, turn - 1, 0] = _energy(signs[:, 1 - turn % 2])

    def _estimate(self) -> NDArray[np.float64]:
        ledger = self.state[:, 2 * SIGNS :].reshape(-1, TURNS - 1, self.slots).astype(np.float64)
        now, then, moved = ledger[:, :, : self.turn], ledger[:, :, 1 : self.turn + 1], ledger[:, :, -1].sum(1)
        weight = np.arange(1.0, self.turn + 1) * (
            now > FLOOR
        )  # later steps have turned further to the slowest direction
        total = weight.sum((1, 2))
        mean = (weight * then / np.where(now > FLOOR, now, 1.0)).sum((1, 2)) / np.maximum(total, 1.0)
        return np.asarray(np.clip(np.where((total > 0) | (moved > FLOOR), mean, 1.0), 0.0, 1.0))


def _energy(signs: F32) -> NDArray[np.float64]:
    """(k,) mean square, in float64."""
    return np.asarray((signs.astype(np.float64) ** 2).mean(1))
