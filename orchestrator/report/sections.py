"""What a report says: summary, tables, figures, clips, settings, in the order in which somebody reads."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavs_model.errors import InputError
from orchestrator import figures
from orchestrator.comparison import BACKGROUND_ALONE, Row, table
from orchestrator.experiment import Objective
from orchestrator.figures import knob_name
from orchestrator.ledger import COMPUTED, Trial
from orchestrator.progress import clock
from orchestrator.report import page
from orchestrator.report.clips import Gallery
from orchestrator.report.page import Column, Section
from orchestrator.report.sources import Source, StreamData, without_background
from orchestrator.search import WORKER_SECONDS, importance
from orchestrator.sweep import best_of, pareto_front

MOST_CLOSE = 3  # entries that are looked at closely
MEGABYTE = 2**20
_OVER_TASKS = {
    "miou/all": ("All classes", "mean IoU", "Mean IoU over all classes seen so far, background included."),
    "miou/old": ("Old classes", "mean IoU", "Mean IoU over the classes of the base task, background included."),
    "miou/new": ("New classes", "mean IoU", "Mean IoU over the classes that later tasks added."),
    "drift/old": (
        "Drift to background",
        "share of pixels",
        "Share of the old objects' pixels that are called background. What it gains over the base task is drift.",
    ),
    "confusion/old_as_new": (
        "Old called new",
        "share of pixels",
        "Share of the old objects' pixels that are called a new class.",
    ),
    "confusion/new_as_old": (
        "New called old",
        "share of pixels",
        "Share of the new objects' pixels that are called an old class: what collisions foretell.",
    ),
}
_HEADS = {
    "miou/all": "mIoU all",
    "miou/old": "old",
    "miou/new": "new",
    "miou/foreground": "foreground",
    "drift/old": "drift",
    "stream/forgetting": "forgetting",
    "stream/average_miou": "average over tasks",
    "confusion/old_as_new": "old called new",
    "confusion/new_as_old": "new called old",
}
_METRICS = ("miou/all", "miou/old", "miou/new", "miou/foreground", "drift/old", "stream/forgetting", "stream/average_miou")


@dataclass(frozen=True)
class Wishes:
    """What whoever asks for the report wants to see: a split (the first by default), entries to look at closely."""

    split: str = ""
    entries: tuple[str, ...] = ()
    clips: bool = True
    most_clips: int | None = None  # of one kind
    told: Callable[[str], None] = field(default=lambda text: None)  # hears what was left out, and why


def written(source: Source, wishes: Wishes) -> str:
    """The report as HTML."""
    split = _split(source, wishes)
    close = _close(source, wishes, split)
    makers = {"sweep": _of_sweep, "comparison": _of_comparison, "run": _of_run}
    lead, first = makers[source.kind](source, split)
    sections = [*first, _tasks(source, split, close)]
    sections += [_closer(source, entry, setting, split) for setting in source.settings for entry in close]
    if source.kind == "sweep":
        sections.append(_search(source))
    sections.append(_cost(source))
    if wishes.clips and close:
        sections.append(_clips(source, close, split, wishes))
    sections += [_settings(source), _origin(source)]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    status = source.parent.status.lower()
    about = f'<p class="soft">Report on the {source.kind}, made {made}; MLflow run {source.parent.run}, {escape(status)}.</p>'
    title = f"{_TITLES[source.kind]}: {source.name}"
    return page.document(title, about + f'<div class="summary">{page.paragraphs(lead)}</div>', sections)


_TITLES = {"sweep": "Sweep", "comparison": "Comparison", "run": "Run"}


def _split(source: Source, wishes: Wishes) -> str:
    known = list(dict.fromkeys(split for stream in source.streams for split in stream.splits))
    if wishes.split and wishes.split not in known:
        raise InputError(f"--split {wishes.split!r} was not evaluated; there are: {', '.join(known) or 'none'}")
    return wishes.split or next((split for split in source.splits if split in known), known[0] if known else "val")


def _close(source: Source, wishes: Wishes, split: str) -> list[str]:
    """The entries to look at closely: those wished for, else the best, the first with a collision table, the reference."""
    for name in wishes.entries:
        if name not in source.entries:
            raise InputError(f"--entry {name!r} has no stream that ended; there are: {', '.join(source.entries)}")
    if wishes.entries:
        return list(wishes.entries)
    bounds = {stream.entry for stream in source.streams if stream.config.get("method") == "joint"}
    ranked = sorted(_ranked(source, split), key=lambda entry: entry in bounds)
    telling = [stream.entry for stream in source.streams if any(task.scores or task.collisions for task in stream.tasks)]
    best_telling = [name for name in ranked if name in telling]
    return list(dict.fromkeys([*ranked[:1], *best_telling[:1], *([source.reference] if source.reference in ranked else [])]))[
        :MOST_CLOSE
    ]


def _ranked(source: Source, split: str) -> list[str]:
    """Entries by their mean over seeds and settings after the last task, best first."""
    means: dict[str, list[float]] = {}
    for stream in source.streams:
        if split in stream.splits:
            means.setdefault(stream.entry, []).append(stream.metrics(split)[-1].get("miou/all", math.nan))
    return sorted(means, key=lambda entry: -statistics.fmean(means[entry]))


# The three kinds: a summary in words, and tables.


def _of_comparison(source: Source, split: str) -> tuple[list[str], list[Section]]:
    seeds = sorted({result.seed for result in source.results})
    rows = table(source.results, seeds, source.reference)
    lead, body = [], ""
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        bounds = {stream.entry for stream in source.streams if stream.config.get("method") == "joint"}
        lead += _winner(own, setting, split, source.reference, len(seeds), bounds)
        for each in dict.fromkeys([split, *source.splits]):
            body += _comparison_table(own, setting, each, source.reference, seeds, bounds)
            body += page.grid([_difference_figure(own, setting, each, source.reference)])
    failed = [result for result in source.results if result.error]
    total = len(without_background(source.results))
    lead.append(f"{total - len(failed)} of {total} streams ended well." + (" The others are named below." if failed else ""))
    lead += _costs_in_words(source, [result.values.get("worker_seconds", 0.0) for result in source.results])
    if failed:
        shown = [{"entry": each.entry, "setting": each.setting, "seed": each.seed, "error": each.error} for each in failed]
        body += page.table(
            "Streams without a result",
            {"entry": Column("method"), "setting": Column("setting"), "seed": Column("seed", "d"), "error": Column("why")},
            shown,
        )
    return lead, [Section("results", "Results", body), Section("streams", "Every stream", _streams_table(source))]


def _winner(rows: Sequence[Row], setting: str, split: str, reference: str, seeds: int, bounds: Collection[str]) -> list[str]:
    """Which entry is best in a setting, by how much, and how sure that is; `bounds` are no continual methods."""
    metric = f"{split}/miou/all"
    able = sorted(
        (row for row in rows if metric in row.mean and row.entry != BACKGROUND_ALONE), key=lambda row: -row.mean[metric]
    )
    if not able:
        return [f"Setting {setting}: no entry has a result for every seed."]
    methods = [row for row in able if row.entry not in bounds]
    over = [row for row in able if row.entry in bounds] if methods else []
    able = methods or able
    best = able[0]
    told = f"Setting {setting}, {split}, mean over {_many(seeds, 'seed')}: {best.entry} is the best of "
    told += f"{_many(len(able), 'entry', 'entries')}, with a mean IoU of {_with_spread(best, metric)} over all classes"
    parts = [f"{name} {best.mean[key]:.3f}" for name in ("old", "new") if (key := f"{split}/miou/{name}") in best.mean]
    told += f" ({', '.join(parts)})." if parts else "."
    if seeds > 1 and best.entry != reference and (difference := best.difference.get(metric)):
        sure = "which leaves out 0" if difference.low > 0 else "which does not leave out 0"
        told += (
            f" Over {reference} it gains {difference.mean:+.3f}; the 95 % interval of the paired difference is "
            f"{difference.low:+.3f} to {difference.high:+.3f}, {sure}."
        )
    if len(able) > 1:
        told += f" Next is {able[1].entry} with {able[1].mean[metric]:.3f}."
    if over:
        told += f" {over[0].entry}, which sees the data of all tasks at once, reaches {over[0].mean[metric]:.3f}."
    floor = next((row.mean[metric] for row in rows if row.entry == BACKGROUND_ALONE and metric in row.mean), None)
    if floor is not None:
        told += f" Calling everything background gives {floor:.3f}."
    few = "hardly more than the smallest and the largest difference seen"
    if seeds == 1:
        return [told, "With one seed there is no spread and no interval: small differences mean nothing."]
    return [told, f"An interval over {seeds} seeds is {few}." if seeds < 5 else ""]


def _comparison_table(
    rows: Sequence[Row], setting: str, split: str, reference: str, seeds: Sequence[int], bounds: Collection[str]
) -> str:
    metric = f"{split}/miou/all"
    ranked = sorted(rows, key=lambda row: -row.mean.get(metric, -math.inf))
    best = next((place for place, row in enumerate(ranked) if row.mean and row.entry not in bounds), None)
    columns = {"entry": Column("method")}
    columns |= {name: Column(_HEADS[name], ".3f", f"{name}/std") for name in _METRICS}
    columns |= {
        **({"difference": Column(f"to {reference}", "+.3f")} if reference else {}),
        **({"interval": Column("95 % interval", "s")} if reference and len(seeds) > 1 else {}),
        "worker_seconds": Column("worker-seconds", ".0f"),
        "memory": Column("memory MB", ".1f"),
    }
    lines = []
    for row in ranked:
        line: dict[str, Any] = {"entry": f"{row.entry} ({row.failed})" if row.failed else row.entry}
        for name in _METRICS:
            line[name], line[f"{name}/std"] = row.mean.get(f"{split}/{name}"), row.std.get(f"{split}/{name}")
        if metric in row.difference:
            found = row.difference[metric]
            line |= {"difference": found.mean}
            if len(seeds) > 1:
                line |= {"interval": f"{found.low:+.3f} … {found.high:+.3f}"}
        line["worker_seconds"] = row.mean.get("worker_seconds")
        line["memory"] = row.mean["memory_bytes"] / MEGABYTE if "memory_bytes" in row.mean else None
        lines.append(line)
    caption = (
        f"Setting {setting}, {split}, after the last task: mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    )
    return page.table(caption, columns, lines, best)


def _difference_figure(rows: Sequence[Row], setting: str, split: str, reference: str) -> str:
    metric = f"{split}/miou/all"
    found = {row.entry: row.difference[metric] for row in rows if metric in row.difference}
    if not found or len(rows[0].seeds) < 2:
        return ""
    ranked = dict(sorted(found.items(), key=lambda item: -item[1].mean))
    drawn = figures.differences(
        {name: (each.mean, each.low, each.high) for name, each in ranked.items()}, f"difference to {reference}"
    )
    return page.figure(
        f"difference {setting} {split}", drawn, f"Against {reference}, {split}",
        f"Paired difference of the mean IoU over all classes, setting {setting}: the mean over seeds and its 95 % bootstrap "
        "interval. Grey where the interval holds 0.",
    )  # fmt: skip


def _streams_table(source: Source) -> str:
    """Every stream's numbers as streams.csv has them."""
    names = [f"{split}/{name}" for split in source.splits for name in _METRICS] + ["worker_seconds", "memory_bytes"]
    columns = {"entry": Column("method"), "setting": Column("setting"), "seed": Column("seed", "d")}
    columns |= {name: Column(name, ".0f" if name in ("worker_seconds", "memory_bytes") else ".4f") for name in names}
    rows = [{"entry": each.entry, "setting": each.setting, "seed": each.seed, **each.values} for each in source.results]
    return page.details(f"{len(rows)} streams", page.table("Streams, after the last task (streams.csv)", columns, rows))


