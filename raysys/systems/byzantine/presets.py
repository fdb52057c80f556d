"""Settings worth a name: functions that return the values which differ from the defaults."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def near_iid() -> Values:
    """Digits divided almost evenly, every attack tried against the rule: where robust rules should cost nothing."""
    return {"partition": "dirichlet(10)", "attack": "best_response", "rule": "nnm+trimmed_mean"}


def skewed() -> Values:
    """Digits with most classes at few workers: heterogeneity sets the floor, and clipping before mixing helps most."""
    return {"partition": "dirichlet(0.3)", "attack": "best_response", "rule": "arc+nnm+geometric_median"}


def nonconvex() -> Values:
    """A small convolutional network on digits."""
    return {"problem": "cnn", "hidden": 8, "lr": 0.3, "batch": 32, "rounds": 300}


def worst_case() -> Values:
    """Quadratics with planted G = 1 and B = 0.5 and noise: the theory's own ground."""
    values: Values = {"problem": "quadratic", "dissimilarity_b": 0.5, "sigma": 1.0, "lr": 0.05, "rounds": 400}
    return values | {"rule": "trimmed_mean", "attack": "alie(z=1.5)"}


def peers() -> Values:
    """No server: two cliques joined by matchings, one Byzantine peer, clipping gossip."""
    return {"topology": "two_cliques(matchings=3)", "byzantine": 1, "attack": "spectral", "lr": 0.2}


PRESETS = {f.__name__: f for f in (near_iid, skewed, nonconvex, worst_case, peers)}
