"""EIR, enhanced instance replay: stored objects of old classes, pasted with their sound into the samples of the new task.

Terms: the paper of this name, CVPR 2025, on continual semantic segmentation of pictures. An instance is a stored sample in
which the class it is stored for is one connected component; pasting fills a sample's background with instances of old classes.

Where the sources disagree or are silent, and what is done here. Known from the paper: a class-balanced memory of instances;
old classes that the old network predicts with a sigmoid of at least 0.7 where the labels say nothing become pseudo-labels, at
most three classes a sample; a stored instance of each is pasted where the sample has most background, and random ones where
there are fewer than two such classes; binary cross-entropy, and 5 times a distillation of chosen regions. Its release does not
run, and pictures have no sound. The rest is our reading:

- Instances: the class shows, and is one component (pixels that touch by side or corner), in every annotated frame that shows
  it. Where fewer samples than the budget are like that, others that show the class fill up, and are pasted as a whole.
- Predicted class: of the old foreground classes the one with the highest confidence in a background pixel, where that is at
  least `confidence`. The background's own confidence is not asked. Counted over annotated frames, per sample.
- Chance: the instances of a sample are drawn once, before the task, and pasted alike in every epoch. The random ones are drawn
  from all stored instances that the sample has not got yet.
- Place: an instance keeps its size and, as a clip, its movement: one offset for all frames. Of a grid of offsets, and its
  own place first, the one that covers the fewest labelled foreground pixels, the nearest of these. Later instances
  avoid earlier ones in the same way. Frame t goes into frame t; a frame in which the stored clip has no annotation or the
  instance does not show gives nothing. Where the sample's own frame has no annotation, picture and sound change, the label not.
- Sound: added in power in each second in which the instance is pasted, so that picture and sound agree (`mix`).
- Pseudo-labels: the classes, of those above, that have most pixels in the clip; other confident pixels stay background. Pixels
  of a pasted instance have its label.
- Region of the distillation: pixels of annotated frames without a label of their own, neither new class nor pasted
  instance: those labelled background before pseudo-labels came in. Summed over the old classes, background included.
- Activation: the paper's sigmoids ask for a base network trained with sigmoids; here all methods share one trained by a
  softmax (as lwf_mc.py tells too), whose logits say nothing in absolute terms: read by sigmoids, they find old classes in most
  of the background (docs/results.md). Field `activation`: "softmax", which reads confidences, labels and distillation
  by softmax, or "sigmoid" (paper).
- Base task: plain cross-entropy, as for all methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from cavs_model.losses import cross_entropy, over_labelled_pixels, weighted
from cavs_model.methods.base import Method, knob
from cavs_model.methods.lwf_mc import one_hot_cross_entropy
from cavs_model.methods.mib import open_pixels
from cavs_model.types import (
    AUDIO_VISUAL,
    BACKGROUND,
    IGNORE,
    Batch,
    Mean,
    Memory,
    Network,
    Paste,
    Rehearsal,
    Row,
    ScoreTable,
    Step,
    Task,
)

GRID = 8  # offsets tried along each side
LOG_OFFSET = 0.01  # of Batch.audio: log(magnitude + 0.01)


@dataclass(frozen=True)
class EIR(Method):
    """Pasted instances and pseudo-labels stand for the old classes; the old network is distilled where nothing is labelled."""

    kd_weight: float = knob(5.0, at_least=0)  # paper: 5; 0 leaves the term out
    activation: Literal["sigmoid", "softmax"] = knob(  # paper: sigmoid; here the base network is trained by a softmax
        "softmax", acts=("train", "score_before"), choices=("sigmoid", "softmax")
    )
    confidence: float = knob(0.7, acts=("train", "score_before"), at_least=0, at_most=1)  # paper: 0.7
    max_classes: int = knob(3, acts=("train", "rehearse"), at_least=0)  # predicted old classes of a sample; paper: 3
    min_classes: int = knob(2, acts="rehearse", at_least=0)  # instances of a sample, if need be random ones; paper: 2
    samples_per_class: int = knob(5, acts="remember", at_least=1)  # instances; CMR's budget

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def scores_before(self) -> bool:
        return True

    @property
    def scores_after(self) -> bool:
        return True

    @property
    def networks_after(self) -> tuple[str, ...]:
        return ()  # the labels say it all

    @property
    def remembers(self) -> bool:
        return True

    def loss(self, step: Step) -> dict[str, Mean]:
        """Terms "cross_entropy" (with `activation` "sigmoid" "binary_cross_entropy") and "distillation"."""
        batch, logits, real = step.batch, step.student.logits, step.batch.real_frame
        if step.task.is_base:
            return {"cross_entropy": cross_entropy(logits, batch.label, real)}
        assert step.teacher is not None
        open_, known = open_pixels(batch), step.teacher.logits.detach()
        label = self.pseudo_labelled(batch.label, open_, known)
        if self.activation == "sigmoid":
            terms = {"binary_cross_entropy": one_hot_cross_entropy(logits, label, real)}
        else:
            terms = {"cross_entropy": cross_entropy(logits, label, real)}
        if self.kd_weight > 0:
            per_pixel = self._difference(logits[:, :, : step.task.num_old], known)
            region = torch.where(open_, batch.label, IGNORE)
            terms["distillation"] = weighted(self.kd_weight, over_labelled_pixels(per_pixel, region, real))
        return terms

    def pseudo_labelled(self, label: Tensor, open_: Tensor, known: Tensor) -> Tensor:
        """The labels [B T H W] with a clip's commonest confidently predicted old classes in its open pixels.

        open_ [B T H W] bool; known: the teacher's logits [B T O H W].
        """
        predicted = self.predicted(known) * open_
        counts = _pixels_per_class(predicted, known.shape[2])
        # Of equally common classes the first; a class without pixels changes nothing.
        rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        taken = F.pad(rank < self.max_classes, (1, 0))  # [B O]; never the background
        found = taken.gather(1, predicted.flatten(1)).view_as(predicted)
        return torch.where(found, predicted.to(label.dtype), label)

    def predicted(self, known: Tensor) -> Tensor:
        """The old foreground class of each pixel, int64 [B T H W], from logits [B T O H W]; BACKGROUND where none is sure."""
        scores = known.float()
        sure = scores.sigmoid() if self.activation == "sigmoid" else scores.softmax(2)
        confidence, best = sure[:, :, 1:].max(2)
        return torch.where(confidence >= self.confidence, best + 1, BACKGROUND)

    def _difference(self, student: Tensor, known: Tensor) -> Tensor:
        """Cross-entropy of the teacher's and the student's outputs [B T O H W], summed over classes, [B T H W]."""
        if self.activation == "sigmoid":
            wanted = known.float().sigmoid()
            return F.binary_cross_entropy_with_logits(student.float(), wanted, reduction="none").sum(2)
        return -(known.float().softmax(2) * student.float().log_softmax(2)).sum(2)

    # What is pasted where.

    def score_before(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Column "pixels_<c>" per old foreground class c: background pixels of annotated frames predicted as c."""
        with torch.no_grad():
            known = models[AUDIO_VISUAL](batch).logits
        counts = _pixels_per_class(self.predicted(known) * open_pixels(batch), task.num_old).cpu().numpy()
        return ScoreTable(
            batch.sample_id,
            {f"pixels_{class_id}": tuple(map(float, counts[:, class_id - 1])) for class_id in range(1, task.num_old)},
        )

    def rehearse(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Rehearsal:
        """No row of its own; per sample a stored instance of each of its commonest predicted classes, random ones to fill up.

        Classes without a stored instance are passed over. The table has, per old class: "class", "predicted" (the samples
        among whose commonest it is), "stored" and "pasted" instances. ValueError without the scores of score_before.
        """
        if scores is None:
            raise ValueError("pasting instances needs the scores of score_before")
        classes = range(1, task.num_old)
        counts = np.array([scores.columns[f"pixels_{class_id}"] for class_id in classes])  # [O - 1, samples]
        stored = {class_id: memory.by_class.get(class_id, ()) for class_id in classes}
        rows = memory.rows
        predicted = dict.fromkeys(classes, 0)
        pastes = []
        for position in sorted(range(len(scores.sample_ids)), key=lambda each: scores.sample_ids[each]):
            pixels = counts[:, position]
            ranked = [
                class_id for class_id in np.argsort(-pixels, kind="stable") + 1 if pixels[class_id - 1] and stored[class_id]
            ]
            chosen = []
            for class_id in map(int, ranked[: self.max_classes]):
                predicted[class_id] += 1
                chosen.append(stored[class_id][rng.integers(len(stored[class_id]))])
            left = [row for row in rows if row not in chosen]
            fill = rng.permutation(len(left))[: max(0, self.min_classes - len(chosen))]
            chosen += [left[place] for place in fill]
            pastes += [Paste(scores.sample_ids[position], row.sample_id, row.class_id) for row in chosen]
        table = tuple(
            {
                "class": float(class_id),
                "predicted": float(predicted[class_id]),
                "stored": float(len(stored[class_id])),
                "pasted": float(sum(paste.class_id == class_id for paste in pastes)),
            }
            for class_id in classes
        )
        return Rehearsal(pastes=tuple(pastes), table=table)

    def compose(self, batch: Batch, stored: Batch, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch with each stored clip's pixels of its class, and its sound, in the clip that it goes into."""
        image, audio, label = (each.clone() for each in (batch.image, batch.audio, batch.label))
        for index, (clip, class_id) in enumerate(places):
            both = (batch.real_frame[clip] & stored.labelled_frame[index]).numpy()
            mask = (stored.label[index] == class_id).numpy() & both[:, None, None]
            if not mask.any():
                continue
            top, left, bottom, right = box(mask)
            cut = mask[:, top:bottom, left:right]
            foreground = ((label[clip] != BACKGROUND) & (label[clip] != IGNORE)).numpy()
            down, across = least_covering(cut, foreground, (top, left))
            shown = torch.from_numpy(np.ascontiguousarray(cut))  # T h w
            place = (..., slice(down, down + cut.shape[1]), slice(across, across + cut.shape[2]))
            picture = stored.image[index][..., top:bottom, left:right]
            image[clip][place] = torch.where(shown[:, None], picture, image[clip][place])
            labelled = shown & batch.labelled_frame[clip][:, None, None]
            label[clip][place] = label[clip][place].masked_fill(labelled, class_id)
            sounding = shown.flatten(1).any(1)[:, None, None]
            audio[clip] = torch.where(sounding, mix(audio[clip], stored.audio[index]), audio[clip])
        # Vectors of sound that were computed from the clips as they were say nothing of the mixture.
        return replace(batch, image=image, audio=audio, label=label, audio_feature=None)

    # What is kept.

    def score_after(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Column "components_<c>" per new class c: the most components it has in a frame; 0 where it does not show."""
        labels = batch.label.cpu().numpy()
        columns = {
            f"components_{class_id}": tuple(float(max(map(components, clip == class_id))) for clip in labels)
            for class_id in task.new_classes
        }
        return ScoreTable(batch.sample_id, columns)

    def remember(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Memory:
        """Adds, per new class, random samples in which it is one component, then random others that show it.

        A sample that does not show the class is never kept for it. Rows carry "components". ValueError without the scores of
        score_after.
        """
        if scores is None:
            raise ValueError("choosing instances needs the scores of score_after")
        by_class = {}
        for class_id in task.new_classes:
            found = dict(zip(scores.sample_ids, scores.columns[f"components_{class_id}"], strict=True))
            ids = sorted(sample.id for sample in task.train if class_id in sample.classes and found[sample.id] > 0)
            drawn = [ids[position] for position in rng.permutation(len(ids))]
            kept = sorted(drawn, key=lambda each: found[each] > 1)[: self.samples_per_class]
            by_class[class_id] = tuple(Row(each, class_id, {"components": found[each]}) for each in kept)
        return memory.extended(by_class)


def _pixels_per_class(predicted: Tensor, num_old: int) -> Tensor:
    """Pixels of each clip per old foreground class, int64 [B O - 1], from classes [B T H W], BACKGROUND for none."""
    pixels = predicted.flatten(1)
    counts = torch.zeros(len(pixels), num_old, dtype=torch.int64, device=pixels.device)
    return counts.scatter_add_(1, pixels, torch.ones_like(pixels))[:, 1:]  # bincount would wait for the GPU in every step


def components(mask: np.ndarray) -> int:
    """Connected components of bool [H W]; pixels touch by side or corner."""
    return int(ndimage.label(mask, structure=np.ones((3, 3)))[1])


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right (the last two exclusive) of what bool [T H W] shows in any frame; it must show something."""
    rows, columns = np.flatnonzero(mask.any((0, 2))), np.flatnonzero(mask.any((0, 1)))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def least_covering(cut: np.ndarray, foreground: np.ndarray, own: tuple[int, int]) -> tuple[int, int]:
    """Where the top left corner of `cut` goes, so that it covers the fewest foreground pixels; of several the nearest to `own`.

    cut bool [T h w], foreground bool [T H W]. Tried are its own place and a grid over all places where it fits; of equally near
    places the upper, then the left one.
    """
    spaces = [whole - part for whole, part in zip(foreground.shape[1:], cut.shape[1:], strict=True)]
    downs, acrosses = (np.unique(np.linspace(0, space, GRID).round().astype(int)).tolist() for space in spaces)
    places = {own, *((down, across) for down in downs for across in acrosses)}
    best, fewest = own, cut.size + 1
    for down, across in sorted(places, key=lambda each: ((each[0] - own[0]) ** 2 + (each[1] - own[1]) ** 2, each)):
        covered = int(np.count_nonzero(foreground[:, down : down + cut.shape[1], across : across + cut.shape[2]] & cut))
        if covered < fewest:
            best, fewest = (down, across), covered
        if not covered:
            break
    return best


def mix(one: Tensor, other: Tensor) -> Tensor:
    """Two log-mel spectrograms heard at once: log(m + 0.01), m^2 = m_1^2 + m_2^2. Sounds that do not cohere add in power."""
    magnitudes = [(each.exp() - LOG_OFFSET).clamp(min=0) for each in (one, other)]
    return torch.log(torch.hypot(*magnitudes) + LOG_OFFSET)
