"""Comparing streams: rows of numbers per stream -> a table with mean, spread and paired differences. Pure.

A stream is one entry (a method, or a variant of one) in one setting with one seed. Seeds are paired: two entries with the same
seed start from the same weights and see the data in the same order, so their difference has less spread than either.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cavs_model.metrics import summary
from orchestrator.stream import TaskOutcome

PLAN_FILE = "comparison.json"  # of a comparison's folder: its plan, its runs and what is done
STREAMS_FILE, TABLE_FILE = "streams.csv", "table.csv"
BACKGROUND_ALONE = "background alone"  # the answer that needs no network
INTERVAL = 0.95
DRAWS = 10_000  # of the bootstrap, where the resamples are too many to be listed
LISTED = 5  # seeds up to which all n^n resamples are


@dataclass(frozen=True)
class StreamResult:
    """The numbers of one stream after its last task. `error` is empty where it ended well, else the values are empty."""

    entry: str
    setting: str
    seed: int
    values: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def values_of(outcomes: Sequence[TaskOutcome]) -> dict[str, float]:
    """What a stream is compared by: the last task's metrics and diagnoses, and its cost over all tasks.

    "worker_seconds" is the training time of its networks on all their workers, whoever computed them: what the stream would
    have cost alone. "memory_bytes" is the memory's size at its end.
    """
    last = outcomes[-1]
    seconds = sum(about.seconds * about.world_size for outcome in outcomes for about in outcome.trained.values())
    return {**last.metrics(), **last.diagnoses(), "worker_seconds": seconds, "memory_bytes": float(last.memory_bytes)}


def background_alone(outcome: TaskOutcome) -> dict[str, float]:
    """The metrics of a network that calls every pixel background, on the outcome's splits: what any method must beat."""
    found: dict[str, float] = {}
    for split, counts in outcome.counts.items():
        answered = np.zeros_like(counts)
        answered[:, 0] = counts.sum(axis=1)
        found |= {f"{split}/{name}": value for name, value in summary(torch.from_numpy(answered), outcome.num_base).items()}
    return found


