"""Scores (MSS, collisions) and confusion counts, vectorised over a batch, against loops over frames and classes.

The loops are what a plain reading does: for each clip, frame and class a mask of the truth and one of the prediction. Both
read the same predictions; the networks' own time is left out of that comparison, as it is the same in both. Then the whole
pass: both networks on the same batch of one pass over the data against one pass a network. `--workers` adds Ray: the same
scores by one worker and by two, and by one process and two that share nothing, for what the cores themselves can do. It needs a
machine with nothing else to do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks._measure import Report, alternate, arguments
from cavs_model import checkpoint
from cavs_model.datasets import cache
from cavs_model.datasets.collage import Collage
from cavs_model.evaluate import Data, ScoreJob, frozen, passes, score_samples
from cavs_model.methods.cmr import CMR
from cavs_model.metrics import confusion
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.types import (
    AUDIO_VISUAL,
    BACKGROUND,
    IGNORE,
    VISUAL_ONLY,
    Batch,
    LabelRule,
    Network,
    Prediction,
    ScoreTable,
    Task,
)
from cavs_model.worker import arithmetic

METHOD = CMR()
WAIT_SECONDS = 0.02


def looped_mss(models: Mapping[str, Network], batch: Batch, task: Task) -> dict[str, list[float]]:
    """S of both networks per clip: per frame and class an intersection and a union."""
    scores: dict[str, list[float]] = {}
    for name in (AUDIO_VISUAL, VISUAL_ONLY):
        prediction = models[name](batch).classes
        scores[name] = []
        for clip in range(len(batch)):
            frames = []
            for frame in range(batch.label.shape[1]):
                said, true = prediction[clip, frame], batch.label[clip, frame]
                known = true != IGNORE
                if not (batch.real_frame[clip, frame] and batch.labelled_frame[clip, frame] and known.any()):
                    continue
                ious = []
                for label in range(task.num_classes):
                    one, other = (said == label) & known, (true == label) & known
                    union = int((one | other).sum())
                    if union:
                        ious.append(int((one & other).sum()) / union)
                frames.append(sum(ious) / len(ious))
            scores[name].append(sum(frames) / len(frames) if frames else 0.0)
    return scores


def looped_collisions(models: Mapping[str, Network], batch: Batch, task: Task) -> list[tuple[int, int, int]]:
    """The commonest pair per clip and its pixels: per frame, old class and new class a mask."""
    prediction = models[AUDIO_VISUAL](batch).classes
    found = []
    for clip in range(len(batch)):
        pairs: dict[tuple[int, int], int] = {}
        for frame in range(batch.label.shape[1]):
            if not (batch.real_frame[clip, frame] and batch.labelled_frame[clip, frame]):
                continue
            for old in range(1, task.num_old):
                for new in task.new_classes:
                    pixels = int(((prediction[clip, frame] == old) & (batch.label[clip, frame] == new)).sum())
                    if pixels:
                        pairs[old, new] = pairs.get((old, new), 0) + pixels
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=(0, 0))
        found.append((*best, pairs.get(best, 0)))
    return found


def looped_confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixel counts [C C]: per frame and pair of classes a mask."""
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for said, true in zip(prediction.flatten(0, 1), label.flatten(0, 1), strict=True):
        for row in range(num_classes):
            mask = true == row
            for column in range(num_classes):
                counts[row, column] += int((mask & (said == column)).sum())
    return counts


class Said(Prediction):
    """A prediction whose classes are known already."""

    @property
    def classes(self) -> Tensor:
        return self.logits


def told(predictions: Mapping[str, Tensor]) -> dict[str, Network]:
    """Networks that say what is given, so that only the scoring is timed."""
    return {name: lambda batch, said=said: Said(said, ()) for name, said in predictions.items()}  # type: ignore[misc]


