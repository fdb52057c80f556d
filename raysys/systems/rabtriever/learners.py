"""The two things that are trained, as the training loop wants them: the reranker, then the predictor that stands in for it.

Shapes: b queries per block, K documents each, d hidden size, V vocabulary, n training queries, m documents.

Notable choices
- A step's batch is cut into blocks whatever the number of workers, and every draw is a function of (seed, step, block).
- The student's documents are on-policy: every `refresh` steps it searches with its own current vectors, and the teacher is asked
  about what it found (the retrieval analogue of sampling from the student's policy; the paper scores all documents [P]).
- The teacher of a student is never touched: its states come through `Targets`, from this process or from actors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.rabtriever import losses
from raysys.systems.rabtriever.backbone import Backbone, Part
from raysys.systems.rabtriever.examples import I64, Examples
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting, cosine
from raysys.systems.rabtriever.targets import Targets

PREFERENCES = 1 << 40
"""Added to the seed for the second stage, so that it does not see the batches of the first again."""
SAMPLE = 256
"""Queries on which the variance of the teacher's states is estimated."""


class TeacherLearner:
    """Supervised fine-tuning of the reranker on answers (LaHoRe [P]); with `reference`, preferences against it (DPO)."""

    def __init__(
        self, setting: TeacherSetting, backbone: Backbone, examples: Examples, documents: Part, queries: Part, seed: int,
        preferences: bool = False,
    ) -> None:  # fmt: skip
        self.setting, self.examples, self.documents, self.queries = setting, examples, documents, queries
        self.module, self.blocks = backbone.train(), setting.blocks
        self.seeds = Seeds(seed + PREFERENCES if preferences else seed)
        self.reference = copy.deepcopy(backbone).eval().requires_grad_(False) if preferences else None
        self.steps = setting.dpo_steps if preferences else setting.steps
        self.others = setting.negatives or len(examples.known) - 1
        self.told: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Nothing to prepare."""

    def loss(self, step: int, block: int) -> Tensor:
        backbone, device = self.module, self.module.device
        count = -(-self.setting.batch // self.blocks)
        rows = self.examples.queries(self.seeds, step, block, count)
        found, also = self.examples.groups(self.seeds, step, block, rows, self.others)
        k = found.shape[1]
        positive = torch.from_numpy(also.copy())
        positive[:, 0] = True
        positive = positive.flatten().to(device)
        part = _to(self.documents.pick(torch.from_numpy(found.reshape(-1))), device)
        asked = _to(self.queries.pick(torch.from_numpy(np.repeat(rows, k))), device)
        read = backbone.read(part, keep=True)
        states = backbone.answer(asked, read)
        if self.reference is None:
            answers = losses.answer_loss(backbone.head(states).float(), positive, backbone.labels)
        else:
            with torch.no_grad():
                before = self.reference.log_odds(self.reference.answer(asked, self.reference.read(part, keep=True)))
            answers = losses.preference_loss(backbone.log_odds(states), before, positive, self.setting.dpo_beta)
        self.told = {"answers": float(answers.detach())}
        if not self.setting.auxiliary:
            return answers
        alone = _to(self.queries.pick(torch.from_numpy(rows)), device)
        return answers + self.setting.auxiliary * backbone.auxiliary(part, read, alone)

    def learning_rate(self, step: int) -> float:
        return cosine(self.setting.lr * (0.1 if self.reference is not None else 1.0), step, self.steps)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], weight_decay=0.01)

    def metrics(self) -> dict[str, float]:
        return self.told


@dataclass(frozen=True)
class Frozen:
    """What a student needs of its teacher besides answers: query states (n, d), document states (m, d), the head, its labels."""

    queries: Tensor
    documents: Tensor
    head: Tensor
    labels: tuple[int, int]

    @property
    def direction(self) -> Tensor:
        """W_T - W_F (d,)."""
        return self.head[self.labels[0]] - self.head[self.labels[1]]


class StudentLearner:
    """Distil the teacher into a predictor, or train the same predictor on labels alone (loss infonce: the control)."""

    def __init__(
        self,
        setting: StudentSetting,
        frozen: Frozen,
        examples: Examples,
        targets: Targets,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.setting, self.examples, self.targets, self.steps = setting, examples, targets, setting.steps
        self.blocks = setting.blocks
        self.seeds = Seeds(seed)
        self.frozen = Frozen(
            frozen.queries.to(device), frozen.documents.to(device), frozen.head.to(device), frozen.labels
        )
        self.module = start_predictor(setting, self.frozen, examples, seed).to(device)
        self.z = self.module.document(self.frozen.documents)
        self.others = len(examples.known) - 1 if setting.rollout == "all" else setting.group - 1
        # in the module, and therefore in checkpoints: what the last search found must survive until the next one
        self.module.register_buffer("own", torch.empty(0, 0, dtype=torch.long))
        self.asked: dict[tuple[int, int], tuple[I64, I64, NDArray[np.bool_], Any]] = {}
        self.variance = self._variance()

    def before(self, step: int) -> None:
        """Search with the current vectors, when it is time."""
        if self.setting.rollout == "onpolicy" and step // self.setting.refresh != (step - 1) // self.setting.refresh:
            self.module.own = self._search()
            self.asked.clear()

    def loss(self, step: int, block: int) -> Tensor:
        known = (step, block) in self.asked
        rows, found, also, asked = self.asked.pop((step, block)) if known else self._ask(step, block)
        if (
            step + 1 < self.steps and (step + 1) % self.setting.refresh
        ):  # what comes next is known already: let the teacher begin
            self.asked[step + 1, block] = self._ask(step + 1, block)
        a, b = self.module(self.frozen.queries[torch.from_numpy(rows)])
        with torch.autocast(
            self.z.device.type, enabled=False
        ):  # answers lie close together; bfloat16 cannot tell them apart
            return self._apart(a.float(), b.float(), found, also, asked, step, block)

    def _apart(
        self, a: Tensor, b: Tensor, found: I64, also: NDArray[np.bool_], asked: Any, step: int, block: int
    ) -> Tensor:
        """The loss (scalar) of maps A, B (b, d) for documents (b, K), of which `also` (b, K) are right besides the first."""
        z, s = self.z[torch.from_numpy(found)], self.setting
        if s.loss == "infonce":
            u = self.frozen.direction * a
            excluded = torch.from_numpy(also).to(self.z.device)
            return losses.info_nce(torch.einsum("nkd,nd->nk", z, u), excluded)
        teacher = self.targets.take(asked).to(self.z.device).view(*found.shape, -1)
        if s.loss != "jepa":
            odds_s = torch.einsum("nkd,nd->nk", z, self.frozen.direction * a)
            odds_t = teacher @ self.frozen.direction
            if s.loss == "margin_mse":
                return losses.margin_mse(odds_s, odds_t) / self._odds_variance
            return losses.listwise_kl(odds_s, odds_t) if s.loss == "listwise" else losses.listwise_kl(odds_t, odds_s)
        student = a[:, None] * z + b[:, None]
        total = student.new_zeros(())
        if s.mse_weight:
            apart = (
                losses.scaled_mse(student, teacher, self.variance)
                if s.match == "mse"
                else losses.contrastive_states(student, teacher)
            )
            total = total + s.mse_weight * apart
        if s.kl_weight:
            total = total + s.kl_weight * self._kl(
                student @ self.frozen.head.T, teacher @ self.frozen.head.T, step, block
            )
        return total

    def _kl(self, student: Tensor, teacher: Tensor, step: int, block: int) -> Tensor:
        if self.setting.kl_samples:
            drawn = self.seeds.generator(Stream.SHUFFLE, block, step)
            return losses.sampled_reverse_kl(student.cpu(), teacher.cpu(), self.setting.kl_samples, drawn).to(
                self.z.device
            )
        return {"reverse": losses.reverse_kl, "forward": losses.forward_kl, "jsd": losses.jensen_shannon}[
            self.setting.kl
        ](student, teacher)

    def _ask(self, step: int, block: int) -> tuple[I64, I64, NDArray[np.bool_], Any]:
        rows = self.examples.queries(self.seeds, step, block, -(-self.setting.batch // self.blocks))
        found, also = self.examples.groups(self.seeds, step, block, rows, self.others, self._own())
        asked = None if self.setting.loss == "infonce" else self.targets.ask(_pairs(rows, found))
        return rows, found, also, asked

    def _own(self) -> I64 | None:
        """(n, top) of the last search, or None where the student is not asked."""
        found: Tensor = self.module.own  # type: ignore[assignment]
        return found.cpu().numpy() if found.numel() else None

    @torch.no_grad()
    def _search(self) -> Tensor:
        """Positions among the known documents (n, top) of each query's best ones, by its own vectors."""
        known = self.z[torch.from_numpy(self.examples.known)]
        top = min(self.setting.top, len(known))
        found = []
        for queries in torch.split(self.frozen.queries, 2048):
            a, _ = self.module(queries)
            found.append((self.frozen.direction * a @ known.T).topk(top).indices)
        return torch.cat(found)

    def _variance(self) -> Tensor:
        """Of the teacher's answer states by coordinate (d,), on a sample of pairs; ones where the setting does not want it."""
        s = self.setting
        self._odds_variance = 1.0
        if s.loss in ("infonce", "listwise", "listwise_reverse") or (s.loss == "jepa" and not s.standardise):
            return torch.ones_like(self.frozen.direction)
        rows = self.examples.spread(SAMPLE)
        found, _ = self.examples.groups(self.seeds, -1, 0, rows, min(7, len(self.examples.known) - 1))
        states = self.targets.take(self.targets.ask(_pairs(rows, found))).to(self.z.device)
        self._odds_variance = float((states @ self.frozen.direction).var(correction=0).clamp_min(1e-9))
        return states.var(0, correction=0).clamp_min(1e-9)

    def learning_rate(self, step: int) -> float:
        return cosine(self.setting.lr, step, self.steps)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), weight_decay=0.01)

    def metrics(self) -> dict[str, float]:
        return {}


def start_predictor(setting: StudentSetting, frozen: Frozen, examples: Examples, seed: int) -> Predictor:
    """A predictor drawn from the seed that knows mean and spread of known queries and documents."""
    drawn = Seeds(seed).generator(Stream.INIT, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=drawn)))
        made = Predictor(frozen.queries.shape[1], setting.combine, setting.additive, setting.layers, setting.hidden)
    made.to(frozen.queries.device)
    if setting.standardise:
        made.standardise("query", frozen.queries)
        made.standardise("document", frozen.documents[torch.from_numpy(examples.known)])
    return made


def _pairs(rows: I64, documents: I64) -> I64:
    """(b * K, 2) of queries (b,) and their documents (b, K)."""
    return np.stack([np.repeat(rows, documents.shape[1]), documents.reshape(-1)], 1)


def _to(part: Part, device: torch.device) -> Part:
    return Part(part.units.to(device), part.length.to(device))
