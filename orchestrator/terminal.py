"""Progress in a terminal: a panel that is drawn anew below the lines of what happened."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.progress import Lines, Renderer, View, clock

SHOWN_FITS = 12
REDRAWS_A_SECOND = 4


def renderer(out: TextIO, title: str, plain: bool = False) -> Renderer:
    """A panel where `out` is a terminal, else lines: in a file, a pipe, a job, a terminal that cannot draw, or as told."""
    console = Console(file=out)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if plain or in_job or not console.is_terminal or console.is_dumb_terminal:
        return Lines(out)
    return Panel(console, title)


class Panel:
    """The renderer for a terminal. Lines stay, as they would in a log; the panel is gone at the end."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live: Live | None = None

    def line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def beat(self, text: str) -> None:
        """The panel says it."""

    def show(self, view: View) -> None:
        if self._live is None:
            # What others print meanwhile appears above, where it goes to the same place.
            ours = self._console.file is sys.stdout
            self._live = Live(console=self._console, transient=True, auto_refresh=True, refresh_per_second=REDRAWS_A_SECOND,
                              redirect_stdout=ours, redirect_stderr=ours)  # fmt: skip
            self._live.start()
        self._live.update(drawn(view, self._title))

    def rest(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self, view: View, error: BaseException | None) -> None:
        self.rest()


def drawn(view: View, title: str) -> Frame:
    """The panel of a view."""
    head = Table.grid(padding=(0, 2))
    head.add_column(justify="right", style="bold")
    head.add_column()
    failed = f", {view.failed} failed" if view.failed else ""
    head.add_row(view.unit, _bar(view.finished, view.trials, f"{view.finished} of {view.trials}{failed}"))
    if view.tasks != view.trials:
        seeds = f", {view.seeds} seeds" if view.seeds > 1 else ""
        head.add_row("tasks", _bar(view.tasks_done, view.tasks, f"{view.tasks_done} of {view.tasks}{seeds}"))
    left = "estimating" if view.seconds_left is None else f"about {clock(view.seconds_left)} left"
    head.add_row("time", f"{clock(view.seconds)}, {left}")
    if view.best is not None:
        head.add_row("best", f"{view.best:.4f}")
    if view.shared:
        head.add_row("shared", Text(view.shared))
    parts: list[Table] = [head]
    if view.fits:
        fits = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        fits.add_column("training", ratio=1, overflow="fold")
        for name in ("epoch", "", "loss", "clips/s"):
            fits.add_column(name, justify="right" if name else "left")
        for fit in view.fits[:SHOWN_FITS]:
            loss = "" if fit.loss is None else f"{fit.loss:.4f}"
            bar = _coloured(fit.epoch, fit.epochs, 10)
            fits.add_row(Text(fit.label), f"{fit.epoch}/{fit.epochs}", bar, loss, f"{fit.clips_per_second:.0f}")
        if len(view.fits) > SHOWN_FITS:
            fits.add_row(f"and {len(view.fits) - SHOWN_FITS} more", "", "", "", "")
        parts.append(fits)
    if view.where:
        places = Table.grid()
        for place in view.where:
            places.add_row(Text(place, style="dim", overflow="fold"))
        parts.append(places)
    return Frame(Group(*parts), title=Text(title), title_align="left")


def _bar(done: int, total: int, text: str) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(_coloured(done, max(1, total), 30), text)
    return row


def _coloured(done: int, total: int, width: int) -> ProgressBar:
    """Told apart by 8 colours too."""
    return ProgressBar(total, done, width, style="bright_black", complete_style="green", finished_style="green")