def compare(report: Report, options: object, size: int, frames: int, clips: int, num_old: int, num_classes: int) -> None:
    """Loops and ours on random predictions of blobs, checked to agree first."""
    g = torch.Generator().manual_seed(0)

    def blobs(first: int, last: int) -> Tensor:
        ids = torch.randint(first, last, (clips, frames, 6, 6), generator=g)
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.5, BACKGROUND, ids)
        return torch.nn.functional.interpolate(ids.float(), size=(size, size)).long()

    label = blobs(num_old, num_classes).to(torch.uint8)
    real = torch.ones(clips, frames, dtype=torch.bool)
    image = torch.zeros(clips, frames, 3, size, size, dtype=torch.uint8)
    batch = Batch(tuple(map(str, range(clips))), image, torch.zeros(clips, frames, 1, 1), label, real, real, real[:, 0])
    task = report_task(num_old, num_classes)
    models = told({name: blobs(1, num_classes) for name in (AUDIO_VISUAL, VISUAL_ONLY)})
    before = told({AUDIO_VISUAL: blobs(1, num_old)})
    said = models[AUDIO_VISUAL](batch).classes

    after, loops = METHOD.score_after(models, batch, task), looped_mss(models, batch, task)
    assert all(np.allclose(after.columns[name], loops[name]) for name in loops)
    pairs = METHOD.score_before(before, batch, task)
    expected = looped_collisions(before, batch, task)
    assert [
        tuple(map(int, row)) for row in zip(*(pairs.columns[n] for n in ("old_class", "new_class", "pixels")), strict=True)
    ] == expected
    assert torch.equal(confusion(said, label, num_classes), looped_confusion(said, label, num_classes))

    rows = []
    questions = {
        "MSS, both networks": (lambda: looped_mss(models, batch, task), lambda: METHOD.score_after(models, batch, task)),
        "collisions": (lambda: looped_collisions(before, batch, task), lambda: METHOD.score_before(before, batch, task)),
        "confusion counts": (
            lambda: looped_confusion(said, label, num_classes),
            lambda: confusion(said, label, num_classes),
        ),
    }
    for name, (loop, ours) in questions.items():
        times = alternate({"loop": loop, "ours": ours}, options.rounds, options.pause)  # type: ignore[attr-defined]
        report.raw[f"{name}, {size} px, {frames} frames, {clips} clips"] = times.raw()
        wall, _, faster, faster_cpu = times.row("ours", "loop")
        rows.append((name, times.row("loop", "loop")[0], wall, faster, faster_cpu))
    report.say(
        f"{clips} clips of {frames} frames, {size} px, {num_old} + {num_classes - num_old} classes, given the predictions:"
    )
    report.say()
    report.table(["", "loop, s", "ours, s", "times as fast by the clock", "by processor time"], rows)


def report_task(num_old: int, num_classes: int) -> Task:
    return Task(1, num_old, num_classes, (), LabelRule(range(num_old, num_classes), BACKGROUND))


def one_pass(report: Report, options: object, root: str, clips: int) -> None:
    """Both networks in one pass over the data against a pass for each, on Collage with the default network."""
    benchmark = Collage(frames=1, train_clips=clips)
    cache.build(benchmark, ["train"], root)
    scenario = Scenario(setting="16-8")
    task = scenario.tasks(benchmark)[0]
    data = Data(benchmark, root, scenario.learned_order(benchmark))
    numbers = arithmetic("fp32", torch.device("cpu"))
    models = {
        name: frozen(AVSegmenter(NetworkConfig(), task.num_classes, name), numbers) for name in (AUDIO_VISUAL, VISUAL_ONLY)
    }
    job = ScoreJob("after", METHOD, task, data, 16, "fp32")
    split, table = data.open("train"), data.table(task.train_rule)

    def both() -> ScoreTable:
        batches = passes(split, job.sample_ids, table, 16, torch.device("cpu"))
        return ScoreTable.concatenate([METHOD.score_after(models, batch, task) for batch in batches])

    def each() -> None:
        for name in models:
            alone = {
                AUDIO_VISUAL: models[name],
                VISUAL_ONLY: lambda batch: Prediction(torch.zeros(len(batch), 1, 1, 96, 96), ()),
            }
            batches = passes(split, job.sample_ids, table, 16, torch.device("cpu"))
            ScoreTable.concatenate([METHOD.score_after(alone, batch, task) for batch in batches])

    times = alternate({"a pass for each network": each, "one pass for both": both}, options.rounds, options.pause)  # type: ignore[attr-defined]
    report.raw["passes"] = times.raw()
    first = "a pass for each network"
    report.say(f"The whole scoring of {len(job.sample_ids)} clips of Collage, default network, fp32:")
    report.say()
    report.table(["", *times.columns(first)], [(name, *times.row(name, first)) for name in times.wall])


