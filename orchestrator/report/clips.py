"""Clips of a stream as pictures and sound: what its networks say of them, computed again here from the store's checkpoints.

Predictions of fixed clips after each task, and for a memory chosen by scores the samples that were kept and rejected.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from cavs_model import checkpoint
from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ
from cavs_model.errors import InputError
from cavs_model.evaluate import Data, frozen
from cavs_model.networks.vggish import feature_name
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, IGNORE, VISUAL_ONLY, LabelRule, Task
from cavs_model.worker import arithmetic
from orchestrator.experiment import Experiment, override
from orchestrator.figures import COLOURS, GREY, in_colours
from orchestrator.report.sources import StreamData

FIXED_CLIPS = 6
SCORED_CLIPS = 3  # kept, and as many rejected, of a task
_QUALITY = 85


@dataclass(frozen=True)
class Tile:
    """A picture, as a data URI, with what it shows."""

    title: str
    alt: str
    data: str


@dataclass(frozen=True)
class Clip:
    """A clip as tiles, the colours of the classes in them, and its sound as a data URI ("" where there is none)."""

    name: str
    sounding: tuple[str, ...]
    note: str
    tiles: tuple[Tile, ...]
    legend: tuple[tuple[str, str], ...]  # class, colour
    sound: str
    seconds: float


@dataclass(frozen=True)
class Gallery:
    """Clips of one stream. Reading and rendering raise InputError that says what is missing."""

    stream: StreamData
    outputs: Path
    most: int | None = None  # clips of one kind; None: as many as are worth looking at

    @property
    def experiment(self) -> Experiment:
        """The experiment of the stream's run. InputError where this code has other fields or other data."""
        config = {path: value for path, value in self.stream.config.items() if path != "seed"}
        if not config:
            raise InputError("the run has no config.json")
        experiment = override(Experiment(), config)
        now, then = experiment.benchmark.fingerprint()[:16], self.stream.run.tags.get("benchmark.fingerprint", "")
        if then and now != then:
            raise InputError(f"the data of {experiment.benchmark.name} are others now (fingerprint {now}, the run's {then})")
        return experiment

    def fixed(self, split: str) -> list[Clip]:
        """Some clips of a split, the same for every stream of the benchmark and order, with the prediction after each task."""
        experiment = self.experiment
        benchmark, tasks = experiment.benchmark, experiment.scenario.tasks(experiment.benchmark)[: len(self.stream.tasks)]
        order = experiment.scenario.learned_order(benchmark)
        names = ("background", *order)
        learned = [
            tuple(order.index(benchmark.class_names()[c - 1]) + 1 for c in sample.classes)
            for sample in benchmark.samples(split)
        ]
        positions = _chosen(learned, tasks)[: self.most]
        rules = [task.seen_rule for task in tasks]
        said = [self._predict(experiment, split, positions, logged.networks, AUDIO_VISUAL) for logged in self.stream.tasks]
        found = []
        for n, position in enumerate(positions):
            maps = {f"after task {task + 1}": predictions[n] for task, predictions in enumerate(said)}
            found.append(self._clip(experiment, split, position, maps, rules[-1], names, ""))
        return found

    def scored(self, task: int, kept: bool) -> list[Clip]:
        """Training clips that a task kept for its classes, or rejected candidates of the largest |delta|, most telling first.

        Empty where the task has no scores of both networks.
        """
        logged = self.stream.tasks[task]
        columns = logged.scores.get("columns", {})
        if not {"delta", AUDIO_VISUAL, VISUAL_ONLY} <= set(columns):
            return []
        experiment = self.experiment
        benchmark = experiment.benchmark
        now = experiment.scenario.tasks(benchmark)[task]
        names = ("background", *experiment.scenario.learned_order(benchmark))
        scores = {
            sample: (columns["delta"][n], columns[AUDIO_VISUAL][n], columns[VISUAL_ONLY][n])
            for n, sample in enumerate(logged.scores["sample_ids"])
        }
        chosen = {row["sample_id"] for row in self.stream.kept(task)}
        new = set(now.new_classes)
        candidates = [sample.id for sample in now.train if new & set(sample.classes) and sample.id in scores]
        ranked = sorted(
            (each for each in candidates if (each in chosen) == kept),
            key=lambda each: (-abs(scores[each][0]) if not kept else -scores[each][1], each),
        )[:SCORED_CLIPS][: self.most]
        places = {sample.id: position for position, sample in enumerate(benchmark.samples("train"))}
        positions = [places[each] for each in ranked]
        said = {
            name: self._predict(experiment, "train", positions, logged.networks, network)
            for name, network in (("picture and sound", AUDIO_VISUAL), ("picture alone", VISUAL_ONLY))
        }
        found = []
        for n, position in enumerate(positions):
            delta, both, alone = scores[ranked[n]]
            note = f"IoU {both:.3f} with sound, {alone:.3f} without: delta {delta:+.3f}"
            maps = {name: predictions[n] for name, predictions in said.items()}
            found.append(self._clip(experiment, "train", position, maps, now.train_rule, names, note))
        return found

    def _data(self, experiment: Experiment) -> Data:
        sound = experiment.network.frozen_sound
        order = experiment.scenario.learned_order(experiment.benchmark)
        cache = str(self.outputs / "data")
        return Data(experiment.benchmark, cache, order, "" if sound is None else feature_name(sound))

    def _predict(
        self, experiment: Experiment, split: str, positions: Sequence[int], networks: Mapping[str, str], network: str
    ) -> np.ndarray:
        """What a network says of clips, int [B T H W], on the CPU."""
        if not positions:
            return np.zeros((0, 1, 1, 1), np.int64)
        if network not in networks:
            raise InputError(f"the run did not note its network {network}: it was made before reports were")
        path = self.outputs / "store" / "networks" / networks[network]
        model = checkpoint.read(path).model()
        data = self._data(experiment)
        opened = data.open(split)
        ids = [opened.sample_ids[position] for position in positions]
        table = data.table(LabelRule(range(1, 255), IGNORE))
        batch = opened.batch(ids, [False] * len(ids), [table] * len(ids))
        says = frozen(model, arithmetic("fp32", torch.device("cpu")))(batch)
        labels: np.ndarray = says.logits.argmax(2).numpy()
        return labels

    def _clip(
        self,
        experiment: Experiment,
        split: str,
        position: int,
        maps: Mapping[str, np.ndarray],
        rule: LabelRule,
        names: Sequence[str],
        note: str,
    ) -> Clip:
        """A clip's tiles: a frame, its sound, its truth under the rule, and each map [T H W] of what a network says."""
        benchmark, data = experiment.benchmark, self._data(experiment)
        read = data.open(split).read([position])
        frame = int(np.flatnonzero(read.labelled_frame[0])[0]) if read.labelled_frame[0].any() else 0
        picture = read.image[0, frame].transpose(1, 2, 0)
        truth = data.table(rule)[read.label[0, frame]]
        shown = {"truth": truth, **{name: labels[frame] for name, labels in maps.items()}}
        classes = _by_size(list(shown.values()))
        colours = {class_id: COLOURS[n] if n < len(COLOURS) else GREY for n, class_id in enumerate(classes)}
        sample = benchmark.samples(split)[position]
        sounding = tuple(benchmark.class_names()[class_id - 1] for class_id in sample.classes)
        tiles = [
            Tile("frame", f"frame of {sample.id}", _picture(picture)),
            Tile("sound", f"log-mel spectrogram of {sample.id}", _picture(_log_mel(read.audio[0], len(picture)))),
        ]
        for name, labels in shown.items():
            seen = ", ".join(names[class_id] for class_id in _by_size([labels])) or "background alone"
            tiles.append(Tile(name, f"{name}: {seen}", _picture(_overlay(picture, labels, colours))))
        wave = benchmark.waveform(split, position)
        return Clip(
            sample.id, sounding, note, tuple(tiles),
            tuple((names[class_id], colour) for class_id, colour in colours.items()),
            "" if wave is None else _sound(wave), 0.0 if wave is None else len(wave) / SAMPLE_RATE_HZ,
        )  # fmt: skip