def _of_sweep(source: Source, split: str) -> tuple[list[str], list[Section]]:
    ledger = source.sweep
    assert ledger is not None
    objectives = _objectives(source)
    metric, mode = objectives[0].metric, objectives[0].mode
    ended = {number: trial for number, trial in sorted(ledger.trials.items()) if trial.state != "RUNNING"}
    well = {number: trial for number, trial in ended.items() if trial.state == "FINISHED" and metric in trial.metrics}
    best = best_of(ended, objectives[0])
    knobs = list(ledger.plan["knobs"])
    told = f"{_many(len(ended), 'trial')} over {_listed(map(knob_name, knobs))}, {len(well)} ended well"
    for state, word in (("FAILED", "failed"), ("PRUNED", "pruned")):
        if number := sum(trial.state == state for trial in ended.values()):
            told += f", {number} {word}"
    ending = source.parent.tags.get("ended", "")
    told += f"; drawn by {ledger.plan['sampler']}. " + (f"The search ended: {ending}." if ending else "It has not ended.")
    lead = [told]
    if best is not None:
        values = sorted(float(trial.metrics[metric]) for trial in well.values())
        config = _listed(f"{knob_name(name)} = {_number(value)}" for name, value in ended[best].config.items())
        lead.append(
            f"Trial {best} is the best: {metric} {float(ended[best].metrics[metric]):.4f} with {config}. "
            f"All trials that ended well lie between {values[0]:.4f} and {values[-1]:.4f}, their median is "
            f"{statistics.median(values):.4f}."
        )
        tests = [each for stream in source.streams[:1] for each in stream.splits if each.startswith("test")]
        shown = [f"{each} {_mean_of(source.streams, each):.4f}" for each in tests]
        if shown:
            lead.append(
                f"On test, which chose nothing, the best configuration reaches a mean IoU over all classes of {_listed(shown)} "
                f"(mean over {_many(len(source.streams), 'seed')})."
            )
    else:
        lead.append("No trial ended well.")
    lead += _costs_in_words(source, [])
    rows = [_trial_row(number, trial) for number, trial in ended.items()]
    order = sorted(
        range(len(rows)), key=lambda place: (rows[place].get(metric) is None, _sign(mode) * (rows[place].get(metric) or 0.0))
    )
    rows = [rows[place] for place in order]
    columns = {"trial": Column("trial", "d")}
    for name in knobs:
        numeric = all(isinstance(row.get(name, 0), (int, float)) and not isinstance(row.get(name), bool) for row in rows)
        whole = all(isinstance(row.get(name, 0), int) for row in rows)
        columns[name] = Column(knob_name(name), ("d" if whole else ".4g") if numeric else "")
    shown_metrics = dict.fromkeys([*(each.metric for each in objectives), "val/miou/all", "val/miou/old", "val/miou/new",
                                   "val/drift/old", "val/stream/forgetting"])  # fmt: skip
    columns |= {name: Column(name, ".4f", f"{name}/std") for name in shown_metrics}
    columns |= {COMPUTED: Column("computed, s", ".0f"), "reused_worker_seconds": Column("reused, s", ".0f")}
    columns |= {"state": Column("state"), "error": Column("error")}
    body = page.table("Trials, best first", columns, rows, best=0 if best is not None else None)
    if len(objectives) > 1:
        front = pareto_front(ended, objectives)
        body += page.table("Pareto front", columns, [_trial_row(number, ended[number]) for number in front])
    body += _streams_over_tasks(source, "The best configuration")
    return lead, [Section("results", "Results", body)]


