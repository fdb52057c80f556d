"""Dense references: each rule written from its definition on the vectors themselves, in float64, never through inner products."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest


def distances(x):
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))


def mean(x, f):
    return x.mean(0)


def median(x, f):
    return np.median(x, axis=0)


def trimmed_mean(x, f):
    return np.sort(x, axis=0)[f : len(x) - f].mean(0)


def nearest_per_column(x, centre, keep):
    order = np.argsort(np.abs(x - centre), axis=0, kind="stable")[:keep]
    return np.take_along_axis(x, order, axis=0).mean(0)


def meamed(x, f):
    return nearest_per_column(x, np.median(x, axis=0), len(x) - f)


def phocas(x, f):
    return nearest_per_column(x, trimmed_mean(x, f), len(x) - f)


def geometric_median(x, f, weights=None):
    w = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    z = np.average(x, axis=0, weights=w)
    for _ in range(20_000):
        r = np.maximum(np.linalg.norm(x - z, axis=1), 1e-13)
        new = (w / r) @ x / (w / r).sum()
        if np.linalg.norm(new - z) < 1e-14 * (1 + np.linalg.norm(z)):
            break
        z = new
    return z


def krum_order(x, f, q=None):
    q = len(x) - f - 1 if q is None else q
    return np.argsort([np.sort(row**2)[1 : q + 1].sum() for row in distances(x)], kind="stable")


def krum(x, f):
    return x[krum_order(x, f)[0]]


def multi_krum(x, f):
    return x[krum_order(x, f)[: len(x) - f]].mean(0)


def bulyan(x, f):
    left, chosen = list(range(len(x))), []
    while len(chosen) < len(x) - 2 * f:
        i = krum_order(x[left], f)[0]
        chosen.append(left.pop(i))
    rows = x[chosen]
    return nearest_per_column(rows, np.median(rows, axis=0), len(rows) - 2 * f)


def mda(x, f):
    best = min(combinations(range(len(x)), len(x) - f), key=lambda s: distances(x[list(s)]).max())
    return x[list(best)].mean(0)


def smea(x, f):
    best = min(
        combinations(range(len(x)), len(x) - f), key=lambda s: np.linalg.norm(x[list(s)] - x[list(s)].mean(0), 2)
    )
    return x[list(best)].mean(0)


def caf(x, f):
    c, best, least = np.ones(len(x)), None, np.inf
    while c.sum() > len(x) - 2 * f:
        mu = np.average(x, axis=0, weights=c)
        _, s, v = np.linalg.svd(np.sqrt(c / c.sum())[:, None] * (x - mu), full_matrices=False)
        if s[0] < least:
            best, least = mu, s[0]
        tau = np.where(c > 0, ((x - mu) @ v[0]) ** 2, 0)
        c = c * (1 - tau / tau.max())
    return best


def centered_clipping(x, f, radius=None, iterations=1, start=None):
    v = np.zeros(x.shape[1]) if start is None else start
    for _ in range(iterations):
        r = np.linalg.norm(x - v, axis=1)
        tau = np.median(r) if radius is None else radius
        v = v + ((x - v) * np.minimum(1, tau / np.maximum(r, 1e-300))[:, None]).mean(0)
    return v


def cge(x, f):
    return x[np.argsort(np.linalg.norm(x, axis=1), kind="stable")[: len(x) - f]].mean(0)


def monna(x, f):
    return x[np.argsort(np.linalg.norm(x - x[0], axis=1), kind="stable")[: len(x) - f]].mean(0)


def dnc(x, f):
    y = x - x.mean(0)
    scores = (y @ np.linalg.svd(y, full_matrices=False)[2][0]) ** 2
    return x[np.argsort(scores, kind="stable")[: len(x) - f]].mean(0)


def ctma(x, f, inner=geometric_median):
    return x[np.argsort(np.linalg.norm(x - inner(x, f), axis=1), kind="stable")[: len(x) - f]].mean(0)


def nnm(x, f):
    return np.stack([x[np.argsort(row, kind="stable")[: len(x) - f]].mean(0) for row in distances(x)])


def clipping(x, f, radius=1.0):
    return x * np.minimum(1, radius / np.linalg.norm(x, axis=1))[:, None]


def arc(x, f):
    k = int(2 * f / len(x) * (len(x) - f) + 1e-9)
    return clipping(x, f, np.sort(np.linalg.norm(x, axis=1))[len(x) - 1 - k])


RULES = {
    r.__name__: r
    for r in (
        mean, median, trimmed_mean, meamed, phocas, geometric_median, krum, multi_krum, bulyan, mda, smea, caf,
        centered_clipping, cge, monna, dnc, ctma,
    )
}  # fmt: skip
BEFORE = {p.__name__: p for p in (nnm, clipping, arc)}


def evaluate(spec, x, f):
    """A chain of the names above on x (n, d)."""
    *before, last = spec.split("+")
    for name in before:
        x = BEFORE[name](x, f)
    return RULES[last](x, f)


@pytest.fixture(scope="session")
def dense():
    return SimpleNamespace(evaluate=evaluate, **RULES, **BEFORE)
