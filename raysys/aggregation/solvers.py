"""Iterations on inner products, compiled because simulations run them millions of times.

Shapes: g (m, m) Gram matrix (centred, rows then anchors); distances (n, n) squared; weights (n,).
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def weiszfeld(g, n, share, tolerance, limit):  # type: ignore[no-untyped-def]
    """Weights of the geometric median, argmin_y sum_i share_i |y - x_i|: (n,), and the iterations used.

    First the best data point is tested for optimality (Vardi & Zhang, PNAS 2000): if the pull of the others does not exceed
    its own weight it is the median, exactly. Otherwise Weiszfeld's iteration from the shares' mean of the points no
    farther than twice the median distance from that point, until a step is below tolerance * median distance.
    """
    weights = np.zeros(n)
    distance = np.empty((n, n))
    best, least = 0, np.inf
    for i in range(n):
        total = 0.0
        for j in range(n):
            distance[i, j] = 0.0 if i == j else np.sqrt(max(g[i, i] + g[j, j] - 2.0 * g[i, j], 0.0))
            total += share[j] * distance[i, j]
        if total < least:
            best, least = i, total
    near = distance[best]
    own = 0.0
    pull = np.zeros(n)
    for j in range(n):
        if near[j] <= 1e-12 * least:
            own += share[j]
        else:
            pull[j] = share[j] / near[j]
    norm = 0.0
    for i in range(n):
        for j in range(n):
            norm += pull[i] * pull[j] * (g[i, j] - g[i, best] - g[best, j] + g[best, best])
    if norm <= own * own or least == 0.0:
        weights[best] = 1.0
        return weights, 0
    scale = np.median(near)
    kept = 0.0
    for i in range(n):
        if near[i] <= 2.0 * scale and share[i] > 0:
            weights[i] = share[i]
            kept += share[i]
    weights /= kept
    if kept == share[best]:
        weights[:] = share
    floor = 1e-15 * scale
    for step in range(limit):
        shift = g[:n, :n] @ weights
        inner = 0.0
        for i in range(n):
            inner += weights[i] * shift[i]
        total = 0.0
        new = np.empty(n)
        for i in range(n):
            new[i] = share[i] / max(np.sqrt(max(g[i, i] - 2.0 * shift[i] + inner, 0.0)), floor)
            total += new[i]
        new /= total
        move = new - weights
        gap = 0.0
        applied = g[:n, :n] @ move
        for i in range(n):
            gap += move[i] * applied[i]
        weights = new
        if gap <= (tolerance * scale) ** 2:
            return weights, step + 1
    return weights, limit


@njit(cache=True, nogil=True)
def covariance_filter(g, n, f):  # type: ignore[no-untyped-def]
    """CAF (Allouah et al. 2025; spec 2.5): weights (n,) of the remembered mean with the least top eigenvalue.

    Each pass zeroes one active row at least, so n passes are never exceeded (2f by the mass argument).
    """
    c = np.ones(n)
    best = c / n
    least = np.inf
    for _ in range(n):
        total = c.sum()
        if total <= n - 2 * f:
            break
        p = c / total
        active = np.flatnonzero(c > 0.0)
        a = active.size
        shift = np.zeros(a)
        inner = 0.0
        for s in range(a):
            for t in range(a):
                shift[s] += g[active[s], active[t]] * p[active[t]]
            inner += p[active[s]] * shift[s]
        k = np.empty((a, a))
        for s in range(a):
            for t in range(a):
                k[s, t] = (g[active[s], active[t]] - shift[s] - shift[t] + inner) * np.sqrt(p[active[s]] * p[active[t]])
        top = 0.0
        for s in range(a):
            top = max(top, k[s, s])
        if top <= 0.0:
            return p
        values, vectors = np.linalg.eigh(k)
        if values[-1] < least:
            least = values[-1]
            best = p
        if values[-1] <= 0.0:
            return p
        # <v, x_i - mean> is proportional to u_i / sqrt(p_i) for the eigenvector u of the scaled matrix.
        largest = 0.0
        score = np.empty(a)
        for s in range(a):
            score[s] = vectors[s, -1] ** 2 / p[active[s]]
            largest = max(largest, score[s])
        for s in range(a):
            keep = 1.0 - score[s] / largest
            c[active[s]] = 0.0 if score[s] == largest else c[active[s]] * keep
    return best
