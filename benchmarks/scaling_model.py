"""How training and scoring scale, by a cost model: prints the tables of docs/scaling.md (`--write` puts them there).

A step of one worker takes compute + what communication does not hide + what the loader does not hide; a task adds start-up per
fit and the driver's serial part. Measured constants are of 2 cores of an AMD EPYC and stand beside their source; constants of
GPUs and networks are assumptions and are named so. Predictions are no measurements.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- tables of benchmarks/scaling_model.py -->", "<!-- end of the tables -->"


@dataclass(frozen=True)
class Machine:
    """What one worker is and what joins the workers."""

    name: str
    step_flops_per_s: float  # of our step, as it gets them
    link_bytes_per_s: float  # of a ring between workers, per worker
    link_latency_s: float  # of one collective of two workers; grows by log2 of the workers
    workers_per_node: int
    storage_bytes_per_s: float  # of a node, from the page cache or a disk that holds the decoded clips
    hidden: float  # the part of the backward pass behind which gradients travel


@dataclass(frozen=True)
class Work:
    """A task and a network."""

    name: str
    clips: int  # of an epoch
    epochs: int
    flops_per_clip: float  # student forward and backward, teacher forward
    forward_flops_per_clip: float
    parameters: float
    batch_norms: int  # layers that gather their statistics over all workers, twice a step (forward, backward)
    bytes_per_clip: float
    global_batch: int | None  # clips over all workers; None: `clips_per_worker` each
    clips_per_worker: int = 4


# Counted from the network's shapes: products and convolutions of a 5-frame clip, ResNet-50, width 256, 224 px (train_step.py).
AVSBENCH_FORWARD = 0.42e12
START_UP_S = 12.0  # of a fit, measured 10 to 15 on 2 busy cores (docs/log.md); waits, not work, once imports are cached
DRIVER_S_PER_100K_SAMPLES = 1.5  # joining scores, collisions and MSS (sweep_cost.py)

H100 = Machine("H100 (assumed)", 0.15 * 989e12, 40e9, 20e-6, 8, 2e9, 0.7)
A100 = Machine("A100 (assumed)", 0.15 * 312e12, 20e9, 25e-6, 8, 2e9, 0.7)
AVSBENCH = Work(
    name="AVSBench-CI, one task of all 8,498 clips, 30 epochs",
    clips=8498,
    epochs=30,
    flops_per_clip=AVSBENCH_STEP,
    forward_flops_per_clip=AVSBENCH_FORWARD,
    parameters=68.2e6,
    batch_norms=61,
    bytes_per_clip=5 * (224 * 224 * 4 + 96 * 64 * 2),
    global_batch=None,
)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by part, and of the task."""

    compute: float
    communication: float  # not hidden
    loading: float  # not hidden
    steps: int
    start_up: float

    @property
    def step(self) -> float:
        return self.compute + self.communication + self.loading

    @property
    def task(self) -> float:
        return self.step * self.steps + self.start_up


def cost(work: Work, machine: Machine, workers: int) -> Cost:
    """Of training the task's network with that many workers."""
    batch = work.global_batch or work.clips_per_worker * workers
    per_worker = math.ceil(batch / workers)
    compute = per_worker * work.flops_per_clip / machine.step_flops_per_s
    communication = 0.0
    if workers > 1:
        hops = math.log2(workers)
        gradients = 2 * (workers - 1) / workers * 4 * work.parameters / machine.link_bytes_per_s + hops * machine.link_latency_s
        # Statistics cannot be hidden: the next layer waits for them.
        statistics = 2 * work.batch_norms * hops * machine.link_latency_s
        communication = max(0.0, gradients - machine.hidden * compute * 0.5) + statistics
    load = per_worker * min(workers, machine.workers_per_node) * work.bytes_per_clip / machine.storage_bytes_per_s
    loading = max(0.0, load - compute - communication)
    return Cost(compute, communication, loading, work.epochs * math.ceil(work.clips / batch), START_UP_S)


def scoring(work: Work, machine: Machine, workers: int, networks: int) -> float:
    """Seconds of one scoring pass over the task's clips, the driver's part included."""
    share = math.ceil(work.clips / workers)
    return (
        networks * share * work.forward_flops_per_clip / machine.step_flops_per_s + work.clips / 1e5 * DRIVER_S_PER_100K_SAMPLES
    )


