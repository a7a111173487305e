"""AVSBench-semantic: web videos in which every pixel of a sounding object carries its class, one frame a second.

The data set is of Zhou et al., "Audio-visual segmentation with semantics" (2023); its cut into clips with one sounding class
(CIS), with several (CIM) and with any number (CI) is of Hong et al., CMR, section 4. Nothing is shipped: the user names a
folder in the layout of the release,

    metadata.csv                    vid, uid, s_min, s_sec, a_obj, split, label; a row is a video
    label2idx.json                  class name -> id (may be absent)
    <label>/<uid>/frames/0.jpg ...  5 frames where label is v1s or v1m, 10 where it is v2
    <label>/<uid>/labels_rgb/0.png ...  colours of the VOC palette; of v1s training videos only the first is used
    <label>/<uid>/audio.wav         16 kHz

What is wrong with a folder is told by `AVSBench.problems`, in full, and nothing of it is passed over: a video with a problem
is an error until it is mended or its uid stands in the file that `AVSBench.quarantine` names.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from cavs_model.datasets.base import Benchmark, Clips, digest, require
from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ, log_mel
from cavs_model.errors import InputError, unknown
from cavs_model.types import BACKGROUND, Sample

RENDER_VERSION = 1  # to be raised by whoever changes what is read from the same files

Subset = Literal["ci", "cis", "cim"]
_NAMES = """
accordion airplane axe baby bassoon bell bird boat boy bus car cat cello clarinet clipper clock dog donkey drum duck
elephant emergency-car erhu flute frying-food girl goose guitar gun guzheng hair-dryer handpan harmonica harp helicopter
hen horse keyboard leopard lion man marimba missile-rocket motorcycle mower parrot piano pig pipa saw saxophone sheep
sitar sorna squirrel tabla tank tiger tractor train trombone truck trumpet tuba ukulele utv vacuum-cleaner violin wolf
woman
"""
CLASS_NAMES = tuple(_NAMES.split())
CO_OCCURRING = ("man", "woman", "violin", "cello", "girl", "accordion", "bassoon", "trumpet", "boy", "tuba")
WITHOUT_CLASS = ("background", "off-the-screen")  # in a_obj, alone: a video in which nothing that sounds is seen
SECONDS: Mapping[str, int] = {"v1s": 5, "v1m": 5, "v2": 10}  # by label; as many frames
COLUMNS = ("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")
METADATA, CLASS_LIST = "metadata.csv", "label2idx.json"

LARGEST_SIDE_PX = 4096
LARGEST_RATIO = 8  # of the sides of a frame
LARGEST_METADATA_BYTES = 2**26
LARGEST_CHANNELS = 8

_SPLITS = ("train", "val", "test")
_CLASS_IDS = {name: index + 1 for index, name in enumerate(CLASS_NAMES)}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)  # no separator, no dot: it stays where it is put
_T = TypeVar("_T")
_ADVICE = "`python -m orchestrator.check_data ROOT` lists every problem"


@dataclass(frozen=True)
class Video:
    """One row of metadata.csv. `names`, `split` and `label` are as written, and mean something where `faults` is empty.

    `row` is the line of the file, the header being line 1. `located`: its files can be looked for, whatever else is wrong.
    """

    row: int
    uid: str
    names: tuple[str, ...] = ()
    split: str = ""
    label: str = ""
    faults: tuple[str, ...] = ()
    located: bool = True

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted(_CLASS_IDS[name] for name in self.names if name in _CLASS_IDS))

    @property
    def folder(self) -> str:
        return f"{self.label}/{self.uid}"

    @property
    def seconds(self) -> int:
        return SECONDS[self.label]

    @property
    def num_labelled(self) -> int:
        """The frames with an annotation; they come first."""
        return 1 if (self.label, self.split) == ("v1s", "train") else self.seconds

    def belongs_to(self, subset: Subset) -> bool:
        return {"ci": True, "cis": len(self.names) == 1, "cim": len(self.names) > 1}[subset]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, for a person: `file` is relative to the root, `row` 0 where it concerns no single video."""

    row: int
    uid: str
    file: str
    what: str


