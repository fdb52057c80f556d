"""What a model draws, says and sounds, for the report; and a tone as a WAV file in the run's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysys.data.media import pcm, wav
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie import figures
from raysys.systems.ernie.artifact import Bundle
from raysys.systems.ernie.evaluate import batches, captions, pictures, sounds
from raysys.systems.ernie.routing import choices, loads, report, usage
from raysys.systems.ernie.stream import Sample
from raysys.systems.ernie.tasks import Tested, given_of

EXAMPLES = 8


def show(run: Run, bundle: Bundle, items: dict[str, Tested], seen: Sequence[Sample], seed: int) -> None:
    """Figures of images, frames, tones and routing, and a table of captions; the balance is told from `seen` training samples."""
    generator = Seeds(seed).generator(Stream.ATTACK)
    if "t2i" in items:
        chosen = items["t2i"].samples[:EXAMPLES]
        drawn = pictures(bundle, chosen, generator, temperature=0.3, guidance=1.0).numpy()
        labels, shown = [item.text for item in items["t2i"].items[:EXAMPLES]], list(drawn[:, 0])
        rows = [(labels[i : i + 4], shown[i : i + 4]) for i in range(0, len(shown), 4)]
        run.figure("images", figures.pictures(rows, "Drawn from captions"))
    if "t2v" in items:
        chosen = items["t2v"].samples[:4]
        given, shown = given_of(bundle, chosen)
        drawn = pictures(bundle, chosen, generator, temperature=0.0, given=given).numpy()
        rows = list[Any]()
        for item, clip in zip(items["t2v"].items, drawn, strict=False):
            rows.append(([item.text, f"({shown} given)"], list(clip)))
            rows.append((["the real ones"], list(item.frames)))
        run.figure("frames", figures.pictures(rows, "Next frames"))
    if "t2a" in items:
        made = sounds(bundle, items["t2a"].samples[:4], generator, temperature=0.5)
        named = [(item.text, one) for item, one in zip(items["t2a"].items, made, strict=False)]
        run.figure("tones", figures.tones(named, bundle.form.rate, "Sounded from captions"))
        run.storage.write_bytes("figures/tone.wav", wav(pcm(named[0][1]), bundle.form.rate, "generated"))
    lines: list[dict[str, Any]] = []
    for task in ("i2t", "v2t", "a2t"):
        if task in items:
            said = captions(bundle, items[task].samples[:4])
            lines += [
                {"task": task, "true": item.text, "model": text}
                for item, text in zip(items[task].items, said, strict=False)
            ]
    if lines:
        run.grid("What it says (first held-out items)", lines)
    show_routing(run, bundle, items, seen)


def show_routing(run: Run, bundle: Bundle, items: dict[str, Tested], seen: Sequence[Sample]) -> dict[str, Any]:
    """Figures and tables of how experts are shared, and what they say; the balance is that of `seen` training samples."""
    samples = [one for found in items.values() for one in found.samples]
    counts = usage(choices(bundle.model, batches(bundle, samples)), bundle.model.setting.experts)
    told = report(counts, loads(bundle.model, batches(bundle, seen)))
    routing_figures(run, told, {stream: c.tolist() for stream, c in counts.items()})
    return told


def routing_figures(run: Run, told: dict[str, Any], counts: dict[str, Any], name: str = "") -> None:
    """The figures and tables of a routing report."""
    mark, streams = f"-{name}" if name else "", list(counts)
    run.figure(f"entropy{mark}", figures.entropy_lines(told["entropy"]))
    run.figure(f"overlap{mark}", figures.overlap_maps(told["overlap"], streams))
    run.figure(f"usage{mark}", figures.usage_maps({s: np.array(c, dtype=np.float64) for s, c in counts.items()}))
    title = f" ({name})" if name else ""
    run.grid(
        f"Normalised entropy of expert usage{title}",
        [by_layer("stream", *row) for row in told["entropy"].items()]
        + [by_layer("stream", "max violation, training samples", told["violation"]["all"])],
    )
    run.grid(
        f"IoU of the most used quarter of experts{title}; unrelated choices give .14",
        [by_layer("pair", *row) for row in told["overlap"].items()],
    )


def by_layer(column: str, label: str, values: list[float]) -> dict[str, Any]:
    """A line of a table with a value for each layer."""
    return {column: label, **{f"layer {i + 1}": f"{v:.2f}" for i, v in enumerate(values)}}