@dataclass(frozen=True)
class Difference:
    """Mean over paired seeds of (entry - reference), with the bootstrap interval of that mean; none of one seed (NaN)."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}{interval}"


def paired_difference(ours: Sequence[float], reference: Sequence[float]) -> Difference:
    """The difference of values paired by seed, with a percentile bootstrap over seeds.

    Up to LISTED seeds all n^n resamples are listed, so that nothing is drawn; more are resampled DRAWS times from a fixed
    seed. With three seeds the interval is little more than the smallest and the largest difference. ValueError for unequal
    lengths or none.
    """
    if len(ours) != len(reference) or not ours:
        raise ValueError(f"expected as many values as reference values, got {len(ours)} and {len(reference)}")
    differences = np.subtract(ours, reference)
    size = len(differences)
    if size == 1:
        return Difference(float(differences[0]))
    if size <= LISTED:
        picks = np.array(list(itertools.product(range(size), repeat=size)))
    else:
        picks = np.random.default_rng(0).integers(size, size=(DRAWS, size))
    means = differences[picks].mean(axis=1)
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True)
class Row:
    """A line of the table: an entry in a setting over the seeds. Empty `mean` where a seed failed or is missing."""

    setting: str
    entry: str
    seeds: tuple[int, ...]
    mean: Mapping[str, float]
    std: Mapping[str, float]  # sample standard deviation; empty for one seed
    difference: Mapping[str, Difference]  # to the reference; empty for the reference itself
    failed: str = ""


def table(results: Sequence[StreamResult], seeds: Sequence[int], reference: str = "") -> list[Row]:
    """One row per setting and entry, in order of first appearance.

    A failed or missing seed is never averaged away: the row has no mean and says which seed it was.
    """
    found = {(result.setting, result.entry, result.seed): result for result in results}
    rows = []
    for setting, entry in dict.fromkeys((result.setting, result.entry) for result in results):
        streams = [found.get((setting, entry, seed)) for seed in seeds]
        bad = [seed for seed, stream in zip(seeds, streams, strict=True) if stream is None or stream.error]
        if bad:
            rows.append(Row(setting, entry, tuple(seeds), {}, {}, {}, f"seeds {', '.join(map(str, bad))} failed"))
            continue
        values = [stream.values for stream in streams if stream is not None]
        names = [name for name in values[0] if all(name in each for each in values)]
        columns = {name: [each[name] for each in values] for name in names}
        partners = [found.get((setting, reference, seed)) for seed in seeds]
        difference = {}
        if entry != reference and all(partner is not None and not partner.error for partner in partners):
            theirs = [partner.values for partner in partners if partner is not None]
            difference = {
                name: paired_difference(column, [each[name] for each in theirs])
                for name, column in columns.items()
                if all(name in each for each in theirs)
            }
        rows.append(
            Row(
                setting,
                entry,
                tuple(seeds),
                {name: statistics.fmean(column) for name, column in columns.items()},
                {name: statistics.stdev(column) for name, column in columns.items()} if len(seeds) > 1 else {},
                difference,
            )
        )
    return rows


def markdown(rows: Sequence[Row], split: str, reference: str = "", metric: str = "miou/all") -> str:
    """The rows as one markdown table a setting, best first: `split`'s mIoUs, diagnoses, difference and cost.

    Rows without a mean come last and say why. Spread is the standard deviation over seeds.
    """
    columns = ("miou/all", "miou/old", "miou/new", "drift/old", "stream/forgetting")
    lines: list[str] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        own.sort(key=lambda row: -row.mean.get(f"{split}/{metric}", -math.inf))
        head = ["method", *columns, *([f"{metric} - {reference} [{INTERVAL:.0%}]"] if reference else []),
                "worker-seconds", "memory MB"]  # fmt: skip
        lines += [f"**{setting}**, {split}, seeds {', '.join(map(str, own[0].seeds))}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in own:
            cells = [row.entry, *(_cell(row, f"{split}/{name}") for name in columns)]
            if row.failed:
                cells[1] = row.failed
            if reference:
                difference = row.difference.get(f"{split}/{metric}")
                cells.append("" if difference is None else str(difference))
            seconds, size = row.mean.get("worker_seconds"), row.mean.get("memory_bytes")
            cells += ["" if seconds is None else f"{seconds:.0f}", "" if size is None else f"{size / 2**20:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if name not in row.mean:
        return ""
    return f"{row.mean[name]:.3f}" + (f" ± {row.std[name]:.3f}" if name in row.std else "")


def raw_csv(results: Sequence[StreamResult]) -> str:
    """Every stream's numbers, one line each, unrounded."""
    names = sorted({name for result in results for name in result.values})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", "entry", "seed", "error", *names])
    for result in results:
        values = [repr(result.values[name]) if name in result.values else "" for name in names]
        writer.writerow([result.setting, result.entry, result.seed, result.error, *values])
    return out.getvalue()


def table_csv(rows: Sequence[Row]) -> str:
    """The table, unrounded: per metric the mean, "<name>/std", and "<name>/difference", "<name>/low", "<name>/high"."""
    lines = []
    for row in rows:
        line: dict[str, object] = {"setting": row.setting, "entry": row.entry, "seeds": " ".join(map(str, row.seeds))}
        line["failed"] = row.failed
        for name, mean in row.mean.items():
            line[name] = repr(mean)
            if name in row.std:
                line[f"{name}/std"] = repr(row.std[name])
            if name in row.difference:
                found = row.difference[name]
                limits = {"difference": found.mean, "low": found.low, "high": found.high}
                line |= {f"{name}/{limit}": repr(value) for limit, value in limits.items() if not math.isnan(value)}
        lines.append(line)
    first = ["setting", "entry", "seeds", "failed"]
    names = [*first, *sorted({name for line in lines for name in line} - set(first))]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
