"""On a GPU: step time, share of the peak, peak memory, bf16 against fp32, torch.compile, and what AVSBench in full would take.

Does nothing without a GPU. Flops are counted by torch over the forward and backward passes of our step (products and
convolutions); the peak is the tensor cores' dense bf16 rate, which is asked for by --peak-tflops (H100 SXM: 989).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._measure import Report, arguments, seconds_text
from benchmarks.train_step import METHOD, Case, case, networks
from cavs_model.evaluate import frozen
from cavs_model.methods.plop import median_entropies
from cavs_model.train import global_means
from cavs_model.types import Step
from cavs_model.worker import LocalWorker, arithmetic

AVSBENCH_CLIPS, EPOCHS = 8498, 30


class OnGpu:
    """The step as cavs_model.train takes it, on the first GPU."""

    def __init__(self, case: Case, precision: str, compiled: bool) -> None:
        device = torch.device("cuda", 0)
        student, teacher = networks(case)
        self.worker = LocalWorker(device)
        self.numbers = arithmetic(precision, device)  # type: ignore[arg-type]
        self.student = self.numbers.place(student).train()
        self.teacher = frozen(copy.deepcopy(teacher), self.numbers)
        self.batch, self.task = case.batch(padded=False).to(device), case.task()
        self.thresholds = median_entropies(self.teacher, [self.batch], self.task, lambda x: x).clamp(min=0.001)
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=1e-4, fused=True)
        self.model: Any = torch.compile(self.student) if compiled else self.student
        self.losses: list[float] = []

    def step(self) -> None:
        with self.numbers.exact():
            self._step()

    def _step(self) -> None:
        with self.numbers.autocast():
            prediction = self.model(self.batch)
        step = Step(self.batch, prediction, self.teacher(self.batch), self.task, self.thresholds)
        loss = sum(global_means(METHOD.loss(step), self.worker).values())
        assert isinstance(loss, torch.Tensor)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.last = loss.detach()


def main() -> None:
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--clips", type=int, default=4, help="clips of 5 frames in a batch")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: nothing was measured")
    found = case("avsbench", options.short)
    given = Case(found.config, found.image_size_px, options.clips, 5, 5, found.num_old, found.num_classes)
    report = Report("gpu", "CMR's step on a GPU", options)
    report.say(f"{given}\n")
    rows = []
    for precision, compiled in (("fp32", False), ("bf16", False), *((("bf16", True),) if options.compile else ())):
        program = OnGpu(given, precision, compiled)
        with FlopCounterMode(display=False) as counter:
            program.step()
        flops = counter.get_total_flops()
        for _ in range(3):
            program.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds, losses = [], []
        for _ in range(options.rounds):
            began = time.perf_counter()
            program.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            losses.append(float(program.last))
        name = f"{precision}{', compiled' if compiled else ''}"
        step = statistics.median(seconds)
        report.raw[name] = {"seconds": seconds, "losses": losses, "flops": flops}
        hours = AVSBENCH_CLIPS * EPOCHS / options.clips * step / 3600
        rows.append(
            (name, seconds_text(seconds), f"{flops / 1e12:.2f}", f"{flops / step / options.peak_tflops / 1e12:.1%}",
             f"{torch.cuda.max_memory_allocated() / 2**30:.1f}", f"{losses[-1]:.4f}", f"{hours:.1f}")
        )  # fmt: skip
        del program
        torch.cuda.empty_cache()
    report.table(
        ["step", "s", "Tflop", "of the peak", "peak memory, GiB", f"loss after {options.rounds} steps",
         f"hours for {AVSBENCH_CLIPS} clips x {EPOCHS} epochs"], rows,
    )  # fmt: skip
    report.end()


if __name__ == "__main__":
    main()
