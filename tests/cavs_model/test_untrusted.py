"""Bombs, pipes and ways out: what a folder of files may try, and that it costs neither memory nor time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
from PIL import Image

from cavs_model.datasets import clip_files
from cavs_model.datasets.avsbench import CLASS_NAMES, AVSBench
from cavs_model.datasets.clip_files import read_frame, read_quarantine, read_wave
from cavs_model.datasets.collage import LONGEST_SOUND_S, SHIPPED_PACK, Collage
from cavs_model.errors import InputError
from cavs_model.untrusted import FaultError, inside, picture, read_bounded, read_json, typed_fields

MEMORY_BYTES = 256 * 2**20
SECONDS = 10.0  # of this process's own time


@contextmanager
def cheap() -> Iterator[None]:
    """Fails where what is done meanwhile takes more memory or time than any of it may: peak of the process, Pillow's too."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert memory("VmHWM") - before < MEMORY_BYTES


def tried(call: Callable[[], object]) -> tuple[str, object]:
    """What was wrong, or what came out."""
    try:
        return "", call()
    except FaultError as fault:
        return str(fault), None


def memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def png(path: Path, width: int, height: int, data: bytes = b"", extra: bytes = b"") -> Path:
    """A picture that claims a size, whatever its data hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def text_chunk(size: int) -> bytes:
    body = b"bomb\0\0" + zlib.compress(bytes(size))
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


@pytest.mark.parametrize("side", [(60_000, 60_000), (2**31 - 1, 1), (5000, 5000), (1, 4000)])
def test_a_picture_is_measured_before_it_is_decoded(tmp_path: Path, side: tuple[int, int]) -> None:
    path = png(tmp_path / "x.png", *side, zlib.compress(bytes(2**20)))
    with cheap(), pytest.raises(FaultError):
        read_frame(str(path))


def test_pictures_with_more_inside_than_they_show_are_bounded(tmp_path: Path) -> None:
    data = zlib.compress(bytes(2**28), 9)  # 256 MiB in 256 KiB
    with cheap():
        for name, path in {
            "data": png(tmp_path / "data.png", 64, 64, data),
            "text": png(tmp_path / "text.png", 64, 64, zlib.compress(bytes(64 * 193)), text_chunk(2**28)),
        }.items():
            told, found = tried(lambda path=path: picture(str(path), ("PNG",), "RGB").size)  # type: ignore[misc]
            assert found == (64, 64) or "cannot be decoded" in told, name


def test_a_progressive_picture_with_a_thousand_scans_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (256, 256)).save(out, "JPEG", progressive=True)
    content = out.getvalue()
    start = content.index(b"\xff\xda")
    scan = content[start : content.index(b"\xff", start + 2)]
    path = tmp_path / "x.jpg"
    path.write_bytes(content[:start] + scan * 100_000 + content[start:])
    with cheap(), pytest.raises(FaultError, match="more than 200 scans"):
        read_frame(str(path))
    path.write_bytes(content)
    read_frame(str(path))


def sound_of(path: Path, frames: int) -> Path:
    """A second of sound whose header claims more."""
    soundfile.write(path, np.zeros(16_000, np.int16), 16_000)
    content = bytearray(path.read_bytes())
    if path.suffix == ".wav":
        content[40:44] = struct.pack("<I", min(2**32 - 1, frames * 2))
        content[4:8] = struct.pack("<I", min(2**32 - 1, frames * 2 + 36))
    else:  # FLAC's count of samples: 36 bits at the end of bytes 18..25
        packed = int.from_bytes(content[18:26]) & ~(2**36 - 1) | min(frames, 2**36 - 1)
        content[18:26] = packed.to_bytes(8)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("frames", [16_000 * 3600 * 30, 2**31, 2**36 - 1])
def test_a_recording_that_claims_hours_costs_seconds(tmp_path: Path, suffix: str, frames: int) -> None:
    path = sound_of(tmp_path / f"x{suffix}", frames)
    with cheap():
        told, found = tried(lambda: read_wave(str(path), 1).shape)
        assert found == (16_000,) or "cannot be decoded" in told
        with pytest.raises(FaultError):
            read_wave(str(path), 10)


def pack_with(tmp_path: Path, kind: str, content: Path) -> Collage:
    """A pack in which all files of a kind were replaced, with the right checksums."""
    folder = tmp_path / "pack"
    shutil.copytree(SHIPPED_PACK, folder)
    lines = (folder / "manifest.csv").read_text().splitlines()
    changed = [lines[0]]
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    for line in lines[1:]:
        cells = line.split(",")
        if cells[1] == kind:
            (folder / cells[0]).unlink()
            os.link(content, folder / cells[0])
            cells[-1] = digest
        changed.append(",".join(cells))
    (folder / "manifest.csv").write_text("\n".join(changed) + "\n")
    return Collage(pack=str(folder))


@pytest.mark.parametrize("kind", ["background", "image", "sound"])
def test_bombs_in_a_pack_are_told_by_file(tmp_path: Path, kind: str) -> None:
    if kind == "sound":
        bomb = tmp_path / "long.flac"
        soundfile.write(bomb, np.zeros((LONGEST_SOUND_S + 1) * 16_000, np.int16), 16_000)
    else:
        bomb = png(tmp_path / "bomb.png", 60_000, 60_000, zlib.compress(bytes(2**20)))
    collage = pack_with(tmp_path, kind, bomb)
    collage.check()  # it is what its manifest says
    folder = {"background": "backgrounds", "image": "images", "sound": "sounds"}[kind]
    with cheap(), pytest.raises(InputError, match=f"collage pack: .*{folder}.* (has|cannot be decoded)"):
        collage.render("train", [0])


def test_a_pack_never_reads_outside_of_itself(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(SHIPPED_PACK, folder)
    lines = (folder / "manifest.csv").read_text().splitlines()
    victim = lines[1].split(",")[0]
    (folder / victim).rename(tmp_path / "outside.webp")
    for path, told in (("../outside.webp", "no plain path"), (str(tmp_path / "outside.webp"), "no plain path")):
        cells = lines[1].split(",")
        changed = "\n".join([lines[0], ",".join([path, *cells[1:]]), *lines[2:]]) + "\n"
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "manifest.csv").write_text(changed)
        os.utime(other / "manifest.csv", ns=(0, len(path)))
        with pytest.raises(InputError, match=f"manifest.csv, row 2: path .*{told}"):
            Collage(pack=str(other)).check()
    (folder / victim).symlink_to(tmp_path / "outside.webp")
    with pytest.raises(InputError, match=f"{victim} leads out of the root, by a link"):
        Collage(pack=str(folder)).check()
    (folder / victim).unlink()
    (tmp_path / "outside.webp").rename(folder / victim)
    (tmp_path / "link").symlink_to(folder)
    Collage(pack=str(tmp_path / "link")).check()  # the root itself may be one


@pytest.mark.parametrize("relative", ["..", "../x", "/etc/passwd", "a/../../x", "link", "link/x", "chain"])
def test_ways_out_of_a_root_are_refused(tmp_path: Path, relative: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "rooted").write_text("")  # a neighbour whose name begins alike
    (root / "link").symlink_to(tmp_path)
    (root / "chain").symlink_to(root / "link" / "rooted")
    (tmp_path / "alias").symlink_to(root)
    for base in (root, tmp_path / "alias"):
        with pytest.raises(FaultError, match="leads out of the root"):
            inside(str(base), relative)
        assert inside(str(base), "a/../b") == str(root / "b")
    with pytest.raises(FaultError, match="null character"):
        inside(str(root), "a\0b")


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for call in (lambda path=path: read_bounded(path, 9), lambda path=path: read_json(path)):
            with pytest.raises(FaultError, match="is not a file"):
                call()
        with pytest.raises(InputError, match="is not a file"):
            read_quarantine(path)


def test_a_class_list_and_a_table_that_are_pipes_are_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.csv")
    with pytest.raises(InputError, match=r"metadata\.csv is not a file"):
        AVSBench(root=str(tmp_path)).samples("train")
    (tmp_path / "metadata.csv").unlink()
    os.mkfifo(tmp_path / "label2idx.json")
    (tmp_path / "metadata.csv").write_text("vid,uid,s_min,s_sec,a_obj,split,label\nv,one,0,0,dog,train,v1s\n")
    (tmp_path / "v1s" / "one").mkdir(parents=True)
    with pytest.raises(InputError, match=r"label2idx\.json is not a file"):
        AVSBench(root=str(tmp_path)).check()


def test_large_and_deep_json_and_endless_tables_are_bounded(tmp_path: Path) -> None:
    deep, large = tmp_path / "deep.json", tmp_path / "large.json"
    deep.write_bytes(b"[" * 10_000_000)
    with large.open("wb") as file:
        file.truncate(2**40)  # as a sparse file it takes no room
    table = tmp_path / "metadata.csv"
    with cheap():
        with pytest.raises(FaultError, match="cannot be read as JSON"):
            read_json(deep)
        with pytest.raises(FaultError, match="is larger than"):
            read_json(large)
        for content in (b"\n" * 10_000_000, b"x" * (2**24 + 1), b"vid," + b"y" * 10_000_000, b'"' + b"\n" * 10_000_000):
            table.write_bytes(content)
            with pytest.raises(InputError, match=r"metadata\.csv (is larger|has more than|must have the columns)"):
                AVSBench(root=str(tmp_path)).samples("train")
    assert len(CLASS_NAMES) == 70
    assert clip_files.MOST_ROWS > 12_356  # the rows of AVSBench


@dataclass(frozen=True)
class Noted:
    """Every type of a field that there is."""

    text: str
    count: int
    share: float
    state: Literal["on", "off"] = "on"
    pairs: tuple[tuple[str, ...], ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    free: Any = None


GOOD = {"text": "a", "count": 1, "share": 0.5}


def test_fields_are_read_as_they_were_written() -> None:
    full = {**GOOD, "state": "off", "pairs": [["a", "b"], []], "numbers": {"x": 1}, "limit": None, "free": [{"a": 1}]}
    expected = {**full, "pairs": (("a", "b"), ()), "numbers": {"x": 1.0}}
    assert typed_fields(Noted, json.loads(json.dumps(full))) == expected
    assert Noted(**typed_fields(Noted, {**GOOD, "share": 1})) == Noted("a", 1, 1.0)
    assert typed_fields(Noted, {"count": 1, "share": 0.5}, given={"text": b"as it is"})["text"] == b"as it is"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": 5}, "text must be text, not '5'"),
        ({"count": True}, "count must be a whole number, not 'True'"),
        ({"count": 2**63}, "count must be of less than 64 bits"),
        ({"share": 10**400}, "share must be a number"),
        ({"share": "x" * 1000}, "share must be a number, not 'xxx"),
        ({"state": "maybe"}, "state must be one of on, off, not 'maybe'"),
        ({"state": []}, "state must be one of on, off, not a list"),
        ({"pairs": "ab"}, "pairs must be a list, not 'ab'"),
        ({"pairs": [["a"], [5]]}, r"pairs\[1\]\[0\] must be text"),
        ({"numbers": {"x": "y"}}, r"numbers\.x must be a number"),
        ({"numbers": []}, "numbers must map names to values"),
        ({"limit": "x"}, "limit must be a whole number"),
        ({"other": 1}, "unknown field 'other'; the fields are: text, count"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_has_to_be(change: dict[str, Any], told: str) -> None:
    with pytest.raises(FaultError, match=told):
        typed_fields(Noted, {**GOOD, **change})
    with pytest.raises(FaultError, match="lacks the field share"):
        typed_fields(Noted, {"text": "a", "count": 1})
