"""Figures of the ERNIE system: generated images, frames and tones, routing maps, and the ladder of sub-models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.report import COLOURS, LINES, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F32 = NDArray[np.float32]


def _blank(width: float, height: float) -> Figure:
    """A figure of that many inches, without axes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def pictures(rows: Sequence[tuple[Sequence[str], Sequence[F32]]], title: str) -> Figure:
    """Rows of images (C, H, W) in [0, 1], the first ones with labels above."""
    wide = max(len(images) for _, images in rows)
    figure = _blank(0.4 + 1.3 * wide, 0.5 + 1.35 * len(rows))
    axes = figure.subplots(len(rows), wide, squeeze=False)
    for line, (labels, images) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, label, image in zip(line, [*labels, *[""] * len(images)], images, strict=False):
            shown = np.clip(image, 0, 1).transpose(1, 2, 0)
            ax.imshow(
                shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            ax.set_title(fill(label, 18), fontsize=6)
    figure.suptitle(title, fontsize=9)
    return figure


def tones(rows: Sequence[tuple[str, F32]], rate: int, title: str) -> Figure:
    """Spectrograms of waves (n,)."""
    figure = _blank(1.0 + 1.9 * len(rows), 2.4)
    for ax, (label, wave) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        if len(wave) >= 128:
            ax.specgram(wave, NFFT=128, noverlap=96, Fs=rate, cmap="gray_r", vmin=-120)
        ax.set_title(label, fontsize=7)
        ax.set_xlabel("s", fontsize=7)
        ax.tick_params(labelsize=6)
    figure.suptitle(f"{title} (Hz over seconds)", fontsize=9)
    return figure


def entropy_lines(entropy: Mapping[str, Sequence[float]]) -> Figure:
    """Normalised entropy of expert usage by layer, one line per stream (the paper's figure 10)."""
    figure, ax = new_figure(width=6.4, height=3.6)
    for i, (name, values) in enumerate(entropy.items()):
        ax.plot(
            range(1, len(values) + 1), values, label=name, color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
        )  # fmt: skip
    ax.set_xlabel("layer")
    ax.set_ylabel("normalised entropy (1: all experts alike)")
    ax.set_title("How evenly each task uses the experts")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overlap_maps(overlap: Mapping[str, Sequence[float]], names: Sequence[str]) -> Figure:
    """IoU of the most used quarter of experts between streams, at the first, middle and last layer (the paper's figure 9)."""
    layers = len(next(iter(overlap.values())))
    shown = sorted({0, layers // 2, layers - 1})
    figure = _blank(1.6 + 2.6 * len(shown), 3.4)
    for ax, layer in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        found = np.eye(len(names))
        for i, a in enumerate(names):
            for j, b in enumerate(names[:i]):
                found[i, j] = found[j, i] = overlap[f"{b} | {a}"][layer]
        ax.imshow(found, cmap="gray_r", vmin=0, vmax=1)
        for i in range(len(names)):
            for j in range(len(names)):
                ax.text(
                    j,
                    i,
                    f"{found[i, j]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=5.5,
                    color="white" if found[i, j] > 0.5 else "black",
                )
        ax.set_title(f"layer {layer + 1}", fontsize=8)
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6)
        ax.set_yticks(range(len(names)), names if layer == shown[0] else [""] * len(names), fontsize=6)
    figure.suptitle("Experts that two tasks share (IoU of the most used quarter)", fontsize=9)
    return figure


def usage_maps(counts: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Assignments to each expert (across) in each layer (down) as a share of a stream's own, experts in the order of the sum."""
    names = list(counts)
    figure = _blank(7.0, 0.6 + 0.7 * len(names))
    order = np.argsort(-np.sum([c / c.sum(1, keepdims=True) for c in counts.values()], 0), 1)
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        share = np.take_along_axis(counts[name] / counts[name].sum(1, keepdims=True), order, 1)
        ax.imshow(share * share.shape[1], cmap="gray_r", vmin=0, vmax=4, aspect="auto", interpolation="nearest")
        ax.set_ylabel(name.replace(" ", "\n"), fontsize=6, rotation=0, ha="right", va="center")
        ax.set_yticks([])
        ax.set_xticks([])
    figure.suptitle(
        "Use of experts (across) by layer (down): white none, black four times the mean or more", fontsize=9
    )
    return figure


def ladder(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean relative loss over tasks of sub-models against their FLOPs; `rows` have label, flops, and ways: name -> loss ratio."""
    figure, ax = new_figure(width=6.4, height=3.8)
    for i, way in enumerate(dict.fromkeys(way for row in rows for way in row["ways"])):
        points = [(row["flops"], row["ways"][way]) for row in rows if way in row["ways"]]
        ax.scatter(
            *zip(*points, strict=True), label=way, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)]
        )
    for row in rows:
        ax.annotate(
            row["label"],
            (row["flops"], min(row["ways"].values())),
            fontsize=6,
            xytext=(3, -8),
            textcoords="offset points",
        )
    ax.set_xlabel("FLOPs of the layers, relative to the whole model")
    ax.set_ylabel("held-out loss, relative to the whole non-elastic model")
    ax.set_title("Sub-models: views of one run, trained alone, pruned")
    ax.legend(fontsize=7)
    return figure
