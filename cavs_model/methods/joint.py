"""Joint training: at every task a new network learns the samples of all tasks so far, with all their labels. The upper bound.

No paper of its own; the name is the field's, and Cermelli et al. (MiB, CVPR 2020) report it beside their methods. What it
knows that no continual method may: the samples of earlier tasks, and in each sample the labels of every class seen so far.

Where the sources disagree, and what is done here:

- When: papers train it once, on all classes, and compare the last task alone. Here after every task, on the classes and the
  samples that the tasks so far admitted, so that each column of a stream has its bound; the last one is the papers'.
- Samples: those that the scenario's filter admits to some task so far, each once. Under the disjoint and the sequential filter
  a sample that shows a class before its time is left out as it is for everybody.
- Schedule: each of its tasks is a base task: `schedule.base_epochs`, plain cross-entropy, the first weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cavs_model.losses import cross_entropy
from cavs_model.methods.base import Method
from cavs_model.types import BACKGROUND, LabelRule, Mean, Step, Task


@dataclass(frozen=True)
class Joint(Method):
    """Cross-entropy on everything so far, from the first weights. On the base task it is fine-tuning."""

    def training_task(self, tasks: Sequence[Task]) -> Task:
        """The base task that has the classes and the samples of all `tasks`: in their order, a sample at its first task."""
        last = tasks[-1]
        samples = tuple(dict.fromkeys(sample for task in tasks for sample in task.train))
        return Task(last.index, 0, last.num_classes, samples, LabelRule(range(1, last.num_classes), BACKGROUND))

    def loss(self, step: Step) -> dict[str, Mean]:
        return {"cross_entropy": cross_entropy(step.student.logits, step.batch.label, step.batch.real_frame)}
