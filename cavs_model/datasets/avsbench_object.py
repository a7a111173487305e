"""AVSBench-object: web videos of 5 s in which every pixel of a sounding object is marked, whatever the object is.

The data set is of Zhou et al., "Audio-Visual Segmentation", ECCV 2022: S4 with one sounding object (of training videos only the
first frame is annotated), MS3 with several (all frames are). There is one class, so nothing to learn continually: it is run in
one task, setting "1". Nothing is shipped: the user names the folder of a subset in the layout of the release,

    s4_meta_data.csv                                          the first column is the video's name; split, category
    s4_data/visual_frames/<split>/<category>/<name>/<name>_1.png ... _5.png
    s4_data/gt_masks/<split>/<category>/<name>/<name>_1.png ...  of training videos only the first is used
    s4_data/audio_wav/<split>/<category>/<name>.wav           16 kHz

    ms3_meta_data.csv                                         the first column is the video's name; split
    ms3_data/visual_frames/<name>/<name>.mp4_1.png ... .mp4_5.png
    ms3_data/gt_masks/<split>/<name>/<name>_1.png ... _5.png
    ms3_data/audio_wav/<split>/<name>.wav                     16 kHz

Everything in a mask that is not black sounds. The spectrograms that the release has as pickles are not read. How the files are
read, and what happens to those that cannot be: clip_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from cavs_model.datasets.base import require
from cavs_model.datasets.clip_files import Video, VideoFolder, is_plain, row_faults
from cavs_model.errors import unknown
from cavs_model.untrusted import shown

Subset = Literal["s4", "ms3"]
CLASS_NAMES = ("sounding-object",)
SECONDS = 5


@dataclass(frozen=True)
class ObjectVideo(Video):
    """One row of a table; `category` is empty in MS3, which has none."""

    category: str = ""

    @property
    def classes(self) -> tuple[int, ...]:
        return (1,)

    @property
    def seconds(self) -> int:
        return SECONDS

    @property
    def num_labelled(self) -> int:
        return 1 if self.category and self.split == "train" else SECONDS

    @property
    def folder(self) -> str:
        if self.category:
            return f"s4_data/visual_frames/{self.split}/{self.category}/{self.uid}"
        return f"ms3_data/visual_frames/{self.uid}"

    @property
    def sound(self) -> str:
        if self.category:
            return f"s4_data/audio_wav/{self.split}/{self.category}/{self.uid}.wav"
        return f"ms3_data/audio_wav/{self.split}/{self.uid}.wav"

    def frame(self, t: int) -> str:
        return f"{self.folder}/{self.uid}{'' if self.category else '.mp4'}_{t + 1}.png"

    def mask(self, t: int) -> str:
        if self.category:
            return f"s4_data/gt_masks/{self.split}/{self.category}/{self.uid}/{self.uid}_{t + 1}.png"
        return f"ms3_data/gt_masks/{self.split}/{self.uid}/{self.uid}_{t + 1}.png"


@dataclass(frozen=True)
class AVSBenchObject(VideoFolder):
    """One subset of AVSBench-object in a folder of the user's. InputError for an unknown subset and numbers out of range."""

    frames: int = SECONDS
    subset: Subset = "s4"  # s4: a single source, ms3: several

    def __post_init__(self) -> None:
        if self.subset not in get_args(Subset):
            raise unknown("AVSBenchObject.subset", self.subset, get_args(Subset))
        require(self, "frames", 1, SECONDS)
        require(self, "image_size_px", 16, 1024)
        require(self, "clips_per_class", 0)

    @property
    def name(self) -> str:
        return f"avsbench-{self.subset}"

    @property
    def table(self) -> str:
        return f"{self.subset}_meta_data.csv"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("split", "category") if self.subset == "s4" else ("split",)

    @property
    def described(self) -> str:
        return f"the folder that holds {self.table} of AVSBench-object"

    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def orders(self) -> Mapping[str, tuple[str, ...]]:
        return {"alphabetical": CLASS_NAMES}

    def settings(self) -> tuple[str, ...]:
        return ("1",)

    def uid_column(self, header: Sequence[str]) -> int:
        return 0

    def video(self, row: int, uid: str, cells: Mapping[str, str], first_row: int | None) -> ObjectVideo:
        split, category = cells["split"], cells["category"] if self.subset == "s4" else ""
        faults = row_faults(uid, split, first_row)
        if self.subset == "s4" and not is_plain(category):
            faults.append(f"category {shown(category)} is no plain name (letters, digits, '_' and '-')")
        return ObjectVideo(row, uid, split, tuple(faults), located=not faults, category=category)

    def unlocated(self, row: int, uid: str, fault: str) -> ObjectVideo:
        return ObjectVideo(row, uid, faults=(fault,), located=False)

    def ids(self, colours: np.ndarray) -> np.ndarray:
        return np.asarray(colours.any(-1), np.uint8)