def workers(report: Report, options: object, root: str, clips: int) -> None:
    """The scores of the same clips by Ray tasks on one core and on two."""
    import ray

    from orchestrator.experiment import Resources
    from orchestrator.ray_backend import RayBackend, connected

    benchmark = Collage(frames=1, train_clips=clips)
    scenario = Scenario(setting="16-8")
    task = scenario.tasks(benchmark)[0]
    job = ScoreJob("after", METHOD, task, Data(benchmark, root, scenario.learned_order(benchmark)), 16, "fp32")
    paths = {}
    for name in (AUDIO_VISUAL, VISUAL_ONLY):
        config = NetworkConfig()
        paths[name] = str(Path(root) / name)
        about = checkpoint.About(name, task.num_classes, vars(config), (), clips=clips, seconds=clips / 40, world_size=1)
        checkpoint.save(Path(paths[name]), AVSegmenter(config, task.num_classes, name).state_dict(), about)
    with connected():
        backend = RayBackend(Path(root), Path(root) / "scratch", Resources())

        backend.prepare(benchmark, ("train",))

        def score() -> None:
            backend.score(job, paths)

        def on_one() -> None:
            # The other one waits in a task: after a placement group ends, Ray keeps both cores busy for a second.
            busy, done = Path(root) / "busy", Path(root) / "done"
            reference = ray.remote(num_cpus=1)(hold).remote(busy, done)
            while not busy.exists():
                time.sleep(WAIT_SECONDS)
            try:
                score()
            finally:
                done.touch()
                ray.get(reference)

        times = alternate({"one worker": on_one, "two workers": score}, options.rounds, options.pause)  # type: ignore[attr-defined]
    report.raw["workers"] = times.raw()
    report.say(f"By Ray tasks on 2 cores, {clips} clips, two networks, the row of one with a core taken away:")
    report.say()
    report.table(["", *times.columns("one worker")[::2]], [(name, *times.row(name, "one worker")[::2]) for name in times.wall])
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:

        def among(count: int) -> None:
            parts = [job.sample_ids[place::count] for place in range(count)]
            list(pool.map(scored, [job] * count, [paths] * count, parts))

        bare = {"one process": lambda: among(1), "two processes": lambda: among(2)}
        times = alternate(bare, options.rounds, options.pause)  # type: ignore[attr-defined]
    report.raw["processes"] = times.raw()
    report.say("The same by processes without Ray that share nothing, which is what two of these cores can do:")
    report.say()
    report.table(
        ["", *times.columns("one process")[::2]], [(name, *times.row(name, "one process")[::2]) for name in times.wall]
    )


def hold(busy: Path, done: Path) -> None:
    """Does nothing between two files, the first its own; leaves neither."""
    busy.touch()
    while not done.exists():
        time.sleep(WAIT_SECONDS)
    busy.unlink()
    done.unlink()


def scored(job: ScoreJob, paths: Mapping[str, str], sample_ids: Sequence[str]) -> None:
    """Scores samples on one thread; what a process of the pool is given."""
    torch.set_num_threads(1)
    models = {name: checkpoint.read(Path(path)) for name, path in paths.items()}
    score_samples(job, models, sample_ids, torch.device("cpu"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", action="store_true", help="also by Ray, with one worker and two")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("scoring", "Scores and confusion counts against loops over frames and classes", options)
    compare(report, options, size=96, frames=1, clips=16, num_old=17, num_classes=25)
    if not options.short:
        compare(report, options, size=224, frames=5, clips=1, num_old=61, num_classes=71)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as root:
        one_pass(report, options, root, 32 if options.short else 128)
        if options.workers:
            workers(report, options, root, 128 if options.short else 1024)
    report.end()


if __name__ == "__main__":
    main()
