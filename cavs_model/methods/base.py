"""The hooks of a continual method. The defaults are plain fine-tuning; a method overrides what its paper changes.

A method is a frozen dataclass without state: its fields are the paper's hyper-parameters, all it learns is in types.State.
`knob` declares a field together with the stages it acts in, so that outcomes computed before a knob acts, or that a knob
cannot touch, are shared between all trials that differ only in it, and with its valid values, which every method checks as
it is made.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from cavs_model.errors import InputError
from cavs_model.types import AUDIO_VISUAL, Batch, Mean, Memory, Network, Rehearsal, ScoreTable, Step, Task

Stage = Literal["train", "consolidate", "score_before", "rehearse", "score_after", "remember"]


def knob(
    default: Any,
    *,
    acts: Stage | tuple[Stage, ...] = "train",
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A hyper-parameter and the stages whose outcome it changes. Used as a dataclass field's default.

    Valid values have the type of `default` (a whole number will do for a float, any method that `can_be_base` for a method) and
    are one of `choices` or lie between the bounds, where these are given; of a tuple, each item does.
    """
    stages = (acts,) if isinstance(acts, str) else acts
    metadata = {"acts": stages, "choices": choices, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata=metadata)


class Method(ABC):
    """One continual method. Subclasses are frozen dataclasses whose every field is a `knob`.

    Making one with a value outside a knob's bounds is an InputError that names `method.<field>`.
    """

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            _check(item, getattr(self, item.name))

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks the method trains on a task that is followed by another one (see types.AUDIO_VISUAL, VISUAL_ONLY).

        After a stream's last task nobody asks for scores, so only the audio-visual network is trained there.
        """
        return (AUDIO_VISUAL,)

    @property
    def needs_teacher(self) -> bool:
        """Whether `prepare` or `loss` reads the old network; without, Step.teacher is None and nobody runs it."""
        return False

    @property
    def scores_before(self) -> bool:
        """Whether `rehearse` reads scores of the old model on the new data."""
        return False

    @property
    def scores_after(self) -> bool:
        """Whether `remember` reads scores of the new models on the new data."""
        return False

    @property
    def networks_after(self) -> tuple[str, ...]:
        """The networks that `score_after` is given, those whose word it reads. Default: all that the method trains."""
        return self.networks

    @property
    def remembers(self) -> bool:
        """Whether the method keeps a memory at all."""
        return False

    @property
    def can_be_base(self) -> bool:
        """Whether a method with a memory can train by this one's losses: they are all that it takes from it."""
        return not self.remembers and type(self).training_task is Method.training_task

    def rows_expected(self, num_classes: int) -> int:
        """How many rows a task after so many foreground classes learns again, about; for estimates of time only."""
        return 0

    @property
    def consolidates(self) -> bool:
        """Whether `penalty` reads what `measure` and `consolidate` make of a trained network before the next task."""
        return False

    def training_task(self, tasks: Sequence[Task]) -> Task:
        """What is trained at the last of these tasks, all of the stream so far. Default: that task itself.

        Where it has no old classes, the network is trained from the first weights by plain cross-entropy.
        """
        return tasks[-1]

    def init_new_classes(self, classifier: nn.Conv2d, task: Task) -> None:  # noqa: B027 (optional hook)
        """Sets the new rows of the grown classifier (weight [C D 1 1], bias [C]) in place. Default: as initialised."""

    def prepare(self, teacher: Network, batches: Iterable[Batch], task: Task, all_reduce: Callable[[Tensor], Tensor]) -> Any:
        """One pass of the teacher over the task's new data before training (PLOP's thresholds).

        `batches` are this worker's part of one pass; `all_reduce` returns the sum over workers. Not called on the base task.
        """
        return None

    @abstractmethod
    def loss(self, step: Step) -> dict[str, Mean]:
        """Named terms; the sum of their means is the objective. On the base task every method equals cross-entropy."""

    def compose(self, batch: Batch, stored: Batch, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch with what Rehearsal.pastes asks for worked in; a new batch, on the CPU, before each step.

        Of each clip of `stored` (labels: all classes seen so far) `places` has the clip of `batch` it goes into and the class
        it was stored for.
        """
        raise AssertionError(f"{type(self).__name__} rehearses by pasting but does not define how")

    def measure(self, network: Network, parameters: Mapping[str, Tensor], clip: Batch, task: Task) -> dict[str, Tensor]:
        """What one clip of the task says of each parameter of the trained network, by its name and of its shape.

        `parameters` are the network's own, with gradients; the network is in evaluation mode; labels: the task's train rule.
        """
        raise AssertionError(f"{type(self).__name__} consolidates but does not define how")

    def consolidate(self, means: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What is kept of a task: a tensor per parameter, of its shape, from the means of `measure` (float64) over its clips.

        `before` is what this returned after the task before (the classifier had fewer rows then), None after the base task.
        """
        raise AssertionError(f"{type(self).__name__} consolidates but does not define how")

    def penalty(
        self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Mean]:
        """Further terms of the objective, of the parameters alone: now, at the start of the task, and `consolidate`'s word.

        Every worker has the same parameters, so a term's total is the whole term, with count 1.
        """
        return {}

    def score_before(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Scores of the old models on a batch of the task's new samples (labels: the task's train rule)."""
        raise AssertionError(f"{type(self).__name__} asks for scores_before but does not define them")

    def rehearse(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Rehearsal:
        """The memory rows this task learns again. Pure. Default: every row once."""
        return Rehearsal(rows=memory.rows)

    def score_after(self, models: Mapping[str, Network], batch: Batch, task: Task) -> ScoreTable:
        """Scores of the newly trained models on a batch of the task's samples (labels: the task's train rule)."""
        raise AssertionError(f"{type(self).__name__} asks for scores_after but does not define them")

    def remember(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Memory:
        """The memory after this task. Pure. Default: unchanged."""
        return memory


class RehearsalMethod(Method):
    """A method with a memory that trains by the losses of another method, its field `base`."""

    base: Method

    @property
    def remembers(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self.base.needs_teacher

    @property
    def consolidates(self) -> bool:
        return self.base.consolidates

    def init_new_classes(self, classifier: nn.Conv2d, task: Task) -> None:
        self.base.init_new_classes(classifier, task)

    def prepare(self, teacher: Network, batches: Iterable[Batch], task: Task, all_reduce: Callable[[Tensor], Tensor]) -> Any:
        return self.base.prepare(teacher, batches, task, all_reduce)

    def loss(self, step: Step) -> dict[str, Mean]:
        return self.base.loss(step)

    def measure(self, network: Network, parameters: Mapping[str, Tensor], clip: Batch, task: Task) -> dict[str, Tensor]:
        return self.base.measure(network, parameters, clip, task)

    def consolidate(self, means: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return self.base.consolidate(means, before)

    def penalty(
        self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Mean]:
        return self.base.penalty(parameters, start, state)


def acting(method: Method, stage: Stage) -> dict[str, Any]:
    """What of a method can change the outcome of a stage: its name and the values of the knobs that act there.

    Nested methods contribute their own acting part. ValueError for a field that was not declared by `knob`.
    """
    part: dict[str, Any] = {"method": type(method).__name__}
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        if "acts" not in item.metadata:
            raise ValueError(f"{type(method).__name__}.{item.name} must be declared with knob(...)")
        if stage in item.metadata["acts"]:
            value = getattr(method, item.name)
            part[item.name] = acting(value, stage) if isinstance(value, Method) else value
    return part


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    """InputError where a field declared by `knob` has a value of the wrong type or out of bounds."""
    if "choices" not in item.metadata:
        return
    default, choices = item.default, item.metadata["choices"]
    at_least, at_most = item.metadata["at_least"], item.metadata["at_most"]
    example = default[0] if isinstance(default, tuple) else default
    values = value if isinstance(default, tuple) and isinstance(value, tuple) and value else (value,)

    def valid(one: Any) -> bool:
        if choices:
            return one in choices
        if isinstance(example, Method):
            return isinstance(one, Method) and one.can_be_base
        if isinstance(example, bool) or isinstance(one, bool):
            return isinstance(example, bool) and isinstance(one, bool)
        if not isinstance(one, (int, float) if isinstance(example, float) else type(example)):
            return False
        if not isinstance(one, (int, float)):
            return True
        return math.isfinite(one) and (at_least is None or one >= at_least) and (at_most is None or one <= at_most)

    if isinstance(value, tuple) == isinstance(default, tuple) and all(valid(one) for one in values):
        return
    if choices:
        expected = "one of: " + ", ".join(map(str, choices))
    elif isinstance(example, Method):
        expected = f"a method that keeps no memory of its own and learns one task at a time, such as: {', '.join(_bases())}"
    else:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(example), type(example).__name__)
        bounds = [f"{word} {bound:g}" for word, bound in (("at least", at_least), ("at most", at_most)) if bound is not None]
        expected = " ".join(("a tuple, each item" if isinstance(default, tuple) else "", kind, " and ".join(bounds))).strip()
    raise InputError(f"method.{item.name} = {value!r}; expected {expected}")


def _bases() -> list[str]:
    """The files of this package, of those that are imported, whose method can be another's base."""
    package = __name__.rpartition(".")[0]
    kinds = [kind for kind in Method.__subclasses__() if kind.__module__.rpartition(".")[0] == package]
    return sorted(kind.__module__.rpartition(".")[2] for kind in kinds if not inspect.isabstract(kind) and kind().can_be_base)
