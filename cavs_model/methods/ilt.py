"""ILT, incremental learning techniques: LwF's losses plus the squared distance between the encoders' maps.

Terms: Michieli and Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation", ICCV Workshops 2019, as the authors
of MiB (Cermelli et al., CVPR 2020) compare with it in their code; the default weights are that code's, made for VOC.

Where the sources disagree, and what is done here:

- Combination: the paper tries distillation of the output, of the encoder, and a frozen encoder; MiB's code adds the first
  two. Here as MiB's code; with one weight at 0 the other stands alone.
- Maps: both take the encoder's last map. Here the four maps of `Prediction.encoder`, as the decoder reads all four levels:
  after the dilated sums and before the sound comes in, so that what is held is the visual encoder's. The distance is the
  mean over a map's elements, then over the four maps, each counting alike whatever its size.
- Weights: here MiB's code's, 100 for both. They belong to its encoder's values: `encoder_weight` in particular need not suit
  the maps here.
- Distillation of the output, background and normalisers: as in lwf.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cavs_model.losses import cross_entropy, distillation, weighted
from cavs_model.methods.base import Method, knob
from cavs_model.types import Mean, Step


@dataclass(frozen=True)
class ILT(Method):
    """Cross-entropy on the labels as they are, plus distillation of the old classes' logits and of the encoder's maps."""

    kd_weight: float = knob(100.0, at_least=0)  # lambda_D of the output; MiB's code: 100 (VOC); 0 leaves the term out
    encoder_weight: float = knob(100.0, at_least=0)  # lambda_D of the encoder; MiB's code: 100 (VOC); 0 leaves the term out

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0 or self.encoder_weight > 0

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "cross_entropy", "distillation" and "encoder_features"."""
        logits, real = step.student.logits, step.batch.real_frame
        terms = {"cross_entropy": cross_entropy(logits, step.batch.label, real)}
        if step.task.is_base or not self.needs_teacher:
            return terms
        assert step.teacher is not None
        if self.kd_weight > 0:
            old = logits[:, :, : step.task.num_old]
            terms["distillation"] = weighted(self.kd_weight, distillation(old, step.teacher.logits, real))
        if self.encoder_weight > 0:
            distance = squared_distance(step.student.encoder, step.teacher.encoder, real)
            terms["encoder_features"] = weighted(self.encoder_weight, distance)
        return terms


def squared_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], real_frame: Tensor) -> Mean:
    """Mean squared difference of maps [B T D h w], over a frame's elements and then over maps, summed over real frames.

    Counted by real frames. The teacher gets no gradient. ValueError without any map, or where numbers of maps or their shapes
    differ.
    """
    if not student or [item.shape for item in student] != [item.shape for item in teacher]:
        shapes = [[tuple(item.shape) for item in maps] for maps in (student, teacher)]
        raise ValueError(f"expected encoder maps of the same shapes, got student {shapes[0]} and teacher {shapes[1]}")
    per_map = [
        (ours.float() - theirs.detach().float()).square().mean((2, 3, 4)) for ours, theirs in zip(student, teacher, strict=True)
    ]
    per_frame = torch.stack(per_map).mean(0)
    return Mean(torch.where(real_frame, per_frame, 0.0).sum(), real_frame.sum())