def _chosen(learned: Sequence[tuple[int, ...]], tasks: Sequence[Task]) -> list[int]:
    """Positions of clips in whose sound each task's classes are, evenly over the tasks; always the same ones."""
    found: list[int] = []
    share = max(1, FIXED_CLIPS // len(tasks))
    for task in tasks:
        there = [n for n, classes in enumerate(learned) if set(classes) & set(task.new_classes) and n not in found]
        if there:
            found += [there[pick] for pick in np.unique(np.linspace(0, len(there) - 1, share).round().astype(int))]
    return found[: max(FIXED_CLIPS, len(tasks))]


def _by_size(maps: Sequence[np.ndarray]) -> list[int]:
    """The classes in label maps, background left out, in the order of the first map's and then by their pixels."""
    found: dict[int, None] = {}
    for labels in maps:
        values, counts = np.unique(labels, return_counts=True)
        for value in values[np.argsort(-counts, kind="stable")].tolist():
            if value not in (BACKGROUND, IGNORE):
                found[int(value)] = None
    return list(found)


def _overlay(picture: np.ndarray, labels: np.ndarray, colours: Mapping[int, str]) -> np.ndarray:
    """The frame in dim grey under its labels in the classes' colours; pixels that count nowhere in stripes."""
    grey = picture.astype(np.float32).mean(2, keepdims=True).repeat(3, 2) * 0.55
    for class_id, colour in colours.items():
        tint = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)], np.float32)
        there = labels == class_id
        grey[there] = 0.25 * grey[there] + 0.75 * tint
    rows, columns = np.indices(labels.shape)
    grey[(labels == IGNORE) & ((rows + columns) // 3 % 2 == 0)] = 150
    tinted: np.ndarray = grey.clip(0, 255).astype(np.uint8)
    return tinted


def _log_mel(audio: np.ndarray, height: int) -> np.ndarray:
    """Audio [T 96 64] as a picture [height height 3], low pitches below, from dark (quiet) to bright (loud)."""
    levels = audio.reshape(-1, audio.shape[-1]).astype(np.float32).T[::-1]
    low, high = float(levels.min()), float(levels.max())
    scaled = Image.fromarray(((levels - low) / max(high - low, 1e-6) * 255).astype(np.uint8))
    square = np.asarray(scaled.resize((height, height), Image.Resampling.BILINEAR)) / 255
    coloured: np.ndarray = (in_colours(square, "magma")[..., :3] * 255).astype(np.uint8)
    return coloured


def _picture(pixels: np.ndarray) -> str:
    """uint8 [H W 3] as a data URI; small pictures are enlarged by a whole factor, so that no browser blurs them."""
    factor = max(1, 160 // len(pixels))
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(out, "WEBP", quality=_QUALITY)
    return _uri("image/webp", out.getvalue())


def _sound(wave: np.ndarray) -> str:
    """float32 [samples] as a data URI: 16-bit WAV, which every browser plays, as loud as it can be."""
    out = io.BytesIO()
    loudest = max(float(np.abs(wave).max(initial=0.0)), 1e-6)
    soundfile.write(out, wave / loudest * 0.9, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return _uri("audio/wav", out.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