def check() -> list[tuple[str, float, float]]:
    """Model against what was measured on one core of the EPYC: (question, predicted, measured)."""
    # One constant is fitted: the rate of the AVSBench step in bf16. The other points follow from it.
    core = Machine("one core", 0.0, 1e9, 50e-6, 2, 2e9, 0.0)
    points = MEASURED
    rate = 4 * AVSBENCH_FORWARD / points["AVSBench step, bf16, one core, s"]
    fitted = replace(core, step_flops_per_s=rate)
    forward = AVSBENCH_FORWARD / fitted.step_flops_per_s
    found = [("AVSBench, student's forward, bf16, one core, s", forward, points["student forward"])]
    found.append(("AVSBench, teacher, bf16, one core, s", forward, points["teacher"]))
    found.append(("AVSBench, backward of network and loss, s", 2 * forward, points["backward"]))
    return found


# Processor seconds, one thread, clip of 5 frames, sections of the step (benchmarks/train_step.py --profile), load from others.
MEASURED = {
    "AVSBench step, bf16, one core, s": 5.31,
    "student forward": 0.99,
    "teacher": 0.94,
    "backward": 2.64,
}


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def document() -> list[str]:
    """All tables."""
    lines = ["Model against measurement (one rate fitted to the whole step):", ""]
    lines += table(
        ["point", "model", "measured", "model / measured"],
        [[name, f"{model:.2f}", f"{seen:.2f}", f"{model / seen:.2f}"] for name, model, seen in check()],
    )
    for machine in (A100, H100):
        lines += [f"{AVSBENCH.name}, {AVSBENCH.clips_per_worker} clips a worker, {machine.name}, predicted:", ""]
        one = cost(AVSBENCH, machine, 1)
        rows = []
        for workers in (1, 8, 64, 512):
            found = cost(AVSBENCH, machine, workers)
            efficiency = one.task / found.task / workers
            rows.append(
                [str(workers), str(workers * AVSBENCH.clips_per_worker), f"{1000 * found.compute:.1f}",
                 f"{1000 * found.communication:.1f}", f"{1000 * found.loading:.1f}", str(found.steps),
                 f"{found.task / 3600:.2f}", f"{efficiency:.0%}", f"{scoring(AVSBENCH, machine, workers, 2):.1f}"]
            )  # fmt: skip
        lines += table(
            [
                "GPUs",
                "global batch",
                "compute, ms",
                "communication, ms",
                "loading, ms",
                "steps",
                "hours",
                "efficiency",
                "scoring two networks, s",
            ],
            rows,
        )
    lines += [f"The same at a fixed global batch of 16 clips, {A100.name}, predicted:", ""]
    fixed = replace(AVSBENCH, global_batch=16)
    one, rows = cost(fixed, A100, 1), []
    for workers in (1, 4, 8, 16):
        found = cost(fixed, A100, workers)
        rows.append(
            [str(workers), f"{1000 * found.compute:.1f}", f"{1000 * found.communication:.1f}", f"{found.task / 3600:.2f}",
             f"{one.task / found.task / workers:.0%}"]
        )  # fmt: skip
    lines += table(["GPUs", "compute, ms", "communication, ms", "hours", "efficiency"], rows)
    lines += ["A sweep of 64 such streams of two tasks on 512 GPUs (A100, assumed), predicted by GPUs per stream:", ""]
    rows = []
    for workers in (1, 4, 8, 64):
        at_once = 512 // workers
        found = cost(AVSBENCH, A100, workers)
        rounds = math.ceil(64 / at_once)
        rows.append(
            [
                str(workers),
                str(min(at_once, 64)),
                f"{rounds * 2 * found.task / 3600:.2f}",
                f"{64 * 2 * found.task * workers / 3600:.0f}",
            ]
        )
    lines += table(["GPUs per stream", "streams at once", "hours to the end", "GPU hours used"], rows)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="no other form: this takes a second")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    lines = document()
    print("\n".join(lines))
    if options.write:
        text = DOCUMENT.read_text()
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        DOCUMENT.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
