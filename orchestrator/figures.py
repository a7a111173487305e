"""All figures: plain numbers in, a matplotlib Figure out. One style, Okabe and Ito's colours, half a page wide.

A figure has one panel, or narrow ones side by side under each other's names, so that it can be read on a phone and in a column
of a paper. `svg` makes text that takes the page's colour, `png` a picture on white. No pyplot: no figure outlives its caller.
matplotlib is imported where it is used: its import makes folders in the home directory.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette without its black, which a dark page would swallow, the pale ones last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#8c8c8c"
WIDTH_IN = 3.6
_MARKERS = "osD^vP"
_INK, _LINE = "#1a1a1b", "#c9c9ca"  # stand for the page's own colours in an svg
_STYLE: Any = {  # matplotlib's type for its settings is a list of all their names
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
_MAP = "viridis"
_LONGEST_NAME = 30
MOST_NAMED = 40  # trials that are told apart by name; more of them are drawn over their numbers
_LANE_IN, _LANES_IN = 0.26, 6.0  # height of a timeline's lane, and of all of them at most
_lock = threading.RLock()  # matplotlib's settings belong to the process: held while they are ours

P = ParamSpec("P")
Seeds = Sequence[Sequence[float | None]]  # [seed][task]; None where there is no value


@contextmanager
def _settings(**more: str) -> Iterator[None]:
    """Our settings of matplotlib for a while."""
    import matplotlib

    settings: Any = {**_STYLE, **more}
    with _lock, matplotlib.rc_context(settings):
        yield


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """The function with our style, which is gone again when it returns."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> Figure:
        with _settings():
            return draw(*arguments, **options)

    return drawn


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: its texts in the page's colour, its lines in var(--line).

    `name` is what makes ids in it differ from those of other figures of the page.
    """
    out = io.StringIO()
    salt = hashlib.sha256(name.encode()).hexdigest()[:12]
    with _settings(**{"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    text = re.sub(  # an id must be the page's only one; one pass for all of them, for there may be thousands
        r'(\bid="|url\(#|href="#)([^")]+)(?=["\)])',
        lambda found: f"{found[1]}{salt}-{found[2]}" if found[2] in ids else found[0],
        text,
    )
    return text.replace(_INK, "currentColor").replace(_LINE, "var(--line)").strip()


def png(figure: Figure, dots_per_inch: int = 200) -> bytes:
    """The figure as a PNG on white."""
    out = io.BytesIO()
    with _settings():
        figure.savefig(out, format="png", dpi=dots_per_inch, facecolor="white")
    return out.getvalue()


# Over tasks and over entries.


@_styled
def over_tasks(series: Mapping[str, Seeds], label: str, shown: Sequence[str] = ()) -> Figure:
    """A value after each task per entry: the mean over seeds, and a band of one standard deviation around it.

    Entries beyond the first six of `shown` (all by default) are thin grey lines.
    """
    coloured = list(shown or series)[: len(_MARKERS)]
    rest = [name for name in series if name not in coloured]
    columns_of_names = 1 if max((len(name) for name in coloured), default=0) > 20 else 2
    rows = -(-(len(coloured) + bool(rest)) // columns_of_names)
    figure, axes = _figure(2.35 + 0.17 * rows)
    tasks = max((len(seed) for seeds in series.values() for seed in seeds), default=0)
    for name in [*rest, *coloured]:
        columns = [[value for seed in series[name] if (value := seed[task]) is not None] for task in range(tasks)]
        places = [task + 1 for task, values in enumerate(columns) if values]
        means = np.array([statistics.fmean(values) for values in columns if values])
        spread = np.array([statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns if values])
        if name in rest:
            told = f"{len(rest)} others" if name == rest[0] else ""
            axes.plot(places, means, color=GREY, linewidth=0.8, alpha=0.7, label=told)
            continue
        number = coloured.index(name)
        axes.plot(places, means, color=COLOURS[number], marker=_MARKERS[number], label=_short(name))
        if spread.any():
            axes.fill_between(places, means - spread, means + spread, color=COLOURS[number], alpha=0.18, linewidth=0)
    _tasks_axis(axes, tasks)
    axes.set_ylabel(label)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=columns_of_names)
    return figure


@_styled
def dots(values: Mapping[str, Sequence[float]], label: str) -> Figure:
    """One line per entry: a small ring per seed, a filled dot for their mean. The axis holds 0."""
    figure, axes = _figure(0.75 + 0.19 * len(values))
    axes.axvline(0, color=_LINE, linewidth=1.0)
    for place, seeds in enumerate(values.values()):
        axes.plot(seeds, [place] * len(seeds), "o", markersize=4, markerfacecolor="none", markeredgecolor=GREY)
        axes.plot([statistics.fmean(seeds)], [place], "o", markersize=5.5, color=COLOURS[0])
    _names_axis(axes, list(values))
    axes.set_xlabel(label)
    return figure


@_styled
def differences(values: Mapping[str, tuple[float, float, float]], label: str) -> Figure:
    """One line per entry: the mean difference to the reference, with its interval (mean, low, high)."""
    figure, axes = _figure(0.75 + 0.19 * len(values))
    for place, (mean, low, high) in enumerate(values.values()):
        clear = low > 0 or high < 0
        colour = COLOURS[0] if clear else GREY
        axes.plot([low, high], [place, place], color=colour)
        axes.plot([mean], [place], "o", color=colour)
    axes.axvline(0, color=_INK, linewidth=0.8)
    _names_axis(axes, list(values))
    axes.set_xlabel(label)
    return figure


# What a stream learned and lost.


@_styled
def matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    row_label: str = "",
    column_label: str = "",
    groups: Sequence[int] = (),
    brightest: float | None = None,
) -> Figure:
    """A table of numbers as colours, from 0 to `brightest` (the largest); None stays empty. Lines go before rows `groups`."""
    table = np.array([[math.nan if value is None else value for value in row] for row in values], dtype=float)
    many = len(columns) > 9
    figure, axes = _figure(1.05 + (0.5 if many else 0.0) + max(0.165 * len(rows), 0.6))
    axes.grid(False)
    top = brightest or (float(np.nanmax(table)) if np.isfinite(table).any() else 1.0)
    picture = axes.imshow(table, cmap=_MAP, vmin=0, vmax=top or 1.0, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(columns)), [_short(name, 16) for name in columns])
    if many or max((len(name) for name in columns), default=0) * len(columns) > 34:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(row_label)
    axes.set_xlabel(column_label)
    for place in groups:
        axes.axhline(place - 0.5, color="#ffffff", linewidth=1.5)
    if len(columns) <= 8:
        for row, column in np.argwhere(np.isfinite(table)):
            value = table[row, column]
            colour = "#000000" if value > 0.6 * top else "#ffffff"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    bar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6.5, length=0)
    bar.outline.set_visible(False)
    return figure


@_styled
def collisions(
    names: Sequence[str], columns: Mapping[str, Sequence[float]], after: Sequence[float | None], after_label: str
) -> Figure:
    """The collision table of a task beside what followed: a bar per old class in each column, and the confusion afterwards."""
    panels = [*columns.items(), (after_label, [math.nan if value is None else value for value in after])]
    figure = _blank(0.85 + 0.17 * len(names))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for number, (axes, (label, values)) in enumerate(zip(grid, panels, strict=True)):
        colour = COLOURS[1] if number == len(panels) - 1 else COLOURS[0]
        axes.barh(range(len(names)), values, color=colour, height=0.7)
        axes.set_title(label, fontsize=7.5)
        top = float(np.nanmax([0.0, *values])) or 1.0
        axes.set_xlim(0, 1.05 * top)
        axes.set_xticks([0, top], ["0", f"{top:.2g}"])
        axes.tick_params(axis="x", labelsize=6.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    _names_axis(grid[0], names, ticks=False)
    return figure


@_styled
def deltas(every: Sequence[float], kept: Sequence[float], label: str) -> Figure:
    """The distribution of a score over all candidates, with a stroke for each that was kept."""
    figure, axes = _figure(2.2)
    low, high = min(every, default=0.0), max(every, default=1.0)
    bins = np.linspace(low, high if high > low else low + 1e-6, 31)
    axes.hist(list(every), bins=bins.tolist(), color=GREY, alpha=0.6, label="all candidates")
    axes.hist(list(kept), bins=bins.tolist(), color=COLOURS[1], label="kept")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("rows")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# The search.


@_styled
def history(values: Mapping[int, float], states: Mapping[int, str], best_is: str, label: str) -> Figure:
    """The objective by trial, the best so far as steps, and a cross below for trials that did not end well."""
    figure, axes = _figure(2.3)
    numbers = sorted(values)
    best = np.array([values[number] for number in numbers])
    best = np.maximum.accumulate(best) if best_is == "max" else np.minimum.accumulate(best)
    axes.step(numbers, best, where="post", color=COLOURS[1], label="best so far")
    axes.plot(numbers, [values[number] for number in numbers], "o", color=COLOURS[0], label="trial")
    if others := sorted(number for number in states if number not in values):
        level = min(values.values(), default=0.0)
        axes.plot(others, [level] * len(others), "x", color=GREY, label="failed, pruned or stopped")
    axes.xaxis.set_major_locator(_ticks(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1)
    return figure


@_styled
def importance(shares: Mapping[str, float]) -> Figure:
    """How much of the objective's variation each knob accounts for."""
    figure, axes = _figure(0.75 + 0.24 * len(shares))
    axes.barh(range(len(shares)), list(shares.values()), color=COLOURS[0], height=0.6)
    for place, share in enumerate(shares.values()):
        axes.text(share, place, f" {share:.2f}", va="center", fontsize=7)
    _names_axis(axes, [knob_name(name) for name in shares])
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of the variation")
    return figure