def _trial_row(number: int, trial: Trial) -> dict[str, Any]:
    error = trial.error.splitlines()[-1] if trial.error else ""
    return {"trial": number, **trial.config, **trial.metrics, "state": trial.state.lower(), "error": error}


def _of_run(source: Source, split: str) -> tuple[list[str], list[Section]]:
    streams = source.streams
    last = [stream.metrics(split)[-1] for stream in streams]
    parts = []
    for name in ("miou/all", "miou/old", "miou/new"):
        values = [each[name] for each in last if name in each]
        if values:
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            parts.append(f"{name.removeprefix('miou/')} {statistics.fmean(values):.3f}{spread}")
    lead = [
        f"{streams[0].entry} in setting {streams[0].setting}, {_many(len(streams), 'seed')}: after "
        f"{_many(len(streams[0].tasks), 'task')} the mean IoU on {split} is {', '.join(parts)} (all, old and new classes)."
    ]
    lost = [each["stream/forgetting"] for each in last if "stream/forgetting" in each]
    if lost:
        change = round(statistics.fmean(lost), 3)
        than = f"{abs(change):.3f} {'worse' if change > 0 else 'better'} than" if change else "as good as"
        lead.append(f"At the end the mean IoU of the earlier tasks' classes is {than} at its best before.")
    if len(streams) < 3:
        lead.append(f"With {_many(len(streams), 'seed')}, small differences to other runs mean nothing.")
    lead += _costs_in_words(source, [])
    return lead, [Section("results", "Results", _streams_over_tasks(source, "Every task"))]


