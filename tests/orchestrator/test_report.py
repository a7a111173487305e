"""Reports of real toys, made in this process: their numbers are the csv files', and a browser shows them without fault."""

import csv
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from cavs_model.errors import InputError
from orchestrator import cli, compare, run, status
from orchestrator.experiment import flatten, override
from orchestrator.figures import COLOURS
from orchestrator.ledger import Ledger, Trial
from orchestrator.local_backend import LocalBackend
from orchestrator.progress import Progress
from orchestrator.report import page, sections, sources
from orchestrator.report.__main__ import report
from orchestrator.report.clips import Clip, Gallery, Tile
from orchestrator.report.sources import Source, StreamData, TaskData
from orchestrator.search import MEMORY_BYTES, WORKER_SECONDS, Search, importance, mean_over_seeds
from orchestrator.store import StoredBackend
from orchestrator.stream import run_stream
from orchestrator.sweep import conclude, plan_of, test
from orchestrator.tracker import Look, Tracker, tags_of, tracking_uri

test.__test__ = False  # the sweep's verb is no test
pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning", "ignore::optuna.exceptions.ExperimentalWarning"
)

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
RUN = "cmr tones 2-2"  # what `orchestrator.run` calls it by itself
HOSTILE = '<img src=x onerror=alert(1)> & "$cmr$"'  # a name from a user's file
SPACE = f'''
"""Toys."""
import dataclasses
from search_spaces.tones import BASE as TONES, OBJECTIVES, define
from cavs_model.train import Schedule
from cavs_model.datasets.tones import Tones
BASE = dataclasses.replace(
    TONES,
    benchmark=Tones(num_classes=4, train_clips=16, val_clips=8, test_clips=8),
    schedule=Schedule(base_epochs=1, epochs=1, batch_size=8),
)
VARIANTS = {{"cmr": {{"method.samples_per_class": 2}}, {HOSTILE!r}: {{"method": "finetune"}}}}
'''
KNOBS = [
    {"method.samples_per_class": count, "method.resampling_ratio": ratio} for count, ratio in ((1, 0.1), (2, 0.2), (3, 0.3))
]


class Page(HTMLParser):
    """A page's tables (caption -> rows of data-values), the addresses it refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.text = ""
        self._caption = self._head = False
        self._name = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self._caption, self._head = tag == "caption" or (self._caption and tag == "span"), tag == "button"
        if tag == "caption":
            self._name = ""
        elif tag == "tr":
            self.tables[self._name].append([])
        elif tag in ("td", "th") and "data-value" in found:
            self.tables[self._name][-1].append(found["data-value"])

    def handle_data(self, data):
        self.text += data
        if self._caption:
            self._name += data
            self.tables[self._name], self.heads[self._name] = [], []
        if self._head:
            self.heads[self._name].append(data)

    def handle_endtag(self, tag):
        self._caption = self._head = False

    def rows(self, start):
        """The rows of the table whose caption starts so, as head -> value."""
        (caption,) = [name for name in self.tables if name.startswith(start)]
        return [dict(zip(self.heads[caption], row, strict=True)) for row in self.tables[caption] if row]


def a_sweep(outputs: Path) -> None:
    """What orchestrator.sweep leaves, without Ray: three trials drawn by hand."""
    space = cli.load_space("tones")
    base = override(space.base, {"schedule.base_epochs": 1, "schedule.epochs": 1, "benchmark.train_clips": 16,
                                 "benchmark.val_clips": 8, "benchmark.test_clips": 8})  # fmt: skip
    space = cli.SearchSpace(space.name, base, space.objectives, space.define)
    tracker = Tracker(tracking_uri(outputs), outputs / "artifacts")
    folder = outputs / "sweeps" / "toy"
    folder.mkdir(parents=True)
    ledger = Ledger(folder, json.loads(json.dumps(plan_of(space, Search(4)))))
    ledger.update(parent=tracker.start("toy", "sweep", {}, tags=tags_of(base)))
    tracker.origin(ledger.parent)
    for number, knobs in enumerate(KNOBS, start=1):
        store = StoredBackend(LocalBackend(outputs / "data"), outputs / "store", user="sweep/toy")
        ledger.begin(number, knobs, {})
        outcomes = list(run_stream(override(base, knobs), 0, store, label=f"trial {number} "))
        metrics = mean_over_seeds((outcomes[-1],)) | {MEMORY_BYTES: 1.0, WORKER_SECONDS: 1.0,
                                                      "computed_worker_seconds": store.reuse.computed_seconds,
                                                      "reused_worker_seconds": store.reuse.reused_seconds}  # fmt: skip
        ledger.change(number, state="FINISHED", metrics=metrics)
    ledger.begin(4, KNOBS[0], {})
    ledger.change(4, state="FAILED", error="DivergedError: the loss is not finite")
    with open("/dev/null", "w") as nowhere:
        test(override(base, KNOBS[1]), 2, store, tracker, ledger, Progress(nowhere, (1.0, 1.0), (0,), 1))
    conclude(space.objectives, ledger, tracker, "")
    tracker.end(ledger.parent)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A comparison of two entries over two seeds, a sweep of four trials and a run, each with its report."""
    root = tmp_path_factory.mktemp("outputs")
    space = root / "reported_toys.py"
    space.write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)

        def call(verb, *arguments):
            patch.setattr("sys.argv", [verb.__name__, *arguments, "--outputs", str(root)])
            assert cli.main(verb) == 0

        call(compare.compare, str(space), "--local", "--seeds", "0,1", "--name", "toys", "--no-report")
        call(run.run, str(space), "--local")
        a_sweep(root)
        call(report, "toys")
        call(report, "toy")
        call(report, RUN)
    return root


