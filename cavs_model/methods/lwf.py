"""LwF, learning without forgetting: cross-entropy plus distillation of the old network's softmax over the old classes.

Terms: Li and Hoiem, "Learning without Forgetting", ECCV 2016, as the authors of MiB (Cermelli et al., CVPR 2020) carried it
over to segmentation in their code; the default weight is that code's, made for VOC.

Where the sources disagree, and what is done here:

- Output: the paper has one head per task, each with a softmax of its own; MiB's code one softmax over all classes for the
  labels, and for the distillation one over the old classes alone. Here as MiB's code.
- Temperature: the paper's is 2, MiB's code has none. Here none.
- Weight: 1 in the paper; 100 in MiB's code, which also divides the distillation by the number O of old classes. Here as
  MiB's code.
- Background: the labels of new data call old classes background and LwF learns that as it stands (MiB's point against it).
  Rehearsed samples show their old classes; nothing has to be done for them.
- Normaliser of the cross-entropy: MiB's code takes the mean over all pixels, ignored ones counted. Here over labelled pixels
  of the whole batch. The distillation is a mean over all pixels in both; here, of real frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from cavs_model.losses import cross_entropy, distillation, weighted
from cavs_model.methods.base import Method, knob
from cavs_model.types import Mean, Step


@dataclass(frozen=True)
class LwF(Method):
    """Cross-entropy on the labels as they are, plus distillation of the old classes' logits."""

    kd_weight: float = knob(100.0, at_least=0)  # lambda; MiB's code: 100 (VOC); 0 leaves the term out

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "cross_entropy" and "distillation"."""
        logits, real = step.student.logits, step.batch.real_frame
        terms = {"cross_entropy": cross_entropy(logits, step.batch.label, real)}
        if not step.task.is_base and self.kd_weight > 0:
            assert step.teacher is not None
            old = logits[:, :, : step.task.num_old]
            terms["distillation"] = weighted(self.kd_weight, distillation(old, step.teacher.logits, real))
        return terms
