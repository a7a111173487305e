"""Does what makes a step fast change the result? Streams of CMR on Collage by three forms of one arithmetic, over seeds.

"plain" is the plain reading of benchmarks.train_step in fp32: N x N attention, one pass for every softmax and every window of
POD, both networks' maps in full. "fp32" and "bf16" are cavs_model's own: exact steps regrouped, and bf16 autocast. The stream
is the default search's with fewer scenes and epochs, evaluated on validation. What plain and fp32 differ by is the last bits of
sums, so their difference says how far training carries such bits; the deviation over seeds says what any difference must be
held against.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from scipy.stats import ttest_rel

from benchmarks._measure import Report, arguments
from benchmarks.train_step import plain_forward, plain_terms
from cavs_model.datasets.collage import Collage
from cavs_model.methods.cmr import CMR
from cavs_model.methods.plop import PLOP
from cavs_model.networks.av_segmenter import AVSegmenter, check_weights
from cavs_model.train import Schedule
from cavs_model.types import Batch, Mean, Prediction, Step
from orchestrator.experiment import Experiment
from orchestrator.local_backend import LocalBackend
from orchestrator.store import StoredBackend
from orchestrator.stream import run_stream
from search_spaces.cmr_collage import BASE

FORMS = ("plain", "fp32", "bf16")
SHOWN = ("val/miou/all", "val/miou/old", "val/miou/new", "val/drift/old", "val/stream/forgetting")


@dataclass(frozen=True)
class PlainPLOP(PLOP):
    """PLOP with the plain reading's loss, of maps that `plain_prediction` gave. Default fields but for the weights."""

    def loss(self, step: Step) -> dict[str, Mean]:
        if step.teacher is None:
            return super().loss(step)
        student, teacher = ((said.logits.flatten(0, 1), [each.flatten(0, 1) for each in said.features])
                            for said in (step.student, step.teacher))  # fmt: skip
        terms = plain_terms(student, teacher, step.batch, step.task, step.prepared, self)
        return {name: Mean(value, 1.0) for name, value in terms.items()}


def plain_prediction(model: AVSegmenter, batch: Batch) -> Prediction:
    """What the network says of a batch, as the plain reading computes it."""
    logits, maps = plain_forward(model, batch)

    def clips(value):  # type: ignore[no-untyped-def]
        return value.unflatten(0, batch.real_frame.shape)

    return Prediction(clips(logits), features=tuple(map(clips, maps)))


def experiment(form: str, short: bool) -> Experiment:
    """The stream in one of the forms; `short` with few clips and epochs."""
    clips, schedule = (48, Schedule(1, 1)) if short else (600, Schedule(3, 8, 8, 1e-3, "cosine"))
    made = replace(BASE, benchmark=Collage(frames=1, train_clips=clips, val_clips=240), schedule=schedule)
    assert isinstance(made.method, CMR)
    assert isinstance(made.method.base, PLOP)
    if form == "plain":
        weights = {name: getattr(made.method.base, name) for name in ("pod_weight", "pod_logits_weight")}
        return replace(made, method=replace(made.method, base=PlainPLOP(**weights)))
    return replace(made, precision=form)  # type: ignore[arg-type]


def stream(form: str, seed: int, root: str, short: bool) -> dict[str, float]:
    """The metrics after the last task. For a process of its own: the plain form takes the networks' forward pass away."""
    if form == "plain":
        AVSegmenter.forward = plain_prediction  # type: ignore[method-assign]
    this = experiment(form, short)
    # A store for each form: no address tells of what was put in the place of a function.
    backend = StoredBackend(LocalBackend(Path(root) / "data", this.resources), Path(root) / form)
    for outcome in run_stream(this, seed, backend, ("val",)):
        last = outcome
    return last.metrics() | last.diagnoses()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="streams of each form (default 3)")
    parser.add_argument("--processes", type=int, default=2, help="streams at a time (default 2)")
    options = parser.parse_args()
    seeds = range(2 if options.short else options.seeds)
    report = Report("quality", "Does what makes a step fast change the result?", options)
    this = experiment("fp32", options.short)
    clips, schedule = len(this.benchmark.samples("train")), this.schedule
    report.say(
        f"CMR on Collage {this.scenario.setting}, {clips} scenes, {schedule.base_epochs} and {schedule.epochs} epochs, "
        f"batches of {schedule.batch_size}; else as search_spaces/cmr_collage.py; seeds 0 to {seeds[-1]}.\n"
    )
    with tempfile.TemporaryDirectory() as root:
        check_weights(this.network)
        LocalBackend(Path(root) / "data").prepare(this.benchmark, ("train", "val"))
        with ProcessPoolExecutor(options.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
            waited = {(form, seed): pool.submit(stream, form, seed, root, options.short) for seed in seeds for form in FORMS}
            found = {each: future.result() for each, future in waited.items()}
    report.raw["metrics"] = {f"{form} seed {seed}": metrics for (form, seed), metrics in found.items()}

    def column(form: str, metric: str) -> list[float]:
        return [found[form, seed][metric] for seed in seeds]

    report.table(
        ["mean and deviation over seeds", *FORMS],
        [(metric, *(_spread(column(form, metric)) for form in FORMS)) for metric in SHOWN],
    )
    pairs = (("fp32", "plain"), ("bf16", "fp32"), ("bf16", "plain"))
    report.table(
        ["difference of each seed, mean [95 %, paired t]", *(f"{one} - {other}" for one, other in pairs)],
        [(metric, *(_difference(column(one, metric), column(other, metric)) for one, other in pairs)) for metric in SHOWN],
    )
    report.end()


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _difference(ones: Sequence[float], others: Sequence[float]) -> str:
    each = [one - other for one, other in zip(ones, others, strict=True)]
    interval = ttest_rel(ones, others).confidence_interval()
    shown = ", ".join(f"{value:+.4f}" for value in each)
    return f"{shown}: {statistics.mean(each):+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


if __name__ == "__main__":
    main()
