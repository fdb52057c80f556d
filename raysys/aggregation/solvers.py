"""Iterations on inner products, compiled because simulations run them millions of times.

Shapes: g (m, m) Gram matrix (centred, rows then anchors); distances (n, n) squared; weights (n,).
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def weiszfeld(g, n, share, tolerance, limit):  # type: ignore[no-untyped-def]
    """Weights of the geometric median, argmin_y sum_i share_i |y - x_i|: (n,), and the iterations used.

    First the two likeliest data points are tested for optimality (Vardi & Zhang, PNAS 2000): if the pull of the others does
    not exceed a point's own weight, it is the median, exactly. Otherwise Weiszfeld's iteration from the shares' mean of the
    points within twice the median distance from the medoid, until a step is below tolerance * median distance.
    """
    weights = np.zeros(n)
    distance = np.empty((n, n))
    medoid, central = 0, np.inf
    nearest, least = 0, np.inf
    for i in range(n):
        total = 0.0
        for j in range(n):
            square = g[i, i] + g[j, j] - 2.0 * g[i, j]
            distance[i, j] = 0.0 if i == j or square <= 1e-14 * (g[i, i] + g[j, j]) else np.sqrt(square)
            total += share[j] * distance[i, j]
        middle = np.median(distance[i])
        if middle < central:
            medoid, central = i, middle
        if total < least:
            nearest, least = i, total
    for candidate in (medoid, nearest):
        own = 0.0
        pull = np.zeros(n)
        for j in range(n):
            if distance[candidate, j] == 0.0:
                own += share[j]
            else:
                pull[j] = share[j] / distance[candidate, j]
        norm = 0.0
        for i in range(n):
            for j in range(n):
                inner = g[i, j] - g[i, candidate] - g[candidate, j] + g[candidate, candidate]
                norm += pull[i] * pull[j] * inner
        if norm <= own * own:
            weights[candidate] = 1.0
            return weights, 0
    scale = central if central > 0.0 else least
    for i in range(n):
        if distance[medoid, i] <= 2.0 * scale:
            weights[i] = share[i]
    if weights.sum() == 0.0:
        weights[:] = share
    weights /= weights.sum()
    floor = 1e-15 * scale
    inside = g[:n, :n].copy()
    for step in range(limit):
        shift = inside @ weights
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
        applied = inside @ move
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


@njit(cache=True, nogil=True)
def _advance(subset, n):  # type: ignore[no-untyped-def]
    """The next subset in lexicographic order, in place; False after the last."""
    k = subset.size
    i = k - 1
    while i >= 0 and subset[i] == n - k + i:
        i -= 1
    if i < 0:
        return False
    subset[i] += 1
    for j in range(i + 1, k):
        subset[j] = subset[j - 1] + 1
    return True


@njit(cache=True, nogil=True)
def least_diameter(distances, k):  # type: ignore[no-untyped-def]
    """The first subset of k rows, in lexicographic order, of least diameter; branch and bound. (k,)"""
    n = distances.shape[0]
    best = np.arange(k)
    least = np.inf
    chosen = np.empty(k, np.int64)
    reach = np.zeros(k + 1)  # reach[i]: diameter of the first i chosen
    chosen[0] = -1
    depth = 0
    while depth >= 0:
        chosen[depth] += 1
        if chosen[depth] > n - k + depth:
            depth -= 1
            continue
        top = reach[depth]
        for i in range(depth):
            top = max(top, distances[chosen[i], chosen[depth]])
        if top >= least:
            continue
        if depth == k - 1:
            least = top
            best[:] = chosen
            continue
        reach[depth + 1] = top
        chosen[depth + 1] = chosen[depth]
        depth += 1
    return best


@njit(cache=True, nogil=True)
def least_variance(g, k):  # type: ignore[no-untyped-def]
    """The first subset of k rows, in lexicographic order, whose covariance has the least top eigenvalue. (k,)

    A few power steps bound that eigenvalue from below, which settles most subsets; the rest get an exact eigenvalue.
    """
    n = g.shape[0]
    subset = np.arange(k)
    best = subset.copy()
    least = np.inf
    a = np.empty((k, k))
    mean = np.empty(k)
    while True:
        total = 0.0
        for i in range(k):
            row = 0.0
            for j in range(k):
                a[i, j] = g[subset[i], subset[j]]
                row += a[i, j]
            mean[i] = row / k
            total += row
        total /= k * k
        start = 0
        for i in range(k):
            for j in range(k):
                a[i, j] += total - mean[i] - mean[j]
            if a[i, i] > a[start, start]:
                start = i
        bound = a[start, start]
        v = a[start].copy()
        for _ in range(6):
            if bound > least or bound <= 0.0:
                break
            w = a @ v
            bound = max(bound, np.dot(v, w) / np.dot(v, v))
            v = w / np.sqrt(np.dot(w, w))
        if bound < least:
            top = np.linalg.eigvalsh(a)[-1] if bound > 0.0 else 0.0
            if top < least:
                least = top
                best[:] = subset
        if least <= 0.0 or not _advance(subset, n):
            return best
