"""The panel, drawn into a terminal that is none, and who gets lines instead."""

import io
import sys

import pytest
from rich.console import Console

from orchestrator.progress import Lines, Progress
from orchestrator.terminal import Panel, drawn, renderer


class Screen(io.StringIO):
    def isatty(self):
        return True


def step(progress, label, epoch, **fields):
    event = {"kind": "epoch", "label": label, "epoch": epoch, "epochs": 4, "work": 10, "seconds": 1.0, "clips_per_second": 12.0}
    progress({**event, **fields})


def shown(view, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(drawn(view, "a sweep"))
    return console.file.getvalue()


def progress_of(**fields):
    return Progress(io.StringIO(), (40.0, 20.0), (0, 1), 3, renderers=(Lines(io.StringIO()),), **fields)


def test_the_panel_says_all_that_is_asked_of_it():
    progress = progress_of(where=("MLflow: make ui", "Ray: http://127.0.0.1:8265"), shared=lambda: "3 outcomes reused")
    step(progress, "trial 1 seed 0 task 1/2 audio_visual", 3, loss=0.25)
    progress({"kind": "task", "trial": 1, "seed": 1, "task": 0, "label": "trial 1", "text": "learned"})
    progress({"kind": "trial", "trial": 2, "label": "trial 2", "text": "failed", "status": "FAILED"})
    progress({"kind": "trial", "trial": 3, "label": "trial 3", "text": "0.5", "value": 0.5, "status": "FINISHED"})
    text = shown(progress.view())
    told = ("a sweep", "2 of 3, 1 failed", "5 of 8, 2 seeds", "0.5000", "about ", "3 outcomes reused", "0.2500", "3/4", "12",
            "trial 1 seed 0 task 1/2 audio_visual", "MLflow: make ui", "Ray: http://127.0.0.1:8265")  # fmt: skip
    for part in told:
        assert part in text, part
    assert "audio_visual" in shown(progress.view(), width=70)  # folded, not cut off
    # An ended task is no longer shown as training.
    progress({"kind": "task", "trial": 1, "seed": 0, "task": 0, "label": "trial 1", "text": "learned"})
    assert "audio_visual" not in shown(progress.view())


def test_text_in_brackets_is_text():
    progress = progress_of(where=("[red]results[/red]",))
    step(progress, "[bold] seed 0 task 1/2 n", 1)
    text = shown(progress.view())
    assert "[red]results[/red]" in text
    assert "[bold] seed 0" in text


def test_lines_stay_above_and_the_panel_goes(monkeypatch):
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=80, height=30, legacy_windows=False)
    with Progress(screen, (40.0,), (0,), 1, renderers=(Panel(console, "title"),)) as progress:
        progress.line("first [not markup]")
        step(progress, "seed 0 task 1/1 n", 1, loss=0.5)
        progress.line("second")
        progress.rest()
        screen.write("a table\n")
        progress({"kind": "trial", "trial": 1, "label": "x", "text": "third"})
    text = screen.getvalue()
    assert "[00:00:00] first [not markup]" in text
    assert text.index("first") < text.index("second") < text.index("a table") < text.index("x: third")
    assert "epoch 1/4 loss" not in text  # the panel has it
    assert "\x1b[2K" in text[text.rindex("title") :]  # wiped


def test_only_a_terminal_gets_the_panel(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(renderer(Screen(), "x"), Panel)
    assert isinstance(renderer(Screen(), "x", plain=True), Lines)
    assert isinstance(renderer(io.StringIO(), "x"), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(renderer(Screen(), "x"), Lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert isinstance(renderer(Screen(), "x"), Lines)


def test_what_others_print_meanwhile_is_not_lost(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    console = Console(file=screen, force_terminal=True, width=80, height=30, legacy_windows=False)
    progress = Progress(screen, (40.0,), (0,), 1, renderers=(Panel(console, "title"),))

    def interrupted():
        with progress:
            progress.heartbeat()
            print("from somewhere else")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stdout is screen
    assert "from somewhere else" in screen.getvalue()