def _streams_over_tasks(source: Source, caption: str) -> str:
    """Every task of every stream, by split."""
    columns = {"split": Column("split"), "seed": Column("seed", "d"), "task": Column("task", "d")}
    columns |= {name: Column(head, ".4f") for name, head in _HEADS.items()}
    rows = [
        {"split": split, "seed": stream.seed, "task": task + 1, **metrics}
        for stream in source.streams
        for split in stream.splits
        for task, metrics in enumerate(stream.metrics(split))
    ]
    return page.table(f"{caption}, task by task", columns, rows)


def _costs_in_words(source: Source, alone: Sequence[float]) -> list[str]:
    """What the workers computed, and what was shared."""
    told = []
    ended = source.parent.ended
    if ended:
        told.append(f"From its start to its end it took {clock(ended - source.parent.started)}.")
    if source.sweep is not None:
        trials = source.sweep.trials.values()
        computed = sum(trial.worker_seconds for trial in trials)
        reused = sum(float(trial.metrics.get("reused_worker_seconds", 0.0)) for trial in trials)
        told.append(f"Workers computed for {computed:.0f} s; {reused:.0f} s of work were found in the store.")
    elif source.jobs:
        computed = sum(job.end - job.start for job in source.jobs)
        each = f" The streams would have trained for {sum(alone):.0f} worker-seconds alone." if sum(alone) else ""
        told.append(f"Workers computed for {computed:.0f} s, which the store keeps.{each}")
    return [" ".join(told)]


# Figures that every kind has.


