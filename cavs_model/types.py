"""The values that pass between the parts: samples, tasks, batches, predictions, scores and memories.

Axis legend, used in every docstring: B clips, T frames, H W pixels, h w cells of a feature map, C classes learned so far
(background included), O old classes (those before the current task, background included), D channels.

Class ids: a benchmark numbers its classes 1..K in its own order (*benchmark ids*); a scenario renumbers them once to the
order in which they are learned (*learned ids*). Everything in this file holds learned ids, so that at any task the classes
seen so far are exactly `range(num_classes)`. Background is 0 and IGNORE marks pixels without a label, in both numberings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

BACKGROUND = 0
IGNORE = 255

AUDIO_VISUAL = "audio_visual"
VISUAL_ONLY = "visual_only"


@dataclass(frozen=True)
class LabelRule:
    """Which labels a model may see: classes in `keep` and background stay, every other class becomes `otherwise`.

    Pixels that are IGNORE in the data stay so. A value instead of a branch per split and filter.
    """

    keep: range
    otherwise: int  # BACKGROUND or IGNORE

    def table(self) -> np.ndarray:
        """The rule as a look-up table, uint8 [256]: learned id -> visible label."""
        table = np.full(256, self.otherwise, dtype=np.uint8)
        table[self.keep.start : self.keep.stop] = np.arange(self.keep.start, self.keep.stop)
        table[BACKGROUND] = BACKGROUND
        table[IGNORE] = IGNORE
        return table


@dataclass(frozen=True)
class Sample:
    """One clip of a benchmark as its index knows it, without pixels: `classes` are the sounding classes, ascending."""

    id: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One step of a continual stream.

    `num_old` classes were learned before it (background included; 0 for the base task), `num_classes` will be known after it.
    `train` are the samples whose labels this task may learn from, in index order; their classes are learned ids and include
    old and future ones where the filter lets them in. A task without old classes is a base task wherever it stands: its
    network is trained from the first weights, as joint training's is at every task.
    """

    index: int
    num_old: int
    num_classes: int
    train: tuple[Sample, ...]
    train_rule: LabelRule

    @property
    def is_base(self) -> bool:
        return self.num_old == 0

    @property
    def new_classes(self) -> range:
        """Foreground classes that this task adds."""
        return range(max(self.num_old, 1), self.num_classes)

    @property
    def num_new(self) -> int:
        """Classifier rows that this task adds (background included at the base task)."""
        return self.num_classes - self.num_old

    @property
    def current_rule(self) -> LabelRule:
        """For choosing an epoch: current classes and background count, all else is ignored."""
        return LabelRule(self.new_classes, IGNORE)

    @property
    def seen_rule(self) -> LabelRule:
        """For memory samples and for every evaluation: all classes seen so far count, future ones are ignored."""
        return LabelRule(range(1, self.num_classes), IGNORE)


