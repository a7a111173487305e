"""Measures of segmentation from confusion matrices over all annotated pixels: of one task, and of a stream of tasks.

Terms: a matrix `counts` [C C] int64 of pixels, row = truth, column = prediction, over the C classes seen so far; old classes
are those of the base task (background included), new classes all later ones. IoU is a fraction in [0, 1].
Classes without any pixel of truth: PLOP's evaluation code skips them in means, CMR's release counts them as 0. Here they are
skipped, and the mean over all classes is reported a second time with them as 0. Either way, a prediction of such a class
costs the class that is truly there.
Over a stream, forgetting is that of Chaudhry et al. (RWalk, ECCV 2018) and backward transfer that of Lopez-Paz and Ranzato
(GEM, NeurIPS 2017), with mean IoU for accuracy. Every name with its formula: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cavs_model.types import BACKGROUND, IGNORE

F_BETA_SQUARED = 0.3  # beta^2 of AVSBench's F-score: precision counts for more than recall
FRAME_UNIT = 2**32  # sums of fractions over frames are kept in whole parts of this size, so that they add up in any order


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixels by truth (row) and prediction (column), int64 [C C], on the device of the inputs. Sums over any split of pixels.

    prediction, label: integers of one shape, prediction in 0..C-1, label in 0..C-1 or IGNORE (left out).
    ValueError for a label that is neither.
    """
    # Place 0 takes the pixels that do not count: a selection of pixels would cost more, and two waits for a GPU.
    pairs = torch.where(label == IGNORE, 0, label.int() * num_classes + prediction.int() + 1)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    if len(counts) != num_classes**2 + 1:
        raise ValueError(f"confusion: labels or predictions beyond the {num_classes} classes")
    return counts[1:].view(num_classes, num_classes)


def iou(counts: Tensor) -> Tensor:
    """IoU_c = TP / (TP + FP + FN) per class, float64 [C]; NaN for a class without any pixel of truth, predicted or not."""
    hit = counts.diagonal().double()
    truth = counts.sum(1)
    union = truth + counts.sum(0) - counts.diagonal()
    return torch.where(truth > 0, hit / union.clamp(min=1), torch.nan)


def f_score(counts: Tensor, beta_squared: float = F_BETA_SQUARED) -> Tensor:
    """F_c = (1 + beta^2) P R / (beta^2 P + R) per class, float64 [C]; NaN for a class without any pixel of truth.

    P = TP / (TP + FP) and R = TP / (TP + FN) over all pixels, so F_c = (1 + beta^2) TP / (beta^2 (TP + FN) + TP + FP), which
    is 0 for a class that is never predicted. AVSBench takes F of every frame and averages over frames: see `frame_sums`.
    """
    hit = counts.diagonal().double()
    truth = counts.sum(1)
    return torch.where(truth > 0, (1 + beta_squared) * hit / (beta_squared * truth.double() + counts.sum(0)), torch.nan)


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
    return _means(groups)


