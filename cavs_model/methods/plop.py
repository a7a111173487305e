"""PLOP: local POD distillation, entropy pseudo-labels, adaptive factor, and MiB's start of the new classifier rows.

Terms: Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, and its authors'
code (default weights: VOC); the classifier's start is from MiB (Cermelli et al., "Modeling the Background for Incremental
Learning in Semantic Segmentation", CVPR 2020). "Image" in the paper is one frame of a clip here.

Where the sources disagree, and what is done here:

- Maps: the paper's are encoder levels before activation, the decoder and the logits; CMR's release takes the four fused maps,
  the decoder's map and the logits. Field `pod_maps`: "fused" (CMR's release: whatever `Prediction.features` holds) or
  "encoder" (the paper's and PLOP's code: the four maps of `Prediction.encoder`, which end in a sum without activation, and
  the decoder's map); then the logits. Both are six maps here.
- Schedule sqrt(C_all / C_new) on the POD terms: PLOP's code on, CMR's release off. Field `pod_schedule`, off.
- Entropy: the paper divides -sum q log q by log O; PLOP's code also averages over classes and divides by the logarithm a second
  time, which changes nothing but the meaning of the floor 0.001. Here as the paper writes it, with the code's floor
  (`entropy_floor`), which the paper does not have.
- Thresholds: the paper takes medians; PLOP's code reads them off a histogram whose running sum adds bin indices instead of
  counts. Here true medians (to 2^-17), over the background-labelled pixels of the new data of all workers together.
- Which pixels get pseudo-labels: PLOP's code all whose label is below O, so it overwrites the truth of old classes where the
  data has it. Here background pixels of new data only: old truth (sequential filter, rehearsed samples) is kept; and a
  rehearsed sample's background is true background, as every class seen so far is labelled in it, so it is trained on as such.
  (CMR's `memory_truth` turns that off for rehearsed samples.)
- Adaptive factor: PLOP's code gives an image without background the factor 0 / 0. Here 1: nothing in it was uncertain.
  In CMR's release the factor reaches only the logged loss. Field `adaptive_factor`, on: the loss logged is the loss trained.
- Normaliser of the cross-entropy: PLOP's code takes the mean over all pixels of a GPU's batch, ignored ones counted. Here over
  the labelled pixels (those with truth or a pseudo-label) of the whole batch; the adaptive factor is not part of the count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cavs_model.losses import cross_entropy, local_pod
from cavs_model.methods.base import Method, knob
from cavs_model.methods.mib import open_pixels, start_from_background
from cavs_model.types import BACKGROUND, IGNORE, Batch, Mean, Network, Prediction, Step, Task

ENTROPY_BINS = 2**16


@dataclass(frozen=True)
class PLOP(Method):
    """Cross-entropy on truth and pseudo-labels, plus local POD on the features and on the logits."""

    pod_weight: float = knob(0.01, at_least=0)  # lambda, features; both codes' default; 0 leaves the term out
    pod_logits_weight: float = knob(0.0005, at_least=0)  # lambda, logits; both codes' default; 0 leaves the term out
    pod_maps: Literal["fused", "encoder"] = knob("fused", choices=("fused", "encoder"))  # CMR's release: fused; PLOP: encoder
    pod_scales: tuple[int, ...] = knob((1, 2, 4), at_least=1)  # S (the paper writes 1/s); paper and both codes
    pod_schedule: bool = knob(False)  # POD terms times sqrt(C_all / C_new); PLOP's code: on; CMR's release: off
    pseudo_labels: bool = knob(True)  # paper: "pseudo-labeling"; off trains on the labels as they are
    entropy_floor: float = knob(0.001, at_least=0)  # least tau_c; both codes' default; normalised entropy in [0, 1]
    adaptive_factor: bool = knob(True)  # nu; paper and PLOP's code: on; CMR's release: logged only
    background_start: bool = knob(True)  # MiB's classifier start; both codes: on

    @property
    def needs_teacher(self) -> bool:
        return True

    def init_new_classes(self, classifier: nn.Conv2d, task: Task) -> None:
        """MiB's start: background and each new class share the old background's probability equally."""
        if not task.is_base and self.background_start:
            start_from_background(classifier, task)

    def prepare(
        self, teacher: Network, batches: Iterable[Batch], task: Task, all_reduce: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The thresholds tau_c: float32 [O]. None where pseudo-labels are off."""
        if not self.pseudo_labels:
            return None
        return median_entropies(teacher, batches, task, all_reduce).clamp(min=self.entropy_floor)

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "cross_entropy", "pod_features" and "pod_logits"; the POD terms are means over real frames and over maps.

        `step.prepared` are the thresholds that `prepare` returned.
        """
        if step.teacher is None:
            return {"cross_entropy": cross_entropy(step.student.logits, step.batch.label, step.batch.real_frame)}
        terms = {"cross_entropy": self._cross_entropy(step, step.teacher.logits)}
        real = step.batch.real_frame
        student, teacher = self._maps(step.student), self._maps(step.teacher)
        share = self._schedule(step.task) / (len(student) + 1)
        if self.pod_weight > 0 and student:
            pods = [local_pod(ours, theirs, real, self.pod_scales) for ours, theirs in zip(student, teacher, strict=True)]
            terms["pod_features"] = Mean(
                self.pod_weight * share * torch.stack([pod.total for pod in pods]).sum(), pods[0].count
            )
        if self.pod_logits_weight > 0:
            pod = local_pod(as_old_logits(step.student.logits, step.task.num_old), step.teacher.logits, real, self.pod_scales)
            terms["pod_logits"] = Mean(self.pod_logits_weight * share * pod.total, pod.count)
        return terms

    def _cross_entropy(self, step: Step, teacher_logits: Tensor) -> Mean:
        batch = step.batch
        if not self.pseudo_labels:
            return cross_entropy(step.student.logits, batch.label, batch.real_frame)
        label, certain_share = pseudo_labelled(batch, teacher_logits, step.prepared)
        return cross_entropy(step.student.logits, label, batch.real_frame, certain_share if self.adaptive_factor else None)

    def _maps(self, prediction: Prediction) -> tuple[Tensor, ...]:
        """The maps under the POD term "pod_features"."""
        if self.pod_maps == "fused":
            return prediction.features
        if not prediction.encoder:
            raise ValueError('pod_maps "encoder" needs a network that gives encoder maps')
        return (*prediction.encoder, prediction.features[-1])

    def _schedule(self, task: Task) -> float:
        return math.sqrt(task.num_classes / task.num_new) if self.pod_schedule else 1.0


def as_old_logits(logits: Tensor, num_old: int) -> Tensor:
    """The student's logits [B T C H W] in the teacher's classes [B T O H W]: new logits are added to the background's."""
    joined: Tensor = _JoinNew.apply(logits, num_old)  # type: ignore[no-untyped-call]
    return joined


