"""Videos in a folder of the user's: a table with a row a video, and per video frames, masks and sound in files.

What AVSBench's data sets have in common. A data set is one file with a subclass of `VideoFolder` that says what its rows mean,
where a video's files lie and what the colours of its masks are; this file reads them.

What is wrong with a folder is told by `VideoFolder.problems`, in full, and nothing of it is passed over: a video with a problem
is an error until it is mended or its uid stands in the file that `VideoFolder.quarantine` names.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from PIL import Image

from cavs_model.datasets.base import Benchmark, Clips, digest
from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ, log_mel
from cavs_model.errors import InputError, unknown
from cavs_model.types import Sample
from cavs_model.untrusted import FaultError, file_status, inside, picture, read_bounded, read_json, reason, shown

RENDER_VERSION = 1  # to be raised by whoever changes what is read from the same files

SPLITS = ("train", "val", "test")
LARGEST_RATIO = 8  # of the sides of a frame
LARGEST_TABLE_BYTES, MOST_ROWS = 2**24, 200_000
LARGEST_CHANNELS = 8

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)  # no separator, no dot: it stays where it is put
_T = TypeVar("_T")
_ADVICE = "`python -m orchestrator.check_data ROOT` lists every problem"


@dataclass(frozen=True)
class Video(ABC):
    """One row of a table, as written; a row that cannot be used says why in `faults`.

    `row` is the line of the file, the header being line 1. `located`: its files can be looked for, whatever else is wrong.
    Files are named relative to the root. Frame t is that of second t, from 0.
    """

    row: int
    uid: str
    split: str = ""
    faults: tuple[str, ...] = ()
    located: bool = True

    @property
    @abstractmethod
    def classes(self) -> tuple[int, ...]:
        """The sounding classes, benchmark ids, ascending."""

    @property
    @abstractmethod
    def seconds(self) -> int:
        """Length; as many frames."""

    @property
    @abstractmethod
    def num_labelled(self) -> int:
        """The frames with an annotation; they come first."""

    @property
    @abstractmethod
    def folder(self) -> str:
        """A folder that every such video has, to see at a glance whether it is there."""

    @property
    @abstractmethod
    def sound(self) -> str:
        """The recording."""

    @abstractmethod
    def frame(self, t: int) -> str:
        """A picture."""

    @abstractmethod
    def mask(self, t: int) -> str:
        """Its annotation."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, for a person: `file` is relative to the root, `row` 0 where it concerns no single video."""

    row: int
    uid: str
    file: str
    what: str


CheckVideo = Callable[[Video], tuple[Problem, ...]]
MapVideos = Callable[[CheckVideo, Sequence[Video]], Iterable[tuple[Problem, ...]]]


