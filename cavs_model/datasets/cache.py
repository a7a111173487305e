"""Decoded clips on disk: each clip is rendered once, then read through memory maps by any number of processes.

A split is stored as blocks of 64 clips. A block is one .npy file of records (see `record_type`) followed by the 32 bytes of
its SHA-256; it appears under its name only when it is complete, so that an interrupted build goes on where it stopped and two
processes may write the same block at once. Until then it is a .part file beside its place, under a lock that ends with its
writer: `build` deletes those that nobody locks. Opening a split looks at headers and sizes alone; a block is held against its
SHA-256 when a process first reads of it, and is made anew where it differs. `verify` reads everything.

Beside the clips lie, where a network has a sound encoder that is never trained, its vectors of every clip's seconds: blocks of
the same kind, whose names begin with `vggish.feature_name`, so that every weight file has its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from cavs_model.datasets.base import Benchmark, Clips
from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES
from cavs_model.errors import FULL, InputError, OutageError, unknown
from cavs_model.networks.vggish import AUDIO_DIM, feature_name, load_vggish
from cavs_model.types import BACKGROUND, IGNORE, Batch

BLOCK_CLIPS = 64
FORMAT_VERSION = 2  # part of the file names: a cache of another format counts as missing

Job = tuple[str, int]  # split, block
MapBlocks = Callable[[Callable[[Job], None], Sequence[Job]], Iterable[None]]

_DIGEST_BYTES = 32
_PART = ".part"
_log = logging.getLogger(__name__)
# Blocks that this process found whole: path, size, time of the last change and place on the disk, of which a copy has another.
_whole: set[tuple[str, int, int, int]] = set()


def renumbering(class_names: Sequence[str], order: Sequence[str]) -> np.ndarray:
    """Benchmark id -> learned id, uint8 [256]: classes by their place in `order`, background and IGNORE as they are.

    Ids of no class become IGNORE. `rule.table()[renumbering(...)]` is then benchmark id -> visible label. InputError unless
    `order` names every class once.
    """
    if sorted(class_names) != sorted(order):
        wrong = sorted(set(class_names) ^ set(order)) or "a repeated name"
        raise InputError(f"a class order must name every class once; wrong or missing: {wrong}")
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[BACKGROUND] = BACKGROUND
    for index, name in enumerate(class_names):
        table[index + 1] = order.index(name) + 1
    return table


def record_type(benchmark: Benchmark) -> np.dtype[np.void]:
    """One clip as a record whose fields are those of base.Clips."""
    frames, size = benchmark.frames, benchmark.image_size_px
    return np.dtype(
        [
            ("image", "u1", (frames, 3, size, size)),
            ("audio", "<f2", (frames, NUM_FRAMES, NUM_BINS)),
            ("label", "u1", (frames, size, size)),
            ("real_frame", "?", (frames,)),
            ("labelled_frame", "?", (frames,)),
        ]
    )


def feature_type(benchmark: Benchmark) -> np.dtype[np.void]:
    """One clip's vectors of sound as a record; zeros at padded frames."""
    return np.dtype([("audio_feature", "<f4", (benchmark.frames, AUDIO_DIM))])


def cache_folder(benchmark: Benchmark, split: str, root: str | Path) -> Path:
    """Where the blocks of a split lie. A changed benchmark has another fingerprint and so another folder."""
    if split not in benchmark.splits():
        raise unknown(f"split of {benchmark.name}", split, benchmark.splits())
    return _benchmark_folder(benchmark, root) / split.replace("/", "-")


def missing_blocks(benchmark: Benchmark, split: str, root: str | Path, features: str = "") -> list[int]:
    """The blocks that are absent or, by their header and size, not whole. The latter are logged as warnings.

    Of the clips, or of the vectors of sound whose name `features` is: these are small, so that they are read in full.
    """
    folder, record = cache_folder(benchmark, split, root), feature_type(benchmark) if features else record_type(benchmark)
    missing = []
    for block, positions in enumerate(_blocks(benchmark, split)):
        path = _block_path(folder, block, features)
        fault = _fault(path, record, len(positions)) or ("" if not features or _is_whole(path) else "its checksum differs")
        if fault:
            missing.append(block)
            if path.exists():
                _log.warning("%s is damaged (%s) and will be rebuilt", path, fault)
    return missing


