"""CMR: rehearsal with modality-consistent samples (MSS), resampled by collisions (CSR), over the losses of a base method.

Terms: Hong et al., "Taming Modality Entanglement in Continual Audio-Visual Segmentation", arXiv 2510.17234: MSS is multi-modal
sample selection, CSR collision-based sample rehearsal; a collision is an old class that the old network sees where the truth
is a new one. The base is PLOP, as in the paper; any method without a memory may take its place.

Where paper and authors' code disagree or are silent, and what is done here:

- delta: the paper compares mIoUs; the code sums per-frame, per-class IoUs over all seen classes with background, padding and
  unannotated frames included. Field `delta`: "mean" (mean over a frame's classes that occur in prediction or truth, background
  included, then over annotated frames) or "sum_released" (the code's sum; frames without labels have nothing to add here,
  as padding is never computed).
- Labels under both scores: the task's own (the code's training labels): current classes, everything else background.
- Collisions: the paper counts over the data; the code's dump is one GPU's part. Here all data.
- Normalisation before the sigmoid: undetermined. Field `collision_normalisation`: "zscore" over the old foreground classes
  (population standard deviation; all 0 where they are all alike), "max" (F / max F), or "none".
- Whether resampled rows are added to the memory or stand in for others: undetermined. Field `resampling`: "add" (the code
  trains on an expanded memory), "replace" (as many rows, drawn uniformly, make room) or "off".
- Truth of old classes in rehearsed samples: the code overwrites it by pseudo-labels or ignores it. Field `memory_truth`: "kept"
  (ours) or "overwritten" (the code's).
- What the release's losses do otherwise is told in plop.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cavs_model.methods.base import Method, RehearsalMethod, knob
from cavs_model.methods.plop import PLOP
from cavs_model.methods.replay import random_rows
from cavs_model.types import (
    AUDIO_VISUAL,
    BACKGROUND,
    IGNORE,
    VISUAL_ONLY,
    Batch,
    Mean,
    Memory,
    Network,
    Rehearsal,
    Row,
    ScoreTable,
    Step,
    Task,
)


@dataclass(frozen=True)
class CMR(RehearsalMethod):
    """`base` trains on new data and memory; MSS chooses what the memory keeps, CSR how often it is learned again."""

    base: Method = knob(PLOP(), acts=("train", "consolidate"))  # the losses; paper and code: PLOP, schedule off
    memory_truth: Literal["kept", "overwritten"] = knob("kept", choices=("kept", "overwritten"))  # code: overwritten

    samples_per_class: int = knob(5, acts="remember", at_least=1)  # k; paper: 5
    selection: Literal["mss", "random", "largest", "mixed"] = knob(  # paper: mss; the others are its ablations
        "mss", acts="remember", choices=("mss", "random", "largest", "mixed")
    )
    delta: Literal["mean", "sum_released"] = knob(  # of mean IoUs; sum_released: of their sums, as the code
        "mean", acts="score_after", choices=("mean", "sum_released")
    )

    resampling: Literal["add", "replace", "off"] = knob(  # of rows drawn by CSR: beside the others or in their place
        "add", acts="rehearse", choices=("add", "replace", "off")
    )
    resampling_ratio: float = knob(0.2, acts="rehearse", at_least=0, at_most=1)  # share of the memory's rows; paper: 0.2
    resample_by: Literal["collision", "uniform"] = knob(  # paper: collision; uniform over classes is the ablation
        "collision", acts="rehearse", choices=("collision", "uniform")
    )
    collision_share: float = knob(0.7, acts="rehearse", at_least=0, at_most=1)  # least share of the commonest pair; code: 0.7
    collision_normalisation: Literal["zscore", "max", "none"] = knob(  # of F, before the sigmoid; undetermined
        "zscore", acts="rehearse", choices=("zscore", "max", "none")
    )

    @property
    def networks(self) -> tuple[str, ...]:
        return (AUDIO_VISUAL, VISUAL_ONLY) if self.scores_after else (AUDIO_VISUAL,)

    @property
    def scores_before(self) -> bool:
        return self._resamples and self.resample_by == "collision"

    @property
    def scores_after(self) -> bool:
        return self.selection != "random"

    @property
    def _resamples(self) -> bool:
        return self.resampling != "off" and self.resampling_ratio > 0

    def loss(self, step: Step) -> dict[str, Mean]:
        """The base's terms. With `memory_truth` "overwritten" the base takes rehearsed samples for new data."""
        if self.memory_truth == "overwritten":
            step = replace(step, batch=as_new_data(step.batch, step.task))
        return super().loss(step)

    # CSR: how often to rehearse.

    def score_before(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Each clip's commonest confusion of an old class with a new one, over annotated frames.

        Columns: "old_class" (predicted), "new_class" (true), "pixels" of that pair, and its "share" of all the clip's pixels
        with an old foreground class predicted and a new class true; all 0 in a clip without such pixels. Of equally common
        pairs the first by old, then by new class.
        """
        with torch.no_grad():
            prediction = models[AUDIO_VISUAL](batch).classes
        truth = batch.label.long()
        is_new = (truth >= task.num_old) & (truth < task.num_classes)
        confused = is_new & (prediction != BACKGROUND) & annotated(batch)[:, :, None, None]
        clip = torch.arange(len(batch), device=truth.device)[:, None, None, None]
        pair = (clip * task.num_old + prediction) * task.num_new + (truth - task.num_old)
        num_pairs = task.num_old * task.num_new
        counts = torch.bincount(pair[confused], minlength=len(batch) * num_pairs).view(len(batch), num_pairs).cpu().numpy()

        commonest = counts.argmax(1)
        pixels = counts.max(1)
        found = pixels > 0
        return ScoreTable(
            batch.sample_id,
            {
                "old_class": _column(np.where(found, commonest // task.num_new, 0)),
                "new_class": _column(np.where(found, commonest % task.num_new + task.num_old, 0)),
                "pixels": _column(pixels),
                "share": _column(pixels / np.maximum(counts.sum(1), 1)),
            },
        )

    def rows_expected(self, num_classes: int) -> int:
        rows = num_classes * self.samples_per_class
        return rows + (round(self.resampling_ratio * rows) if self.resampling == "add" else 0)

    def rehearse(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Rehearsal:
        """Every row once, and `resampling_ratio` of their number again (rounded), drawn by class and then by row.

        Old foreground classes are drawn with p_c = F'_c / sum F' (uniformly with `resample_by` "uniform"), F' = sigmoid of the
        normalised number F_c of videos whose collision has the old class c; then a stored row of the class uniformly. Classes
        without stored rows count in the normalisation but cannot be drawn. The table has, per old class: "class", "collisions"
        F, "frequency" F', "probability" p, "stored" and "drawn" rows; pairs have "old_class", "new_class" and "videos".
        """
        rows = memory.rows
        if not self._resamples:
            return Rehearsal(rows=rows)
        classes = np.arange(1, task.num_old)
        pairs: dict[tuple[int, int], int] = {}
        if self.resample_by == "collision":
            if scores is None:
                raise ValueError("resampling by collision needs the scores of score_before")
            pairs = collision_pairs(scores, self.collision_share)
        collisions = _videos_per_class(pairs, classes)
        frequency = self.frequencies(collisions) if self.resample_by == "collision" else np.ones(len(classes))
        stored = np.array([len(memory.by_class.get(int(class_id), ())) for class_id in classes], dtype=np.int64)
        weight = np.where(stored > 0, frequency, 0.0)
        probability = weight / weight.sum() if weight.any() else weight

        num_drawn = round(self.resampling_ratio * len(rows)) if weight.any() else 0
        drawn: list[Row] = []
        if num_drawn:
            positions = rng.choice(len(classes), size=num_drawn, p=probability)
            places = rng.integers(stored[positions])
            drawn = [memory.by_class[int(classes[position])][place] for position, place in zip(positions, places, strict=True)]
        kept = rows
        if self.resampling == "replace":
            gone = set(rng.permutation(len(rows))[:num_drawn].tolist())
            kept = tuple(row for position, row in enumerate(rows) if position not in gone)
        table = tuple(
            {
                "class": float(class_id),
                "collisions": float(collisions[position]),
                "frequency": float(frequency[position]),
                "probability": float(probability[position]),
                "stored": float(stored[position]),
                "drawn": float(sum(row.class_id == class_id for row in drawn)),
            }
            for position, class_id in enumerate(classes.tolist())
        )
        evidence = tuple(
            {"old_class": float(old), "new_class": float(new), "videos": float(videos)}
            for (old, new), videos in sorted(pairs.items())
        )
        return Rehearsal(rows=kept + tuple(drawn), drawn=tuple(drawn), table=table, pairs=evidence)

    def frequencies(self, collisions: np.ndarray) -> np.ndarray:
        """F' [n] = sigmoid(normalised F), from the collisions F [n] of the old foreground classes."""
        values = collisions.astype(np.float64)
        if self.collision_normalisation == "zscore":
            deviation = values.std()
            values = (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)
        elif self.collision_normalisation == "max":
            values = values / max(values.max(initial=0.0), 1.0)
        return 1.0 / (1.0 + np.exp(-values))

    # MSS: what to keep.

    def score_after(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Each clip's IoU under both networks, against the task's labels over all C classes with background.

        Columns: "audio_visual" S_av, "visual_only" S_v, "delta" = S_av - S_v, and "frames", the annotated frames they are over.
        A clip without annotated frames scores 0.
        """
        frames = _scored_frames(batch)
        with torch.no_grad():
            said = [models[name](batch).classes for name in (AUDIO_VISUAL, VISUAL_ONLY)]
        ious = frame_ious(said, batch, task.num_classes)
        score = {name: self._iou(each, frames) for name, each in zip((AUDIO_VISUAL, VISUAL_ONLY), ious, strict=True)}
        return ScoreTable(
            batch.sample_id,
            {
                "delta": _column(score[AUDIO_VISUAL] - score[VISUAL_ONLY]),
                "audio_visual": _column(score[AUDIO_VISUAL]),
                "visual_only": _column(score[VISUAL_ONLY]),
                "frames": _column(frames.sum(1)),
            },
        )

    def _iou(self, ious: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """S [B] from IoUs [B T C], NaN for classes that do not occur, and the frames to score, bool [B T]."""
        if self.delta == "sum_released":
            total: np.ndarray = np.nansum(ious, axis=(1, 2))
            return total
        occurring = np.maximum((~np.isnan(ious)).sum(2), 1)
        per_frame = np.nansum(ious, axis=2) / occurring
        mean: np.ndarray = per_frame.sum(1) / np.maximum(frames.sum(1), 1)
        return mean

    def remember(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Memory:
        """Adds, per new class, k of the samples that contain it (all, if fewer) by |delta|; ties go by sample id.

        "mss" keeps the smallest, "largest" the largest, "mixed" half of each (the smallest have the odd one). Clips without
        annotated frames come last in either direction. Rows carry the scores they were chosen by. ValueError where the scores
        lack a sample.
        """
        if self.selection == "random":
            return memory.extended(random_rows(task.train, task.new_classes, self.samples_per_class, rng))
        if scores is None:
            raise ValueError(f"selection {self.selection!r} needs the scores of score_after")
        numbers = {
            sample_id: dict(zip(scores.columns, values, strict=True))
            for sample_id, *values in zip(scores.sample_ids, *scores.columns.values(), strict=True)
        }
        if missing := [sample.id for sample in task.train if sample.id not in numbers]:
            raise ValueError(f"no scores for {len(missing)} samples of task {task.index}, the first is {missing[0]!r}")
        by_class = {}
        for class_id in task.new_classes:
            candidates = [sample.id for sample in task.train if class_id in sample.classes]
            by_class[class_id] = tuple(
                Row(sample_id, class_id, numbers[sample_id]) for sample_id in self._selected(candidates, numbers)
            )
        return memory.extended(by_class)

    def _selected(self, candidates: Sequence[str], numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
        def ranked(sign: int) -> list[str]:
            return sorted(
                candidates,
                key=lambda each: (numbers[each]["frames"] == 0, sign * abs(numbers[each]["delta"]), each),
            )

        k = self.samples_per_class
        smallest = {"mss": k, "largest": 0, "mixed": (k + 1) // 2}[self.selection]
        chosen = ranked(1)[:smallest]
        return chosen + [each for each in ranked(-1) if each not in chosen][: k - smallest]


def as_new_data(batch: Batch, task: Task) -> Batch:
    """The batch as if rehearsed samples were new data: their old classes are labelled background and the flags are down."""
    old = (batch.label > BACKGROUND) & (batch.label < task.num_old) & batch.rehearsed[:, None, None, None]
    return replace(batch, label=batch.label.masked_fill(old, BACKGROUND), rehearsed=torch.zeros_like(batch.rehearsed))


def annotated(batch: Batch) -> Tensor:
    """Frames that are real and have labels, bool [B T]."""
    return batch.real_frame & batch.labelled_frame


def collision_pairs(scores: ScoreTable, least_share: float) -> dict[tuple[int, int], int]:
    """Videos per collision (old class, new class): a video counts where its commonest pair has more than `least_share`."""
    pairs: dict[tuple[int, int], int] = {}
    columns = (scores.columns[name] for name in ("old_class", "new_class", "pixels", "share"))
    for old, new, pixels, share in zip(*columns, strict=True):
        if pixels > 0 and share > least_share:
            pairs[int(old), int(new)] = pairs.get((int(old), int(new)), 0) + 1
    return pairs


def frame_ious(predictions: Sequence[Tensor], batch: Batch, num_classes: int) -> list[np.ndarray]:
    """IoU per clip, frame and class of several predictions, each float64 [B T C], over labelled pixels of annotated frames.

    predictions: integers [B T H W]. NaN for a class that is neither predicted nor true in a frame.
    """
    clips, frames = batch.label.shape[:2]
    # One matrix a frame, whose last row takes the pixels that do not count: a selection of pixels would cost more. Where each
    # pixel's row begins is the same for all predictions. In 32 bits, which hold it many times over, for half of the memory.
    size = num_classes + 1
    uncounted = ~annotated(batch)[:, :, None, None]
    label = batch.label.masked_fill(batch.label == IGNORE, num_classes).masked_fill_(uncounted, num_classes)
    matrix = torch.arange(clips * frames, dtype=torch.int32, device=label.device).view(clips, frames, 1, 1) * size**2
    row = torch.add(matrix, label, alpha=size)
    found = []
    for prediction in predictions:
        counts = torch.bincount((row + prediction.int()).flatten(), minlength=clips * frames * size**2)
        counted = counts.view(clips, frames, size, size).cpu().numpy()[:, :, :num_classes, :num_classes]
        hit = counted.diagonal(axis1=2, axis2=3)
        union = counted.sum(3) + counted.sum(2) - hit
        found.append(np.divide(hit, union, out=np.full(union.shape, np.nan), where=union > 0))
    return found


def _scored_frames(batch: Batch) -> np.ndarray:
    """Annotated frames with at least one labelled pixel, bool [B T]."""
    frames: np.ndarray = (annotated(batch) & (batch.label != IGNORE).any(3).any(2)).cpu().numpy()
    return frames


def _videos_per_class(pairs: Mapping[tuple[int, int], int], classes: np.ndarray) -> np.ndarray:
    """F [n]: per old class the videos whose collision has it."""
    return np.array([sum(videos for (old, _), videos in pairs.items() if old == class_id) for class_id in classes.tolist()])


def _column(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
