"""Losses that several methods share: cross-entropy, distillation and local POD, as pairs of sums over real frames.

Terms: Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, for local POD;
Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation" (MiB), CVPR 2020, and its
authors' code, which has LwF and ILT too, for the distillation.
Axes as in types.py. Every loss computes in fp32 whatever the autocast, leaves its inputs as they are, and returns a types.Mean
whose total and count (int64) are sums over this process's part of the batch, so that any split of a batch over workers gives
the same mean. A part without anything to count has total 0 and count 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cavs_model.types import BACKGROUND, IGNORE, Mean


def cross_entropy(logits: Tensor, label: Tensor, real_frame: Tensor, frame_weight: Tensor | None = None) -> Mean:
    """Cross-entropy in nats, summed over labelled pixels of real frames and counted by them.

    logits [B T C H W]; label [B T H W] uint8 (IGNORE is left out); real_frame [B T] bool. `frame_weight` [B T] multiplies the
    losses of a frame's pixels but not their count (PLOP's adaptive factor).
    """
    target = label.masked_fill(~real_frame[:, :, None, None], IGNORE).flatten(0, 1).long()
    count = (target != IGNORE).sum()
    scores = logits.flatten(0, 1).float()
    if frame_weight is None:
        return Mean(F.cross_entropy(scores, target, ignore_index=IGNORE, reduction="sum"), count)
    per_pixel = F.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
    return Mean((per_pixel.sum((1, 2)) * frame_weight.flatten()).sum(), count)


def distillation(student: Tensor, teacher: Tensor, real_frame: Tensor) -> Mean:
    """Cross-entropy in nats between the teacher's and the student's softmax over the old classes, divided by their number O.

    student, teacher: logits [B T O H W] of the same classes; real_frame [B T] bool. -(1 / O) sum_c q_c log p_c, q from the
    teacher, summed over all pixels of real frames, labelled or not, and counted by them. Least where student and teacher say
    the same. The teacher gets no gradient. ValueError where the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"distillation compares logits of one shape, got student {student.shape} and teacher {teacher.shape}")
    wanted = torch.softmax(teacher.detach().float(), dim=2)
    per_pixel = F.cross_entropy(student.float().flatten(0, 1), wanted.flatten(0, 1), reduction="none")
    return over_real_pixels(per_pixel.view_as(student[:, :, 0]) / student.shape[2], real_frame)


def weighted(weight: float, mean: Mean) -> Mean:
    """`weight` times a mean."""
    return Mean(weight * mean.total, mean.count)


def over_real_pixels(per_pixel: Tensor, real_frame: Tensor) -> Mean:
    """Losses per pixel [B T H W] summed over all pixels of real frames, and the number of these pixels."""
    total = torch.where(real_frame, per_pixel.sum((2, 3)), 0.0).sum()
    return Mean(total, real_frame.sum() * (per_pixel.shape[2] * per_pixel.shape[3]))


def over_labelled_pixels(per_pixel: Tensor, label: Tensor, real_frame: Tensor) -> Mean:
    """Losses per pixel [B T H W] summed over the labelled pixels of real frames, and their number."""
    counted = (label != IGNORE) & real_frame[:, :, None, None]
    return Mean(torch.where(counted, per_pixel, 0.0).sum(), counted.sum())


def logit_of_label(logits: Tensor, label: Tensor) -> Tensor:
    """Each pixel's logit for its label, [B T H W] from logits [B T C H W]; the background's where the label is IGNORE."""
    index = label.masked_fill(label == IGNORE, BACKGROUND).long()
    return logits.gather(2, index.unsqueeze(2)).squeeze(2)


def local_pod(student: Tensor, teacher: Tensor, real_frame: Tensor, scales: tuple[int, ...] = (1, 2, 4)) -> Mean:
    """Local POD of one map (PLOP): per real frame the L2 norm between two embeddings, counted by frames.

    student, teacher [B T D h w]; real_frame [B T] bool. The embedding of a frame: values squared; at each scale s the map is
    cut into s x s windows of (h // s) x (w // s) cells; the means over every window's rows and over its columns, of all
    channels and scales, one after another. As in the authors' code, cells that a scale's windows do not reach (h or w not
    divisible by s) are left out at that scale, and windows are not weighted. A scale finer than the map is left out.
    The teacher gets no gradient; where student and teacher agree exactly, the student's gradient is zero.
    ValueError where the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"local POD compares maps of one shape, got student {student.shape} and teacher {teacher.shape}")
    height, width = student.shape[-2:]
    usable = tuple(scale for scale in scales if scale <= min(height, width))
    # Pooling is linear, so the difference of the pooled squares is the pooled difference of the squares: one map, pooled once.
    ours, theirs, finest = student.flatten(0, 1), teacher.detach().flatten(0, 1), max(usable)
    if height % finest or width % finest or any(finest % scale for scale in usable):
        difference = ours.float().square() - theirs.float().square()
        along_rows = _interval_means(difference, usable)  # [N D h s]
        along_columns = _interval_means(difference.transpose(-1, -2), usable)  # [N D w s]
    else:
        # The finest intervals tile those of all other scales: what is coarser comes from their means.
        fine = _FineMeans.apply(ours, theirs, finest)  # type: ignore[no-untyped-call]
        along_rows, along_columns = ([_split(means, scale).mean(-1) for scale in usable] for means in fine)
    norms = [
        torch.linalg.vector_norm(means[:, :, : size // scale * scale], dim=(1, 2, 3))
        for pooled, size in ((along_rows, height), (along_columns, width))
        for scale, means in zip(usable, pooled, strict=True)
    ]
    distance = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return Mean(torch.where(real_frame.flatten(), distance, 0.0).sum(), real_frame.sum())


def _interval_means(values: Tensor, scales: tuple[int, ...]) -> list[Tensor]:
    """Per scale s the means [... s] over the s intervals of n // s cells of the last axis of `values` [... n]."""
    size = values.shape[-1]
    return [_split(values[..., : size // scale * scale], scale).mean(-1) for scale in scales]


class _FineMeans(torch.autograd.Function):
    """Means of student^2 - teacher^2 over `parts` intervals of every row [N D h parts] and every column [N D w parts].

    From maps [N D h w] whose sides `parts` divides. By hand, because the gradient 2 student (row's + column's) takes two passes
    over the map in the layout it has, where autograd takes seven and keeps the difference.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student)
        ctx.parts = parts
        # Not addcmul_: fused, it would leave a rounding error where both are equal.
        difference = student.float().square().sub_(teacher.float().square())
        return _split(difference, parts).mean(-1), _split(difference.transpose(-1, -2), parts).mean(-1)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, columns: Tensor) -> tuple[Tensor, None, None]:
        (student,), parts = ctx.saved_tensors, ctx.parts
        n, depth, height, width = student.shape
        tall, wide = height // parts, width // parts
        ours = student.float()
        gradient = torch.empty_like(ours)
        along_rows = (2 * parts / width * rows).reshape(n, depth, parts, tall, parts, 1)
        along_columns = (2 * parts / height * columns.transpose(2, 3)).reshape(n, depth, parts, 1, parts, wide)
        torch.add(along_rows, along_columns, out=gradient.view(n, depth, parts, tall, parts, wide))
        return gradient.mul_(ours).to(student.dtype), None, None


def _split(values: Tensor, parts: int) -> Tensor:
    """[... n] -> [... parts n // parts]."""
    return values.reshape(*values.shape[:-1], parts, values.shape[-1] // parts)