def write_block(benchmark: Benchmark, split: str, block: int, root: str | Path) -> None:
    """Renders a block and puts it in place, unless a whole one is there.

    InputError where the folder cannot be written, OutageError where it is full.
    """
    folder, record = cache_folder(benchmark, split, root), record_type(benchmark)
    positions = _blocks(benchmark, split)[block]
    path = _block_path(folder, block)
    if _fault(path, record, len(positions)):
        # A clip's matrices are small, and there is a process for every core: threads of BLAS would only wait for one another.
        with threadpool_limits(1, "blas"):
            records = _records(benchmark, split, positions)
        _write_atomically(path, _encode(records))


def write_features(benchmark: Benchmark, split: str, block: int, root: str | Path, weights: str) -> None:
    """Puts the vectors of sound of a block of clips in place, unless they are there whole. The clips must be there.

    Clip by clip in one thread, so that they have the same bits whoever makes them. InputError for weights that do not fit,
    and where the folder cannot be written, OutageError where it is full.
    """
    folder, record = cache_folder(benchmark, split, root), feature_type(benchmark)
    positions = _blocks(benchmark, split)[block]
    path = _block_path(folder, block, feature_name(weights))
    if not _fault(path, record, len(positions)) and _is_whole(path):
        return
    clips = DecodedSplit(benchmark, split, root).read(positions)
    records = np.zeros(len(positions), record)
    network, threads = load_vggish(weights, torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for vectors, audio, real in zip(records["audio_feature"], clips.audio, clips.real_frame, strict=True):
                if real.any():
                    vectors[real] = network(torch.from_numpy(audio[real].astype(np.float32))).numpy()
    finally:
        torch.set_num_threads(threads)
    _write_atomically(path, _encode(records))


def build(
    benchmark: Benchmark,
    splits: Iterable[str],
    root: str | Path,
    map_blocks: MapBlocks = map,
    audio_weights: str | None = None,
    on_block: Callable[[int, int], None] = lambda done, missing: None,
) -> None:
    """Makes all that is missing of some splits: clips and, with `audio_weights`, vectors of sound (NetworkConfig.frozen_sound).

    `map_blocks(function, jobs)` calls a function, which pickles, on every job, in parallel or not: the built-in `map`, a
    pool's, a cluster's. `on_block(done, missing)` hears of every block that was missing when it is there, of clips first and
    then of vectors. Does nothing for a benchmark that is not cached. InputError where the cache cannot be written, OutageError
    where it is full. What killed processes left half-written of this benchmark is deleted, before and after.
    """
    if not benchmark.cached:
        return
    splits = list(splits)
    with _tidied(benchmark, root):
        # First of all: a missing file is told before hours of decoding.
        name = "" if audio_weights is None else feature_name(audio_weights)
        jobs = [(split, block) for split in splits for block in missing_blocks(benchmark, split, root)]
        for done, _ in enumerate(map_blocks(partial(_write_job, benchmark, str(root)), jobs), start=1):
            on_block(done, len(jobs))
        if audio_weights is None:
            return
        jobs = [(split, block) for split in splits for block in missing_blocks(benchmark, split, root, name)]
        for done, _ in enumerate(map_blocks(partial(_feature_job, benchmark, str(root), audio_weights), jobs), start=1):
            on_block(done, len(jobs))


def verify(benchmark: Benchmark, split: str, root: str | Path, features: str = "") -> None:
    """Reads a whole split against its checksums. InputError naming the damaged files, which are best deleted."""
    if not benchmark.cached:
        return
    open_split(benchmark, split, root, features)  # complains of missing blocks
    folder = cache_folder(benchmark, split, root)
    names = ["", features] if features else [""]
    paths = [_block_path(folder, block, name) for name in names for block in range(len(_blocks(benchmark, split)))]
    damaged = [str(path) for path in paths if not _checksum_matches(path)]
    if damaged:
        raise InputError(f"damaged cache files (delete them and build again): {', '.join(damaged)}")


def open_split(benchmark: Benchmark, split: str, root: str | Path, features: str = "") -> DecodedSplit:
    """A split ready for reading. InputError naming the folder and the blocks where the cache is incomplete.

    Its batches have the vectors of sound of the name `features`, if one is given. Benchmarks that are not cached are rendered
    into memory here, without such vectors; `root` is then not looked at.
    """
    if benchmark.cached:
        for name in ("", features) if features else ("",):
            missing = missing_blocks(benchmark, split, root, name)
            if missing:
                folder = cache_folder(benchmark, split, root)
                kind = f"{name} blocks" if name else "blocks"
                raise InputError(f"the cache {folder} is incomplete: build it first; missing {kind} {missing}")
    return DecodedSplit(benchmark, split, root, features)


class DecodedSplit:
    """The clips of one split. Maps are opened at first use, also in another process: it pickles as its arguments.

    To be made by `open_split`, which checks that all blocks are there.
    """

    def __init__(self, benchmark: Benchmark, split: str, root: str | Path, features: str = "") -> None:
        self.benchmark = benchmark
        self.split = split
        self.root = Path(root)
        self.features = features if benchmark.cached else ""
        self.sample_ids = tuple(sample.id for sample in benchmark.samples(split))
        self._position = {sample_id: position for position, sample_id in enumerate(self.sample_ids)}
        self._opened: dict[tuple[int, str], np.ndarray] = {}

    def __reduce__(self) -> tuple[type[DecodedSplit], tuple[Benchmark, str, Path, str]]:
        return type(self), (self.benchmark, self.split, self.root, self.features)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def read(self, positions: Sequence[int]) -> Clips:
        """The clips at these positions of the index, copied, in benchmark ids."""
        records = np.empty(len(positions), record_type(self.benchmark))
        for n, position in enumerate(positions):
            records[n] = self._record(position)
        return Clips(**{item.name: records[item.name] for item in fields(Clips)})

    def batch(self, sample_ids: Sequence[str], rehearsed: Sequence[bool], tables: Sequence[np.ndarray] | np.ndarray) -> Batch:
        """These samples as a batch on the CPU, B of them.

        `rehearsed` [B]; `tables` [B 256] uint8: per sample its benchmark id -> visible label (see `renumbering`). Frames that
        are padded or not annotated get IGNORE. KeyError for an unknown sample, ValueError for lists of unequal length.
        """
        positions = [self._position[sample_id] for sample_id in sample_ids]
        records = [self._record(position) for position in positions]
        heard = None
        if self.features:
            kept = [self._record(position, self.features)["audio_feature"] for position in positions]
            heard = torch.from_numpy(np.stack(kept).astype(np.float32, copy=False))
        frames, size = self.benchmark.frames, self.benchmark.image_size_px
        image = np.empty((len(records), frames, 3, size, size), np.uint8)
        audio = np.empty((len(records), frames, NUM_FRAMES, NUM_BINS), np.float32)
        label = np.empty((len(records), frames, size, size), np.uint8)
        real = np.empty((len(records), frames), np.bool_)
        labelled = np.empty((len(records), frames), np.bool_)
        for n, (record, table, _) in enumerate(zip(records, tables, rehearsed, strict=True)):
            image[n], audio[n] = record["image"], record["audio"]
            real[n], labelled[n] = record["real_frame"], record["labelled_frame"]
            np.take(table, record["label"], out=label[n], mode="clip")  # "clip" writes straight into `out`
        labelled &= real
        label[~labelled] = IGNORE
        return Batch(
            sample_id=tuple(sample_ids),
            image=torch.from_numpy(image),
            audio=torch.from_numpy(audio),
            label=torch.from_numpy(label),
            real_frame=torch.from_numpy(real),
            labelled_frame=torch.from_numpy(labelled),
            rehearsed=torch.tensor(list(rehearsed), dtype=torch.bool),
            audio_feature=heard,
        )

    @cached_property
    def _folder(self) -> Path:
        return cache_folder(self.benchmark, self.split, self.root)

    def _record(self, position: int, features: str = "") -> np.void:
        if not 0 <= position < len(self):
            raise IndexError(f"split {self.split!r} has {len(self)} clips, asked for position {position}")
        block, row = divmod(position, BLOCK_CLIPS)
        if (block, features) not in self._opened:
            self._opened[block, features] = self._open(block, features)
        return self._opened[block, features][row]  # type: ignore[no-any-return]

    def _open(self, block: int, features: str) -> np.ndarray:
        if not self.benchmark.cached:
            return _records(self.benchmark, self.split, _blocks(self.benchmark, self.split)[block])
        path = _block_path(self._folder, block, features)
        try:
            if not _is_whole(path):
                self._mend(path, block, features)
            return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the cache file {path}: {error}") from None

    def _mend(self, path: Path, block: int, features: str) -> None:
        """Puts a whole block in the place of a damaged one, from which processes that have it open go on reading."""
        if features:  # whose weights are not known here
            raise OutageError(f"the cache file {path} is damaged: its checksum differs; the same command again makes it anew")
        _log.warning("%s is damaged (its checksum differs) and is rebuilt", path)
        _write_atomically(path, _encode(_records(self.benchmark, self.split, _blocks(self.benchmark, self.split)[block])))


def _blocks(benchmark: Benchmark, split: str) -> list[range]:
    """The positions that each block of a split holds."""
    count = len(benchmark.samples(split))
    return [range(start, min(start + BLOCK_CLIPS, count)) for start in range(0, count, BLOCK_CLIPS)]


def _benchmark_folder(benchmark: Benchmark, root: str | Path) -> Path:
    return Path(root) / f"{benchmark.name}-{benchmark.fingerprint()[:16]}"


def _block_path(folder: Path, block: int, features: str = "") -> Path:
    return folder / f"{features or f'clips-v{FORMAT_VERSION}'}-{block:05d}.npy"


def _write_job(benchmark: Benchmark, root: str, job: Job) -> None:
    split, block = job
    write_block(benchmark, split, block, root)


def _feature_job(benchmark: Benchmark, root: str, weights: str, job: Job) -> None:
    split, block = job
    write_features(benchmark, split, block, root, weights)


def _records(benchmark: Benchmark, split: str, positions: Sequence[int]) -> np.ndarray:
    clips = benchmark.render(split, positions)
    records = np.empty(len(positions), record_type(benchmark))
    for item in fields(Clips):
        values = getattr(clips, item.name)
        if values.shape != records[item.name].shape:
            raise ValueError(f"{benchmark.name} rendered {item.name} {values.shape}, expected {records[item.name].shape}")
        records[item.name] = values
    return records


def _encode(records: np.ndarray) -> bytes:
    """The .npy file and its digest. The digest comes last, where np.load does not look."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def _write_atomically(path: Path, content: bytes) -> None:
    """Writes through a temporary file beside `path`, which is gone afterwards unless the process is killed."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _new_part(path)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out other users of a shared cache
            os.replace(temporary, path)  # while it is locked
    except OSError as error:
        kind = OutageError if error.errno in FULL else InputError
        raise kind(f"cannot write the cache folder {path.parent}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _new_part(path: Path) -> tuple[int, str]:
    """A temporary file beside `path`, under a lock that tells others that somebody writes it: its descriptor and its name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        with suppress(OSError):  # a file system without locks, where nobody is taken for dead either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, name
        os.close(handle)  # taken for a dead process's before it was locked


@contextmanager
def _tidied(benchmark: Benchmark, root: str | Path) -> Iterator[None]:
    """Deletes what killed processes left half-written of a benchmark, before the block and after it."""
    _clear_parts(benchmark, root)
    try:
        yield
    finally:
        _clear_parts(benchmark, root)


def _clear_parts(benchmark: Benchmark, root: str | Path) -> None:
    """Leaves alone what a living process writes, another build or one that mends a block."""
    for path in _benchmark_folder(benchmark, root).glob(f"*/.*{_PART}"):
        with suppress(OSError), open(path, "rb+") as file:  # of others, without locks, or another process was faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _fault(path: Path, record: np.dtype[np.void], count: int) -> str:
    """What is wrong with a block by its header and size; empty if nothing is."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                return f"format {version}"
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            expected = file.tell() + count * record.itemsize + _DIGEST_BYTES
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "absent"
    except (OSError, ValueError) as error:
        return str(error)
    if dtype != record or shape != (count,):
        return f"shape {shape} of another kind of clip"
    return "" if size == expected else f"{size} bytes instead of {expected}"


def _is_whole(path: Path) -> bool:
    """Whether a block's checksum matches; read once in a process as long as the file stays the same. OSError."""
    status = path.stat()
    state = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    if state not in _whole:
        if not _checksum_matches(path):
            return False
        _whole.add(state)
    return True


def _checksum_matches(path: Path) -> bool:
    digest = hashlib.sha256()
    remaining = max(0, path.stat().st_size - _DIGEST_BYTES)
    with open(path, "rb") as file:
        while remaining and (chunk := file.read(min(remaining, 1 << 20))):
            digest.update(chunk)
            remaining -= len(chunk)
        return file.read() == digest.digest()
