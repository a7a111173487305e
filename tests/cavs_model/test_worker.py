"""How work is shared: batches, prefetching and number formats; and batch norm over two processes against one."""

import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import NetworkConfig, build
from cavs_model.types import AUDIO_VISUAL
from cavs_model.worker import (
    Arithmetic,
    GlobalBatchNorm,
    LocalWorker,
    arithmetic,
    device_for,
    epoch_batches,
    my_part,
    prefetch,
    synchronise_batch_norm,
    without_tf32,
)

CPU = torch.device("cpu")
TINY = NetworkConfig(visual_encoder="tiny", visual_weights="none", audio_encoder="tiny", audio_dim=8, width=8)


@dataclass(frozen=True)
class GlooWorker:
    """One of several workers on the CPU, as a launcher's own worker would be."""

    rank: int
    world_size: int
    device: torch.device = CPU
    reports: list = field(default_factory=list)

    def wrap(self, model):
        model = synchronise_batch_norm(model, self.device)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def all_reduce(self, value):
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def report(self, record):
        self.reports.append(record)


def on_two_workers(function, folder, *arguments):
    """Runs function(worker, *arguments) in two processes that meet through a file in `folder`."""
    torch.multiprocessing.spawn(_meet, (function, folder / "rendezvous", arguments), nprocs=2)


def _meet(rank, function, rendezvous, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=2)
    try:
        function(GlooWorker(rank, 2), *arguments)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (23, 5), (20, 5), (100, 7)])
def test_an_epoch_has_each_item_once_in_even_batches(count, batch_size):
    items = [f"item {index}" for index in range(count)]
    batches = epoch_batches(items, batch_size, (0, 1, 2))
    lengths = [len(batch) for batch in batches]
    assert Counter(item for batch in batches for item in batch) == Counter(items)
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1
    assert len(batches) == -(-count // batch_size)


def test_an_epoch_keeps_repeated_items():
    batches = epoch_batches(["a", "b", "a", "a"], 3, (0,))
    assert Counter(item for batch in batches for item in batch) == {"a": 3, "b": 1}


def test_the_order_depends_on_the_seed_alone():
    items = list(range(50))
    first = epoch_batches(items, 8, (1, 2, 3))
    np.random.seed(5)
    torch.manual_seed(5)
    assert epoch_batches(items, 8, (1, 2, 3)) == first
    assert items == list(range(50))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert epoch_batches(items, 8, other) != first
    # Another batch size cuts the same permutation.
    other = epoch_batches(items, 11, (1, 2, 3))
    assert list(chain.from_iterable(other)) == list(chain.from_iterable(first))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_parts_of_a_batch_are_the_batch(world_size):
    batch = list(range(5))
    parts = [my_part(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(item for part in parts for item in part) == batch
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_worker_without_samples_is_refused():
    with pytest.raises(InputError, match=r"batch of 2 samples cannot feed 3 workers.*resources\.workers.*schedule\.batch_size"):
        my_part([1, 2], 0, 3)


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetch_is_map_in_order(depth):
    def load(number):
        time.sleep(0.001 * (number % 3))
        return number**2

    assert list(prefetch(range(20), load, depth)) == [number**2 for number in range(20)]
    assert list(prefetch([], load, depth)) == []
    assert not prefetchers()


def test_prefetch_runs_ahead_no_further_than_its_depth():
    loaded = []
    values = prefetch(range(50), lambda number: loaded.append(number) or number, depth=2)
    assert next(values) == 0
    deadline = time.monotonic() + 5
    while len(loaded) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert loaded == [0, 1, 2, 3]  # one taken, two waiting, one in the hand
    values.close()
    assert not prefetchers()


@pytest.mark.parametrize("where", ["load", "inputs"])
def test_prefetch_raises_the_error_where_the_value_was_due(where):
    def inputs():
        yield from range(3)
        if where == "inputs":
            raise InputError("no more clips")
        yield 3

    def load(number):
        if number == 3:
            raise InputError("no more clips")
        return number

    received = []
    with pytest.raises(InputError, match="no more clips"):
        received.extend(prefetch(inputs(), load))
    values = prefetch(inputs(), load)
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError):
        next(values)
    assert not prefetchers()


def test_leaving_prefetch_early_ends_its_thread():
    def endless():
        number = 0
        while True:
            yield number
            number += 1

    for value in prefetch(endless(), lambda number: number):
        if value == 3:
            break
    assert not prefetchers()


def test_arithmetic_names():
    assert arithmetic("fp32", CPU) == Arithmetic(CPU, bf16=False)
    assert arithmetic("bf16", CPU) == Arithmetic(CPU, bf16=True)
    assert arithmetic("auto", CPU).bf16 == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for wrong in ("fp16", "BF16", ""):
        with pytest.raises(InputError, match=r"auto, bf16, fp32") as caught:
            arithmetic(wrong, CPU)
        assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_arithmetic_is_that_of_the_products(precision, dtype):
    numbers = arithmetic(precision, CPU)
    layer = numbers.place(nn.Conv2d(2, 3, 3))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last) == (precision == "bf16")
    assert layer.weight.dtype == torch.float32
    with numbers.autocast():
        assert layer(torch.ones(1, 2, 4, 4)).dtype == dtype


@pytest.mark.parametrize("before", [True, False])
def test_plain_fp32_is_not_tf32_and_the_setting_comes_back(monkeypatch, before):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    with arithmetic("bf16", CPU).exact():
        assert cudnn.allow_tf32 == before
    with arithmetic("fp32", CPU).exact():
        assert not cudnn.allow_tf32
        with arithmetic("fp32", CPU).exact():  # as a frozen network's pass within a task
            assert not cudnn.allow_tf32
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32 == before
    with suppress(InputError), without_tf32():
        raise InputError("in the middle")
    assert cudnn.allow_tf32 == before


def test_the_local_worker_is_alone():
    reports = []
    worker, layer, value = LocalWorker(on_report=reports.append), nn.Linear(2, 2), torch.ones(2)
    assert (worker.rank, worker.world_size, worker.device) == (0, 1, CPU)
    assert worker.wrap(layer) is layer
    assert torch.equal(worker.all_reduce(value), torch.ones(2))
    worker.report({"epoch": 1})
    LocalWorker().report({"epoch": 1})
    assert reports == [{"epoch": 1}]


LAYERS = {
    "1d": (nn.BatchNorm1d, (7, 5)),
    "2d": (nn.BatchNorm2d, (7, 5, 3, 4)),
    "3d": (nn.BatchNorm3d, (7, 5, 2, 3, 2)),
    "2d slow": (lambda channels: nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03), (7, 5, 1, 2)),
}


