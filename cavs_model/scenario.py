"""From a class order and a setting such as "16-8" to the list of tasks.

Settings and filters are those of class-incremental segmentation (PLOP; CMR, section 4): "16-8" learns 16 classes first and 8
more in each later task. "24", the number of all classes, learns them in one task: joint training in a single step, for
reference, and the only setting of a benchmark with one class. A training video belongs to a task if any of its sounding
classes is current (overlapped), if moreover none is a future class (disjoint), or like disjoint with the labels of old classes
kept (sequential).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cavs_model.datasets.base import Benchmark
from cavs_model.errors import InputError, unknown
from cavs_model.types import BACKGROUND, LabelRule, Sample, Task

FILTERS = ("overlapped", "disjoint", "sequential")
MIN_CLASSES = 1


@dataclass(frozen=True)
class Scenario:
    """How a benchmark's classes arrive.

    `order` is one of the benchmark's named orders or "random" (drawn from `order_seed`); `class_order` overrides it by a list
    of all class names. InputError for an impossible setting, order or filter comes from `tasks` and `learned_order`.
    """

    setting: str = "16-8"  # classes of the base task - classes of every later one; or the number of all classes
    order: str = "alphabetical"
    filter: str = "overlapped"  # overlapped, disjoint or sequential: which videos a task has, and which labels in them
    order_seed: int = 0
    class_order: tuple[str, ...] = ()

    def learned_order(self, benchmark: Benchmark) -> tuple[str, ...]:
        """The class names in the order in which they are learned; learned id i + 1 is the i-th of them."""
        names = benchmark.class_names()
        if self.class_order:
            for name in self.class_order:
                if name not in names:
                    raise unknown("class in scenario.class_order", name, names)
            if sorted(self.class_order) != sorted(names):
                missing = sorted(set(names) - set(self.class_order))
                raise InputError(f"scenario.class_order must name each class once; missing: {missing or 'none (repeats)'}")
            return self.class_order
        if self.order == "random":
            if self.order_seed < 0:
                raise InputError(f"scenario.order_seed must not be negative, got {self.order_seed}")
            return tuple(np.random.default_rng(self.order_seed).permutation(np.array(names)).tolist())
        orders = benchmark.orders()
        if self.order not in orders:
            raise unknown("scenario.order", self.order, [*orders, "random"])
        return orders[self.order]

    def class_counts(self, benchmark: Benchmark) -> tuple[int, ...]:
        """Foreground classes that each task adds, such as (16, 4, 4)."""
        total = len(benchmark.class_names())
        if self.setting == str(total):
            return (total,)
        match = re.fullmatch(r"([0-9]{1,4})-([0-9]{1,4})", self.setting)
        base, step = (int(match[1]), int(match[2])) if match else (0, 0)
        if base < MIN_CLASSES or step < MIN_CLASSES or base >= total or (total - base) % step:
            usual = ", ".join(benchmark.settings())
            raise InputError(
                f"scenario.setting {self.setting!r} does not divide the {total} classes of {benchmark.name}; "
                f'write "BASE-STEP" with {total} - BASE a multiple of STEP, or "{total}" for one task, for example: {usual}'
            )
        return (base, *[step] * ((total - base) // step))

    def samples(self, benchmark: Benchmark, split: str) -> tuple[Sample, ...]:
        """A split's index with learned class ids."""
        names = benchmark.class_names()
        position = {name: index + 1 for index, name in enumerate(self.learned_order(benchmark))}
        learned = [BACKGROUND, *(position[name] for name in names)]
        return tuple(
            Sample(sample.id, tuple(sorted(learned[class_id] for class_id in sample.classes)))
            for sample in benchmark.samples(split)
        )

    def tasks(self, benchmark: Benchmark) -> tuple[Task, ...]:
        """The stream's tasks in order. InputError where a task would have no training sample."""
        if self.filter not in FILTERS:
            raise unknown("scenario.filter", self.filter, FILTERS)
        samples = self.samples(benchmark, "train")
        tasks: list[Task] = []
        num_old = 0
        for index, added in enumerate(self.class_counts(benchmark)):
            num_classes = max(num_old, 1) + added
            current = range(max(num_old, 1), num_classes)
            task = Task(index, num_old, num_classes, self._admitted(samples, current), self._train_rule(current))
            if not task.train:
                raise InputError(f"task {index} of setting {self.setting!r} ({self.filter}) has no training sample")
            tasks.append(task)
            num_old = num_classes
        return tuple(tasks)

    def _admitted(self, samples: Sequence[Sample], current: range) -> tuple[Sample, ...]:
        admitted = (sample for sample in samples if any(class_id in current for class_id in sample.classes))
        if self.filter == "overlapped":
            return tuple(admitted)
        return tuple(sample for sample in admitted if max(sample.classes) < current.stop)

    def _train_rule(self, current: range) -> LabelRule:
        keep = range(1, current.stop) if self.filter == "sequential" else current
        return LabelRule(keep, otherwise=BACKGROUND)
