"""A judge of spoken digits, and what a codec leaves of what a judge tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raysys.data.multimodal import Item
from raysys.systems.ernie.judges import F32, Facts, Judge


def agreement(told: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """For each fact of the truth, the share of items in which the judged one is the same; a missing one counts as wrong."""
    if len(told) != len(truth) or not truth:
        raise ValueError(f"got {len(told)} judgements of {len(truth)} items; expected as many, and at least one")
    names = sorted({name for facts in truth for name in facts})
    return {
        name: float(
            np.mean([t.get(name) == facts[name] for t, facts in zip(told, truth, strict=True) if name in facts])
        )
        for name in names
    }


class SpokenJudge:
    """Which digit is spoken: a support vector machine on the pooled log-spectrum of training recordings."""

    def __init__(self, items: Sequence[Item]) -> None:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        found = [(item.wave, item.facts["digit"]) for item in items if item.wave is not None and "digit" in item.facts]
        if len({digit for _, digit in found}) < 2:
            raise ValueError("a judge of spoken digits needs training sounds of two or more digits")
        self._model = make_pipeline(StandardScaler(), SVC(C=10.0))
        self._model.fit(self._look(np.stack([wave for wave, _ in found])), [digit for _, digit in found])

    def __call__(self, waves: F32) -> list[Facts]:
        """Fact digit."""
        return [{"digit": str(digit)} for digit in self._model.predict(self._look(waves))] if len(waves) else []

    @staticmethod
    def _look(waves: F32, times: int = 12, bands: int = 20) -> NDArray[np.float64]:
        """The log-spectrum from where the sound begins to where it ends, pooled to a grid, its loudness taken out."""
        made = []
        for wave in waves:
            loud = np.abs(wave) > 0.1 * max(1e-6, float(np.abs(wave).max()))
            first, last = int(loud.argmax()), len(wave) - int(loud[::-1].argmax())
            part = wave[first : max(last, first + 512)]
            part = np.pad(part, (0, max(0, 512 - len(part))))
            starts = np.linspace(0, len(part) - 256, times).astype(int)
            frames = np.stack([part[s : s + 256] for s in starts])
            power = np.abs(np.fft.rfft(frames * np.hanning(256)))[:, 1:]
            edges = np.unique(np.round(128 * np.linspace(0, 1, bands + 1) ** 1.5).astype(int))
            grid = np.add.reduceat(power, edges[:-1], 1) / np.diff(edges)
            grid = np.log(0.03 * max(1e-6, float(grid.max())) + grid)  # what lies 30 dB below the loudest is silence
            made.append((grid - grid.mean()).ravel())
        return np.stack(made)


def ceiling(
    judge: Judge, original: F32, rebuilt: F32, truth: Sequence[Mapping[str, str]]
) -> dict[str, tuple[float, float]]:
    """For each fact that the judge tells, its agreement with the truth on originals and on rebuilt ones."""
    first, second = judge(original), judge(rebuilt)
    known = {name for facts in first for name in facts}
    truth = [{name: value for name, value in facts.items() if name in known} for facts in truth]
    a, b = agreement(first, truth), agreement(second, truth)
    return {name: (a[name], b[name]) for name in a}
