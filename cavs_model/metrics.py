"""Measures of segmentation from one confusion matrix over all annotated pixels: IoU per class and its means.

Terms: a matrix `counts` [C C] int64 of pixels, row = truth, column = prediction, over the C classes seen so far; old classes
are those of the base task (background included), new classes all later ones. IoU is a fraction in [0, 1].
Classes without any pixel of truth: PLOP's evaluation code skips them in means, CMR's release counts them as 0. Here they are
skipped, and the mean over all classes is reported a second time with them as 0. Either way, a prediction of such a class
costs the class that is truly there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavs_model.types import BACKGROUND, IGNORE


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixels by truth (row) and prediction (column), int64 [C C], on the device of the inputs. Sums over any split of pixels.

    prediction, label: integers of one shape, prediction in 0..C-1, label in 0..C-1 or IGNORE (left out).
    ValueError for a label that is neither.
    """
    counted = label != IGNORE
    pairs = label[counted].long() * num_classes + prediction[counted].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    if len(counts) != num_classes**2:
        raise ValueError(f"confusion: labels or predictions beyond the {num_classes} classes")
    return counts.view(num_classes, num_classes)


def iou(counts: Tensor) -> Tensor:
    """IoU_c = TP / (TP + FP + FN) per class, float64 [C]; NaN for a class without any pixel of truth, predicted or not."""
    hit = counts.diagonal().double()
    truth = counts.sum(1)
    union = truth + counts.sum(0) - counts.diagonal()
    return torch.where(truth > 0, hit / union.clamp(min=1), torch.nan)


def summary(counts: Tensor, num_base: int) -> dict[str, float]:
    """Mean IoUs by name; a mean over no class at all is left out, so no value is NaN.

    "miou/all", "miou/old" (classes below `num_base`, background included), "miou/new" (the others; absent at the base task),
    "miou/foreground" (all but background): over classes that have pixels of truth. "miou/all_zero_absent": over all C
    classes, those without pixels of truth as 0.
    """
    ious = iou(counts.cpu())
    groups = {
        "miou/all": ious,
        "miou/old": ious[:num_base],
        "miou/new": ious[num_base:],
        "miou/foreground": ious[BACKGROUND + 1 :],
        "miou/all_zero_absent": ious.nan_to_num(0.0),
    }
    return {name: group.nanmean().item() for name, group in groups.items() if not group.isnan().all()}