@dataclass(frozen=True)
class VideoFolder(Benchmark):
    """A benchmark in a folder of the user's. InputError where a file cannot be used, with the row, the file and the fault.

    Training frames are scaled to a short side of `image_size_px` and cut to the centre, the others are scaled to a square;
    masks take the nearest pixel. Videos shorter than `frames` are padded (`real_frame` False), of longer ones the first frames
    are taken. Sound: several channels are averaged, as the VGGish front end does; less than a second may be missing at the
    end and is silence; another rate than 16 kHz is a problem and never resampled.
    """

    root: str = ""  # absolute: workers run in other folders
    frames: int = 10
    image_size_px: int = 224
    quarantine: str | None = None  # absolute path of a file that `write_quarantine` wrote: every row with its uids is left out
    clips_per_class: int = 0  # of a split at most, the first ones of the table; 0 is all: for debugging

    @property
    @abstractmethod
    def table(self) -> str:
        """The csv file with a row a video, relative to the root."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that the table must have, each once; others may stand between them."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What the root is, for the message where there is none."""

    @property
    def selection(self) -> str:
        """The part of the table's videos that this benchmark has, in words."""
        return "the table"

    @abstractmethod
    def uid_column(self, header: Sequence[str]) -> int:
        """Where the names of the videos stand."""

    @abstractmethod
    def video(self, row: int, uid: str, cells: Mapping[str, str], first_row: int | None) -> Video:
        """A row by the names of its columns; `first_row` has the same uid."""

    @abstractmethod
    def unlocated(self, row: int, uid: str, fault: str) -> Video:
        """A row that is none."""

    def includes(self, video: Video) -> bool:
        """Whether a sound row belongs to this benchmark, whose table may hold others."""
        return True

    @abstractmethod
    def ids(self, colours: np.ndarray) -> np.ndarray:
        """Benchmark ids uint8 [...] of a mask's colours uint8 [... 3]. ValueError that names a colour of no class."""

    def other_faults(self) -> tuple[Problem, ...]:
        """What is wrong beside the table and the videos."""
        return ()

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def samples(self, split: str) -> tuple[Sample, ...]:
        """The index of a split in the order of the table; a sample's id is its uid.

        InputError that names the first malformed row, if there is one, of whatever split or part.
        """
        return tuple(Sample(video.uid, video.classes) for video in self._videos(split))

    def render(self, split: str, positions: Sequence[int]) -> Clips:
        """InputError that names the row, the file and the fault where one cannot be used."""
        videos, crop = self._videos(split), split == "train"
        count, frames, size = len(positions), self.frames, self.image_size_px
        clips = Clips.blank(count, frames, size)
        for n, position in enumerate(positions):
            if not 0 <= position < len(videos):
                raise IndexError(f"split {split!r} of {self.name} has {len(videos)} clips, asked for position {position}")
            video = videos[position]
            real, labelled = min(frames, video.seconds), min(frames, video.num_labelled)
            for t in range(real):
                picture = self._read(video, video.frame(t), read_frame)
                pixels = np.asarray(_fitted(picture, size, crop, Image.Resampling.BILINEAR))
                clips.image[n, t] = pixels.transpose(2, 0, 1)
                if t < labelled:
                    label = partial(self._label, frame=picture.size, crop=crop)
                    clips.label[n, t] = self._read(video, video.mask(t), label)
            wave = self._read(video, video.sound, partial(read_wave, seconds=video.seconds))
            clips.audio[n, :real] = log_mel(wave.reshape(video.seconds, SAMPLE_RATE_HZ)[:real])
            clips.real_frame[n, :real] = True
            clips.labelled_frame[n, :labelled] = True
        return clips

    def waveform(self, split: str, position: int) -> np.ndarray:
        """InputError as `render`."""
        video = self._videos(split)[position]
        wave = self._read(video, video.sound, partial(read_wave, seconds=video.seconds))
        return wave[: min(self.frames, video.seconds) * SAMPLE_RATE_HZ]

    def fingerprint(self) -> str:
        """Of the table the content, of the other files the sizes: times change with every copy, and contents take minutes.

        A file replaced by one of the same size is therefore not noticed. Sizes are looked up once in a process.
        """
        return _fingerprint(self, *self._stamps())

    def check(self) -> None:
        """That the table can be used and every video has a folder; files are not opened."""
        videos = self._usable()
        if not videos:
            raise InputError(f"{self._folder / self.table} has no video of {self.selection}")
        for problem in self.other_faults():
            raise InputError(f"{self._folder / problem.file} {problem.what}")
        places = {video.row: os.path.split(video.folder) for video in videos}
        present = {parent: _names_in(self._folder / parent) for parent in {parent for parent, _ in places.values()}}
        for video in videos:
            parent, name = places[video.row]
            if name not in present[parent]:
                raise InputError(f"{self._place(video)}: folder {self._folder / video.folder} is missing; {_ADVICE}")

    def videos(self) -> tuple[Video, ...]:
        """The rows of this benchmark and all malformed rows, quarantined or not."""
        rows = _rows(self, self._stamps()[0])[1]
        return tuple(video for video in rows if video.faults or self.includes(video))

    def problems(self, map_videos: MapVideos = map) -> tuple[Problem, ...]:
        """Everything that is wrong, by row; reads every file of the benchmark, those of quarantined videos included.

        `map_videos(function, videos)` calls a function, which pickles, on every video, in parallel or not, in their order.
        InputError only where there is no table to go by.
        """
        videos = self.videos()
        found = [Problem(video.row, video.uid, self.table, fault) for video in videos for fault in video.faults]
        found += self.other_faults()
        for problems in map_videos(self.video_problems, [video for video in videos if video.located]):
            found += problems
        return tuple(sorted(found, key=lambda problem: problem.row))

    def video_problems(self, video: Video) -> tuple[Problem, ...]:
        """Everything that is wrong with the files of a video, whose row must be `located`."""
        inspection = Inspection(self, video)
        inspection.read_all(range(video.seconds), range(video.num_labelled))
        return tuple(inspection.found)

    @property
    def _folder(self) -> Path:
        return Path(_absolute("benchmark.root", self.root, self.described))

    def _stamps(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """By what a change of the two files is seen within a process."""
        if not os.path.isdir(self._folder):
            raise InputError(f"benchmark.root must name a folder; there is none at {self._folder}")
        held_back = None if self.quarantine is None else _stamp(self._quarantine)
        return _stamp(self._folder / self.table), held_back

    @property
    def _quarantine(self) -> Path:
        return Path(_absolute("benchmark.quarantine", self.quarantine or "", "a file that check_data wrote"))

    def _usable(self) -> tuple[Video, ...]:
        return _usable(self, *self._stamps())

    def _videos(self, split: str) -> tuple[Video, ...]:
        if split not in SPLITS:
            raise unknown(f"split of {self.name}", split, SPLITS)
        return tuple(video for video in self._usable() if video.split == split)

    def _place(self, video: Video) -> str:
        return f"{self._folder / self.table}, row {video.row} ({shown(video.uid)})"

    def _read(self, video: Video, file: str, reader: Callable[[str], _T]) -> _T:
        """What a reader makes of a file of a video. InputError in its place."""
        try:
            return reader(inside(str(self._folder), file))
        except FaultError as fault:
            raise InputError(f"{self._place(video)}: {file} {fault}; {_ADVICE}") from None

    def _label(self, path: str, frame: tuple[int, int], crop: bool) -> np.ndarray:
        mask = _fitted(_read_mask(path, frame), self.image_size_px, crop, Image.Resampling.NEAREST)
        try:
            return self.ids(np.asarray(mask))
        except ValueError as error:
            raise FaultError(f"has a {error}") from None

    def check_mask(self, path: str, frame: tuple[int, int] | None) -> None:
        """FaultError where a mask cannot be used; `frame` is the size of its picture, None where that is not known."""
        colours = _read_mask(path, frame).getcolors(maxcolors=256)
        if colours is None:
            raise FaultError("has more than 256 colours")
        try:
            self.ids(np.array(sorted(colour for _, colour in colours), np.uint8))
        except ValueError as error:
            raise FaultError(f"has a {error}") from None


class Inspection:
    """Reads the files of a video and keeps what is wrong with them, one problem a file at most, in `found`."""

    def __init__(self, benchmark: VideoFolder, video: Video) -> None:
        self.found: list[Problem] = []
        self._benchmark, self._video, self._root = benchmark, video, str(benchmark._folder)

    def attempt(self, file: str, reader: Callable[[str], _T]) -> _T | None:
        """What a reader makes of a file, None where there is a problem with it."""
        try:
            return reader(inside(self._root, file))
        except FaultError as fault:
            self.tell(file, str(fault))
            return None

    def tell(self, file: str, what: str) -> None:
        """Adds a problem."""
        self.found.append(Problem(self._video.row, self._video.uid, file, what))

    def read_all(self, frames: Iterable[int], masks: Iterable[int]) -> None:
        """Reads pictures, masks and sound, of whose numbers these are to be there."""
        self.read_masks(masks, self.read_frames(frames))
        self.attempt(self._video.sound, partial(read_wave, seconds=self._video.seconds))

    def read_frames(self, frames: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Reads pictures; the sizes of those without a problem."""
        pictures = {t: self.attempt(self._video.frame(t), read_frame) for t in frames}
        return {t: picture.size for t, picture in pictures.items() if picture is not None}

    def read_masks(self, masks: Iterable[int], sizes: Mapping[int, tuple[int, int]]) -> None:
        """Reads masks, which must have the shapes of their pictures."""
        for t in masks:
            self.attempt(self._video.mask(t), partial(self._benchmark.check_mask, frame=sizes.get(t)))


def row_faults(uid: str, split: str, first_row: int | None) -> list[str]:
    """What of a row leaves open where its files are."""
    faults = []
    if not is_plain(uid):
        faults.append(f"uid {shown(uid)} is no plain name (letters, digits, '_' and '-')")
    if split not in SPLITS:
        faults.append(f"unknown split {shown(split)}; one of: {', '.join(SPLITS)}")
    if first_row is not None:
        faults.append(f"the uid stands in row {first_row} too")
    return faults


def is_plain(name: str) -> bool:
    """Whether a name may be part of a path: it leads nowhere else."""
    return _PLAIN_NAME.fullmatch(name) is not None


def read_quarantine(path: Path) -> frozenset[str]:
    """The uids in a quarantine file. InputError where it is none."""
    try:
        content = read_json(path)
    except FaultError as fault:
        raise InputError(f"cannot read the quarantine file {path}: it {fault}") from None
    uids = content.get("uids") if isinstance(content, dict) else None
    if not isinstance(uids, list) or not all(isinstance(uid, str) and uid for uid in uids):
        raise InputError(f'{path} is no quarantine file, which holds {{"uids": [...]}}')
    return frozenset(uids)


def write_quarantine(path: Path, uids: Iterable[str]) -> None:
    """Writes, atomically, a file of the uids to be left out. InputError where it cannot be written."""
    text = json.dumps({"uids": sorted(set(uids))}, indent=1) + "\n"
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise InputError(f"cannot write the quarantine file {path}: {reason(error)}") from None


@lru_cache(maxsize=8)
def _rows(benchmark: VideoFolder, stamp: tuple[int, int]) -> tuple[str, tuple[Video, ...]]:
    """SHA-256 and rows of the table. InputError where it cannot be read or lacks a column."""
    path = benchmark._folder / benchmark.table
    try:
        content = read_bounded(inside(str(benchmark._folder), benchmark.table), LARGEST_TABLE_BYTES)
        if content.count(b"\n") > MOST_ROWS:
            raise FaultError(f"has more than {MOST_ROWS} rows")
    except FaultError as fault:
        raise InputError(f"{path} {fault}") from None
    return hashlib.sha256(content).hexdigest(), _parsed(benchmark, content, path)


def _parsed(benchmark: VideoFolder, content: bytes, path: Path) -> tuple[Video, ...]:
    """One Video per line that is not blank. Bytes that are no UTF-8 end as characters that no cell may hold."""
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    header = _cells(lines[0])
    missing = [name for name in benchmark.columns if not isinstance(header, list) or header.count(name) != 1]
    if missing or not isinstance(header, list):
        wanted = ", ".join(benchmark.columns)
        raise InputError(f"{path} must have the columns {wanted}, each once; wrong or missing: {', '.join(missing)}")
    place = benchmark.uid_column(header)
    videos: list[Video] = []
    first_row: dict[str, int] = {}
    for row, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = _cells(line)
        if isinstance(cells, str):
            videos.append(benchmark.unlocated(row, "", cells))
            continue
        uid = cells[place] if place < len(cells) else ""
        if len(cells) != len(header):
            video = benchmark.unlocated(row, uid, f"has {len(cells)} columns, expected {len(header)}")
        else:
            video = benchmark.video(row, uid, dict(zip(header, cells, strict=True)), first_row.get(uid))
        first_row.setdefault(uid, row)
        videos.append(video)
    return tuple(videos)


def _cells(line: str) -> list[str] | str:
    """The cells of a line, or what is wrong with it. A line is a row, so that a stray quote cannot swallow others."""
    try:
        return next(csv.reader([line.removesuffix("\r")], strict=True), [])
    except csv.Error as error:
        return f"is not a line of comma-separated values: {error}"


@lru_cache(maxsize=8)
def _usable(benchmark: VideoFolder, stamp: tuple[int, int], quarantine_stamp: tuple[int, int] | None) -> tuple[Video, ...]:
    """The benchmark's videos without the quarantined ones. InputError for a malformed row, and a uid that is not there."""
    videos = _rows(benchmark, stamp)[1]
    left_out = frozenset() if benchmark.quarantine is None else read_quarantine(benchmark._quarantine)
    absent = sorted(left_out - {video.uid for video in videos})
    if absent:
        raise InputError(f"{benchmark.quarantine}: uid {shown(absent[0])} is not in {benchmark.table}; run check_data again")
    kept = tuple(video for video in videos if video.uid not in left_out)
    for video in kept:
        if video.faults:
            raise InputError(f"{benchmark._place(video)}: {video.faults[0]}; {_ADVICE}")
    included = tuple(video for video in kept if benchmark.includes(video))
    return _few(included, benchmark.clips_per_class) if benchmark.clips_per_class else included


def _few(videos: Sequence[Video], clips_per_class: int) -> tuple[Video, ...]:
    """The first videos by which every class of a split has so many, as far as there are."""
    counts: Counter[tuple[str, int]] = Counter()
    chosen = []
    for video in videos:
        if any(counts[video.split, class_id] < clips_per_class for class_id in video.classes):
            chosen.append(video)
            counts.update((video.split, class_id) for class_id in video.classes)
    return tuple(chosen)


@lru_cache(maxsize=8)
def _fingerprint(benchmark: VideoFolder, stamp: tuple[int, int], quarantine_stamp: tuple[int, int] | None) -> str:
    content, every = _rows(benchmark, stamp)
    videos = _usable(benchmark, stamp, quarantine_stamp)
    sizes = hashlib.sha256()
    for video in videos:
        files = [video.frame(t) for t in range(video.seconds)] + [video.mask(t) for t in range(video.num_labelled)]
        for file in (*files, video.sound):
            sizes.update(f"{file}:{_size(os.path.join(benchmark._folder, file))}\n".encode())
    left_out = sorted({video.uid for video in every if benchmark.includes(video)} - {video.uid for video in videos})
    return digest(
        {
            "benchmark": benchmark.name,
            "render_version": RENDER_VERSION,
            "metadata": content,
            "file_sizes": sizes.hexdigest(),
            "left_out": left_out,
            "frames": benchmark.frames,
            "image_size_px": benchmark.image_size_px,
            **({"clips_per_class": benchmark.clips_per_class} if benchmark.clips_per_class else {}),
        }
    )


def _absolute(field: str, value: str, meaning: str) -> str:
    if not value:
        raise InputError(f"{field} must name {meaning}")
    if not os.path.isabs(value) or "\0" in value:
        raise InputError(f"{field} must name {meaning} by an absolute path, since workers run in other folders, not {value!r}")
    return value


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    return status.st_mtime_ns, status.st_size


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:  # each video that should be in it is missing
        return frozenset()


def listed(path: str) -> list[str]:
    """The names in a folder. FaultError where it is missing or cannot be read."""
    try:
        return os.listdir(path)
    except FileNotFoundError:
        raise FaultError("is missing") from None
    except OSError as error:
        raise FaultError(f"is no folder that can be read: {reason(error)}") from None


def _picture(path: str, formats: tuple[str, ...]) -> Image.Image:
    return picture(path, formats, "RGB", LARGEST_RATIO)


def read_frame(path: str) -> Image.Image:
    """A frame as a picture, JPEG or PNG. FaultError where it is missing or damaged."""
    return _picture(path, ("JPEG", "PNG"))


def _read_mask(path: str, frame: tuple[int, int] | None) -> Image.Image:
    """A mask of the shape of its frame, whose size may be another; None where the frame is not known."""
    mask = _picture(path, ("PNG",))
    if frame is not None and abs(mask.width * frame[1] - mask.height * frame[0]) > max(mask.width, frame[0]):
        raise FaultError(f"has {mask.width} x {mask.height} px, not the shape of its frame of {frame[0]} x {frame[1]} px")
    return mask


def _fitted(image: Image.Image, size: int, crop: bool, resampling: Image.Resampling) -> Image.Image:
    """The image as a square: its centre, after the short side is scaled, or the whole of it."""
    if not crop:
        return image.resize((size, size), resampling)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resampling).crop((left, top, left + size, top + size))


def read_wave(path: str, seconds: int) -> np.ndarray:
    """The first seconds of a recording, float32 [seconds * 16000]; what is missing of the last one is silence."""
    file_status(path)
    expected = seconds * SAMPLE_RATE_HZ
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != SAMPLE_RATE_HZ:
                raise FaultError(f"has {file.samplerate} Hz, expected {SAMPLE_RATE_HZ} Hz")
            if file.channels > LARGEST_CHANNELS:
                raise FaultError(f"has {file.channels} channels, at most {LARGEST_CHANNELS} are read")
            wave: np.ndarray = file.read(expected, dtype="float32", always_2d=True).mean(1)
    except FaultError:
        raise
    except Exception as error:  # whatever a damaged file makes of a decoder
        raise FaultError(f"cannot be decoded: {reason(error)}") from None
    if not np.isfinite(wave).all():
        raise FaultError("has samples that are no finite numbers")
    if expected - len(wave) >= SAMPLE_RATE_HZ:
        raise FaultError(f"is {len(wave) / SAMPLE_RATE_HZ:.2f} s long: of {seconds} s, a whole second or more is missing")
    return np.pad(wave, (0, expected - len(wave)))
