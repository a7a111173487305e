"""Who runs a training or scoring loop: a `Worker` that does not know its launcher, and the arithmetic of sharing the work.

The number of workers never changes the result: the batches of an epoch depend on the seed alone and each worker takes its
slice of every batch; batch statistics, label counts and gradients are summed over all workers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed
import torch.distributed.nn.functional
from torch import Tensor, nn

from cavs_model.errors import InputError, unknown

Precision = Literal["auto", "bf16", "fp32"]
PRECISIONS = ("auto", "bf16", "fp32")
Item = TypeVar("Item")
Output = TypeVar("Output")


class Worker(Protocol):
    """One process of a data-parallel job."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model ready for data-parallel training on `device`: forward through the result, parameters stay the model's."""

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of `value` over all workers."""

    def report(self, record: Mapping[str, Any]) -> None:
        """Progress, once an epoch, for whoever watches. Never part of the result."""


@dataclass(frozen=True)
class LocalWorker:
    """The only worker, in this process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_report: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def all_reduce(self, value: Tensor) -> Tensor:
        return value

    def report(self, record: Mapping[str, Any]) -> None:
        if self.on_report is not None:
            self.on_report(record)


def device_for(gpus: float) -> torch.device:
    """The CPU for a job without GPU, whatever the machine has, else the process's first GPU. InputError where there is none."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("resources.gpus_per_worker asks for a GPU, and torch sees none here; set it to 0")
    return torch.device("cuda", 0)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions on CUDA take fp32 numbers as they are; by default torch rounds them to 10 bits of fraction (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Arithmetic:
    """The number format of a job on a device: bf16 autocast in channels_last, or plain fp32."""

    device: torch.device
    bf16: bool

    def exact(self) -> AbstractContextManager[None]:
        """The context of all that is computed, backward passes too: where the format is fp32, no product is less."""
        return nullcontext() if self.bf16 else without_tf32()

    def autocast(self) -> Any:
        """The context in which networks run forward."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory layout its convolutions like best."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.bf16 else model  # type: ignore[call-overload]


def arithmetic(precision: Precision, device: torch.device) -> Arithmetic:
    """The arithmetic for a precision; "auto" takes bf16 where the hardware computes it natively."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision != "auto":
        return Arithmetic(device, precision == "bf16")
    if device.type == "cuda":
        return Arithmetic(device, torch.cuda.is_bf16_supported(including_emulation=False))
    return Arithmetic(device, bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def epoch_batches(items: Sequence[Item], batch_size: int, seed: Sequence[int]) -> list[list[Item]]:
    """The batches of one epoch, for all workers together: a permutation drawn from the seed, cut into even parts.

    Every item comes once; sizes differ by at most one and never exceed `batch_size`, so nothing is dropped or padded.
    """
    order = np.random.default_rng(seed).permutation(len(items))
    parts = np.array_split(order, -(-len(items) // batch_size))
    return [[items[position] for position in part] for part in parts]


def my_part(batch: Sequence[Item], rank: int, world_size: int) -> Sequence[Item]:
    """A worker's slice of a batch. InputError where a worker would go without."""
    if len(batch) < world_size:
        raise InputError(
            f"a batch of {len(batch)} samples cannot feed {world_size} workers; "
            "lower resources.workers or raise schedule.batch_size"
        )
    return batch[rank::world_size]


def prefetch(inputs: Iterable[Item], load: Callable[[Item], Output], depth: int = 2) -> Iterator[Output]:
    """`map(load, inputs)` computed ahead in one thread (memory maps copy without the interpreter's lock).

    An error in `load` is raised here. Leaving the loop early ends the thread.
    """
    results: queue.Queue[tuple[Output | None, BaseException | None, bool]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[Output | None, BaseException | None, bool]) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                results.put(entry, timeout=0.1)
                return

    def run() -> None:
        try:
            for item in inputs:
                if stop.is_set():
                    return
                put((load(item), None, False))
            put((None, None, True))
        except BaseException as error:  # handed to the consumer, who raises it
            put((None, error, True))

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error, last = results.get()
            if error is not None:
                raise error
            if last:
                return
            yield value  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the whole batch of all workers, on any device.

    torch.nn.SyncBatchNorm refuses CPU tensors; this is the same statistics by one differentiable all-reduce. Parameters and
    buffers are those of the layer it replaces, so a state_dict does not tell the two apart.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        if layer.momentum is None or layer.running_mean is None:
            raise ValueError("GlobalBatchNorm needs a layer with running statistics and a momentum")
        self.weight, self.bias = layer.weight, layer.bias
        self.eps, self.momentum = layer.eps, layer.momentum
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.register_buffer("num_batches_tracked", layer.num_batches_tracked)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [N D ...], as nn.BatchNorm1d/2d/3d."""
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        dims = [0, *range(2, x.dim())]
        wide = x.float()
        variances, means = torch.var_mean(wide, dims, correction=0)
        count = wide.new_full((1,), x.numel() / x.shape[1])
        # One collective a layer: every worker's moments, joined about the common mean (E[x^2] - mean^2 would cancel).
        parts = wide.new_zeros(torch.distributed.get_world_size(), 2 * x.shape[1] + 1)
        parts[torch.distributed.get_rank()] = torch.cat([means, variances, count])
        parts = _all_reduce(parts)
        means, variances, counts = parts[:, : x.shape[1]], parts[:, x.shape[1] : -1], parts[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            unbiased = variance * (total / (total - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normalised: Tensor = (wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype)


def _all_reduce(value: Tensor) -> Tensor:
    """The sum over the default process group, with a gradient."""
    return torch.distributed.nn.functional.all_reduce(value)  # type: ignore[no-any-return,no-untyped-call]


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every batch norm by one over all workers: torch's own on a GPU, GlobalBatchNorm on a CPU."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return,no-untyped-call]
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, GlobalBatchNorm(child))
        else:
            synchronise_batch_norm(child, device)
    return model