MapVideos = Callable[[Callable[[Video], tuple[Problem, ...]], Sequence[Video]], Iterable[tuple[Problem, ...]]]


class _FaultError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class AVSBench(Benchmark):
    """AVSBench-semantic in a folder of the user's. InputError for an unknown subset and numbers out of range.

    Training frames are scaled to a short side of `image_size_px` and cut to the centre, the others are scaled to a square;
    masks take the nearest pixel. Videos shorter than `frames` are padded (`real_frame` False), of longer ones the first frames
    are taken. Sound: several channels are averaged, as the VGGish front end does; less than a second may be missing at the
    end and is silence; another rate than 16 kHz is a problem and never resampled. Videos in which nothing that sounds is seen
    have no classes: they are never learned from, and count in the other splits.
    """

    root: str = ""  # absolute: workers run in other folders
    subset: Subset = "ci"
    frames: int = 10
    image_size_px: int = 224
    quarantine: str | None = None  # absolute path of a file that `write_quarantine` wrote: every row with its uids is left out

    def __post_init__(self) -> None:
        if self.subset not in get_args(Subset):
            raise unknown("AVSBench.subset", self.subset, get_args(Subset))
        require(self, "frames", 1, max(SECONDS.values()))
        require(self, "image_size_px", 16, 1024)

    @property
    def name(self) -> str:
        return f"avsbench-{self.subset}"

    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def orders(self) -> Mapping[str, tuple[str, ...]]:
        """ "alphabetical"; "co-occurring-last" ends with those most often in multi-source videos, as CMR's release has them."""
        others = tuple(name for name in CLASS_NAMES if name not in CO_OCCURRING)
        return {"alphabetical": CLASS_NAMES, "co-occurring-last": others + CO_OCCURRING}

    def settings(self) -> tuple[str, ...]:
        return ("60-10", "60-5", "65-1")

    def splits(self) -> tuple[str, ...]:
        return _SPLITS

    def samples(self, split: str) -> tuple[Sample, ...]:
        """The index of a split in the order of metadata.csv; a sample's id is its uid.

        InputError that names the first malformed row, if there is one, of whatever split or subset.
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
                picture = self._read(video, f"frames/{t}.jpg", _frame)
                pixels = np.asarray(_fitted(picture, size, crop, Image.Resampling.BILINEAR))
                clips.image[n, t] = pixels.transpose(2, 0, 1)
                if t < labelled:
                    mask = partial(_label, frame=picture.size, size=size, crop=crop)
                    clips.label[n, t] = self._read(video, f"labels_rgb/{t}.png", mask)
            wave = self._read(video, "audio.wav", partial(_wave, seconds=video.seconds))
            clips.audio[n, :real] = log_mel(wave.reshape(video.seconds, SAMPLE_RATE_HZ)[:real])
            clips.real_frame[n, :real] = True
            clips.labelled_frame[n, :labelled] = True
        return clips

    def fingerprint(self) -> str:
        """Of metadata.csv the content, of the other files the sizes: times change with every copy, and contents take minutes.

        A file replaced by one of the same size is therefore not noticed. Sizes are looked up once in a process.
        """
        return _fingerprint(self, *self._stamps())

    def check(self) -> None:
        """That metadata.csv and the class list can be used and every video has a folder; files are not opened."""
        videos = self._usable()
        if not videos:
            raise InputError(f"{self._folder / METADATA} has no video of subset {self.subset!r}")
        if fault := _class_list_fault(str(self._folder)):
            raise InputError(f"{self._folder / CLASS_LIST} {fault}")
        present = {label: _names_in(self._folder / label) for label in SECONDS}
        for video in videos:
            if video.uid not in present[video.label]:
                raise InputError(f"{self._place(video)}: folder {self._folder / video.folder} is missing; {_ADVICE}")

    def videos(self) -> tuple[Video, ...]:
        """The rows of this subset and all malformed rows, quarantined or not."""
        rows = _metadata(str(self._folder), self._stamps()[0])[1]
        return tuple(video for video in rows if video.faults or video.belongs_to(self.subset))

    def problems(self, map_videos: MapVideos = map) -> tuple[Problem, ...]:
        """Everything that is wrong, by row; reads every file of the subset, those of quarantined videos included.

        `map_videos(function, videos)` calls a function, which pickles, on every video, in parallel or not, in their order.
        InputError only where there is no metadata.csv to go by.
        """
        root, videos = str(self._folder), self.videos()
        found = [Problem(video.row, video.uid, METADATA, fault) for video in videos for fault in video.faults]
        if fault := _class_list_fault(root):
            found.append(Problem(0, "", CLASS_LIST, fault))
        for problems in map_videos(partial(video_problems, root), [video for video in videos if video.located]):
            found += problems
        return tuple(sorted(found, key=lambda problem: problem.row))

    @property
    def _folder(self) -> Path:
        return Path(_absolute("benchmark.root", self.root, "the folder that holds metadata.csv of AVSBench-semantic"))

    def _stamps(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """By what a change of the two files is seen within a process."""
        if not os.path.isdir(self._folder):
            raise InputError(f"benchmark.root must name a folder; there is none at {self._folder}")
        held_back = None if self.quarantine is None else _stamp(self._quarantine)
        return _stamp(self._folder / METADATA), held_back

    @property
    def _quarantine(self) -> Path:
        return Path(_absolute("benchmark.quarantine", self.quarantine or "", "a file that check_data wrote"))

    def _usable(self) -> tuple[Video, ...]:
        return _usable(self, *self._stamps())

    def _videos(self, split: str) -> tuple[Video, ...]:
        if split not in _SPLITS:
            raise unknown(f"split of {self.name}", split, _SPLITS)
        return tuple(video for video in self._usable() if video.split == split)

    def _place(self, video: Video) -> str:
        return f"{self._folder / METADATA}, row {video.row} ({_shown(video.uid)})"

    def _read(self, video: Video, name: str, reader: Callable[[str], _T]) -> _T:
        """What a reader makes of a file of a video. InputError in its place."""
        file = f"{video.folder}/{name}"
        try:
            return reader(_inside(str(self._folder), file))
        except _FaultError as fault:
            raise InputError(f"{self._place(video)}: {file} {fault}; {_ADVICE}") from None


def video_problems(root: str, video: Video) -> tuple[Problem, ...]:
    """Everything that is wrong with the files of a video, whose row must be `located`."""
    found: list[Problem] = []

    def attempt(name: str, reader: Callable[[str], _T]) -> _T | None:
        file = f"{video.folder}/{name}" if name else video.folder
        try:
            return reader(_inside(root, file))
        except _FaultError as fault:
            found.append(Problem(video.row, video.uid, file, str(fault)))
            return None

    if attempt("", _listed) is None:
        return tuple(found)

    def numbered(folder: str, suffix: str, expected: int, allowed: int) -> list[int]:
        """The expected images that are there."""
        names = attempt(folder, _listed)
        if names is None:
            return []
        numbers = {int(name[:-4]) for name in names if re.fullmatch(rf"(0|[1-9]\d{{0,8}})\{suffix}", name, re.ASCII)}
        missing = sorted(set(range(expected)) - numbers)
        surplus = sorted(numbers - set(range(allowed)))
        parts = [f"lacks {n}{suffix}" for n in missing] + [f"has {n}{suffix} too many" for n in surplus[:3]]
        if parts:
            what = f"holds {len(numbers)} images, expected {expected}: {', '.join(parts)}"
            found.append(Problem(video.row, video.uid, f"{video.folder}/{folder}", what))
        return sorted(numbers & set(range(expected)))

    sizes: dict[int, tuple[int, int]] = {}
    for t in numbered("frames", ".jpg", video.seconds, video.seconds):
        frame = attempt(f"frames/{t}.jpg", _frame)
        if frame is not None:
            sizes[t] = frame.size
    # Of first-frame videos, masks beyond the first are of no use and no harm: up to one a frame are allowed.
    for t in numbered("labels_rgb", ".png", video.num_labelled, video.seconds):
        attempt(f"labels_rgb/{t}.png", partial(_check_mask, frame=sizes.get(t)))
    attempt("audio.wav", partial(_wave, seconds=video.seconds))
    return tuple(found)


@cache
def palette() -> np.ndarray:
    """The colours of background and classes, uint8 [71 3]: VOC's, which deals the bits of an id to red, green and blue in turn.

    From the highest bit of each channel downwards: 1 is (128, 0, 0), 2 is (0, 128, 0), 3 is (128, 128, 0). Read-only.
    """
    ids = np.arange(len(CLASS_NAMES) + 1)
    colours = np.zeros((len(ids), 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (ids >> (3 * place + channel)) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    colours.setflags(write=False)
    return colours


def class_ids(colours: np.ndarray) -> np.ndarray:
    """Benchmark ids uint8 [...] of colours uint8 [... 3]. ValueError that names a colour of no class."""
    weights = np.array([65536, 256, 1])
    codes = palette() @ weights
    order = np.argsort(codes)
    wanted = colours @ weights
    found = np.minimum(np.searchsorted(codes, wanted, sorter=order), len(codes) - 1)
    ids: np.ndarray = order[found].astype(np.uint8)
    wrong = codes[ids] != wanted
    if wrong.any():
        raise ValueError(f"colour {tuple(colours[wrong][0].tolist())} is of no class")
    return ids


def read_quarantine(path: Path) -> frozenset[str]:
    """The uids in a quarantine file. InputError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the quarantine file {path}: {_reason(error)}") from None
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
        raise InputError(f"cannot write the quarantine file {path}: {_reason(error)}") from None