def _tasks(source: Source, split: str, close: Sequence[str]) -> Section:
    body = ""
    for setting in source.settings:
        by_entry = {entry: source.of(entry, setting) for entry in _ranked(source, split)}
        by_entry = {entry: streams for entry, streams in by_entry.items() if streams}
        shown = list(dict.fromkeys([*close, *by_entry]))
        spread = any(len(streams) > 1 for streams in by_entry.values())
        drawn = []
        for metric, (title, label, caption) in _OVER_TASKS.items():
            series = {
                entry: [[each.get(metric) for each in stream.metrics(split)] for stream in streams]
                for entry, streams in by_entry.items()
            }
            if any(value is not None for seeds in series.values() for seed in seeds for value in seed):
                drawn.append(
                    page.figure(
                        f"tasks {setting} {metric}",
                        figures.over_tasks(series, label, [name for name in shown if name in series]),
                        title,
                        f"{caption} {split}, setting {setting}"
                        + ("; the band is one standard deviation over seeds." if spread else "."),
                    )
                )
        lost = {
            entry: [value for stream in streams if (value := stream.metrics(split)[-1].get("stream/forgetting")) is not None]
            for entry, streams in by_entry.items()
        }
        lost = {entry: values for entry, values in lost.items() if values}
        if lost:
            ranked = dict(sorted(lost.items(), key=lambda item: statistics.fmean(item[1])))
            drawn.append(
                page.figure(
                    f"forgetting {setting}",
                    figures.dots(ranked, "forgetting (mean IoU lost)"),
                    "Forgetting",
                    "How much of its best mean IoU an earlier task's classes have lost at the end, mean over those tasks; "
                    f"rings are seeds. Below 0 it got better. {split}, setting {setting}.",
                )
            )
        body += (f"<h3>Setting {escape(setting)}</h3>\n" if len(source.settings) > 1 else "") + page.grid(drawn)
    return Section("tasks", "Over tasks", body)


def _closer(source: Source, entry: str, setting: str, split: str) -> Section:
    """One entry: what it learned and lost, class by class, and how its memory was made."""
    streams = [stream for stream in source.of(entry, setting) if split in stream.splits]
    key = f"close-{_slug(entry)}-{_slug(setting)}"
    if not streams:
        return Section(key, entry, "")
    first, seeds = streams[0], _many(len(streams), "seed")
    names, tasks, base = first.classes, len(first.tasks), first.num_base
    ends = [len(counts) for counts in first.history(split)]
    drawn = []

    def add(name: str, made: Any, title: str, caption: str) -> None:
        drawn.append(page.figure(f"{key} {name}", made, title, caption))

    if tasks > 1:
        columns = [f"task {task + 1}" for task in range(tasks)]
        add(
            "matrix",
            figures.matrix(_mean([stream.matrix(split) for stream in streams]), [f"after {name}" for name in columns], columns,
                           "mean IoU", column_label="classes of"),
            "Task by task", f"Mean IoU of the classes that each task added, after each task, mean over {seeds}. Down a column "
            "one sees them forgotten.",
        )  # fmt: skip
    by_class = _mean([stream.class_ious(split) for stream in streams])
    foreground = max((value for row in by_class[1:] for value in row if value is not None), default=0.0)
    add(
        "classes",
        figures.matrix(by_class, names, [f"{task + 1}" for task in range(tasks)], "IoU", column_label="tasks learned",
                       groups=ends[:-1], brightest=foreground or None),
        "Class by class", f"IoU of every class after each task, mean over {seeds}. White lines part the tasks that added them; "
        "a class without truth in the split is blank. The scale ends at the best class but background.",
    )  # fmt: skip
    if tasks > 1:
        counts = sum((stream.history(split)[-1] for stream in streams), torch.zeros_like(first.history(split)[-1]))
        shares = _shares(counts)
        add(
            "new as old",
            figures.matrix(shares[base:, 1:base].tolist(), names[base:], names[1:base], "share of pixels",
                           "truth: new", "called: old"),
            "New called old, class by class",
            f"Share of a new class's pixels (row) called an old class, after the last task, over {seeds}.",
        )  # fmt: skip
        add(
            "old as new",
            figures.matrix(shares[1:base, base:].tolist(), names[1:base], names[base:], "share of pixels",
                           "truth: old", "called: new"),
            "Old called new, class by class",
            f"Share of an old class's pixels (row) called a new class, after the last task, over {seeds}.",
        )  # fmt: skip
    for task in range(tasks):
        drawn += [*_collisions(first, split, task, key), *_deltas(first, task, key)]
    body = page.grid(drawn, uneven=True) + "".join(_pairs(first, split, task) for task in range(tasks))
    of = f" in {setting}" if len(source.settings) > 1 else ""
    return Section(key, f"Closer: {entry}{of}", body)