@pytest.fixture(scope="module")
def tracker(outputs):
    return Tracker(f"sqlite:///{outputs}/mlflow.db", outputs / "artifacts")


@pytest.fixture(scope="module")
def comparison(outputs):
    return Page((outputs / "comparisons" / "toys" / "report.html").read_text())


@pytest.fixture(scope="module")
def searched(outputs):
    return Page((outputs / "sweeps" / "toy" / "report.html").read_text())


def test_a_comparisons_numbers_are_those_of_its_csv(outputs, comparison):
    with open(outputs / "comparisons" / "toys" / "table.csv") as file:
        expected = {line["entry"]: line for line in csv.DictReader(file)}
    rows = comparison.rows("Setting 2-2, val")
    assert [row["method"] for row in rows] == sorted(expected, key=lambda entry: -float(expected[entry]["val/miou/all"]))
    for row in rows:
        line = expected[row["method"]]
        assert row["mIoU all"] == line["val/miou/all"]
        assert row["drift"] == line["val/drift/old"]
        assert row["to cmr"] == line["val/miou/all/difference"]
    with open(outputs / "comparisons" / "toys" / "streams.csv") as file:
        streams = list(csv.DictReader(file))
    found = comparison.rows("Streams, after the last task")
    assert [(row["method"], row["seed"], row["val/miou/new"]) for row in found] == [
        (line["entry"], line["seed"], line["val/miou/new"]) for line in streams
    ]
    best = max(
        (line for line in expected.values() if line["entry"] != "background alone"),
        key=lambda line: float(line["val/miou/all"]),
    )
    assert f"a mean IoU of {float(best['val/miou/all']):.3f} ± " in comparison.text


