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


# Multiplications and additions of a 5-frame clip, ResNet-50, width 256, 224 px, 71 classes, counted layer by layer from the
# network's shapes (`forward_flops` below). A step is the student's forward and backward pass and the teacher's forward one.
LEVELS = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side of the encoder's maps
FRAMES, WIDTH, CLASSES, RESNET50 = 5, 256, 71, 2 * 4.09e9  # the last: of one frame


def forward_flops() -> float:
    """Of one clip through the network."""
    total = RESNET50
    for channels, side in LEVELS:
        inside = sum(dilation < side for dilation in (3, 6, 12, 18))  # the others are joined in one 1x1 convolution
        dilated = (9 * inside + (inside < 4)) * channels * WIDTH
        units = 2 if side != 7 else 1  # residual units of two convolutions
        total += 2 * side**2 * (dilated + units * 2 * 9 * WIDTH**2 + 2 * WIDTH**2)
    total += 2 * 112**2 * 9 * WIDTH * WIDTH // 2  # the head: 256 -> 128 at stride 2, 128 -> 32 and the classes at full size
    total += 2 * 224**2 * (9 * WIDTH // 2 * 32 + 32 * CLASSES)
    return FRAMES * total


AVSBENCH_FORWARD = forward_flops()
AVSBENCH_STEP = 4 * AVSBENCH_FORWARD
START_UP_S = 7.5  # of a fit beside another one on 2 cores (benchmarks/ray_overhead.py), while imports are cached
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


# Processor seconds of the parts of our step, one thread, bf16, a clip of 5 frames, other work on the machine; commit bd8cb1e.
MEASURED = {"student's forward": 0.986, "teacher's forward": 0.936, "backward of the network": 2.079}
LOSSES_S = 1.176  # losses and their backward pass at that commit: bound by memory, so no flops of the model stand for them


def check() -> list[tuple[str, float, float]]:
    """Model against what was measured on one core of the EPYC: (part, predicted, measured).

    One constant is fitted, the rate of the three parts together.
    """
    rate = AVSBENCH_STEP / sum(MEASURED.values())
    flops = {"student's forward": 1, "teacher's forward": 1, "backward of the network": 2}
    return [(part, times * AVSBENCH_FORWARD / rate, MEASURED[part]) for part, times in flops.items()]


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def document() -> list[str]:
    """All tables."""
    lines = [
        "Model against measurement on one core, processor seconds, one rate fitted to the sum. Losses took another "
        f"{LOSSES_S:.2f} s. Communication was checked against nothing.",
        "",
    ]
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
                 f"{found.task / 60:.1f}", f"{efficiency:.0%}", f"{scoring(AVSBENCH, machine, workers, 2):.1f}"]
            )  # fmt: skip
        lines += table(
            [
                "GPUs",
                "global batch",
                "compute, ms",
                "communication, ms",
                "loading, ms",
                "steps",
                "minutes",
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
            [str(workers), f"{1000 * found.compute:.1f}", f"{1000 * found.communication:.1f}", f"{found.task / 60:.1f}",
             f"{one.task / found.task / workers:.0%}"]
        )  # fmt: skip
    lines += table(["GPUs", "compute, ms", "communication, ms", "minutes", "efficiency"], rows)
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
