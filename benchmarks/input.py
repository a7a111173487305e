"""Input: the decoded cache against decoding each epoch, waiting for the loader, building on several cores, shared pages.

Decoding reads a clip as AVSBench has it, a JPEG and a palette PNG a frame and a wav, written here from scenes of Collage.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks._measure import Ratio, Report, alternate, arguments, memory_maps, seconds_text
from cavs_model.datasets import cache
from cavs_model.datasets.collage import Collage
from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ, log_mel
from cavs_model.evaluate import frozen
from cavs_model.methods.cmr import CMR
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, Batch, LabelRule, Step, Task
from cavs_model.worker import arithmetic, prefetch

TABLE = np.arange(256, dtype=np.uint8)


def read_batch(split: cache.DecodedSplit, ids: list[str]) -> Batch:
    """A batch from the cache."""
    return split.batch(ids, [False] * len(ids), [TABLE] * len(ids))


def write_files(split: cache.DecodedSplit, ids: list[str], folder: Path) -> None:
    """The clips as files of AVSBench's kinds."""
    noise = np.random.default_rng(0)
    for name in ids:
        batch = read_batch(split, [name])
        place = folder / name.replace("/", "-")
        place.mkdir()
        for frame, (image, label) in enumerate(zip(batch.image[0], batch.label[0], strict=True)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{frame}.jpg", quality=90)
            Image.fromarray(label.numpy(), mode="P").save(place / f"{frame}.png")
        seconds = batch.image.shape[1]
        soundfile.write(place / "audio.wav", 0.1 * noise.standard_normal(seconds * SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)


def decode(folder: Path, ids: list[str], frames: int) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """The same clips from their files."""
    images, labels, sounds = [], [], []
    for name in ids:
        place = folder / name.replace("/", "-")
        for frame in range(frames):
            images.append(np.asarray(Image.open(place / f"{frame}.jpg")).transpose(2, 0, 1))
            labels.append(np.asarray(Image.open(place / f"{frame}.png")))
        wave, _ = soundfile.read(place / "audio.wav", dtype="float32")
        sounds.append(log_mel(wave.reshape(frames, -1)))
    return np.stack(images), np.stack(labels), sounds


def build_once(benchmark: Collage, workers: int) -> None:
    """Builds the training split into a new folder by some processes that are there already when the time starts."""
    with tempfile.TemporaryDirectory() as root:
        jobs = [("train", block) for block in cache.missing_blocks(benchmark, "train", root)]
        run = partial(_build_block, benchmark, root)
        list(POOLS[workers].map(run, jobs))


def _build_block(benchmark: Collage, root: str, job: tuple[str, int]) -> None:
    torch.set_num_threads(1)
    cache.write_block(benchmark, *job, root)


POOLS: dict[int, ProcessPoolExecutor] = {}


def loader_wait(split: cache.DecodedSplit, ids: list[str], batch_size: int) -> tuple[list[float], list[float]]:
    """Seconds waited for each batch, and of each step, while CMR's light network is trained."""
    torch.manual_seed(0)
    task = Task(1, 17, 25, (), LabelRule(range(17, 25), BACKGROUND))
    numbers = arithmetic("fp32", torch.device("cpu"))
    student, teacher = (
        AVSegmenter(NetworkConfig(), 25, AUDIO_VISUAL),
        frozen(AVSegmenter(NetworkConfig(), 17, AUDIO_VISUAL), numbers),
    )
    optimiser = torch.optim.Adam(numbers.place(student).train().parameters(), lr=1e-4, fused=True)
    parts = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    waited, steps = [], []
    loaded = iter(prefetch(parts, partial(read_batch, split)))
    while True:
        asked = time.perf_counter()
        batch = next(loaded, None)
        got = time.perf_counter()
        if batch is None:
            return waited[1:], steps[1:]
        step = Step(batch, student(batch), teacher(batch), task, torch.full((17,), 0.1))
        optimiser.zero_grad(set_to_none=True)
        sum(mean.value() for mean in CMR().loss(step).values()).backward()  # type: ignore[union-attr]
        optimiser.step()
        waited.append(got - asked)
        steps.append(time.perf_counter() - got)


def _reader(benchmark: Collage, root: str, ready: Any, go_on: Any) -> None:
    torch.set_num_threads(1)
    split = cache.open_split(benchmark, "train", root)
    for start in range(0, len(split), 64):
        read_batch(split, list(split.sample_ids[start : start + 64]))
    ready.release()
    go_on.wait()


def shared_pages(benchmark: Collage, root: str, readers: int) -> list[dict[str, float]]:
    """Memory of processes that have each read the whole split."""
    context = multiprocessing.get_context("spawn")
    ready, go_on = context.Semaphore(0), context.Event()
    processes = [context.Process(target=_reader, args=(benchmark, root, ready, go_on)) for _ in range(readers)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire(timeout=600)
    try:
        return [memory_maps(process.pid or 0) for process in processes]
    finally:
        go_on.set()
        for process in processes:
            process.join()


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("input", "Input: the decoded cache, waiting, building, shared pages", options)
    clips, frames, size = (64, 1, 96) if options.short else (256, 5, 224)
    benchmark = Collage(frames=frames, train_clips=clips, image_size_px=size)
    report.say(f"{clips} clips of {frames} frames, {size} px.\n")
    with tempfile.TemporaryDirectory() as root:
        cache.build(benchmark, ["train"], root)
        split = cache.open_split(benchmark, "train", root)
        ids = list(split.sample_ids[:32])
        files = Path(root) / "files"
        files.mkdir()
        write_files(split, ids, files)
        first = "decoding"
        times = alternate(
            {first: lambda: decode(files, ids, frames), "decoded cache": lambda: read_batch(split, ids)}, options.rounds
        )
        report.raw["reading 32 clips"] = times.raw()
        report.table(["32 clips", *times.columns(first)], [(name, *times.row(name, first)) for name in times.wall])

        light = Collage(frames=1, train_clips=64 if options.short else 320)
        cache.build(light, ["train"], root)
        thin = cache.open_split(light, "train", root)
        waited, steps = loader_wait(thin, list(thin.sample_ids), 16)
        report.raw["loader"] = {"waited_s": waited, "steps_s": steps}
        report.table(
            ["light network, 96 px, batches of 16, one thread", "s, median"],
            [("waiting for a batch", seconds_text(waited)), ("the step", seconds_text(steps)),
             ("share of waiting", f"{sum(waited) / (sum(waited) + sum(steps)):.4f}")],
        )  # fmt: skip

        readers = 2 if options.short else 4
        maps = shared_pages(benchmark, root, readers)
        held = sum(path.stat().st_size for path in Path(root).rglob("clips-*.npy")) / 2**20
        report.raw["maps_MiB"] = maps
        kinds = ("Rss", "Pss", "Pss_File", "Pss_Anon")
        report.table(
            ["MiB of a process that read all", *(f"reader {n + 1}" for n in range(readers)), "sum"],
            [(name, *(f"{each[name]:.0f}" for each in maps), f"{sum(each[name] for each in maps):.0f}") for name in kinds],
        )  # fmt: skip
        report.say(
            f"The caches in this folder have {held:.0f} MiB. Pss counts a page that n processes share as 1 / n in each.\n"
        )

    context = multiprocessing.get_context("spawn")
    for workers in (1, 2):
        POOLS[workers] = ProcessPoolExecutor(workers, mp_context=context)
    small = Collage(frames=1, train_clips=128 if options.short else 512)
    programs = {f"{workers} process(es)": partial(build_once, small, workers) for workers in POOLS}
    wall = alternate(programs, options.rounds, options.pause).wall
    report.raw["build"] = wall
    one = "1 process(es)"
    report.table(
        [
            f"building {small.train_clips} scenes of one frame, 96 px, {len(os.sched_getaffinity(0))} cores",
            "s",
            "times as fast",
        ],
        [(name, seconds_text(values), Ratio.of(wall[one], values)) for name, values in wall.items()],
    )
    report.say(f"Scenes per second: {small.train_clips / statistics.median(wall['2 process(es)']):.0f} by two.")
    for pool in POOLS.values():
        pool.shutdown()
    report.end()


if __name__ == "__main__":
    main()
