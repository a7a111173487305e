"""MiB, modelling the background: losses that know of old classes in the new data's background, and of new ones in the old.

Terms: Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR 2020, and its
authors' code; the default weight is the code's, made for VOC.

Where the sources disagree, and what is done here:

- Which background is open: paper and code know neither rehearsal nor labels of old classes in new data. Here the background
  includes the old classes in exactly the pixels where the labels hide them: in new data whose label rule hides old classes
  (overlapped and disjoint filter). In rehearsed samples, and under the sequential filter, every class seen so far is labelled,
  background is true background, and the cross-entropy is the plain one.
- Labels of old classes in new data, should there be any: the code turns them into background. Here they are truth.
- Distillation: the paper sums over the old classes, the code divides by their number O. Here as the code, whose weight 10
  belongs to it. It is over all pixels in both, rehearsed samples included.
- Normaliser of the cross-entropy: the code takes the mean over all pixels, ignored ones counted. Here over labelled pixels of
  the whole batch.
- Base task: plain cross-entropy in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cavs_model.losses import cross_entropy, distillation, logit_of_label, over_labelled_pixels, weighted
from cavs_model.methods.base import Method, knob
from cavs_model.types import BACKGROUND, Batch, Mean, Step, Task


@dataclass(frozen=True)
class MiB(Method):
    """Unbiased cross-entropy and unbiased distillation, and new classes that start from the background."""

    kd_weight: float = knob(10.0, at_least=0)  # lambda; the code: 10 (VOC); 0 leaves the term out
    unbiased_cross_entropy: bool = knob(True)  # paper and code: on; off is plain cross-entropy (the paper's ablation)
    unbiased_distillation: bool = knob(True)  # paper and code: on; off is LwF's distillation (the paper's ablation)
    background_start: bool = knob(True)  # paper and code: on; off is an ordinary initialisation (the paper's ablation)

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    def init_new_classes(self, classifier: nn.Conv2d, task: Task) -> None:
        """Background and each new class share the old background's probability equally."""
        if not task.is_base and self.background_start:
            start_from_background(classifier, task)

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "cross_entropy" and "distillation"."""
        batch, logits, task = step.batch, step.student.logits, step.task
        if self.unbiased_cross_entropy and hides_old_classes(task):
            classified = unbiased_cross_entropy(logits, batch.label, batch.real_frame, open_pixels(batch), task.num_old)
        else:
            classified = cross_entropy(logits, batch.label, batch.real_frame)
        terms = {"cross_entropy": classified}
        if not task.is_base and self.kd_weight > 0:
            assert step.teacher is not None
            fold = new_classes_as_background if self.unbiased_distillation else without_new_classes
            known = distillation(fold(logits, task.num_old), step.teacher.logits, batch.real_frame)
            terms["distillation"] = weighted(self.kd_weight, known)
        return terms


def start_from_background(classifier: nn.Conv2d, task: Task) -> None:
    """Sets, in place, the n new rows to w_bg with bias b_bg - log(n + 1), and the background's bias alike.

    The probabilities of old classes, and the sum over background and new classes, are then those of the old classifier.
    ValueError for a classifier without bias.
    """
    if classifier.bias is None:
        raise ValueError("starting new classes from the background needs a classifier with bias")
    with torch.no_grad():
        classifier.weight[task.num_old :] = classifier.weight[BACKGROUND]
        bias = classifier.bias[BACKGROUND] - math.log(task.num_new + 1)
        classifier.bias[task.num_old :] = bias
        classifier.bias[BACKGROUND] = bias


def hides_old_classes(task: Task) -> bool:
    """Whether the task's own labels show some old foreground class as background."""
    return any(class_id not in task.train_rule.keep for class_id in range(1, task.num_old))


def open_pixels(batch: Batch) -> Tensor:
    """Pixels whose label leaves the class open, bool [B T H W]: background in new data, where old classes hide."""
    new_data = batch.real_frame & ~batch.rehearsed[:, None]
    return (batch.label == BACKGROUND) & new_data[:, :, None, None]


def unbiased_cross_entropy(logits: Tensor, label: Tensor, real_frame: Tensor, open_: Tensor, num_old: int) -> Mean:
    """Cross-entropy in which an open pixel is background or any old class, summed over labelled pixels of real frames.

    logits [B T C H W]; label [B T H W]; open_ [B T H W] bool, among the background pixels. With Z = logsumexp of all logits,
    an open pixel's loss is Z - logsumexp_{c<O} z_c, any other's Z - z_label.
    """
    scores = logits.float()
    of_truth = torch.where(open_, scores[:, :, :num_old].logsumexp(2), logit_of_label(scores, label))
    return over_labelled_pixels(scores.logsumexp(2) - of_truth, label, real_frame)


def new_classes_as_background(logits: Tensor, num_old: int) -> Tensor:
    """The student's logits [B T C H W] in the teacher's classes, float32 [B T O H W]: new ones join the background.

    The background's is logsumexp of its own and the new ones, so that softmax gives the summed probability.
    """
    scores = logits.float()
    background = torch.cat([scores[:, :, :1], scores[:, :, num_old:]], dim=2).logsumexp(2, keepdim=True)
    return torch.cat([background, scores[:, :, 1:num_old]], dim=2)


def without_new_classes(logits: Tensor, num_old: int) -> Tensor:
    """The student's logits [B T C H W] of the old classes alone, [B T O H W]."""
    return logits[:, :, :num_old]
