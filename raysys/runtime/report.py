"""What a run found, for people: a self-contained HTML page, tables on the console, figures in one style.

Notable choices
- The page opens offline in any browser and prints well: figures are embedded, there is no script.
- The table of intervals is the record; a grid (rules against attacks, say) is the same numbers as a job chooses to show.
- Figures are readable in grey: line styles and markers differ with the colours.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from rich.console import Console
from rich.table import Table

from raysys.runtime.config import Config
from raysys.runtime.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = ("metric", "mean", "ci_low", "ci_high", "n")
CONSOLE_ROWS = 40
FIGURE_STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 4.0), "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.6, "errorbar.capsize": 3,
    "image.cmap": "viridis",
}  # fmt: skip
COLOURS = ("#0b3c5d", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6a4f", "#5c5c5c")
DASHES = ("-", "--", "-.", ":")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
"""One line style per colour, for figures that must tell all series apart in grey."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    """A matplotlib figure (inches) and its axes, in the project's style from here on; needs no display, is not in pyplot."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams.update({**FIGURE_STYLE, "axes.prop_cycle": _cycle()})
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _cycle() -> Any:
    from cycler import cycler

    dashes = [DASHES[i % len(DASHES)] for i in range(len(COLOURS))]
    return cycler(color=COLOURS) + cycler(linestyle=dashes) + cycler(marker=MARKERS)


def heat_map(
    values: Any, rows: list[str], columns: list[str], *, title: str, unit: str, digits: int = 2, low: float | None = None,
    high: float | None = None,
) -> Figure:  # fmt: skip
    """Figure of a (rows, columns) array with the number written in each cell; an absent value (NaN) is left blank."""
    import numpy as np

    numbers = np.asarray(values, dtype=float)
    figure, axes = new_figure(width=2.2 + 0.72 * len(columns), height=1.4 + 0.36 * len(rows))
    image = axes.imshow(numbers, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    bottom, top = image.get_clim()
    for i, j in np.argwhere(np.isfinite(numbers)):
        dark = numbers[i, j] < bottom + 0.6 * (top - bottom)
        axes.text(
            j, i, f"{numbers[i, j]:.{digits}f}", ha="center", va="center", color="white" if dark else "black", size=8
        )
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def figure_png(figure: Figure) -> bytes:
    """PNG of a figure; it is closed if pyplot holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    import sys

    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return buffer.getvalue()


def render_report(
    summary: Mapping[str, Any],
    record: Record,
    config: Config,
    grids: list[tuple[str, list[dict[str, Any]]]],
    images: Mapping[str, bytes],
    events: list[dict[str, Any]],
) -> str:
    """The report of a run as one HTML page; `images` maps file names to PNG bytes."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, interval=interval, traffic=traffic, duration=duration, stamp=stamp)
    source = resources.files("raysys.runtime").joinpath("report.html.j2").read_text(encoding="utf-8")
    figures = [(name, base64.b64encode(data).decode()) for name, data in images.items()]
    return environment.from_string(source).render(
        summary=summary, record=record, settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        grids=[(title, _columns(rows), rows) for title, rows in grids], figures=figures,
        labels=[name for name in _columns(summary["table"]) if name not in NUMBERS],
        events=[event for event in events if event["kind"] != "finished"],
    )  # fmt: skip


def console_tables(summary: Mapping[str, Any], grids: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Print the grids (or, without any, the table) and the claims on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    for title, rows in grids:
        console.print(_table(title, _columns(rows), [[number(row.get(c, "")) for c in _columns(rows)] for row in rows]))
    rows = summary["table"]
    if rows and not grids:
        labels = [name for name in _columns(rows) if name not in NUMBERS]
        shown = [[str(row.get(c, "")) for c in [*labels, "metric"]] + [interval(row), str(row["n"])] for row in rows]
        title = f"{summary['system']} {summary['command']}"
        console.print(_table(title, [*labels, "metric", "mean [95 % interval]", "n"], shown[:CONSOLE_ROWS]))
        if len(shown) > CONSOLE_ROWS:
            console.print(f"... and {len(shown) - CONSOLE_ROWS} more rows in report.html and summary.json")
    if summary["claims"]:
        verdicts = [[c["claim"], c["source"], "holds" if c["holds"] else "does not hold"] for c in summary["claims"]]
        console.print(_table("claims", ["claim", "source", "here"], verdicts))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def number(value: Any) -> str:
    """A value as people read it: floats with four significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def interval(row: Mapping[str, Any]) -> str:
    """ "0.912 [0.90, 0.92]" of a row of the table."""
    if row.get("ci_low") is None or row.get("ci_high") is None:
        return number(row["mean"])
    return f"{number(row['mean'])} [{number(row['ci_low'])}, {number(row['ci_high'])}]"


def traffic(count: int) -> str:
    """Bytes with a unit."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def stamp(seconds: float) -> str:
    """A Unix time in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