def test_a_sweeps_numbers_are_those_of_its_csv(outputs, searched):
    with open(outputs / "sweeps" / "toy" / "trials.csv") as file:
        expected = list(csv.DictReader(file))
    rows = searched.rows("Trials, best first")
    assert [row["trial"] for row in rows] == [line["trial"] for line in expected]
    assert [row["val/miou/all"] for row in rows] == [line["val/miou/all"] for line in expected]
    assert [row["samples_per_class"] for row in rows] == [line["method.samples_per_class"] for line in expected]
    assert rows[-1]["error"] == "DivergedError: the loss is not finite"
    assert f"val/miou/all {float(expected[0]['val/miou/all']):.4f}" in searched.text
    tested = [row for row in searched.rows("The best configuration") if row["split"] == "test"]
    ((parent,),) = [runs(outputs, "sweep")]
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    (stream,) = [each for each in runs(outputs, "stream") if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    logged = [point.value for point in client.get_metric_history(stream.info.run_id, "test/miou/all")]
    assert [float(row["mIoU all"]) for row in tested] == logged
    assert "report.html" in [item.path for item in client.list_artifacts(parent.info.run_id)]


def runs(outputs, kind):
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("cavs")
    return list(client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'"))


OVER_TASKS = [
    "All classes", "Old classes", "New classes", "Drift to background", "Old called new", "New called old", "Forgetting",
]  # fmt: skip
CLOSER = ["Task by task", "Class by class", "New called old, class by class", "Old called new, class by class"]
CMR = [*CLOSER, "Samples kept of task 1", "Collisions before task 2"]  # nothing is kept of the last task
SEARCH = [
    "History", "Importance of the knobs", "Slice: samples_per_class", "Slice: resampling_ratio", "Parallel coordinates",
    "Objective and cost",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("sweeps/toy", [*OVER_TASKS, *CMR, *SEARCH, "Timeline of the workers", "Reuse by the store"]),
        ("reports/cmr-tones-2-2", [*OVER_TASKS, *CMR, "Timeline of the workers"]),
    ],
)
def test_the_figures_of_a_report(outputs, name, titles):
    assert titles_of((outputs / name / "report.html").read_text()) == titles


def test_the_figures_of_a_comparison(outputs, comparison):
    ranked = [row["method"] for row in comparison.rows("Setting 2-2, val") if row["method"] != "background alone"]
    close = CMR if ranked[0] == "cmr" else [*CLOSER, *CMR]  # the best, and the reference
    expected = ["Against cmr, val", *OVER_TASKS, *close, "Timeline of the workers", "Cost of training", "Memory"]
    assert titles_of((outputs / "comparisons" / "toys" / "report.html").read_text()) == expected


def titles_of(text):
    return re.findall(r"<figure><h4>(.*?)</h4>", text)


def drawn(source, **wishes):
    """The figures of a report as matplotlib has them, by title, and the page with their captions alone."""
    found = {}

    def kept(name, figure, title, caption):
        assert title not in found
        found[title] = figure
        return f"<p>{title}. {caption}</p>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "figure", kept)
        text = sections.written(source, sections.Wishes(clips=False, **wishes))
    return found, Page(text)


def lines_of(figure, label):
    """The points of the figure's line of this name."""
    ((x, y),) = [line.get_data() for line in figure.axes[0].lines if line.get_label() == label]
    return list(x), list(y)


def bars_of(axes):
    return [bar.get_width() for bar in axes.patches]


def shown_in(figure):
    """The numbers of a matrix."""
    return figure.axes[0].images[0].get_array().filled(np.nan)


def test_a_comparisons_figures_show_what_the_runs_logged(outputs, tracker):
    source = sources.find("comparisons/toys", outputs, tracker)
    found, _ = drawn(source, entries=("cmr",))
    with open(outputs / "comparisons" / "toys" / "table.csv") as file:
        table = {line["entry"]: line for line in csv.DictReader(file)}
    with open(outputs / "comparisons" / "toys" / "streams.csv") as file:
        streams = [line for line in csv.DictReader(file) if line["entry"] != "background alone"]
    against = [line.get_xdata()[0] for line in found["Against cmr, val"].axes[0].lines if line.get_marker() == "o"]
    differences = [float(line["val/miou/all/difference"]) for line in table.values() if line["val/miou/all/difference"]]
    assert against == sorted(differences, reverse=True)
    for title, metric in (("All classes", "val/miou/all"), ("Drift to background", "val/drift/old")):
        tasks, values = lines_of(found[title], "cmr")
        assert tasks == [1, 2]
        assert values[-1] == pytest.approx(float(table["cmr"][metric]))
    means = [line.get_xdata()[0] for line in found["Forgetting"].axes[0].lines if line.get_color() == COLOURS[0]]
    lost = [float(table[entry]["val/stream/forgetting"]) for entry in ("cmr", HOSTILE)]
    assert means == pytest.approx(sorted(lost))
    for title, metric, unit in (("Cost of training", "worker_seconds", 1), ("Memory", "memory_bytes", 2**20)):
        rings = [x for line in found[title].axes[0].lines if line.get_markerfacecolor() == "none" for x in line.get_xdata()]
        assert sorted(rings) == pytest.approx(sorted(float(line[metric]) / unit for line in streams))
    # Of cmr alone: the artifacts of its two runs.
    logged = [tracker.contents(stream.run.run) for stream in source.of("cmr", "2-2")]
    rows = [each["task_1/matrix_val.json"]["miou"] for each in logged]
    np.testing.assert_allclose(shown_in(found["Task by task"]), np.mean(np.array(rows, dtype=float), axis=0))
    ious = [list(each["task_1/confusion_val.json"]["iou"].values()) for each in logged]
    np.testing.assert_allclose(shown_in(found["Class by class"])[:, 1], np.mean(np.array(ious, dtype=float), axis=0))
    counts = sum(np.array(each["task_1/confusion_val.json"]["counts"]) for each in logged)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(shown_in(found["New called old, class by class"]), shares[3:, 1:3])
    np.testing.assert_allclose(shown_in(found["Old called new, class by class"]), shares[1:3, 3:])
    first = logged[0]
    panels = found["Collisions before task 2"].axes
    records = first["task_1/collisions.json"]["classes"]
    for axes, key in zip(panels[:3], ("collisions", "frequency", "drawn"), strict=True):
        assert bars_of(axes) == [record[key] for record in records]
    after = np.array(first["task_1/confusion_val.json"]["counts"])[3:]
    ids = [["background", *"abcd"].index(record["class"][0]) for record in records]
    assert bars_of(panels[3]) == pytest.approx([after[:, class_id].sum() / after.sum() for class_id in ids])
    every, kept = found["Samples kept of task 1"].axes[0].containers
    assert sum(bar.get_height() for bar in kept) == len(first["task_0/memory.json"]["rows"]) == 4
    assert sum(bar.get_height() for bar in every) == len(first["task_0/scores.json"]["sample_ids"])


def test_a_sweeps_figures_show_its_ledger(outputs, tracker):
    source = sources.find("toy", outputs, tracker)
    found, _ = drawn(source)
    trials = [source.sweep.trials[number] for number in (1, 2, 3)]
    values = [trial.metrics["val/miou/all"] for trial in trials]
    assert lines_of(found["History"], "best so far") == ([1, 2, 3], list(np.maximum.accumulate(values)))
    assert lines_of(found["History"], "trial") == ([1, 2, 3], values)
    assert lines_of(found["History"], "failed, pruned or stopped")[0] == [4]
    for knob in ("samples_per_class", "resampling_ratio"):
        places = [trial.config[f"method.{knob}"] for trial in trials]
        axes = found[f"Slice: {knob}"].axes[0]
        assert axes.collections[0].get_offsets().tolist() == [list(each) for each in zip(places, values, strict=True)]
        assert axes.lines[0].get_ydata()[0] == max(values)
    (lines,) = found["Parallel coordinates"].axes[0].collections
    assert len(lines.get_segments()) == 3
    assert lines_of(found["Objective and cost"], "best") == ([1.0], [max(values)])
    computed, reused = found["Reuse by the store"].axes[0].containers
    assert [bar.get_width() for bar in computed] == [trial.worker_seconds for trial in trials]
    assert [bar.get_width() for bar in reused] == [trial.metrics["reused_worker_seconds"] for trial in trials]
    bars = [len(patch.get_path()) // 5 for patch in found["Timeline of the workers"].axes[0].patches]
    assert sum(bars) == len(source.jobs) > 6


def with_trials(source, objectives, trials):
    """The sweep with other objectives and trials."""
    plan = {**source.sweep.plan, "objectives": [{"metric": name, "mode": mode} for name, mode in objectives]}
    return dataclasses.replace(source, sweep=dataclasses.replace(source.sweep, plan=plan, trials=trials))


def test_each_further_objective_has_a_figure_with_the_front_of_all(outputs, tracker):
    source = sources.find("toy", outputs, tracker)
    objectives = [("val/miou/all", "max"), (MEMORY_BYTES, "min"), (WORKER_SECONDS, "min")]
    values = [(0.3, 3e6, 30.0), (0.2, 1e6, 40.0), (0.1, 2e6, 10.0), (0.05, 4e6, 50.0)]  # the last is beaten by all
    names = [metric for metric, _ in objectives]
    trials = {
        number: Trial(KNOBS[number % 3], "FINISHED", dict(zip(names, each, strict=True)))
        for number, each in enumerate(values, start=1)
    }
    told = "The diamonds are the front of all {} objectives together"
    for count, front in ((2, [0, 1]), (3, [0, 1, 2])):
        found, read = drawn(with_trials(source, objectives[:count], trials))
        assert [title for title in found if "Pareto" in title or "cost" in title] == [
            f"Pareto front: {name}" for name in names[1:count]
        ]
        for place, name in enumerate(names[1:count], start=1):
            figure = found[f"Pareto front: {name}"]
            assert lines_of(figure, "Pareto front") == ([values[n][place] for n in front], [values[n][0] for n in front])
            assert len(lines_of(figure, "other trials")[0]) == 4 - len(front)
        assert read.text.count(told.format(count)) == count - 1
        assert read.text.count("A diamond that looks beaten here") == (count - 1) * (count > 2)
        assert "The first objective of each trial" in read.text
        assert [row["trial"] for row in read.rows("Pareto front")] == [str(n + 1) for n in front]


def test_a_report_on_a_thousand_trials_is_bounded(outputs, tracker):
    source = sources.find("toy", outputs, tracker)
    trials = {}
    for number, (value, seconds, ratio) in enumerate(np.random.default_rng(0).random((1000, 3)).tolist(), start=1):
        config = {"method.samples_per_class": 1 + number % 4, "method.resampling_ratio": 0.05 + 0.25 * ratio}
        metrics = {"val/miou/all": value, WORKER_SECONDS: seconds, "computed_worker_seconds": seconds}
        trials[number] = Trial(config, "FINISHED", metrics)
    text = sections.written(with_trials(source, [("val/miou/all", "max")], trials), sections.Wishes(clips=False))
    assert len(text) < 3 * 2**20
    assert max(float(height) for height in re.findall(r'<svg [^>]*\bheight="([\d.]+)pt"', text)) < 72 * 8
    assert len(Page(text).rows("Trials, best first")) == 1000


def three_tasks(*shares):
    """A run of one seed over three tasks, without its networks; after each task every class has this IoU.

    Each task keeps a clip of each of its classes, one with a class of a later task where there is one.
    """
    space = cli.load_space("tones")
    experiment = override(space.base, {"scenario.setting": "2-1", "benchmark.train_clips": 16})
    look = Look("0" * 32, "three seed 0", "FINISHED", 0.0, 1.0, {}, {}, {})
    names = ("background", *experiment.scenario.learned_order(experiment.benchmark))
    rows, tasks = [], []
    for task, share in zip(experiment.scenario.tasks(experiment.benchmark), shares, strict=True):
        counts = (torch.eye(task.num_classes, dtype=torch.float64) * 100 * share).long()
        counts[1:, 0] = 100 - counts.diagonal()[1:]
        ids = [sample.id for sample in task.train]
        for class_id in task.new_classes:
            clip = max((each for each in task.train if class_id in each.classes), key=lambda each: each.classes[-1])
            rows = [*rows, {"sample_id": clip.id, "class": names[class_id]}]
        delta = [0.01 * (len(ids) - place) for place in range(len(ids))]
        columns = {"delta": delta, "audio_visual": delta, "visual_only": [0.0] * len(ids)}
        tasks.append(TaskData({"val": counts}, rows, {}, {"sample_ids": ids, "columns": columns}))
    stream = StreamData(look, "cmr", {**flatten(experiment), "seed": 0}, names, tuple(tasks))
    return Source("run", "three", Path(), Path(), look, (stream,), {}, (), splits=("val",))


def test_a_clip_kept_for_an_older_class_is_none_that_a_later_task_kept(monkeypatch):
    source = three_tasks(0.5, 0.5, 0.5)
    (stream,) = source.streams
    monkeypatch.setattr(Gallery, "_predict", lambda self, experiment, split, positions, *more: np.zeros(len(positions)))
    monkeypatch.setattr(Gallery, "_clip", lambda self, experiment, split, position, *more: f"train-{position:05d}")
    gallery = Gallery(stream, Path())
    own = [["train-00002", "train-00015"], ["train-00011"], ["train-00003"]]  # of classes a and b, c, d
    for task, kept in enumerate(own):
        assert [row["sample_id"] for row in stream.kept(task)] == kept
        assert sorted(gallery.scored(task, kept=True)) == kept
    # Class d sounds in two clips of the last task that are in the memory for b and c: it rejected them, as it did the fourth.
    assert gallery.scored(2, kept=False) == ["train-00007", "train-00011", "train-00015"]
    found, _ = drawn(source)
    for task, kept in enumerate(own):
        _, strokes = found[f"Samples kept of task {task + 1}"].axes[0].containers
        assert sum(bar.get_height() for bar in strokes) == len(kept)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.5, 0.5, 0.25), "is 0.250 worse than at its best before."),
        ((0.25, 0.25, 0.5), "is 0.250 better than at its best before."),
        ((0.5, 0.5, 0.5), "is as good as at its best before."),
    ],
)
def test_what_was_forgotten_is_said_the_right_way_round(shares, words):
    _, read = drawn(three_tasks(*shares))
    assert f"the mean IoU of the earlier tasks' classes {words}" in read.text