@lru_cache(maxsize=8)
def _metadata(root: str, stamp: tuple[int, int]) -> tuple[str, tuple[Video, ...]]:
    """SHA-256 and rows of metadata.csv. InputError where it cannot be read or lacks a column."""
    path = Path(root) / METADATA
    try:
        real = Path(_inside(root, METADATA))
        if _file(str(real)).st_size > LARGEST_METADATA_BYTES:
            raise _FaultError(f"is larger than {LARGEST_METADATA_BYTES} bytes")
        content = real.read_bytes()
    except _FaultError as fault:
        raise InputError(f"{path} {fault}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None
    return hashlib.sha256(content).hexdigest(), _parsed(content, path)


def _parsed(content: bytes, path: Path) -> tuple[Video, ...]:
    """One Video per line that is not blank. Bytes that are no UTF-8 end as characters that no cell may hold."""
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    header = _cells(lines[0])
    missing = [name for name in COLUMNS if not isinstance(header, list) or header.count(name) != 1]
    if missing or not isinstance(header, list):
        raise InputError(
            f"{path} must have the columns {', '.join(COLUMNS)}, each once; wrong or missing: {', '.join(missing)}"
        )
    videos: list[Video] = []
    first_row: dict[str, int] = {}
    for row, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = _cells(line)
        if isinstance(cells, str):
            videos.append(Video(row, "", faults=(cells,), located=False))
            continue
        place = header.index("uid")
        uid = cells[place] if place < len(cells) else ""
        if len(cells) != len(header):
            video = Video(row, uid, faults=(f"has {len(cells)} columns, expected {len(header)}",), located=False)
        else:
            video = _video(row, dict(zip(header, cells, strict=True)), first_row.get(uid))
        first_row.setdefault(uid, row)
        videos.append(video)
    return tuple(videos)


def _cells(line: str) -> list[str] | str:
    """The cells of a line, or what is wrong with it. A line is a row, so that a stray quote cannot swallow others."""
    try:
        return next(csv.reader([line.removesuffix("\r")], strict=True), [])
    except csv.Error as error:
        return f"is not a line of comma-separated values: {error}"


def _video(row: int, cells: Mapping[str, str], first_row: int | None) -> Video:
    uid, split, label = cells["uid"], cells["split"], cells["label"]
    names = tuple(cells["a_obj"].split("_"))
    where = []  # faults that leave open where the files are or how many
    if not _PLAIN_NAME.fullmatch(uid):
        where.append(f"uid {_shown(uid)} is no plain name (letters, digits, '_' and '-')")
    if label not in SECONDS:
        where.append(f"unknown label {_shown(label)}; one of: {', '.join(SECONDS)}")
    if split not in _SPLITS:
        where.append(f"unknown split {_shown(split)}; one of: {', '.join(_SPLITS)}")
    if first_row is not None:
        where.append(f"the uid stands in row {first_row} too")
    what = []
    if not (len(names) == 1 and names[0] in WITHOUT_CLASS):
        what += [f"unknown class {_shown(name)} in a_obj" for name in dict.fromkeys(names) if name not in _CLASS_IDS]
        what += [f"class {_shown(name)} repeated in a_obj" for name in dict.fromkeys(names) if names.count(name) > 1]
    return Video(row, uid, names, split, label, tuple(where + what), located=not where)


@lru_cache(maxsize=8)
def _usable(benchmark: AVSBench, stamp: tuple[int, int], quarantine_stamp: tuple[int, int] | None) -> tuple[Video, ...]:
    """The videos of the subset without the quarantined ones. InputError for a malformed row, and a uid that is not there."""
    videos = _metadata(str(benchmark._folder), stamp)[1]
    left_out = frozenset() if benchmark.quarantine is None else read_quarantine(benchmark._quarantine)
    absent = sorted(left_out - {video.uid for video in videos})
    if absent:
        raise InputError(f"{benchmark.quarantine}: uid {_shown(absent[0])} is not in metadata.csv; run check_data again")
    kept = tuple(video for video in videos if video.uid not in left_out)
    for video in kept:
        if video.faults:
            raise InputError(f"{benchmark._place(video)}: {video.faults[0]}; {_ADVICE}")
    return tuple(video for video in kept if video.belongs_to(benchmark.subset))


@lru_cache(maxsize=8)
def _fingerprint(benchmark: AVSBench, stamp: tuple[int, int], quarantine_stamp: tuple[int, int] | None) -> str:
    content, every = _metadata(str(benchmark._folder), stamp)
    videos = _usable(benchmark, stamp, quarantine_stamp)
    sizes = hashlib.sha256()
    for video in videos:
        folder = os.path.join(benchmark._folder, video.folder)
        files = [f"frames/{t}.jpg" for t in range(video.seconds)]
        files += [f"labels_rgb/{t}.png" for t in range(video.num_labelled)]
        for file in (*files, "audio.wav"):
            sizes.update(f"{video.folder}/{file}:{_size(os.path.join(folder, file))}\n".encode())
    left_out = sorted({video.uid for video in every if video.belongs_to(benchmark.subset)} - {video.uid for video in videos})
    return digest(
        {
            "benchmark": benchmark.name,
            "render_version": RENDER_VERSION,
            "metadata": content,
            "file_sizes": sizes.hexdigest(),
            "left_out": left_out,
            "frames": benchmark.frames,
            "image_size_px": benchmark.image_size_px,
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
        raise InputError(f"cannot read {path}: {_reason(error)}") from None
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


def _class_list_fault(root: str) -> str:
    """What is wrong with label2idx.json; empty where nothing is, or it is absent."""
    if not os.path.lexists(os.path.join(root, CLASS_LIST)):
        return ""
    try:
        path = _inside(root, CLASS_LIST)
        _file(path)
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
    except _FaultError as fault:
        return str(fault)
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {_reason(error)}"
    if not isinstance(ids, dict):
        return "does not map class names to ids"
    expected = {"background": BACKGROUND, **_CLASS_IDS}
    wrong = sorted(name for name in ids.keys() | expected.keys() if ids.get(name, -1) != expected.get(name, -2))
    return f"differs from the class list, first at {_shown(wrong[0])}" if wrong else ""


def _inside(root: str, relative: str) -> str:
    """The real path of something below the root."""
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, relative))
    if os.path.commonpath([base, path]) != base:
        raise _FaultError("leads out of the root, by a link")
    return path


def _file(path: str) -> os.stat_result:
    """A file's status; a pipe or a device would never end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise _FaultError("is missing") from None
    except OSError as error:
        raise _FaultError(f"cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise _FaultError("is not a file")
    return status


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        raise _FaultError("is missing") from None
    except OSError as error:
        raise _FaultError(f"is no folder that can be read: {_reason(error)}") from None


def _picture(path: str, formats: tuple[str, ...]) -> Image.Image:
    """A decoded image in RGB. Its size is looked at before its pixels are."""
    _file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                width, height = image.size
                if max(image.size) > min(LARGEST_SIDE_PX, LARGEST_RATIO * min(image.size)):
                    limits = f"at most {LARGEST_SIDE_PX} px a side and {LARGEST_RATIO} to 1"
                    raise _FaultError(f"has {width} x {height} px, allowed are {limits}")
                return image.convert("RGB")
    except _FaultError:
        raise
    except Exception as error:  # whatever a damaged file makes of a decoder
        raise _FaultError(f"cannot be decoded: {_reason(error)}") from None


def _frame(path: str) -> Image.Image:
    return _picture(path, ("JPEG", "PNG"))


def _mask(path: str, frame: tuple[int, int] | None) -> Image.Image:
    """A mask of the shape of its frame, whose size may be another; None where the frame is not known."""
    mask = _picture(path, ("PNG",))
    if frame is not None and abs(mask.width * frame[1] - mask.height * frame[0]) > max(mask.width, frame[0]):
        raise _FaultError(f"has {mask.width} x {mask.height} px, not the shape of its frame of {frame[0]} x {frame[1]} px")
    return mask


def _check_mask(path: str, frame: tuple[int, int] | None) -> None:
    colours = _mask(path, frame).getcolors(maxcolors=256)
    if colours is None:
        raise _FaultError("has more than 256 colours")
    try:
        class_ids(np.array(sorted(colour for _, colour in colours), np.uint8))
    except ValueError as error:
        raise _FaultError(f"has a {error}") from None


def _label(path: str, frame: tuple[int, int], size: int, crop: bool) -> np.ndarray:
    mask = _fitted(_mask(path, frame), size, crop, Image.Resampling.NEAREST)
    try:
        return class_ids(np.asarray(mask))
    except ValueError as error:
        raise _FaultError(f"has a {error}") from None


def _fitted(image: Image.Image, size: int, crop: bool, resampling: Image.Resampling) -> Image.Image:
    """The image as a square: its centre, after the short side is scaled, or the whole of it."""
    if not crop:
        return image.resize((size, size), resampling)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resampling).crop((left, top, left + size, top + size))


def _wave(path: str, seconds: int) -> np.ndarray:
    """The first seconds of a recording, float32 [seconds * 16000]; what is missing of the last one is silence."""
    _file(path)
    expected = seconds * SAMPLE_RATE_HZ
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != SAMPLE_RATE_HZ:
                raise _FaultError(f"has {file.samplerate} Hz, expected {SAMPLE_RATE_HZ} Hz")
            if file.channels > LARGEST_CHANNELS:
                raise _FaultError(f"has {file.channels} channels, at most {LARGEST_CHANNELS} are read")
            wave: np.ndarray = file.read(expected, dtype="float32", always_2d=True).mean(1)
    except _FaultError:
        raise
    except Exception as error:  # whatever a damaged file makes of a decoder
        raise _FaultError(f"cannot be decoded: {_reason(error)}") from None
    if not np.isfinite(wave).all():
        raise _FaultError("has samples that are no finite numbers")
    if expected - len(wave) >= SAMPLE_RATE_HZ:
        raise _FaultError(f"is {len(wave) / SAMPLE_RATE_HZ:.2f} s long: of {seconds} s, a whole second or more is missing")
    return np.pad(wave, (0, expected - len(wave)))


def _shown(text: str) -> str:
    """Text of unknown origin, quoted, on one line and of bounded length."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def _reason(error: Exception) -> str:
    """Why something failed, on one line and without the path, which whoever reports it knows."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not the expected one"
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
