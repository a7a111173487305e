"""LwF-MC, the multi-class form of learning without forgetting: a sigmoid per class, for the labels and the distillation alike.

Terms: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, which compares with it under
this name, as the authors of MiB (Cermelli et al., CVPR 2020) carried it over to segmentation in their code; the default
weight is that code's, made for VOC.

Where the sources disagree, and what is done here:

- Old classes' targets: in the paper the old network's sigmoids take the labels' place; MiB's code by default keeps the labels
  of all classes and adds the sigmoids as a term of its own. Here as MiB's code.
- Weight: none in the paper; 10 in MiB's code, on a term that is summed over the old classes (it multiplies a mean by O) and a
  mean over all pixels. Here as MiB's code.
- Base task: both train it by binary cross-entropy too. Here it is plain cross-entropy, a departure of this project: one base
  network serves all methods, and all start alike. So the teacher of the second task has logits that a softmax was trained
  on; their sigmoids are distilled all the same.
- Background: the labels of new data call old classes background, and their one-hot targets are learned as they stand.
  Rehearsed samples show their old classes; nothing has to be done for them.
- Normaliser of the labels' term: MiB's code takes the mean over all pixels, ignored ones counted. Here over labelled pixels
  of the whole batch. The distillation is a mean over all pixels in both; here, of real frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cavs_model.losses import cross_entropy, logit_of_label, over_labelled_pixels, over_real_pixels, weighted
from cavs_model.methods.base import Method, knob
from cavs_model.types import Mean, Step


@dataclass(frozen=True)
class LwFMC(Method):
    """Binary cross-entropy of every class with one-hot labels, and of the old classes with the old network's sigmoids."""

    kd_weight: float = knob(10.0, at_least=0)  # MiB's code: 10 (VOC), "icarl_importance"; 0 leaves the term out

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "binary_cross_entropy" and "distillation"; on the base task "cross_entropy" alone."""
        logits, label, real = step.student.logits, step.batch.label, step.batch.real_frame
        if step.task.is_base:
            return {"cross_entropy": cross_entropy(logits, label, real)}
        terms = {"binary_cross_entropy": one_hot_cross_entropy(logits, label, real)}
        if self.kd_weight > 0:
            assert step.teacher is not None
            old = logits[:, :, : step.task.num_old]
            terms["distillation"] = weighted(self.kd_weight, sigmoid_distillation(old, step.teacher.logits, real))
        return terms


def one_hot_cross_entropy(logits: Tensor, label: Tensor, real_frame: Tensor) -> Mean:
    """Binary cross-entropy of logits [B T C H W] with one-hot labels, summed over classes and labelled pixels.

    With y one-hot, sum_c (softplus(z_c) - y_c z_c) = sum_c softplus(z_c) - z_label: no one-hot tensor is made.
    """
    scores = logits.float()
    return over_labelled_pixels(F.softplus(scores).sum(2) - logit_of_label(scores, label), label, real_frame)


def sigmoid_distillation(student: Tensor, teacher: Tensor, real_frame: Tensor) -> Mean:
    """Binary cross-entropy between logits [B T O H W], summed over the classes and all pixels of real frames.

    The teacher's sigmoids are the targets and get no gradient. Its mean is O times the mean over classes and pixels.
    """
    wanted = teacher.detach().float().sigmoid()
    per_class = F.binary_cross_entropy_with_logits(student.float(), wanted, reduction="none")
    return over_real_pixels(per_class.sum(2), real_frame)