def test_a_band_is_told_of_where_there_is_one(comparison, searched):
    told = "; the band is one standard deviation over seeds."
    assert comparison.text.count(told) == len(OVER_TASKS) - 1
    assert told not in searched.text  # one seed was tested


@pytest.mark.parametrize("name", [RUN, "cmr-tones-2-2"])
def test_a_run_is_found_by_its_name_and_by_its_folders(outputs, tracker, name):
    source = sources.find(name, outputs, tracker)
    assert (source.name, source.folder) == (RUN, outputs / "reports" / "cmr-tones-2-2")
    assert source.jobs  # by the name that the store has
    assert status.find(name, outputs).path.parent == outputs / "runs" / "cmr-tones-2-2"


def test_of_many_runs_the_latest_are_named(tmp_path):
    class Runs:
        def looks(self, tags):
            return [Look(str(number), f"run {number} seed 0", "FINISHED", 0.0, 1.0, {}, {}, {}) for number in range(30)]

    with pytest.raises(InputError) as error:
        sources.find("nobody", tmp_path, Runs())
    shown = ", ".join(f"'run {number}'" for number in range(29, 19, -1))
    assert str(error.value).endswith(f"no run in MLflow; there are: {shown} and 20 more")


@pytest.mark.parametrize("name", ["comparisons/toys", "sweeps/toy", "reports/cmr-tones-2-2"])
def test_a_page_needs_nothing_else_and_is_small(outputs, name):
    text = (outputs / name / "report.html").read_text()
    assert len(text) < 4 * 2**20  # toys; the limit is 20 MB
    read = Page(text)
    assert {address.split(":")[0].split("#")[0] for address in read.addresses} <= {"data", ""}
    assert not re.search(r"url\((?!['\"]?#)|@import|https?://(?!www\.w3\.org/)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {one or other for one, other in used} <= set(ids)
    assert all(f"--{each}" not in text for each in ("1a1a1b", "c9c9ca"))
    assert len(re.findall(r"<svg ", text)) == len(re.findall(r'<svg role="img" aria-label="[^"]{20,}', text))
    assert "-m orchestrator." in read.text
    assert "mlflow" in read.text


def test_names_from_outside_are_text(outputs, comparison):
    text = (outputs / "comparisons" / "toys" / "report.html").read_text()
    assert "<img src=x" not in text
    assert HOSTILE in comparison.text


def test_kept_and_rejected_clips_are_shown_with_their_delta(outputs, tracker, comparison):
    assert "Training clips of task 1: kept in the memory" in comparison.text
    assert "rejected, with the largest |delta|" in comparison.text
    source = sources.find("comparisons/toys", outputs, tracker)
    (stream, _) = source.of("cmr", "2-2")
    scores = stream.tasks[0].scores
    kept = {row["sample_id"] for row in stream.tasks[0].memory}
    shown = re.findall(
        r"(train-\d+)sounding: [^;]+; IoU ([\d.]+) with sound, ([\d.]+) without: delta ([+-][\d.]+)", comparison.text
    )
    assert len(shown) == 2 * 3
    for number, (sample, *values) in enumerate(shown):
        place = scores["sample_ids"].index(sample)
        both, alone, delta = (scores["columns"][name][place] for name in ("audio_visual", "visual_only", "delta"))
        assert [float(value) for value in values] == pytest.approx([both, alone, delta], abs=6e-4)
        assert (sample in kept) == (number < 3)
    largest = max((each for each in scores["sample_ids"] if each not in kept),
                  key=lambda each: abs(scores["columns"]["delta"][scores["sample_ids"].index(each)]))  # fmt: skip
    assert abs(scores["columns"]["delta"][scores["sample_ids"].index(shown[3][0])]) == abs(
        scores["columns"]["delta"][scores["sample_ids"].index(largest)]
    )


def test_clips_for_which_there_is_no_room_are_left_out_and_told():
    tile = Tile("frame", "a frame", "data:" + "x" * 95)
    clip = Clip("one", ("bell",), "", (tile,), (), "data:" + "y" * 45, 1.0)
    room = page.Room(pictures=200, sounds=50)
    text = page.clips([clip] * 3, room)
    assert text.count("<article") == 2
    assert text.count("<audio") == text.count("Its sound was left out") == 1
    assert "1 clips were left out" in text


def test_a_missing_checkpoint_is_told_in_its_place(outputs, tracker, tmp_path):
    shutil.copytree(outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("networks"))
    source = sources.find("toys", tmp_path / "outputs", tracker)
    told = []
    text = sections.written(source, sections.Wishes(told=told.append))
    assert "Clips cannot be shown: no checkpoint at" in text
    assert told
    assert told[0].startswith("no clips of ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody",), ("'nobody'", "sweeps/toy", "comparisons/toys", f"'{RUN}'")),
        (("0" * 32,), ("0" * 32,)),
        (("toys", "--split", "test"), ("--split", "'test'", "val")),
        (("toys", "--entry", "plop"), ("--entry", "'plop'", "cmr")),
    ],
)
def test_bad_arguments_are_told_with_the_valid_ones(outputs, monkeypatch, capsys, arguments, words):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", ["report", *arguments, "--outputs", str(outputs)])
    assert cli.main(report) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_a_dry_run_of_a_report_writes_nothing(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["report", "toys", "--outputs", str(outputs), "--to", str(page), "--dry-run"])
    assert cli.main(report) == 0
    assert f"splits val; the report would be {page}" in capsys.readouterr().out
    assert not page.exists()