def norm_and_inputs(name):
    """A layer with weights, and two steps of inputs whose mean is far from zero beside the factors of a loss."""
    draw = torch.Generator().manual_seed(3)
    make, shape = LAYERS[name]
    layer = make(shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.rand(shape[1], generator=draw) + 0.5)
        layer.bias.copy_(torch.randn(shape[1], generator=draw))
    steps = [(10 + step + 2 * torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)) for step in range(2)]
    return layer, steps


def normalise(layer, steps, part=slice(None)):
    """What two training steps give on a part of the batch, and the layer's state after them."""
    found = {}
    for index, (x, factors) in enumerate(steps):
        mine = x[part].clone().requires_grad_()
        y = layer(mine)
        (y.square() * factors[part]).sum().backward()
        found[f"{index} y"], found[f"{index} gradient"] = y.detach(), mine.grad
    found["weight"], found["bias"] = layer.weight.grad, layer.bias.grad
    return found, layer.state_dict()


def normalise_part(worker, folder):
    part = slice(0, 5) if worker.rank == 0 else slice(5, 7)
    results = {}
    for name in LAYERS:
        layer, steps = norm_and_inputs(name)
        results[name] = normalise(GlobalBatchNorm(layer), steps, part)
    torch.save(results, folder / f"{worker.rank}.pt")


def test_batch_norm_over_two_workers_is_that_of_the_whole_batch(tmp_path):
    on_two_workers(normalise_part, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # Sums of some 84 numbers of size 10 in another order: 1e-6 of 10, through a division by a deviation of 2.
    close = {"rtol": 1e-4, "atol": 2e-5}
    for name in LAYERS:
        layer, steps = norm_and_inputs(name)
        whole, state = normalise(layer, steps)
        (one, state_one), (two, state_two) = first[name], second[name]
        for key, value in whole.items():
            joined = one[key] + two[key] if key in ("weight", "bias") else torch.cat([one[key], two[key]])
            torch.testing.assert_close(joined, value, **close)
        assert list(state_one) == list(state_two) == list(state)
        for key, value in state.items():
            assert torch.equal(state_one[key], state_two[key])
            torch.testing.assert_close(state_one[key], value, **close)
        assert state_one["num_batches_tracked"] == 2


def test_synchronised_networks_keep_their_state_and_their_predictions():
    torch.manual_seed(0)
    model = build(TINY, 3, AUDIO_VISUAL)
    names, parameters = list(model.state_dict()), [id(each) for each in model.parameters()]
    norms = [name for name, each in model.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    x = torch.randn(2, 4, 5, 5)
    layer = nn.BatchNorm2d(4)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    layer.eval()
    assert torch.equal(GlobalBatchNorm(layer).eval()(x), layer(x))

    assert synchronise_batch_norm(model, CPU) is model
    assert list(model.state_dict()) == names
    assert [id(each) for each in model.parameters()] == parameters
    assert norms
    assert [name for name, each in model.named_modules() if isinstance(each, GlobalBatchNorm)] == norms
    build(TINY, 3, AUDIO_VISUAL).load_state_dict(model.state_dict())


def test_global_batch_norm_refuses_layers_without_running_statistics():
    for layer in (nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, momentum=None)):
        with pytest.raises(ValueError, match="running statistics"):
            GlobalBatchNorm(layer)


def test_a_job_runs_where_its_resources_say_whatever_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(0) == torch.device("cpu")
    assert device_for(0.5) == device_for(1) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"resources\.gpus_per_worker asks for a GPU"):
        device_for(1)
