"""AVSBench-semantic: web videos in which every pixel of a sounding object carries its class, one frame a second.

The data set is of Zhou et al., "Audio-visual segmentation with semantics" (2023); its cut into clips with one sounding class
(CIS), with several (CIM) and with any number (CI) is of Hong et al., CMR, section 4. Nothing is shipped: the user names a
folder in the layout of the release,

    metadata.csv                    vid, uid, s_min, s_sec, a_obj, split, label; a row is a video
    label2idx.json                  class name -> id (may be absent)
    <label>/<uid>/frames/0.jpg ...  5 frames where label is v1s or v1m, 10 where it is v2
    <label>/<uid>/labels_rgb/0.png ...  colours of the VOC palette; of v1s training videos only the first is used
    <label>/<uid>/audio.wav         16 kHz

How the files are read, and what happens to those that cannot be: clip_files.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from cavs_model.datasets.base import require
from cavs_model.datasets.clip_files import (
    Inspection,
    Problem,
    Video,
    VideoFolder,
    listed,
    row_faults,
)
from cavs_model.errors import unknown
from cavs_model.types import BACKGROUND
from cavs_model.untrusted import FaultError, inside, read_json, shown

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

_CLASS_IDS = {name: index + 1 for index, name in enumerate(CLASS_NAMES)}


@dataclass(frozen=True)
class SemanticVideo(Video):
    """One row of metadata.csv; `names` and `label` mean something where `faults` is empty."""

    names: tuple[str, ...] = ()
    label: str = ""

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted(_CLASS_IDS[name] for name in self.names if name in _CLASS_IDS))

    @property
    def seconds(self) -> int:
        return SECONDS[self.label]

    @property
    def num_labelled(self) -> int:
        return 1 if (self.label, self.split) == ("v1s", "train") else self.seconds

    @property
    def folder(self) -> str:
        return f"{self.label}/{self.uid}"

    @property
    def sound(self) -> str:
        return f"{self.folder}/audio.wav"

    def frame(self, t: int) -> str:
        return f"{self.folder}/frames/{t}.jpg"

    def mask(self, t: int) -> str:
        return f"{self.folder}/labels_rgb/{t}.png"

    def belongs_to(self, subset: Subset) -> bool:
        return {"ci": True, "cis": len(self.names) == 1, "cim": len(self.names) > 1}[subset]


@dataclass(frozen=True)
class AVSBench(VideoFolder):
    """AVSBench-semantic in a folder of the user's. InputError for an unknown subset and numbers out of range.

    Videos in which nothing that sounds is seen have no classes: they are never learned from, and count in the other splits.
    """

    subset: Subset = "ci"  # ci: all; cis: the videos with a single source, cim: those with several

    def __post_init__(self) -> None:
        if self.subset not in get_args(Subset):
            raise unknown("AVSBench.subset", self.subset, get_args(Subset))
        require(self, "frames", 1, max(SECONDS.values()))
        require(self, "image_size_px", 16, 1024)
        require(self, "clips_per_class", 0)

    @property
    def name(self) -> str:
        return f"avsbench-{self.subset}"

    @property
    def table(self) -> str:
        return METADATA

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS

    @property
    def described(self) -> str:
        return "the folder that holds metadata.csv of AVSBench-semantic"

    @property
    def selection(self) -> str:
        return f"subset {self.subset!r}"

    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def orders(self) -> Mapping[str, tuple[str, ...]]:
        """ "alphabetical"; "co-occurring-last" ends with those most often in multi-source videos, as CMR's release has them."""
        others = tuple(name for name in CLASS_NAMES if name not in CO_OCCURRING)
        return {"alphabetical": CLASS_NAMES, "co-occurring-last": others + CO_OCCURRING}

    def settings(self) -> tuple[str, ...]:
        return ("60-10", "60-5", "65-1")

    def uid_column(self, header: Sequence[str]) -> int:
        return header.index("uid")

    def video(self, row: int, uid: str, cells: Mapping[str, str], first_row: int | None) -> SemanticVideo:
        split, label, names = cells["split"], cells["label"], tuple(cells["a_obj"].split("_"))
        where = row_faults(uid, split, first_row)
        if label not in SECONDS:
            where.append(f"unknown label {shown(label)}; one of: {', '.join(SECONDS)}")
        what = []
        if not (len(names) == 1 and names[0] in WITHOUT_CLASS):
            what += [f"unknown class {shown(name)} in a_obj" for name in dict.fromkeys(names) if name not in _CLASS_IDS]
            what += [f"class {shown(name)} repeated in a_obj" for name in dict.fromkeys(names) if names.count(name) > 1]
        return SemanticVideo(row, uid, split, tuple(where + what), located=not where, names=names, label=label)

    def unlocated(self, row: int, uid: str, fault: str) -> SemanticVideo:
        return SemanticVideo(row, uid, faults=(fault,), located=False)

    def includes(self, video: Video) -> bool:
        return isinstance(video, SemanticVideo) and video.belongs_to(self.subset)

    def ids(self, colours: np.ndarray) -> np.ndarray:
        return class_ids(colours)

    def other_faults(self) -> tuple[Problem, ...]:
        fault = _class_list_fault(str(self._folder))
        return (Problem(0, "", CLASS_LIST, fault),) if fault else ()

    def video_problems(self, video: Video) -> tuple[Problem, ...]:
        """As of every video; missing and surplus images are told by folder."""
        inspection = Inspection(self, video)
        if inspection.attempt(video.folder, listed) is not None:
            inspection.read_all(
                _numbered(inspection, f"{video.folder}/frames", ".jpg", video.seconds, video.seconds),
                # Of first-frame videos, masks beyond the first are of no use and no harm: up to one a frame are allowed.
                _numbered(inspection, f"{video.folder}/labels_rgb", ".png", video.num_labelled, video.seconds),
            )
        return tuple(inspection.found)


def _numbered(inspection: Inspection, folder: str, suffix: str, expected: int, allowed: int) -> list[int]:
    """The expected images of a folder that are there; tells of others and of missing ones."""
    names = inspection.attempt(folder, listed)
    if names is None:
        return []
    numbers = {int(name[:-4]) for name in names if re.fullmatch(rf"(0|[1-9]\d{{0,8}})\{suffix}", name, re.ASCII)}
    missing = sorted(set(range(expected)) - numbers)
    surplus = sorted(numbers - set(range(allowed)))
    parts = [f"lacks {n}{suffix}" for n in missing] + [f"has {n}{suffix} too many" for n in surplus[:3]]
    if parts:
        inspection.tell(folder, f"holds {len(numbers)} images, expected {expected}: {', '.join(parts)}")
    return sorted(numbers & set(range(expected)))


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


def _class_list_fault(root: str) -> str:
    """What is wrong with label2idx.json; empty where nothing is, or it is absent."""
    if not os.path.lexists(os.path.join(root, CLASS_LIST)):
        return ""
    try:
        ids = read_json(inside(root, CLASS_LIST))
    except FaultError as fault:
        return str(fault)
    if not isinstance(ids, dict):
        return "does not map class names to ids"
    expected = {"background": BACKGROUND, **_CLASS_IDS}
    wrong = sorted(name for name in ids.keys() | expected.keys() if ids.get(name, -1) != expected.get(name, -2))
    return f"differs from the class list, first at {shown(wrong[0])}" if wrong else ""
