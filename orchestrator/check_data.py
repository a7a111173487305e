"""`python -m orchestrator.check_data ROOT`: all that is wrong with a folder of AVSBench-semantic, before a run meets it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO, get_args

from cavs_model.datasets import avsbench, avsbench_object
from cavs_model.datasets.avsbench import AVSBench
from cavs_model.datasets.avsbench_object import AVSBenchObject
from cavs_model.datasets.clip_files import Problem, Video, VideoFolder, read_quarantine, write_quarantine
from cavs_model.errors import InputError
from orchestrator import cli
from orchestrator.progress import clock

LINE_SECONDS = 5.0
PROBLEMS_STATUS = 1
CHUNK_VIDEOS = 8
DEBUG_VIDEOS = 2
SEMANTIC, OBJECT = get_args(avsbench.Subset), get_args(avsbench_object.Subset)

Check = Callable[[Video], tuple[Problem, ...]]


@dataclass(frozen=True)
class ProcessMap:
    """Maps over videos by several processes, or in this one where `processes` is 1; tells of it every few seconds."""

    processes: int
    out: TextIO
    now: Callable[[], float] = time.monotonic
    most: int | None = None  # videos of a split; None is all

    def __call__(self, check: Check, videos: Sequence[Video]) -> Iterator[tuple[Problem, ...]]:
        if self.most is not None:
            videos = _first_of_splits(videos, self.most)
        started = told = self.now()
        count = 0
        for done, problems in enumerate(self._results(check, videos), start=1):
            count += len(problems)
            now = self.now()
            if now - told >= LINE_SECONDS:
                told = now
                left = clock((now - started) / done * (len(videos) - done))
                print(f"checked {done} of {len(videos)} videos, {count} problems, about {left} left", file=self.out, flush=True)
            yield problems

    def _results(self, check: Check, videos: Sequence[Video]) -> Iterator[tuple[Problem, ...]]:
        if self.processes == 1 or not videos:
            yield from map(check, videos)
            return
        # Spawned, because a fork would copy the locks of torch's threads.
        pool = ProcessPoolExecutor(self.processes, get_context("spawn"), initializer=_leave_interrupts_to_the_parent)
        try:
            yield from pool.map(check, videos, chunksize=CHUNK_VIDEOS)
        except BrokenProcessPool:
            raise InputError("a checking process was killed, for want of memory perhaps; try fewer --processes") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _first_of_splits(videos: Sequence[Video], most: int) -> Sequence[Video]:
    """The first `most` of each split, in their order."""
    seen: Counter[str] = Counter()
    chosen = []
    for video in videos:
        seen[video.split] += 1
        if seen[video.split] <= most:
            chosen.append(video)
    return chosen


def check_data() -> int:
    """The verb."""
    made = argparse.ArgumentParser(
        prog="python -m orchestrator.check_data",
        description="Read every file of an AVSBench folder and list what is wrong. Status 1 where something is.",
    )
    made.add_argument("root", type=Path, metavar="ROOT", help="the folder that holds metadata.csv, or the table of s4 or ms3")
    made.add_argument(
        "--subset", choices=(*SEMANTIC, *OBJECT), default="ci",
        help="the videos to read: ci, cis, cim of AVSBench-semantic, s4, ms3 of AVSBench-object (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--quarantine", type=Path, metavar="FILE",
        help="write the uids of videos with problems to FILE, for --set benchmark.quarantine=FILE",
    )  # fmt: skip
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="to read with (%(default)s)")
    made.add_argument("--dry-run", action="store_true", help="say what would be read and written; only the table is read")
    made.add_argument("--debug", action="store_true", help=f"the files of the first {DEBUG_VIDEOS} videos of each split alone")
    arguments = made.parse_args()
    if not 1 <= arguments.processes <= 256:
        raise InputError(f"--processes must be from 1 to 256, got {arguments.processes}")
    kind: type[AVSBench] | type[AVSBenchObject] = AVSBenchObject if arguments.subset in OBJECT else AVSBench
    benchmark: VideoFolder = kind(root=_absolute(arguments.root), subset=arguments.subset)
    target = None if arguments.quarantine is None else Path(_absolute(arguments.quarantine))
    if target is not None:
        _check_target(target)
    if arguments.debug and target is not None:
        raise InputError(
            "--debug reads a few videos, by which no list of --quarantine can be written; leave out one of the two"
        )
    if arguments.dry_run:
        splits = Counter(video.split for video in benchmark.videos() if video.located)
        counts = ", ".join(f"{split} {count}" for split, count in sorted(splits.items()))
        written = "nothing is written" if target is None else f"{target} would be written"
        print(f"dry run, only the table was read: the files of {splits.total()} videos would be ({counts}); {written}")
        return 0
    problems = benchmark.problems(ProcessMap(arguments.processes, sys.stderr, most=DEBUG_VIDEOS if arguments.debug else None))
    _print_problems(problems)
    _print_counts(benchmark.videos(), problems)
    if target is not None:
        write_quarantine(target, (problem.uid for problem in problems if problem.uid))
        print(f"quarantined, by {target}: {len(read_quarantine(target))} videos")
        nameless = sum(not problem.uid for problem in problems)
        if nameless:
            print(f"{nameless} problems belong to no uid and must be mended in place: see the rows without one")
    return PROBLEMS_STATUS if problems else 0


def _absolute(path: Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _check_target(path: Path) -> None:
    """InputError now rather than after an hour: another file would be overwritten, or the folder cannot be written."""
    if os.path.lexists(path):
        read_quarantine(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--quarantine {path}: {path.parent} is not a folder that can be written")


def _print_problems(problems: Sequence[Problem]) -> None:
    """Row 0 stands for the folder as a whole."""
    if not problems:
        print("no problems")
        return
    _print_table([("row", "uid", "file", "what"), *((str(each.row), each.uid, each.file, each.what) for each in problems)])


def _print_counts(videos: Sequence[Video], problems: Sequence[Problem]) -> None:
    """Per split the videos of the subset and those with a problem; malformed rows stand under the split they name."""
    wrong = {problem.row for problem in problems}
    splits = {video.row: video.split if video.split in ("train", "val", "test") else "(none)" for video in videos}
    total, bad = Counter(splits.values()), Counter(split for row, split in splits.items() if row in wrong)
    rows = [(split, str(total[split]), str(bad[split])) for split in ("train", "val", "test", "(none)") if split in total]
    print()
    _print_table([("split", "videos", "with problems"), *rows])


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    safe = [[cell if cell.isprintable() else ascii(cell) for cell in row] for row in rows]
    widths = [min(80, max(len(row[n]) for row in safe)) for n in range(len(safe[0]))]
    for row in safe:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(cli.main(check_data))