def _collisions(stream: StreamData, split: str, task: int, key: str) -> list[str]:
    """The table that a task's rehearsal was drawn by, beside the confusion afterwards."""
    records = stream.tasks[task].collisions.get("classes", [])
    known = {"collisions": "videos\nF", "frequency": "F'", "drawn": "drawn\nrows", "predicted": "videos", "pasted": "pastes"}
    columns = {known[name]: [float(each[name]) for each in records] for name in known if records and name in records[0]}
    if not columns or "class" not in records[0]:
        return []
    names = [str(each["class"]) for each in records]
    counts = stream.history(split)[task].double()
    old = len(stream.history(split)[task - 1])
    fresh = counts[old:, 1:]  # rows: what this task taught
    total = float(fresh.sum() + counts[old:, 0].sum())
    ids = [stream.classes.index(name) for name in names]
    after = [float(counts[old:, class_id].sum()) / total if total else None for class_id in ids]
    drawn = figures.collisions(names, columns, after, "confused\nafter")
    caption = (
        f"What the old network saw in the data of task {task + 1}, per old class, and what came of it (seed {stream.seed}). "
        "Videos F: clips in which the class was seen where a new one is true; F' the frequency it is drawn by; then the rows "
        f"drawn again; last, the share of the new classes' pixels that are called this class after the task, on {split}."
    )
    return [page.figure(f"{key} collisions {task}", drawn, f"Collisions before task {task + 1}", caption)]


def _pairs(stream: StreamData, split: str, task: int) -> str:
    """The collision pairs of a task with the confusion of each pair afterwards."""
    counts = _shares(stream.history(split)[task])
    rows = []
    for pair in stream.tasks[task].collisions.get("pairs", []):
        old, new = stream.classes.index(pair["old_class"]), stream.classes.index(pair["new_class"])
        rows.append({**pair, "after": counts[new, old].item(), "back": counts[old, new].item()})
    columns = {
        "old_class": Column("old class, seen"), "new_class": Column("new class, true"), "videos": Column("videos", ".0f"),
        "after": Column("new called old, after", ".3f"), "back": Column("old called new, after", ".3f"),
    }  # fmt: skip
    rows.sort(key=lambda row: -row["videos"])
    told = f"Collision pairs before task {task + 1}, and the confusion of each pair after it ({split}, seed {stream.seed})"
    return page.details(told, page.table(told, columns, rows))


def _deltas(stream: StreamData, task: int, key: str) -> list[str]:
    """The distribution of delta over a task's clips, with those that were kept."""
    scores = stream.tasks[task].scores
    every = scores.get("columns", {}).get("delta")
    if not every:
        return []
    of_sample = dict(zip(scores["sample_ids"], every, strict=True))
    kept = [of_sample[row["sample_id"]] for row in stream.kept(task) if row["sample_id"] in of_sample]
    if not kept:
        return []
    caption = (
        f"How much the sound changes the IoU of each training clip of task {task + 1} (seed {stream.seed}): "
        f"{len(every)} clips, {len(kept)} rows kept. MSS keeps those near 0, whose prediction picture and sound agree on."
    )
    drawn = figures.deltas(every, kept, "delta: IoU with sound - without")
    return [page.figure(f"{key} deltas {task}", drawn, f"Samples kept of task {task + 1}", caption)]


# The search, and what it cost.


def _search(source: Source) -> Section:
    ledger = source.sweep
    assert ledger is not None
    objectives = _objectives(source)
    metric, mode = objectives[0].metric, objectives[0].mode
    trials = {number: trial for number, trial in sorted(ledger.trials.items()) if trial.state == "FINISHED"}
    trials = {number: trial for number, trial in trials.items() if metric in trial.metrics}
    values = {number: float(trial.metrics[metric]) for number, trial in trials.items()}
    states = {number: trial.state for number, trial in ledger.trials.items()}
    if not values:
        return Section("search", "The search", "")
    several = len(objectives) > 1
    what = "first objective" if several else "objective"
    drawn = [
        page.figure("history", figures.history(values, states, mode, metric), "History",
                    f"The {what} of each trial and the best so far ({mode}imised)."),
    ]  # fmt: skip
    knobs = ledger.plan["knobs"]
    shares = importance(knobs, [(trials[number].config, values[number]) for number in trials], mode)
    if shares:
        drawn.append(
            page.figure(
                "importance",
                figures.importance(shares),
                "Importance of the knobs",
                f"Share of the {what}'s variation by knob (Optuna's default method), from {len(values)} trials; "
                "with few trials a hint at most.",
            )
        )
    best_trial = best_of(trials, objectives[0]) or next(iter(values))
    best = list(values).index(best_trial)
    common = [name for name in knobs if all(name in trial.config for trial in trials.values())]
    places = {name: [trial.config[name] for trial in trials.values()] for name in common}
    for name in common:
        log = bool(knobs[name].get("attributes", {}).get("log"))
        made = figures.knob_slice(name, places[name], list(values.values()), best, metric, log)
        drawn.append(
            page.figure(
                f"slice {name}",
                made,
                f"Slice: {knob_name(name)}",
                f"The {what} over {name}; darker dots are later trials, the diamond is the best.",
            )
        )
    if common and len(values) > 1:
        drawn.append(
            page.figure(
                "parallel",
                figures.parallel(places, list(values.values()), best, mode, metric),
                "Parallel coordinates",
                f"A line per trial through its knobs to its {what}; brighter is better, the best is vermillion.",
            )
        )
    marked = set(pareto_front(trials, objectives)) if several else {best_trial}
    front = (
        f"The diamonds are the front of all {len(objectives)} objectives together: no other trial is as good in each of them "
        "and better in one."
    )
    if len(objectives) > 2:
        front += " A diamond that looks beaten here is better in another objective."
    for other in [each.metric for each in objectives[1:]] or [WORKER_SECONDS]:
        if any(other not in trial.metrics for trial in trials.values()):
            continue
        drawn.append(
            page.figure(
                f"against {other}",
                figures.scatter(
                    [float(trial.metrics[other]) for trial in trials.values()],
                    list(values.values()),
                    [number in marked for number in trials],
                    other,
                    metric,
                    ("Pareto front" if several else "best", "other trials"),
                ),
                f"Pareto front: {other}" if several else "Objective and cost",
                f"{metric} against {other}" + (f". {front}" if several else ": what a better result costs in training."),
            )
        )
    return Section("search", "The search", page.grid(drawn))