@_styled
def knob_slice(knob: str, places: Sequence[Any], values: Sequence[float], best: int, label: str, log: bool) -> Figure:
    """The objective over one knob; the best trial as a larger diamond. Darker dots are later trials."""
    figure, axes = _figure(2.1)
    numbers, names = _numbered(places)
    # From grey to blue, so that the order can be read without knowing the colours' names.
    shades = in_colours(np.linspace(0.35, 1.0, len(values)), "Blues")
    axes.scatter(numbers, values, c=shades, s=26, edgecolors=COLOURS[0], linewidths=0.6, zorder=3)
    axes.plot([numbers[best]], [values[best]], "D", color=COLOURS[1], markersize=7, zorder=4)
    if names:
        axes.set_xticks(range(len(names)), [_short(name, 14) for name in names])
    elif log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(_ticks(6, integer=all(isinstance(place, int) for place in places)))
    axes.set_xlabel(knob_name(knob))
    axes.set_ylabel(label)
    return figure


@_styled
def parallel(knobs: Mapping[str, Sequence[Any]], values: Sequence[float], best: int, best_is: str, label: str) -> Figure:
    """A line per trial through its knobs and its objective; the better, the brighter, the best in vermillion."""
    from matplotlib.collections import LineCollection

    figure, axes = _figure(2.6)
    axes.grid(axis="y", visible=False)
    columns = [(knob_name(name), *_numbered(places)) for name, places in knobs.items()] + [(label, list(values), [])]
    scaled, ends = [], []
    for name, numbers, names in columns:
        low, high = min(numbers), max(numbers)
        scaled.append([(number - low) / (high - low) if high > low else 0.5 for number in numbers])
        ends.append((name, names[0] if names else f"{low:.3g}", names[-1] if names else f"{high:.3g}"))
    table = np.array(scaled)  # [columns trials]
    worth = table[-1] if best_is == "max" else 1 - table[-1]
    order = np.argsort(worth, kind="stable")  # the better above the worse
    lines = [list(enumerate(table[:, trial])) for trial in order]
    axes.add_collection(LineCollection(lines, colors=in_colours(0.05 + 0.85 * worth[order], _MAP), linewidths=1.0))
    axes.plot(range(len(columns)), table[:, best], color=COLOURS[1], linewidth=2.2, zorder=3)
    for place, (_, low_name, high_name) in enumerate(ends):
        axes.axvline(place, color=_LINE, linewidth=0.8)
        axes.text(place, -0.05, _short(low_name, 12), ha="center", va="top", fontsize=7)
        axes.text(place, 1.05, _short(high_name, 12), ha="center", va="bottom", fontsize=7)
    axes.set_xlim(-0.35, len(columns) - 0.65)
    axes.set_ylim(-0.16, 1.16)
    axes.set_yticks([])
    axes.set_xticks(range(len(columns)), [_short(name.replace("_", "_\n", 1), 24) for name, *_ in ends])
    axes.tick_params(axis="x", length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    return figure


@_styled
def scatter(
    x: Sequence[float], y: Sequence[float], marked: Sequence[bool], x_label: str, y_label: str, names: tuple[str, str]
) -> Figure:
    """Two values of each trial or entry against each other; the marked ones (`names[0]`) in vermillion, others `names[1]`."""
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(2.4)
    for is_marked, colour, marker, name in ((False, GREY, "o", names[1]), (True, COLOURS[1], "D", names[0])):
        chosen = [place for place, mark in enumerate(marked) if mark == is_marked]
        if chosen:
            axes.plot([x[place] for place in chosen], [y[place] for place in chosen], marker, color=colour, label=name)
    axes.xaxis.set_major_locator(_ticks(5))
    if max(x, default=0.0) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # bytes are millions; a share of 0.2 would be "200m"
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_styled
def timeline(jobs: Sequence[tuple[float, float, str, str]]) -> Figure:
    """When workers computed what: jobs as (start, end) in seconds, a kind and a short name, in as few lanes as hold them.

    The lanes are drawn from the times alone: as many as jobs ran at once at most. Long pauses are cut short, at dashed lines.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    ends: list[float] = []
    placed = []
    shifted, cuts = _without_pauses(sorted(jobs))
    for start, end, kind, name in shifted:
        lane = next((number for number, busy in enumerate(ends) if busy <= start + 1e-6), len(ends))
        ends[lane:] = [end, *ends[lane + 1 :]]
        placed.append((lane + 1, start, end, kind, name))
    longest = max(ends, default=1.0)
    unit, scale = ("min", 60.0) if longest > 300 else ("s", 1.0)
    lane_in = min(_LANE_IN, _LANES_IN / max(len(ends), 1))
    figure, axes = _figure(1.3 + lane_in * len(ends))
    crowded = len(placed) > MOST_NAMED * len(ends)  # white edges would cover bars that are thinner than they
    for number, kind in enumerate(sorted({kind for *_, kind, _ in placed})):
        bars = [_bar(lane, start / scale, end / scale) for lane, start, end, each, _ in placed if each == kind]
        axes.add_patch(PathPatch(  # one for all of a kind: to draw thousands takes many seconds
            Path.make_compound_path_from_polys(np.array(bars)), facecolor=COLOURS[number % len(COLOURS)], label=kind,
            edgecolor="none" if crowded else "white", linewidth=0.0 if crowded else 0.3,
        ))  # fmt: skip
    for lane, start, end, _, name in placed:
        if name and (end - start) > 0.055 * longest and lane_in > _LANE_IN / 2:
            axes.text((start + end) / 2 / scale, lane, name, ha="center", va="center", fontsize=6, color="#ffffff")
    for cut in cuts:
        axes.axvline(cut / scale, color=_INK, linewidth=0.8, linestyle="--")
    if lane_in == _LANE_IN:
        axes.set_yticks(range(1, len(ends) + 1), [str(lane + 1) for lane in range(len(ends))])
    else:
        axes.yaxis.set_major_locator(_ticks(integer=True))
    axes.set_xlim(0, 1.02 * longest / scale)
    axes.set_ylim(len(ends) + 0.6, 0.4)
    axes.set_ylabel("jobs at once")
    axes.set_xlabel(f"{unit} since the start" + (", pauses cut" if cuts else ""))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _bar(lane: int, start: float, end: float) -> list[tuple[float, float]]:
    """The corners of a timeline's bar."""
    low, high = lane - 0.4, lane + 0.4
    return [(start, low), (end, low), (end, high), (start, high)]


def _without_pauses(
    jobs: Sequence[tuple[float, float, str, str]],
) -> tuple[list[tuple[float, float, str, str]], list[float]]:
    """Jobs in the order of their starts with every long time in which none ran cut to a tenth of the busy time; the cuts."""
    longest = max(0.1 * sum(end - start for start, end, *_ in jobs), 1.0)
    busy_until = removed = 0.0
    found, cuts = [], []
    for start, end, kind, name in jobs:
        if start - busy_until > longest:
            removed += start - busy_until - longest
            cuts.append(start - removed - longest / 2)
        busy_until = max(busy_until, end)
        found.append((start - removed, end - removed, kind, name))
    return found, cuts


@_styled
def stacked(trials: Sequence[int], parts: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Parts that add up, such as seconds computed and seconds reused, of trials by their numbers.

    A bar per trial; for more than MOST_NAMED of them areas over the numbers, as high as any other figure.
    """
    colours = [COLOURS[number + 1 if number else 0] for number in range(len(parts))]
    if len(trials) <= MOST_NAMED:
        figure, axes = _figure(1.0 + 0.19 * len(trials))
        left = np.zeros(len(trials))
        for colour, (part, values) in zip(colours, parts.items(), strict=True):
            axes.barh(range(len(trials)), values, left=left, color=colour, height=0.7, label=part)
            left = left + np.array(values)
        _names_axis(axes, [f"trial {number}" for number in trials])
        axes.set_xlabel(label)
    else:
        figure, axes = _figure(2.3)
        edges = np.arange(min(trials), max(trials) + 2) - 0.5
        below = np.zeros(len(edges) - 1)
        for colour, (part, values) in zip(colours, parts.items(), strict=True):
            above = below.copy()
            above[np.array(trials) - min(trials)] += np.array(values)  # a number that is not there has nothing
            axes.stairs(above, edges, baseline=below, fill=True, color=colour, label=part)
            below = above
        axes.xaxis.set_major_locator(_ticks(integer=True))
        axes.set_xlabel("trial")
        axes.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def knob_name(path: str) -> str:
    """The last part of a field path."""
    return path.rsplit(".", 1)[-1]


def _blank(height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_IN, height_in))


def _figure(height_in: float) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = _blank(height_in)
    return figure, figure.subplots()


def _ticks(count: int | None = None, integer: bool = False) -> MaxNLocator:
    """At most so many ticks (matplotlib's own number by default)."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count or "auto", integer=integer)


def in_colours(values: np.ndarray | float, scale: str) -> Any:
    """Numbers from 0 to 1 as colours of one of matplotlib's scales, float [... 4]."""
    import matplotlib

    return matplotlib.colormaps[scale](values)


def _tasks_axis(axes: Axes, tasks: int) -> None:
    axes.set_xticks(range(1, tasks + 1) if tasks <= 12 else range(1, tasks + 1, -(-tasks // 12)))
    axes.set_xlim(0.8, max(tasks, 1) + 0.2)
    axes.set_xlabel("tasks learned")


def _names_axis(axes: Axes, names: Sequence[str], ticks: bool = True) -> None:
    """Names down the side, the first one on top; `ticks` are to be found along the other axis."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    if ticks:
        axes.xaxis.set_major_locator(_ticks(5))


def _short(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name cut to a length, and safe from matplotlib, which reads $...$ as a formula and hides what begins with _."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return (" " if cut.startswith("_") else "") + cut.replace("$", r"\$")


def _numbered(places: Sequence[Any]) -> tuple[list[float], list[str]]:
    """The places on an axis, and their names where they are no numbers."""
    if all(isinstance(place, (int, float)) and not isinstance(place, bool) for place in places):
        return [float(place) for place in places], []
    names = sorted({str(place) for place in places})
    return [float(names.index(str(place))) for place in places], names
