"""Collage: scenes put together from the shipped pack of cut-outs, recordings and photo backgrounds, with exact masks.

A clip shows one to three objects that drift over a photo. Some of them sound; in about half of the clips one more is silent,
so that the picture alone cannot answer. The label is the class of an object that is both visible and sounding, else
background. Three sets follow AVSBench-CIS, -CIM and -CI (Hong et al., CMR, section 4): one sounding object, several, both.
It is composed data: numbers on it do not compare with numbers on recorded video. See collage_pack/README.md for the sources.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from cavs_model.datasets.base import Benchmark, Clips, digest, require
from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES, SAMPLE_RATE_HZ, log_mel
from cavs_model.errors import InputError, unknown
from cavs_model.types import BACKGROUND, Sample
from cavs_model.untrusted import FaultError, file_status, inside, picture, read_bounded, reason, shown

RENDER_VERSION = 1  # to be raised by whoever changes what a clip looks or sounds like
SHIPPED_PACK = Path(__file__).parent / "collage_pack"
LARGEST_MANIFEST_BYTES, MOST_SOURCES = 2**26, 100_000
LARGEST_SOURCE_BYTES = 2**26
LONGEST_SOUND_S = 600
MOST_CLIPS = 1_000_000  # of a split, whose index is held in memory

# Who is met together: companions and silent objects come from a family of the clip's first class. People are in most of them.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "farm": ("chicken", "cow", "dog", "duck", "horse", "person", "pig", "sheep"),
    "wild": ("big_cat", "elephant", "horse", "songbird", "wolf"),
    "band": ("bell", "brass", "drum", "guitar", "person", "violin", "woodwind"),
    "traffic and air": ("airplane", "car", "helicopter", "person", "songbird", "train"),
    "workshop": ("car", "dog", "hammer", "person", "saw"),
}
CLASS_NAMES = tuple(sorted({name for family in FAMILIES.values() for name in family}))

# Per subset: the name, and the shares of clips with one, two and three sounding objects.
SUBSETS: Mapping[str, tuple[str, tuple[float, float, float]]] = {
    "both": ("collage", (0.5, 0.35, 0.15)),
    "single": ("collage-s", (1.0, 0.0, 0.0)),
    "multi": ("collage-m", (0.0, 0.7, 0.3)),
}
MIN_VISIBLE = 0.6  # of every object, in every frame

_SILENT_SHARE = 0.5  # of clips with a silent object
_PHOTO_WEIGHT = 3  # photos are few, and the report on photos alone needs them: drawn this much more often than a drawing
_SCALE = (0.35, 0.65)  # longest side of an object / side of the frame
_DRIFT = 0.12  # most that an object moves over the clip, in sides of the frame
_MARGIN = 0.15  # part of an object that may start outside the frame
_LAYOUTS = 100  # tries before the objects are put into three fixed places
_SHRINK_EVERY, _SHRINK = 20, 0.9  # scenes that are hard to lay out get smaller objects
_SHIFT = 0.1  # seconds between the places at which a window of a recording may start
_ENERGY_FLOOR = 0.3  # of the loudest window's RMS
_SHORTEST_PERIOD = SAMPLE_RATE_HZ // 2  # shorter sounds are repeated with a pause
_MIX_DB, _LEVEL_DB, _NOISE_DB = (-5.0, 5.0), (-3.0, 3.0), (-40.0, -25.0)
_LEVEL_RMS = 0.1
_PACK_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]*(/[A-Za-z0-9_-][A-Za-z0-9_. -]*){0,7}", re.ASCII)


@dataclass(frozen=True)
class Placed:
    """An object of a scene. `image` and sizes determine its pixels, `corners` (x, y of the top left, per frame) its places."""

    class_id: int
    sounding: bool
    image: str  # path in the pack
    width_px: int
    height_px: int
    flipped: bool
    brightness: float
    hue_turn: float  # radians about the grey axis
    corners: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scene:
    """All that a clip shows and sounds, without pixels. `objects` are pasted in this order, later ones over earlier ones."""

    background: str
    crop: tuple[int, int, int]  # x, y, side of the square cut from the background
    objects: tuple[Placed, ...]
    sounds: tuple[str, ...]  # one recording per sounding object, by ascending class id

    @property
    def sources(self) -> tuple[str, ...]:
        """The pack files the clip is made of."""
        return (self.background, *(placed.image for placed in self.objects), *self.sounds)


@dataclass(frozen=True)
class _Part:
    """Clips of one split that draw on the same sources. `key` keeps the random streams of the parts apart."""

    name: str
    source: str
    key: int
    count: int


@dataclass(frozen=True)
class Collage(Benchmark):
    """The embedded benchmark. InputError for an unknown subset and numbers out of range.

    `test/unseen` is composed from sources that no other split uses, `test/seen` of new scenes from the training sources.
    Of the validation clips the first half is from sources of its own ("val-unseen-..."), the rest are new scenes from the
    training sources ("val-seen-..."), so that choosing by them favours neither test set.
    """

    subset: str = "both"  # both, or only clips with a "single" sounding object or with several: "multi"
    frames: int = 2
    image_size_px: int = 96
    train_clips: int = 1440  # at least one of each class
    val_clips: int = 240  # half from sources of its own, half from those of training
    test_clips: int = 240  # in each of the two test splits
    seed: int = 0  # of all that is drawn: who is in a scene, where, and what it sounds like
    pack: str | None = None  # folder of another pack of the same layout; None is the shipped one

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise unknown("Collage.subset", self.subset, SUBSETS)
        classes = len(CLASS_NAMES)  # fewer clips would leave classes out of a split
        require(self, "frames", 1, 10)
        require(self, "image_size_px", 48, 512)
        require(self, "train_clips", classes, MOST_CLIPS)
        require(self, "val_clips", 2 * classes, MOST_CLIPS)
        require(self, "test_clips", classes, MOST_CLIPS)
        require(self, "seed", 0, 2**63 - 1)

    @property
    def name(self) -> str:
        return SUBSETS[self.subset][0]

    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def orders(self) -> Mapping[str, tuple[str, ...]]:
        """ "alphabetical"; "co-occurring-last" ends with the classes that sound most often beside others."""
        return {
            "alphabetical": CLASS_NAMES,
            "co-occurring-last": tuple(sorted(CLASS_NAMES, key=lambda name: (expected_company(name), name))),
        }

    def settings(self) -> tuple[str, ...]:
        return ("16-8", "16-4", "20-1")

    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "test/unseen", "test/seen")

    def samples(self, split: str) -> tuple[Sample, ...]:
        return _index(self, split)

    def sources(self, split: str, position: int) -> tuple[str, ...]:
        """The pack files (paths in manifest.csv) that a clip is made of: background, images, sounds."""
        return self.scene(split, position).sources

    def styles(self, split: str, position: int) -> tuple[str, ...]:
        """The styles (photo, drawing, emoji) of the objects that a clip shows, in the order of pasting."""
        styles = self._pack.styles
        return tuple(styles[placed.image] for placed in self.scene(split, position).objects)

    def scene(self, split: str, position: int) -> Scene:
        """What a clip is made of. Decodes the cut-outs, whose shapes the layout depends on."""
        part, index = self._locate(split, position)
        sounding, silent = self._cast(part, index)
        rng = self._rng(part, index, 1)
        pack = self._pack
        images = {class_id: pack.draw("image", part.source, class_id, rng) for class_id in sounding + silent}
        sounds = tuple(pack.draw("sound", part.source, class_id, rng) for class_id in sorted(sounding))
        background = pack.draw("background", part.source, None, rng)
        width, height = _background(pack.path(background)).size
        side = int(min(width, height) * rng.uniform(0.6, 1.0))
        crop = (int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)), side)
        classes = rng.permutation(np.array(list(images))).tolist()
        objects = self._layout([(class_id, class_id in sounding, images[class_id]) for class_id in classes], rng)
        return Scene(background, crop, objects, sounds)

    def render(self, split: str, positions: Sequence[int]) -> Clips:
        count, frames, size = len(positions), self.frames, self.image_size_px
        clips = Clips(
            image=np.empty((count, frames, 3, size, size), np.uint8),
            audio=np.empty((count, frames, NUM_FRAMES, NUM_BINS), np.float16),
            label=np.empty((count, frames, size, size), np.uint8),
            real_frame=np.ones((count, frames), np.bool_),
            labelled_frame=np.ones((count, frames), np.bool_),
        )
        for n, position in enumerate(positions):
            scene = self.scene(split, position)
            clips.image[n], clips.label[n] = self._paint(scene)
            clips.audio[n] = log_mel(self._mix(scene, self._rng(*self._locate(split, position), 2)))
        return clips

    def waveform(self, split: str, position: int) -> np.ndarray:
        return self._mix(self.scene(split, position), self._rng(*self._locate(split, position), 2)).reshape(-1)

    def fingerprint(self) -> str:
        content = hashlib.sha256(_manifest(_manifest_path(self._folder))).hexdigest()
        parameters = {
            name: value for name, value in asdict(self).items() if name != "pack"
        }  # its content counts, not its place
        return digest({"benchmark": self.name, "render_version": RENDER_VERSION, "pack": content, **parameters})

    def check(self) -> None:
        pack = self._pack
        for relative, expected in pack.checksums.items():
            path = pack.path(relative)
            try:
                actual = hashlib.sha256(read_bounded(path, LARGEST_SOURCE_BYTES)).hexdigest()
            except FaultError as fault:
                raise InputError(f"collage pack: {path} {fault}") from None
            if actual != expected:
                raise InputError(f"collage pack: {path} is damaged: its SHA-256 differs from the one in manifest.csv")
        for source in ("train", "val", "test"):
            wanted = [("background", ""), *((kind, name) for kind in ("image", "sound") for name in CLASS_NAMES)]
            for kind, name in wanted:
                if (kind, source, name) not in pack.groups:
                    raise InputError(f"collage pack: {_manifest_path(self._folder)} has no {kind} {name} for {source}")

    @property
    def _folder(self) -> Path:
        return SHIPPED_PACK if self.pack is None else Path(self.pack)

    @property
    def _pack(self) -> _Pack:
        return _read_pack(str(self._folder))

    def _parts(self, split: str) -> tuple[_Part, ...]:
        if split not in self.splits():
            raise unknown(f"split of {self.name}", split, self.splits())
        half = self.val_clips // 2
        return {
            "train": (_Part("train", "train", 0, self.train_clips),),
            "val": (_Part("val-unseen", "val", 1, self.val_clips - half), _Part("val-seen", "train", 2, half)),
            "test/unseen": (_Part("test-unseen", "test", 3, self.test_clips),),
            "test/seen": (_Part("test-seen", "train", 4, self.test_clips),),
        }[split]

    def _locate(self, split: str, position: int) -> tuple[_Part, int]:
        index = position
        for part in self._parts(split):
            if 0 <= index < part.count:
                return part, index
            index -= part.count
        raise IndexError(f"split {split!r} of {self.name} has no position {position}")

    def _rng(self, part: _Part, index: int, stage: int) -> np.random.Generator:
        """A stream of its own for each stage of each clip, so that clips do not depend on how many are rendered together."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(part.key, index, stage)))

    def _cast(self, part: _Part, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The classes that sound and those that are only seen.

        The first sounding class goes round all classes, in a new order each round, which keeps the classes balanced; the
        others come from a family of it.
        """
        turn, place = divmod(index, len(CLASS_NAMES))
        first = CLASS_NAMES[np.random.default_rng((self.seed, part.key, turn)).permutation(len(CLASS_NAMES))[place]]
        rng = self._rng(part, index, 0)
        shares = SUBSETS[self.subset][1]
        num_sounding = 1 + int(rng.choice(3, p=shares))
        families = [family for family in FAMILIES.values() if first in family]
        family = families[rng.integers(len(families))]
        company = [first, *rng.permutation(np.array([name for name in family if name != first])).tolist()]
        # Three objects are the most a scene shows, so the clips with fewer sounding ones make up for those with three.
        shows_silent = num_sounding < 3 and rng.random() < _SILENT_SHARE / (1 - shares[2])
        ids = [CLASS_NAMES.index(name) + 1 for name in company[: num_sounding + int(shows_silent)]]
        return tuple(ids[:num_sounding]), tuple(ids[num_sounding:])

    def _layout(self, wanted: Sequence[tuple[int, bool, str]], rng: np.random.Generator) -> tuple[Placed, ...]:
        """Sizes and places such that every object is at least MIN_VISIBLE visible in every frame."""
        size, frames = self.image_size_px, self.frames
        cutouts = [_cutout(self._pack.path(image)) for _, _, image in wanted]
        scales = rng.uniform(*_SCALE, len(wanted))
        flips = (rng.random(len(wanted)) < 0.5).tolist()
        brightness = rng.uniform(0.75, 1.25, len(wanted)).tolist()
        hues = rng.uniform(-0.25, 0.25, len(wanted)).tolist()
        shapes: list[tuple[int, int]] = []
        masks: list[np.ndarray] = []
        steps = np.arange(frames)[:, None] / max(frames - 1, 1)
        for attempt in range(_LAYOUTS + 1):
            last = attempt == _LAYOUTS
            if attempt % _SHRINK_EVERY == 0:
                longest = np.maximum(_SCALE[0], scales * _SHRINK ** (attempt // _SHRINK_EVERY)) * size
                longest = np.full_like(longest, _SCALE[0] * size) if last else longest
                shapes = [_fit(cutout, side) for cutout, side in zip(cutouts, longest, strict=True)]
                masks = [
                    _opaque(_resized(cutout, shape, flip)) for cutout, shape, flip in zip(cutouts, shapes, flips, strict=True)
                ]
            extents = np.array(shapes)
            if last:  # three places in which objects of the smallest scale cannot meet
                starts = np.array([(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)])[: len(wanted)] * size - extents / 2
                drifts = np.zeros_like(starts)
            else:
                starts = rng.uniform(-_MARGIN * extents, size - (1 - _MARGIN) * extents)
                drifts = rng.uniform(-_DRIFT, _DRIFT, starts.shape) * size
            corners = np.rint(starts[:, None] + steps * drifts[:, None]).astype(int)  # [objects T 2]
            if _all_visible(masks, corners, size):
                return tuple(
                    Placed(class_id, sounding, image, *shapes[n], flips[n], brightness[n], hues[n], _pairs(corners[n]))
                    for n, (class_id, sounding, image) in enumerate(wanted)
                )
        raise InputError(f"collage pack: {[image for _, _, image in wanted]} cannot be laid out at {size} px")

    def _paint(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [T 3 H W] and label uint8 [T H W]."""
        size, frames = self.image_size_px, self.frames
        x, y, side = scene.crop
        backdrop = _background(self._pack.path(scene.background)).resize(
            (size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side)
        )
        image = np.repeat(np.asarray(backdrop)[None], frames, axis=0)  # [T H W 3]
        label = np.full((frames, size, size), BACKGROUND, np.uint8)
        for placed in scene.objects:
            pixels = np.asarray(
                _resized(_cutout(self._pack.path(placed.image)), (placed.width_px, placed.height_px), placed.flipped)
            )
            # In 64 bits, for the reason that log_mel gives.
            colour = pixels[..., :3].astype(np.float64) @ _colour_change(placed.brightness, placed.hue_turn)
            colour = np.clip(colour, 0, 255).astype(np.float32)
            alpha = pixels[..., 3:].astype(np.float32) / 255
            opaque = pixels[..., 3] >= 128
            for t, corner in enumerate(placed.corners):
                inside, piece = _overlap(corner, opaque.shape, size)
                under = image[t][inside]
                image[t][inside] = np.rint(under + alpha[piece] * (colour[piece] - under))
                label[t][inside][opaque[piece]] = placed.class_id if placed.sounding else BACKGROUND
        return image.transpose(0, 3, 1, 2), label

    def _mix(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The sound, float32 [T 16000]: all recordings at drawn levels, with a little noise."""
        total = np.zeros((self.frames, SAMPLE_RATE_HZ), np.float32)
        for path in scene.sounds:
            track = _recording(self._pack.path(path)).track(self.frames, rng)
            total += track * np.float32(_gain(rng.uniform(*_MIX_DB)) / max(_rms(track), 1e-6))
        total *= np.float32(_LEVEL_RMS * _gain(rng.uniform(*_LEVEL_DB)) / max(_rms(total), 1e-6))
        noise = rng.standard_normal(total.shape, np.float32)
        return total + noise * np.float32(_LEVEL_RMS * _gain(rng.uniform(*_NOISE_DB)))


def expected_company(name: str) -> Fraction:
    """How often a class is expected to sound as a companion, for one clip led by each class: its degree of entanglement."""
    total = Fraction(0)
    for first in CLASS_NAMES:
        families = [family for family in FAMILIES.values() if first in family]
        shared = [family for family in families if name in family and name != first]
        total += sum((Fraction(1, len(families) * (len(family) - 1)) for family in shared), Fraction(0))
    return total


@lru_cache(maxsize=16)
def _index(benchmark: Collage, split: str) -> tuple[Sample, ...]:
    """Kept, since it follows from the benchmark's fields alone and every cache block asks for it."""
    return tuple(
        Sample(f"{part.name}-{index:05d}", tuple(sorted(benchmark._cast(part, index)[0])))
        for part in benchmark._parts(split)
        for index in range(part.count)
    )


@dataclass(frozen=True)
class _Pack:
    """The manifest: `groups` by (kind, source split, class), each group a list of paths, and facts per path."""

    folder: Path
    groups: Mapping[tuple[str, str, str], tuple[tuple[str, ...], ...]]
    styles: Mapping[str, str]
    checksums: Mapping[str, str]

    def path(self, relative: str) -> str:
        """Where a file lies. InputError where a link leads out of the pack."""
        try:
            inside(str(self.folder), relative)
        except FaultError as fault:
            raise InputError(f"collage pack: {self.folder / relative} {fault}") from None
        return str(self.folder / relative)

    def draw(self, kind: str, source: str, class_id: int | None, rng: np.random.Generator) -> str:
        """A file by a random draw: first the group, so that a long series counts as much as a single picture."""
        key = (kind, source, "" if class_id is None else CLASS_NAMES[class_id - 1])
        if key not in self.groups:
            raise InputError(f"collage pack: {_manifest_path(self.folder)} has no {kind} {key[2]} for {source}")
        groups = self.groups[key]
        photos = np.array([kind == "image" and self.styles[group[0]] == "photo" for group in groups])
        weights = np.where(photos, _PHOTO_WEIGHT, 1)
        group = groups[int(rng.choice(len(groups), p=weights / weights.sum()))]
        return group[int(rng.integers(len(group)))]


@dataclass(frozen=True)
class _Recording:
    """A recording of at least a second and the places (in samples) at which a window above the energy floor starts."""

    wave: np.ndarray
    starts: np.ndarray

    def track(self, seconds: int, rng: np.random.Generator) -> np.ndarray:
        """Windows of one second each [seconds 16000] that follow each other where the recording is long and loud enough."""
        windows: list[np.ndarray] = []
        start = -SAMPLE_RATE_HZ
        for _ in range(seconds):
            start += SAMPLE_RATE_HZ
            if not windows or start not in self._places:
                start = int(rng.choice(self.starts))
            windows.append(self.wave[start : start + SAMPLE_RATE_HZ])
        return np.stack(windows)

    @cached_property
    def _places(self) -> frozenset[int]:
        return frozenset(self.starts.tolist())


def _manifest_path(folder: Path) -> Path:
    return folder / "manifest.csv"


@lru_cache(maxsize=4)
def _read_pack(folder: str) -> _Pack:
    """The manifest of a pack. InputError that names the row where one cannot be used."""
    manifest = _manifest_path(Path(folder))
    try:
        lines = _manifest(manifest).decode("utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{manifest} is not UTF-8 text: {reason(error)}") from None
    except csv.Error as error:
        raise InputError(f"{manifest} is not a table of comma-separated values: {reason(error)}") from None
    if not rows:
        raise InputError(f"{manifest} has no rows")
    grouped: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    paths: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        fault = _row_fault(row, paths)
        if fault:
            raise InputError(f"{manifest}, row {number}: {fault}")
        paths[row["path"]] = number
        key = (row["kind"], row["split"], row["class"] if row["kind"] != "background" else "")
        grouped.setdefault(key, {}).setdefault(row["group"], []).append(row["path"])
    return _Pack(
        folder=Path(folder),
        groups={key: tuple(tuple(paths) for paths in groups.values()) for key, groups in grouped.items()},
        styles={row["path"]: row["style"] for row in rows},
        checksums={row["path"]: row["sha256"] for row in rows},
    )


def _manifest(path: Path) -> bytes:
    try:
        content = read_bounded(inside(str(path.parent), path.name), LARGEST_MANIFEST_BYTES)
    except FaultError as fault:
        raise InputError(f"cannot read {path}: it {fault}") from None
    if content.count(b"\n") > MOST_SOURCES:
        raise InputError(f"{path} has more than {MOST_SOURCES} rows")
    return content


def _row_fault(row: Mapping[str | None, object], before: Mapping[str, int]) -> str:
    """What is wrong with a row of the manifest; empty where nothing is."""
    for name in ("path", "kind", "class", "style", "group", "split", "sha256"):
        if not isinstance(row.get(name), str):
            return f"has no column {name!r}"
    path = str(row["path"])
    if len(path) > 200 or not _PACK_PATH.fullmatch(path) or ".." in path.split("/"):
        return f"path {shown(path)} is no plain path below the pack"
    if path in before:
        return f"path {shown(path)} stands in row {before[path]} too"
    if not re.fullmatch(r"[0-9a-f]{64}", str(row["sha256"])):
        return f"sha256 {shown(str(row['sha256']))} is none"
    allowed = {"kind": ("image", "sound", "background"), "split": ("train", "val", "test"), "class": ("", *CLASS_NAMES)}
    for name, choices in allowed.items():
        if row[name] not in choices:
            return f"unknown {name} {shown(str(row[name]))}; one of: {', '.join(filter(None, choices))}"
    return ""


@lru_cache(maxsize=512)
def _cutout(path: str) -> Image.Image:
    return _decode(path, "RGBA")


@lru_cache(maxsize=64)
def _background(path: str) -> Image.Image:
    return _decode(path, "RGB")


def _decode(path: str, mode: str) -> Image.Image:
    try:
        return picture(path, ("WEBP", "PNG", "JPEG"), mode)
    except FaultError as fault:
        raise InputError(f"collage pack: {path} {fault}") from None


@lru_cache(maxsize=512)
def _recording(path: str) -> _Recording:
    try:
        file_status(path)
        with soundfile.SoundFile(path) as file:
            if (file.channels, file.samplerate) != (1, SAMPLE_RATE_HZ):
                raise FaultError(f"must be mono at {SAMPLE_RATE_HZ} Hz, has {file.channels} channels at {file.samplerate} Hz")
            if not 0 < file.frames <= LONGEST_SOUND_S * SAMPLE_RATE_HZ:
                raise FaultError(f"has {file.frames} samples, allowed are 1 to {LONGEST_SOUND_S * SAMPLE_RATE_HZ}")
            wave = file.read(dtype="float32")
    except FaultError as fault:
        raise InputError(f"collage pack: {path} {fault}") from None
    except Exception as error:  # whatever a damaged file makes of a decoder
        raise InputError(f"collage pack: {path} cannot be decoded: {reason(error)}") from None
    if not len(wave) or not np.isfinite(wave).all():
        raise InputError(f"collage pack: {path} has no samples, or some that are no finite numbers")
    if len(wave) < SAMPLE_RATE_HZ:
        period = np.pad(wave, (0, max(0, _SHORTEST_PERIOD - len(wave))))
        wave = np.resize(period, SAMPLE_RATE_HZ)
    energy = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    starts = np.arange(0, len(wave) - SAMPLE_RATE_HZ + 1, int(_SHIFT * SAMPLE_RATE_HZ))
    loudness = np.sqrt(np.maximum(0.0, energy[starts + SAMPLE_RATE_HZ] - energy[starts]))
    return _Recording(wave, starts[loudness >= _ENERGY_FLOOR * loudness.max()])


def _fit(cutout: Image.Image, longest: float) -> tuple[int, int]:
    """Width and height of a cut-out whose longest side becomes `longest` pixels."""
    factor = longest / max(cutout.size)
    return max(1, round(cutout.width * factor)), max(1, round(cutout.height * factor))


def _resized(cutout: Image.Image, shape: tuple[int, int], flipped: bool) -> Image.Image:
    scaled = cutout.resize(shape, Image.Resampling.BILINEAR)
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else scaled


def _opaque(cutout: Image.Image) -> np.ndarray:
    """Where an object hides what is behind it, bool [h w]: alpha of at least one half."""
    return np.asarray(cutout.getchannel("A")) >= 128


def _overlap(corner: tuple[int, int], shape: tuple[int, ...], size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a frame that an object of a shape covers, and the part of the object that lies in the frame."""
    x, y = corner
    height, width = shape
    top, bottom, left, right = (min(max(edge, 0), size) for edge in (y, y + height, x, x + width))
    frame = slice(top, bottom), slice(left, right)
    piece = slice(top - y, bottom - y), slice(left - x, right - x)
    return frame, piece


def _all_visible(masks: Sequence[np.ndarray], corners: np.ndarray, size: int) -> bool:
    """Whether each object, pasted in order at `corners` [objects T 2], shows MIN_VISIBLE of its pixels in every frame."""
    areas = np.array([mask.sum() for mask in masks])
    if not areas.all():
        return False
    for t in range(corners.shape[1]):
        owner = np.zeros((size, size), np.int64)
        for n, mask in enumerate(masks):
            x, y = corners[n, t].tolist()
            inside, piece = _overlap((x, y), mask.shape, size)
            owner[inside][mask[piece]] = n + 1
        visible = np.bincount(owner.ravel(), minlength=len(masks) + 1)[1:]
        if (visible < MIN_VISIBLE * areas).any():
            return False
    return True


def _colour_change(brightness: float, hue_turn: float) -> np.ndarray:
    """A matrix for row vectors of red, green, blue: a turn about the grey axis, which keeps greys, and a factor."""
    cosine, sine = np.cos(hue_turn), np.sin(hue_turn) / np.sqrt(3)
    across = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    turn = cosine * np.eye(3) + (1 - cosine) / 3 + sine * across
    return brightness * turn  # type: ignore[no-any-return]


def _pairs(corners: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(x), int(y)) for x, y in corners)


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave * wave)))


def _gain(decibel: float) -> float:
    return float(10 ** (decibel / 20))
