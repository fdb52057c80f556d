"""Controls that share the teacher's frozen states but fit no inner-product index, or no unseen document.

Shapes: n queries, m documents, m_k of them known, d hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.rabtriever import losses
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.learners import Frozen
from raysys.systems.rabtriever.predictor import HyperPredictor
from raysys.systems.rabtriever.setting import StudentSetting, cosine

F32 = NDArray[np.float32]
QUERIES, DOCUMENTS = 64, 1024
"""Pairs that the hyper-encoder scores at a time: a product of 64 x 1024 x (d + 16) numbers, however many documents there are."""


def classifier(train: Tensor, examples: Examples, test: Tensor, documents: int) -> F32:
    """Multinomial logistic regression on query vectors (n, e): the reference for small closed pools.

    A query with several right documents is an example of each. A document that is right for no training query is a class that
    it does not know: -inf; where all queries have the same right document, that one has probability 1.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.repeat(np.arange(len(examples)), [len(row) for row in examples.positives])
    label = np.concatenate(examples.positives)
    scores = np.full((len(test), documents), -np.inf, dtype=np.float32)
    if (label == label[0]).all():
        scores[:, label[0]] = 0.0
        return scores
    fitted = LogisticRegression(C=10.0, max_iter=300).fit(train.numpy()[rows], label)
    scores[:, fitted.classes_] = fitted.predict_log_proba(test.numpy())
    return scores


def hyper_encoder(setting: StudentSetting, frozen: Frozen, examples: Examples, test: Tensor, seed: int) -> F32:
    """A network made by the query scores the document (see HyperPredictor), trained on labels like the adapter with InfoNCE.

    test: (n, d) query states. Returns scores (n, m).
    """
    seeds = Seeds(seed)
    mean, std = frozen.queries.mean(0), frozen.queries.std(0).clamp_min(1e-6)
    known = frozen.documents[torch.from_numpy(examples.known)]
    z = (frozen.documents - known.mean(0)) / known.std(0).clamp_min(1e-6)
    drawn = seeds.generator(Stream.INIT, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=drawn)))
        model = HyperPredictor(z.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    asked = (frozen.queries - mean) / std
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(setting.lr, step, setting.steps)
        rows = examples.queries(seeds, step, 0, setting.batch)
        found, also = examples.groups(seeds, step, 0, rows, setting.group - 1)
        scores = model(asked[torch.from_numpy(rows)], z[torch.from_numpy(found)])
        optimizer.zero_grad()
        torch.autograd.backward(losses.info_nce(scores, torch.from_numpy(also)))
        optimizer.step()
    with torch.inference_mode():
        scored = [
            torch.cat([model(one, part.expand(len(one), -1, -1)) for part in torch.split(z, DOCUMENTS)], 1)
            for one in torch.split((test - mean) / std, QUERIES)
        ]
        return torch.cat(scored).numpy()
