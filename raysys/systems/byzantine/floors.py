"""Measured error floors beside the bounds they must meet: plain rows for tables and figures.

Notable choices
- Everything runs on the exact one-dimensional instances, where floors are numbers and not trends. Rules that treat
  coordinates alike take many copies of an instance as columns; the others take one column at a time.
- Row order is shuffled every round. Simulators that list the honest first let ties betray who is honest: on these
  instances a stable sort then beats the lower bound, which is impossible.
- Each world is run on its own and a floor is averaged over both: whatever the algorithm, its expectation is at least
  the lower bound.

Shapes: n workers, c copies (columns), theta (c,). Source: specs/byzantine.md sections 2.3, 2.4 and 3 (T1, T2, T3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import Rule, make_rule
from raysys.systems.byzantine import theory
from raysys.systems.byzantine.lower_bound import (
    NoiseInstance,
    TwoWorlds,
    breakdown_instance,
    lower_bound_instance,
)

F64 = NDArray[np.float64]
Row = dict[str, Any]
RULES = ("trimmed_mean", "median", "geometric_median")


def aggregate_columns(rule: Rule, stack: F64, rng: np.random.Generator | None = None) -> F64:
    """(c,) the rule on each column of (n, c) as a problem of its own, rows in a fresh random order when `rng` is given."""
    if rng is not None:
        stack = rng.permuted(stack, axis=0)
    if not rule.needs_products:
        return rule(torch.from_numpy(stack)).numpy()
    columns = torch.from_numpy(np.ascontiguousarray(stack.T))
    return np.array([float(rule(column[:, None])) for column in columns])


def world_floors(
    rule: Rule,
    instance: TwoWorlds,
    rng: np.random.Generator,
    *,
    copies: int = 1,
    rounds: int | None = None,
    gamma: float | None = None,
    alpha: float = 1.0,
    shuffle: bool = True,
    start: float | None = None,
) -> F64:
    """(2,) ||grad L_H||^2 of a full-gradient run in each world, averaged over its second half and over copies.

    The worlds are run one by one: in world 0 the honest rows are A and C, in world 1 A and C'. Rows are listed honest
    first, as simulators do, and shuffled every round unless `shuffle` is False.

    gamma: 1 / smoothness by default. rounds: twelve times the slowest time constant by default. alpha < 1: local
    momentum, which the Byzantine workers run honestly on their false data. start: theta_0, default the minimiser of
    world 0.
    """
    gamma = 1.0 / instance.smoothness if gamma is None else gamma
    slowest = instance.curvature[instance.curvature > 0].min()
    rounds = max(200, math.ceil(12.0 / (gamma * slowest * alpha))) if rounds is None else rounds
    begin = instance.minimiser if start is None else start
    errors = np.zeros(2)
    for world, honest in enumerate(instance.worlds):
        order = np.argsort(~honest, kind="stable")
        theta = np.full(copies, begin, dtype=np.float64)
        momentum = instance.gradients(theta)[order]
        total, count = 0.0, 0
        for t in range(rounds):
            momentum = (1.0 - alpha) * momentum + alpha * instance.gradients(theta)[order]
            theta = theta - gamma * aggregate_columns(rule, momentum, rng if shuffle else None)
            if 2 * t >= rounds:
                total += float((instance.honest_gradient(theta)[world] ** 2).mean())
                count += 1
        errors[world] = total / count
    return errors


def floors_table(
    ns: Iterable[int] = (20,),
    Bs: Iterable[float] = (0.0, 0.5, 1.0, 1.5),
    rules: Sequence[str] = RULES,
    fs: Iterable[int] | None = None,
    G: float = 1.0,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """T1: floors on the lower-bound instance for every f up to breakdown (or f in `fs`), and beyond it.

    Rows: n, f, f_over_n, G, B, z, rule, kappa, breakdown, lower_bound, upper_bound, measured, world_0, world_1. At and
    beyond breakdown the instance has G = 0 and three sizes z: the floor grows with z^2, which is to say without end.
    """
    rows: list[Row] = []
    rng = np.random.default_rng(seed)
    chosen = None if fs is None else tuple(fs)
    for n in ns:
        for B in Bs:
            note(f"floors n={n} B={B}")
            for f in chosen or range(1, (n + 1) // 2):
                if 2 * f >= n:
                    continue
                below = math.isfinite(theory.lower_bound(n, f, G, B))
                instances = (
                    [(math.nan, lower_bound_instance(n, f, G, B))]
                    if below
                    else [(z, breakdown_instance(n, f, B, z)) for z in (1.0, 10.0, 100.0)]
                )
                for z, instance in instances:
                    for name in rules:
                        rows.append(_floor_row(name, instance, z, rng))
    return rows


def _floor_row(name: str, instance: TwoWorlds, z: float, rng: np.random.Generator) -> Row:
    n, f, G, B = instance.n, instance.f, instance.G, instance.B
    rule = make_rule(name, n, f)
    kappa = rule.kappa(n, f)
    value = math.nan if kappa is None else kappa.value
    below = math.isnan(z)
    worlds = world_floors(rule, instance, rng, copies=1) if below else world_floors(rule, instance, rng, start=0.0)
    return {
        "n": n, "f": f, "f_over_n": f / n, "G": G, "B": B, "z": z, "rule": name, "kappa": value,
        "breakdown": theory.breakdown(B),
        "lower_bound": theory.lower_bound(n, f, G, B) if below else math.inf,
        "upper_bound": theory.floor_without_momentum(value, G, B) if below else math.inf,
        "floor": instance.floor, "measured": float(worlds.mean()),
        "world_0": float(worlds[0]), "world_1": float(worlds[1]),
    }  # fmt: skip


def noise_table(
    n: int = 20,
    fs: Iterable[int] = (2, 4, 6, 8),
    sigma: float = 1.0,
    rules: Sequence[str] = RULES,
    seed: int = 0,
    rounds: int = 400,
) -> list[Row]:
    """T2: floors on the noise instance without momentum. Rows: n, f, sigma, rule, floor (exact), measured."""
    rows: list[Row] = []
    rng = np.random.default_rng(seed)
    for f in fs:
        instance = NoiseInstance(n, f, sigma)
        for name in rules:
            rule, theta, total = make_rule(name, n, f), np.zeros(1), 0.0
            for t in range(rounds):
                stack = np.concatenate([instance.honest_gradients(theta, rng), instance.byzantine(theta)])
                theta = theta - 0.1 * aggregate_columns(rule, stack, rng)
                total += float((theta**2).mean()) if 2 * t >= rounds else 0.0
            measured = total / (rounds - rounds // 2)
            rows.append({"n": n, "f": f, "sigma": sigma, "rule": name, "floor": instance.floor, "measured": measured})
    return rows


def momentum_table(
    n: int = 20,
    f: int = 6,
    sigma: float = 1.0,
    alphas: Sequence[float] = (1.0, 0.5, 0.2, 0.1, 0.05),
    rules: Sequence[str] = ("trimmed_mean", "nnm+trimmed_mean"),
    gamma: float = 0.002,
    rounds: int = 2500,
    copies: int = 8,
    seed: int = 0,
) -> list[Row]:
    """T3: what local momentum leaves of the noise floor, and that it leaves the heterogeneity floor alone.

    The Byzantine workers copy the smallest honest momentum on the noise instance. Rows with part = "noise": n, f,
    alpha, rule, kappa, bound = kappa sigma^2 alpha / (2 - alpha) with kappa = f/(n - 2f), measured, measured_low,
    measured_high (95% over copies where a rule runs several). Rows with part = "heterogeneity": the lower-bound
    instance with G = 1, B = 0, bound its exact floor.
    """
    rows: list[Row] = []
    rng = np.random.default_rng(seed)
    kappa = theory.kappa_limit(n, f)
    for name in rules:
        rule = make_rule(name, n, f)
        repeats = 1 if rule.needs_products else copies
        floors = _noise_floors(rule, NoiseInstance(n, f, sigma), np.repeat(alphas, repeats), gamma, rounds, rng)
        for alpha, values in zip(alphas, floors.reshape(len(alphas), repeats), strict=True):
            half = 2.0 * float(values.std(ddof=1)) / math.sqrt(repeats) if repeats > 1 else 0.0
            mean = float(values.mean())
            bound = kappa * sigma**2 * theory.momentum_factor(alpha)
            rows.append(_momentum_row("noise", n, f, alpha, name, kappa, bound, mean, half))
        instance = lower_bound_instance(n, f, 1.0, 0.0)
        for alpha in alphas if not rule.needs_products else ():
            worlds = world_floors(rule, instance, rng, alpha=alpha)
            rows.append(
                _momentum_row("heterogeneity", n, f, alpha, name, kappa, instance.floor, float(worlds.mean()), 0.0)
            )
    return rows


def _momentum_row(
    part: str, n: int, f: int, alpha: float, rule: str, kappa: float, bound: float, measured: float, half: float
) -> Row:
    return {
        "part": part, "n": n, "f": f, "alpha": alpha, "rule": rule, "kappa": kappa, "bound": bound,
        "measured": measured, "measured_low": measured - half, "measured_high": measured + half,
    }  # fmt: skip


def _noise_floors(
    rule: Rule, instance: NoiseInstance, alphas: F64, gamma: float, rounds: int, rng: np.random.Generator
) -> F64:
    """(c,) theta^2 averaged over the second half of a momentum run, one alpha per column."""
    theta = np.sqrt(0.7 * instance.floor * alphas / (2.0 - alphas))  # near the floor: the transient is not the subject
    momentum = instance.honest_gradients(theta, rng)
    total = np.zeros_like(theta)
    for t in range(rounds):
        momentum = (1.0 - alphas) * momentum + alphas * instance.honest_gradients(theta, rng)
        smallest = momentum.min(0)
        stack = np.concatenate([momentum, np.broadcast_to(smallest, (instance.f, len(theta)))])
        theta = theta - gamma * aggregate_columns(rule, stack, rng)
        if 2 * t >= rounds:
            total += theta**2
    return total / (rounds - rounds // 2)


def misspecified_table(
    n: int = 20, f: int = 2, f_hats: Iterable[int] | None = None, seed: int = 0, rounds: int = 300
) -> list[Row]:
    """The price of a wrong f: trimmed mean set to f_hat on the worst instance for it, with G = 1.

    Honest: f_hat workers at theta - z, the rest at theta; Byzantine: `size` above everyone. Rows: n, f, f_hat, size,
    floor = f_hat / (n - f - f_hat) (inf for f_hat < f, where the measured one grows with size^2), measured.
    """
    rows: list[Row] = []
    h = n - f
    for f_hat in range(max(f - 1, 0), (n + 1) // 2) if f_hats is None else f_hats:
        rule = make_rule("trimmed_mean", n, f_hat)
        group = max(f_hat, 1)
        z = h / math.sqrt(group * (h - group))
        for size in (10.0,) if f_hat >= f else (10.0, 100.0, 1000.0):
            theta, total = np.zeros(1), 0.0
            rng = np.random.default_rng(seed)
            for t in range(rounds):
                honest = np.repeat([[0.0], [-z]], [h - group, group], axis=0) + theta
                stack = np.concatenate([honest, np.full((f, 1), honest.max() + size)])
                theta = theta - 0.1 * aggregate_columns(rule, stack, rng)
                gradient = theta - group / h * z
                total += float((gradient**2).mean()) if 2 * t >= rounds else 0.0
            rows.append(
                {
                    "n": n,
                    "f": f,
                    "f_hat": f_hat,
                    "size": size,
                    "floor": theory.misspecified_kappa(n, f, f_hat),
                    "measured": total / (rounds - rounds // 2),
                }
            )
    return rows