def diagnoses(counts: Tensor, num_base: int) -> dict[str, float]:
    """What `summary` does not tell, by name; a value over no pixel or no class at all is left out.

    "miou/old_foreground" (old classes but background; new classes have none, so "miou/new" needs no such twin), "f_score/all"
    and "f_score/foreground" (means like those of "miou/..."). Shares of the labelled pixels of old or new foreground classes:
    "drift/old" (old ones predicted background), "confusion/old_as_new" (old ones predicted as any new class) and
    "confusion/new_as_old" (new ones predicted as any old class but background).
    """
    counts = counts.cpu()
    old, new = slice(BACKGROUND + 1, num_base), slice(num_base, None)
    scores = f_score(counts)
    return _means(
        {
            "miou/old_foreground": iou(counts)[old],
            "f_score/all": scores,
            "f_score/foreground": scores[BACKGROUND + 1 :],
            "drift/old": _share(counts[old, BACKGROUND], counts[old]),
            "confusion/old_as_new": _share(counts[old, new], counts[old]),
            "confusion/new_as_old": _share(counts[new, old], counts[new]),
        }
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The pixels of `part` in those of `whole`, float64 []; NaN where either is empty."""
    return part.sum().double() / (whole.sum() if part.numel() else 0)


def _means(groups: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of every group without its NaNs; groups that hold nothing else are left out."""
    return {name: group.nanmean().item() for name, group in groups.items() if not group.isnan().all()}


def numbers(values: Tensor) -> list[float | None]:
    """A row of values for JSON, which knows no NaN: None in its place."""
    return [None if math.isnan(value) else value for value in values.tolist()]


# Over a stream: `history` holds the matrices after task 0, 1, ... T, each over the classes seen by then.


def added_classes(history: Sequence[Tensor]) -> list[range]:
    """The foreground classes that each task added. Background belongs to no task: every task learns it anew."""
    ends = [len(counts) for counts in history]
    return [range(start, end) for start, end in zip([BACKGROUND + 1, *ends[:-1]], ends, strict=True)]


def task_matrix(history: Sequence[Tensor]) -> Tensor:
    """R[t, k] = mean IoU after task t of the classes that task k added, float64 [T+1 T+1].

    NaN above the diagonal, where nothing is learned yet, and in the columns of tasks whose classes have no pixel of truth.
    """
    spans = added_classes(history)
    matrix = torch.full((len(history), len(history)), torch.nan, dtype=torch.float64)
    for after, counts in enumerate(history):
        ious = iou(counts.cpu())
        for task, span in enumerate(spans[: after + 1]):
            matrix[after, task] = ious[span.start : span.stop].nanmean()
    return matrix


def forgetting(matrix: Tensor) -> Tensor:
    """F[k] = max over t < T of R[t, k] - R[T, k] for every task k < T, float64 [T]; below 0 where it was never better."""
    last = matrix[-1, :-1]
    return matrix[:-1, :-1].nan_to_num(-math.inf).amax(0) - last if len(last) else last


def backward_transfer(matrix: Tensor) -> Tensor:
    """R[T, k] - R[k, k] for every task k < T, float64 [T]: what later tasks did to it; below 0 where they harmed it."""
    return (matrix[-1] - matrix.diagonal())[:-1]


def stream_summary(history: Sequence[Tensor]) -> dict[str, float]:
    """Measures of a stream so far, by name; a mean over no task at all is left out, so no value is NaN.

    "stream/forgetting" and "stream/backward_transfer" (means over the tasks before the last; absent at the base task),
    "stream/average_miou" (the mean of "miou/all" after every task so far).
    """
    matrix = task_matrix(history)
    return _means(
        {
            "stream/forgetting": forgetting(matrix),
            "stream/backward_transfer": backward_transfer(matrix),
            "stream/average_miou": torch.stack([iou(counts.cpu()).nanmean() for counts in history]),
        }
    )


# Over single frames, which no matrix of all pixels tells.


def frame_ious(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """IoU per frame and class, float64 [F C], as AVSBench counts it: NaN where a frame has a class in neither map.

    prediction, label: as for `confusion`, [... H W] with at least one axis before H; those axes are the F frames.
    """
    return _ious(_frame_counts(prediction, label, num_classes))


def frame_sums(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """What means over frames are made of, int64 [C+1 3]; adds up over any split of frames, exactly. Inputs as `frame_ious`.

    Row c is over the frames in which class c is true or predicted: the sum of their IoU_c, of their F_c, and their number. The
    last row is over the frames with a labelled pixel: the sums of the frame's mean IoU and mean F over the classes in it, and
    their number. IoU and F are in units of 1 / FRAME_UNIT.
    """
    counts = _frame_counts(prediction, label, num_classes)
    weighted = F_BETA_SQUARED * counts.sum(2).double() + counts.sum(1)
    scores = (1 + F_BETA_SQUARED) * counts.diagonal(dim1=1, dim2=2).double() / weighted
    per_frame = torch.stack([_ious(counts), scores], dim=2)  # [F C 2], NaN where a class is in neither map
    with_mean = torch.cat([per_frame, per_frame.nanmean(1, keepdim=True)], dim=1)
    counted = ~with_mean[..., 0].isnan()
    sums = (with_mean.nan_to_num(0.0) * FRAME_UNIT).round().long().sum(0)
    return torch.cat([sums, counted.sum(0)[:, None]], dim=1)


def frame_summary(sums: Tensor) -> dict[str, float]:
    """Means over frames by name, from the `frame_sums` of a split; a mean over nothing is left out, so no value is NaN.

    "frame/miou/all", "frame/miou/foreground": per class the mean over the frames in which it is true or predicted, then over
    the classes that are in any frame; "frame/miou/all_zero_absent": over all C classes, those in no frame as 0, as
    AVSBench-semantic's code has it. "frame/f_score/..." likewise. "frame/miou/mean_of_frames" is `frame_miou`.
    """
    sums = sums.cpu()
    means = sums[:, :2].double() / FRAME_UNIT / sums[:, 2:]
    groups = {}
    for measure, values in (("miou", means[:-1, 0]), ("f_score", means[:-1, 1])):
        groups[f"frame/{measure}/all"] = values
        groups[f"frame/{measure}/foreground"] = values[BACKGROUND + 1 :]
        groups[f"frame/{measure}/all_zero_absent"] = values.nan_to_num(0.0) if sums[-1, 2] else values
    return _means({**groups, "frame/miou/mean_of_frames": means[-1, 0]})


def _frame_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """`confusion` of every frame, int64 [F C C]."""
    said, true = prediction.flatten(0, -3).long(), label.flatten(0, -3).long()
    counted = true != IGNORE
    if bool((torch.maximum(said, true)[counted] >= num_classes).any()):
        raise ValueError(f"frames: labels or predictions beyond the {num_classes} classes")
    first = torch.arange(len(true), device=true.device).view(-1, 1, 1) * num_classes
    counts = torch.bincount(((first + true) * num_classes + said)[counted], minlength=len(true) * num_classes**2)
    return counts.view(-1, num_classes, num_classes)


def _ious(counts: Tensor) -> Tensor:
    """IoU of matrices [F C C], float64 [F C]; NaN for a class that is in neither map."""
    hit = counts.diagonal(dim1=1, dim2=2)
    return hit.double() / (counts.sum(1) + counts.sum(2) - hit)


def frame_miou(prediction: Tensor, label: Tensor, num_classes: int) -> float:
    """Mean over frames of the frame's mean IoU over the classes in it, true or predicted; NaN without a labelled pixel.

    AVSBench's list of means per frame leaves out classes with IoU 0 besides, so a class that is wholly wrong costs nothing;
    here it counts. The mIoU that AVSBench prints averages over frames first, class by class: `frame_ious(...).nanmean(0)`.
    """
    return frame_ious(prediction, label, num_classes).nanmean(1).nanmean().item()