class _JoinNew(torch.autograd.Function):
    """`as_old_logits` with its gradient by hand: slices and concatenation would fill and copy the whole map three times."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_old: int) -> Tensor:
        ctx.num_classes = logits.shape[2]
        joined = logits[:, :, :num_old].clone()
        joined[:, :, BACKGROUND] += logits[:, :, num_old:].sum(2)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        background = gradient[:, :, :1].expand(-1, -1, ctx.num_classes - gradient.shape[2], -1, -1)
        return torch.cat([gradient, background], dim=2), None


def opinion(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a teacher says per pixel: its class, int64 [B T H W], and its normalised entropy -(sum_c q_c log q_c) / log O.

    logits [B T O H W]; the entropy is float32 in [0, 1], 0 where it is certain.
    """
    logits = logits.detach().float()
    greatest, classes = logits.max(2, keepdim=True)
    below = logits - greatest
    # With d_c = z_c - max z, s = sum_c e^d_c: log s - sum_c d_c e^d_c / s, two terms of one sign, no logarithm per class.
    weights = below.exp()
    sums = weights.sum(2)
    entropy = sums.log() - below.mul_(weights).sum(2) / sums
    return classes.squeeze(2), entropy / math.log(max(logits.shape[2], 2))


def pseudo_labelled(batch: Batch, teacher_logits: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Labels with the teacher's view in the open pixels, and each frame's share of open pixels that got one.

    thresholds [O] on normalised entropy. An open pixel gets the teacher's class (background included) where the entropy is
    strictly below the threshold of that class, else IGNORE. Returns label uint8 [B T H W] and the adaptive factor float32
    [B T], 1 for a frame without open pixels.
    """
    if thresholds.shape != (teacher_logits.shape[2],):
        raise ValueError(f"expected one threshold per old class, got {tuple(thresholds.shape)} for {teacher_logits.shape[2]}")
    classes, entropy = opinion(teacher_logits)
    unclear = open_pixels(batch)
    certain = unclear & (entropy < thresholds.to(entropy.device)[classes])
    label = batch.label.masked_fill(unclear, IGNORE)
    label = torch.where(certain, classes.to(label.dtype), label)
    num_unclear = unclear.sum((2, 3))
    share = certain.sum((2, 3)) / num_unclear.clamp(min=1)
    return label, torch.where(num_unclear > 0, share, 1.0)


def median_entropies(teacher: Network, batches: Iterable[Batch], task: Task, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Per old class the median normalised entropy of the open pixels that the teacher gives it, float32 [O]; 0 without pixels.

    Read from per-class counts in 2^16 equal bins of [0, 1], which add up over workers: one pass over the data and the same
    result for any number of workers. The value is the middle of the median's bin, so it differs from the lower median (that of
    torch.median) by at most 2^-17.
    """
    counts = torch.zeros(task.num_old * ENTROPY_BINS, dtype=torch.int64)
    with torch.no_grad():
        for batch in batches:
            classes, entropy = opinion(teacher(batch).logits)
            bins = (entropy * ENTROPY_BINS).long().clamp(0, ENTROPY_BINS - 1)
            index = (classes * ENTROPY_BINS + bins)[open_pixels(batch)]
            counts = counts.to(index.device) + torch.bincount(index, minlength=len(counts))
    cumulative = all_reduce(counts).view(task.num_old, ENTROPY_BINS).cumsum(1)
    pixels = cumulative[:, -1:]
    median_bin = torch.searchsorted(cumulative, (pixels + 1) // 2)
    return torch.where(pixels > 0, (median_bin + 0.5) / ENTROPY_BINS, 0.0).squeeze(1)