def test_a_report_for_debugging_has_a_clip_of_each_kind(outputs, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    clips = []
    for more in ([], ["--debug"]):
        page = tmp_path / f"page{len(more)}.html"
        monkeypatch.setattr("sys.argv", ["report", "toys", "--outputs", str(outputs), "--to", str(page), *more])
        assert cli.main(report) == 0
        section = page.read_text().partition("Clips to look at and listen to</h2>")[2]
        clips.append((section.count("Training clips of task"), section.count('class="clip"')))
    assert clips[1][0] == clips[0][0] > 0
    assert clips[0][0] < clips[1][1] < clips[0][1]


def test_a_report_that_fails_is_told_and_fails_nothing_else(tmp_path, capsys):
    cli.write_report("sweeps/nobody", tmp_path)
    shown = capsys.readouterr().out
    assert "no report (error: 'sweeps/nobody' is no sweep" in shown
    assert "python -m orchestrator.report sweeps/nobody" in shown


def test_the_knob_that_moves_the_objective_is_the_important_one():
    knobs = {name: {"name": "FloatDistribution", "attributes": {"low": 0.0, "high": 1.0, "step": None, "log": False}}
             for name in ("idle", "strong")}  # fmt: skip
    rng = np.random.default_rng(0)
    trials = [({"idle": float(idle), "strong": float(strong)}, float(strong)) for idle, strong in rng.random((20, 2))]
    shares = importance(knobs, trials, "max")
    assert shares["strong"] > 0.8 > 0.2 > shares["idle"]
    assert importance(knobs, trials[:2], "max") == {}


def test_the_clip_that_is_heard_is_the_benchmarks():
    benchmark = cli.load_space("tones").base.benchmark
    wave = benchmark.waveform("val", 0)
    spectrum = np.abs(np.fft.rfft(wave))
    loudest = np.fft.rfftfreq(len(wave), 1 / 16000)[spectrum.argmax()]
    pitches = [benchmark.pitch_hz(class_id) for class_id in benchmark.samples("val")[0].classes]
    assert min(abs(loudest - pitch) for pitch in pitches) < 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One headless browser for all pages."""
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={profile}", "window-size=1280,900"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


LOADED = """
const done = arguments[0], sounds = [...document.querySelectorAll("audio")];
const look = () => sounds.every((each) => each.readyState >= 1 || each.error)
  ? done(sounds.map((each) => each.error ? -1 : each.duration)) : setTimeout(look, 50);
look();
"""
COLUMN = "return [...arguments[0].tBodies[0].rows].map((row) => row.children[arguments[1]].dataset.value)"


@pytest.mark.parametrize("name", ["comparisons/toys", "sweeps/toy"])
def test_in_a_browser(outputs, browser, name):
    browser.get((outputs / name / "report.html").as_uri())
    browser.set_script_timeout(10)
    durations = browser.execute_async_script(LOADED)
    assert len(durations) >= 6
    assert durations == pytest.approx([2.0] * len(durations))  # a clip of tones has two frames, a second each
    assert browser.execute_script("return [...document.images].every((each) => each.complete && each.naturalWidth > 0)")
    assert browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].every((each) => each.getBoundingClientRect().height > 40)"
    )
    # A table sorts at a click, and the other way at the next.
    found = browser.find_element("css selector", "#results table")
    heads = [each.text.split()[0] for each in found.find_elements("css selector", "thead button")]
    column = heads.index("mIoU" if name.startswith("comparisons") else "val/miou/all")
    button = found.find_elements("css selector", "thead button")[column]
    orders = []
    for _ in range(2):
        browser.execute_script("arguments[0].click()", button)
        values = browser.execute_script(COLUMN, found, column)
        orders.append([float(value) for value in values if value])
        assert values[len(orders[-1]) :] == [""] * (len(values) - len(orders[-1]))  # empty cells come last
    assert orders == [sorted(orders[0], reverse=True), sorted(orders[0])]
    assert len(orders[0]) == 3
    heading = button.find_element("xpath", "..")
    assert heading.get_attribute("aria-sort") == "ascending"
    # A phone: the page is as wide as the screen, and wide tables scroll within it.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") == 375
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