def _cost(source: Source) -> Section:
    drawn = []
    if source.jobs:
        start = source.parent.started
        names = {"networks": "training", "scores": "scoring", "counts": "evaluating", "states": "consolidating"}
        jobs = [
            (job.start - start, job.end - start, names.get(job.kind, job.kind), _short_label(job.label)) for job in source.jobs
        ]
        drawn.append(
            page.figure(
                "timeline",
                figures.timeline(jobs),
                "Timeline of the workers",
                f"{len(jobs)} jobs that were computed, by when the store got them and what they took. What was reused takes "
                "no time and is not here." + (" Numbers are trials." if source.kind == "sweep" else ""),
            )
        )
    if source.sweep is not None:
        trials = {number: trial for number, trial in sorted(source.sweep.trials.items()) if trial.metrics}
        parts = {
            "computed": [trial.worker_seconds for trial in trials.values()],
            "reused": [trial.reuse.reused_seconds for trial in trials.values()],
        }
        if trials:
            drawn.append(
                page.figure(
                    "reuse",
                    figures.stacked(list(trials), parts, "worker-seconds"),
                    "Reuse by the store",
                    "What each trial made workers compute, and what it found in the store.",
                )
            )
    elif source.results:
        mine = without_background(source.results)
        for name, title, label, scale in (
            ("worker_seconds", "Cost of training", "worker-seconds", 1.0),
            ("memory_bytes", "Memory", "MB of clips kept at the end", MEGABYTE),
        ):
            values: dict[str, list[float]] = {}
            for result in mine:
                if name in result.values:
                    values.setdefault(result.entry, []).append(result.values[name] / scale)
            if any(any(each) for each in values.values()):
                ranked = dict(sorted(values.items(), key=lambda item: statistics.fmean(item[1])))
                told = "alone, whoever computed it" if scale == 1.0 else "decoded"
                drawn.append(
                    page.figure(name, figures.dots(ranked, label), title, f"Per stream, {told}; rings are seeds and settings.")
                )
    return Section("cost", "Cost", page.grid(drawn))


def _clips(source: Source, close: Sequence[str], split: str, wishes: Wishes) -> Section:
    """Clips with what the networks say of them; a note in place of what cannot be shown."""
    room = page.Room()
    body, setting = "", source.settings[0]
    for entry in close:
        stream = source.of(entry, setting)[0] if source.of(entry, setting) else None
        if stream is None or split not in stream.splits:
            continue
        gallery = Gallery(stream, source.outputs, wishes.most_clips)
        body += f"<h3>{escape(entry)}, setting {escape(setting)}, seed {stream.seed}</h3>\n"
        try:
            body += page.paragraphs([
                f"The same clips of {split} for every entry: a frame, its sound as log-mel, the truth, and the prediction "
                "after each task. Stripes are pixels that do not count: classes not learned yet."
            ]) + page.clips(gallery.fixed(split), room)  # fmt: skip
            for task in range(len(stream.tasks)):
                for kept, told in ((True, "kept in the memory"), (False, "rejected, with the largest |delta|")):
                    found = gallery.scored(task, kept)
                    if found:
                        body += f"<h4>Training clips of task {task + 1}: {told}</h4>\n" + page.clips(found, room)
        except InputError as error:
            wishes.told(f"no clips of {entry}: {error}")
            body += page.paragraphs([f"Clips cannot be shown: {error}"])
    return Section("clips", "Clips to look at and listen to", body)


# Where it came from.