@dataclass(frozen=True)
class Batch:
    """Clips with their labels, on one device.

    image [B T 3 H W] uint8; audio [B T F M] float32 log-mel (96 frames of 64 bins a second, one second a frame);
    label [B T H W] uint8 after a LabelRule; real_frame [B T] bool: False where a short clip was padded (never computed);
    labelled_frame [B T] bool: False where the frame has no annotation (its label is IGNORE throughout);
    rehearsed [B] bool: True where the sample comes from the memory; audio_feature [B T 128] float32: what the frozen sound
    network says of `audio`, where that is kept on disk; real_frame_cpu: `real_frame` on the CPU where the batch was moved away
    from there, so that nobody waits for the device to read it. Who changes what one of these two follows from sets it to None.
    """

    sample_id: tuple[str, ...]
    image: Tensor
    audio: Tensor
    label: Tensor
    real_frame: Tensor
    labelled_frame: Tensor
    rehearsed: Tensor
    audio_feature: Tensor | None = None
    real_frame_cpu: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        mask = self.real_frame if self.real_frame_cpu is None else self.real_frame_cpu
        away = torch.device(device).type != "cpu" and mask.device.type == "cpu"
        return replace(self._each(lambda value: value.to(device, non_blocking=True)), real_frame_cpu=mask if away else None)

    def pinned_for(self, device: torch.device) -> Batch:
        """The batch, on the CPU, in memory that CUDA reads while the CPU goes on; as it is for a device of another kind."""
        return self._each(lambda value: value.contiguous().pin_memory()) if device.type == "cuda" else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed but the CPU's own."""
        names = [item.name for item in fields(self) if item.name != "real_frame_cpu"]
        values: dict[str, Any] = {name: change(value) for name in names if isinstance(value := getattr(self, name), Tensor)}
        return replace(self, **values)

    def trimmed(self) -> Batch:
        """The batch, on the CPU, without its last frames where these pad every clip; at least one frame stays.

        No result depends on padding; maps and losses of frames that nobody computes still cost memory and time.
        """
        frames = max(1, int((self.real_frame.any(0) * torch.arange(1, self.real_frame.shape[1] + 1)).max()))
        if frames == self.real_frame.shape[1]:
            return self
        per_frame = ("image", "audio", "label", "real_frame", "labelled_frame", "audio_feature")
        values = {name: getattr(self, name) for name in per_frame}
        return replace(self, **{name: value[:, :frames] for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Prediction:
    """What a network says of a batch.

    logits [B T C H W]; features: the maps that distillation compares, each [B T D h w]: four fused maps from fine to coarse,
    then the decoder's map; encoder: the four maps before fusion, which know nothing of the sound, of the same shapes as the
    fused ones. Values at padded frames are zeros and mean nothing.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    encoder: tuple[Tensor, ...] = ()

    @property
    def classes(self) -> Tensor:
        """The class of each pixel's greatest logit, int64 [B T H W]; of equal ones the first."""
        return self.logits.max(2).indices  # argmax takes half as long again over an axis that is not the last


Network = Callable[[Batch], Prediction]


@dataclass(frozen=True)
class Mean:
    """A mean as its two sums over this process's part of the batch, so that any number of workers gives the same mean.

    `total` is a scalar tensor with a gradient; `count` what it is to be divided by. The trainer adds the counts of all
    workers before it divides: mean = sum of totals / sum of counts.
    """

    total: Tensor
    count: Tensor | float

    def value(self) -> Tensor:
        """The mean over this process's part alone (the whole mean when there is one process)."""
        return self.total / self.count


@dataclass(frozen=True)
class Step:
    """All that a method's loss may look at in one optimiser step. `teacher` is None on the base task."""

    batch: Batch
    student: Prediction
    teacher: Prediction | None
    task: Task
    prepared: Any = None


@dataclass(frozen=True)
class ScoreTable:
    """Numbers per sample: equally long columns beside `sample_ids`. Column names are each method's own."""

    sample_ids: tuple[str, ...]
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.sample_ids):
                raise ValueError(f"column {name!r} has {len(column)} rows, expected {len(self.sample_ids)}")

    def row(self, sample_id: str) -> dict[str, float]:
        """The numbers of one sample. KeyError where the table has no such sample."""
        try:
            position = self.sample_ids.index(sample_id)
        except ValueError:
            raise KeyError(sample_id) from None
        return {name: column[position] for name, column in self.columns.items()}

    @staticmethod
    def concatenate(tables: list[ScoreTable]) -> ScoreTable:
        """The tables one below the other. ValueError where their columns differ."""
        if not tables:
            return ScoreTable(())
        names = list(tables[0].columns)
        if any(list(table.columns) != names for table in tables):
            raise ValueError(f"score tables with different columns: {[list(table.columns) for table in tables]}")
        return ScoreTable(
            tuple(sample_id for table in tables for sample_id in table.sample_ids),
            {name: tuple(value for table in tables for value in table.columns[name]) for name in names},
        )


@dataclass(frozen=True)
class Row:
    """One place in the memory: a sample kept for the sake of one class, with the scores it was chosen by."""

    sample_id: str
    class_id: int
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """The rehearsal memory: per learned class the rows kept for it.

    A sample kept for two classes is stored once and is two rows.
    """

    by_class: Mapping[int, tuple[Row, ...]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, by class and then in the order of selection."""
        return tuple(row for class_id in sorted(self.by_class) for row in self.by_class[class_id])

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """The distinct samples held, sorted."""
        return tuple(sorted({row.sample_id for row in self.rows}))

    def extended(self, by_class: Mapping[int, tuple[Row, ...]]) -> Memory:
        """This memory with the rows of further classes. ValueError for a class it holds already: nothing is re-selected."""
        if again := sorted(set(by_class) & set(self.by_class)):
            raise ValueError(f"memory already holds rows of classes {again}")
        return Memory({**self.by_class, **by_class})


@dataclass(frozen=True)
class Paste:
    """A stored instance that is worked into a new sample: what the clip `instance_id` shows of `class_id`, into `sample_id`."""

    sample_id: str
    instance_id: str
    class_id: int


@dataclass(frozen=True)
class Rehearsal:
    """What a task learns again: `rows` in full (each counts once, repeats allowed) and the evidence they were drawn by.

    `pastes` are instances that are shown within the task's own samples instead, in this order where a sample gets several.

    `drawn` are the rows that resampling added or put in place of others; `table` holds one record per old class
    (columns are the method's own) and `pairs` one per collision pair, for the log.
    """

    rows: tuple[Row, ...] = ()
    pastes: tuple[Paste, ...] = ()
    drawn: tuple[Row, ...] = ()
    table: tuple[Mapping[str, float], ...] = ()
    pairs: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class State:
    """ALL that crosses a task boundary: per network the directory of its checkpoint, and the memory.

    Where a method consolidates, `method_states` has, per network, the directory of what it knows of the network's parameters.
    """

    checkpoints: Mapping[str, str] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    method_states: Mapping[str, str] = field(default_factory=dict)
