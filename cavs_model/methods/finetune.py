"""FT, fine-tuning: plain cross-entropy on the task's labels. The lower bound that every continual method should beat.

Paper and authors' code do not disagree: there is nothing to choose. The mean is over all labelled pixels of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from cavs_model.losses import cross_entropy
from cavs_model.methods.base import Method
from cavs_model.types import Mean, Step


@dataclass(frozen=True)
class Finetune(Method):
    """Cross-entropy and nothing else; the teacher is not looked at."""

    def loss(self, step: Step) -> dict[str, Mean]:
        return {"cross_entropy": cross_entropy(step.student.logits, step.batch.label, step.batch.real_frame)}