def _settings(source: Source) -> Section:
    configs: dict[tuple[str, str], dict[str, Any]] = {}
    for stream in source.streams:
        configs.setdefault(
            (stream.entry, stream.setting), {k: v for k, v in stream.config.items() if k not in ("seed", "seeds")}
        )
    if source.sweep is not None and not configs:  # nothing was tested
        configs["", ""] = dict(source.sweep.plan["experiment"])
    every = sorted({path for config in configs.values() for path in config})
    same = {
        path: first for path in every if (first := _same([config.get(path) for config in configs.values()])) is not _DIFFERENT
    }
    seeds = sorted({stream.seed for stream in source.streams})
    body = page.paragraphs(
        [
            f"Seeds {_listed(map(str, seeds))}. " * bool(seeds)
            + "Formulas of the metrics: docs/metrics.md; of the methods: docs/methods.md."
        ]
    )
    if len(configs) > 1:
        columns = {"entry": Column("method"), "setting": Column("setting"), "fields": Column("what is not the same for all")}
        rows = [
            {"entry": entry, "setting": setting,
             "fields": ", ".join(f"{path} = {_plain(config[path])}" for path in every if path not in same and path in config)}
            for (entry, setting), config in configs.items()
        ]  # fmt: skip
        body += page.table("What differs", columns, rows)
    if source.sweep is not None:
        knobs = source.sweep.plan["knobs"]
        body += page.facts("Open knobs", {name: _range(each) for name, each in knobs.items()})
    body += page.details(f"{len(same)} settings", page.facts("Settings", same))
    return Section("settings", "Method and settings", body)


def _origin(source: Source) -> Section:
    about = dict(source.environment)
    argv = about.pop("command", None)
    lines = []
    if commit := about.get("commit"):
        changed = "  # with changes that were not committed" if about.get("changed") else ""
        lines.append(f"git checkout {commit}{changed}")
    if argv:
        verb = Path(argv[0]).stem if Path(argv[0]).suffix == ".py" else Path(argv[0]).name
        lines.append(shlex.join(["python", "-m", f"orchestrator.{verb}", *argv[1:]]))
    body = page.command("\n".join(lines)) if lines else page.paragraphs(["The run did not note its command."])
    packages = about.pop("packages", {})
    if about:
        body += page.facts("Environment of the process that began it", {**about, **packages})
    else:
        body += page.paragraphs(["The run did not note its environment: it was made before that was done."])
    body += page.facts("Identity", {
        "MLflow run": source.parent.run,
        "status": source.parent.status,
        **{name: value for name, value in source.parent.tags.items() if not name.startswith("mlflow.") and len(value) < 200},
    })  # fmt: skip
    return Section("origin", "How to reproduce it", body)


_DIFFERENT = object()


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _same(values: Sequence[Any]) -> Any:
    """The value, where all are alike."""
    return values[0] if all(value == values[0] for value in values) else _DIFFERENT


def _range(knob: Mapping[str, Any]) -> str:
    """A knob's distribution in words."""
    about = knob.get("attributes", {})
    if "choices" in about:
        return "one of " + ", ".join(map(str, about["choices"]))
    told = f"{about.get('low')} to {about.get('high')}"
    return (
        told
        + (f" in steps of {about['step']}" if about.get("step") not in (None, 1) else "")
        + (", logarithmic" if about.get("log") else "")
    )


def _objectives(source: Source) -> list[Objective]:
    from orchestrator.experiment import Objective

    assert source.sweep is not None
    return [Objective(each["metric"], each["mode"]) for each in source.sweep.plan["objectives"]]


def _mean_of(streams: Sequence[StreamData], split: str) -> float:
    return statistics.fmean(stream.metrics(split)[-1]["miou/all"] for stream in streams)


def _mean(tables: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """The mean over seeds of tables of one shape; None where no seed has a value."""
    rows: list[list[float | None]] = []
    for cells in zip(*tables, strict=True):
        row: list[float | None] = []
        for values in zip(*cells, strict=True):
            known = [value for value in values if value is not None]
            row.append(statistics.fmean(known) if known else None)
        rows.append(row)
    return rows


def _shares(counts: Tensor) -> Tensor:
    """Counts as shares of the truth's pixels, float64 [C C]; 0 where a class has none."""
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


def _with_spread(row: Row, name: str) -> str:
    return f"{row.mean[name]:.3f}" + (f" ± {row.std[name]:.3f}" if name in row.std else "")


def _many(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _listed(parts: Iterable[str]) -> str:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + f" and {listed[-1]}" if listed else "nothing"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sign(mode: str) -> int:
    return -1 if mode == "max" else 1


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def _short_label(label: str) -> str:
    """The trial's number of a job's label, where it has one."""
    words = label.split()
    return words[1] if len(words) > 1 and words[0] == "trial" else ""
