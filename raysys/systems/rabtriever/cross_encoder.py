"""A cross-encoder trained on labels: query and document read together, the costliest and classic way to rank.

Shapes: n test queries, m documents, k documents of a shortlist, b queries of a batch.

Notable choices
- The body reads the pair as its tokenizer joins it (query, separator, document); a linear head on the mean of the last states is
  the score, and the loss is -log softmax of the right document among itself and `negatives` others (RankLLaMA's listwise loss,
  spec section 4): half are among the nearest by the frozen encoder, half are random. Only the top layers are trained; the
  layers below run once per pair, as nothing of a pair can be cached.
- Every pair is a pass of the whole body: about 20 ms of one core for 25 tokens, so all of 192 documents take 4 s a query. So it
  ranks a shortlist, as cross-encoders are used: what is not on it gets -inf, which `measure` takes as not retrieved.
- At the default budget (23 to 29 seconds of one core, scoring of 1,000 pairs included) it has NOT converged. 100 test queries,
  seed 0, ten documents listed: recall@1 .42 on facts (the list's own first .85), .04 on the rationale task (.79; chance .10),
  whose training loss hardly moved. So it is no upper reference here; more steps were not tried.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysys.data.retrieval import Retrieval
from raysys.nn.body import pool
from raysys.nn.encoder import TextEncoder
from raysys.nn.pretrained import Base
from raysys.nn.upper import Upper
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.rabtriever.baselines import SCALE, batches, train, training_pairs

F32 = NDArray[np.float32]
NEAR = 16
MOST_PAIRS = 256 * 200
"""Pairs scored without a shortlist; more would take a quarter of an hour and longer."""


def cross_encoder(
    data: Retrieval, base: Base, shortlist: NDArray[np.int64] | None = None, seed: int = 0, steps: int = 30, layers: int = 1,
    batch: int = 8, negatives: int = 7, lr: float = 1e-3, max_length: int = 128, losses: list[float] | None = None,
) -> F32:  # fmt: skip
    """(n, m) scores of pairs, -inf off the shortlist.

    Args:
        shortlist: (n, k) the documents that are scored for each test query, say the best of `bi_encoder`; None for all m.
        layers: how many of the top layers are trained.
        batch, negatives: queries of a step, and known documents beside the right one of each.
        losses: the loss of each step is appended to it.

    Raises:
        ValueError: without a shortlist there would be more than MOST_PAIRS pairs; the shortlist has another number of rows.
    """
    n, m = len(data.test), len(data.documents)
    if shortlist is None and n * m > MOST_PAIRS:
        raise ValueError(
            f"shortlist: got none for {n} x {m} pairs; above {MOST_PAIRS} pairs a shortlist (n, k) is needed"
        )
    if shortlist is not None and (shortlist.ndim != 2 or len(shortlist) != n):
        raise ValueError(f"shortlist: got shape {shortlist.shape}; expected ({n}, k)")
    upper = Upper(base, layers, max_length)
    head = nn.Linear(upper.width, 1)
    with torch.no_grad():
        head.weight.zero_()  # all documents are alike at first, whatever the size of the states
        head.bias.zero_()
    drawn = list(batches(training_pairs(data), batch, steps, seed))
    rng = Seeds(seed).rng(Stream.PARTICIPATION)
    near = _nearest(data, base, max_length, drawn)

    def score(asked: list[str], documents: list[str]) -> Tensor:
        hidden, mask = upper(upper.lower(asked, documents))
        return head(SCALE * nn.functional.normalize(pool(hidden, mask, upper.causal), dim=1))[:, 0]

    def loss_of(step: int) -> Tensor:
        asked, documents = [], []
        wrong = [np.setdiff1d(data.known, data.train.relevant[q]) for q, _ in drawn[step]]
        count = min(negatives, *map(len, wrong))
        for (q, right), others in zip(drawn[step].tolist(), wrong, strict=True):
            hard = rng.permutation(np.setdiff1d(near[q], data.train.relevant[q]))[: count // 2]
            easy = rng.choice(np.setdiff1d(others, hard), count - len(hard), replace=False)
            asked += [data.train.texts[q]] * (1 + count)
            documents += [data.documents[i] for i in (right, *hard, *easy)]
        scores = score(asked, documents).view(len(drawn[step]), -1)
        return nn.functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    train([upper, head], steps, lr, loss_of, losses)
    out = np.full((n, m), -np.inf, np.float32)
    with torch.no_grad():
        for q, text in enumerate(data.test.texts):
            listed = np.arange(m) if shortlist is None else np.unique(shortlist[q])
            out[q, listed] = score([text] * len(listed), [data.documents[i] for i in listed]).numpy()
    return out


def _nearest(
    data: Retrieval, base: Base, max_length: int, drawn: list[NDArray[np.int64]]
) -> dict[int, NDArray[np.int64]]:
    """The NEAR known documents nearest to each training query that is drawn, by the frozen encoder's cosine."""
    encoder, used = TextEncoder(base, max_length), np.unique(np.concatenate(drawn)[:, 0])
    pool_of = encoder.encode([data.documents[i] for i in data.known])
    cosine = encoder.encode([data.train.texts[q] for q in used]) @ pool_of.T
    best = cosine.topk(min(NEAR, len(data.known)), dim=1).indices.numpy()
    return {int(q): data.known[row] for q, row in zip(used, best, strict=True)}
