"""`python -m orchestrator.predict MODEL INPUT`: what a trained network sees and hears in a clip of yours.

Writes into a folder: the clip under its masks (overlay.mp4, or overlay/NNNNNN.png), a mask per answered frame
(masks/NNNNNN.png, indexed: a pixel's number is the class in learned order), their legend (legend.json), and what was found in
each second (prediction.json). Frame N is that at N / frames_per_second.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cavs_model.checkpoint import ABOUT, WEIGHTS, Checkpoint, read
from cavs_model.errors import InputError, unknown
from cavs_model.evaluate import frozen
from cavs_model.predict import Answer, Shares, answers, phases, second_of_sound
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, Network
from cavs_model.untrusted import LARGEST_JSON_BYTES, FaultError, read_bounded, read_json, shown
from cavs_model.worker import PRECISIONS, arithmetic
from orchestrator import cli
from orchestrator.entries import DamagedError, Entries
from orchestrator.tracker import Tracker, tracking_uri
from orchestrator.video import Clip, VideoWriter, library, open_clip

CLASSES = "classes.json"  # beside a checkpoint in a model of MLflow's: what a checkpoint of an earlier version does not say
DEVICES = ("auto", "cpu", "cuda")
KINDS = ("video", "frames")
TINT = 0.55  # of a class's colour over the picture
DEBUG_PICTURES = 2
NAMED_SHARE = 0.002  # of a picture: smaller areas are not named on it
SMALLEST_NAMED_PX = 120  # the height below which names would cover the picture
FORMS = (
    "a run of MLflow's (its id), a registered model (models:/NAME/VERSION), a network of the store (its key or the beginning "
    "of it), or a folder with a checkpoint"
)


@dataclass(frozen=True)
class Model:
    """A network to be asked, and what it knows of itself. `classes` are in learned order, without background."""

    checkpoint: Checkpoint
    classes: tuple[str, ...]
    image_size_px: int
    frames: int
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of what it answers, background first."""
        return ("background", *self.classes)[: self.checkpoint.about.num_classes]

    @property
    def never_learned(self) -> tuple[str, ...]:
        """The benchmark's classes that it was never taught: it takes them for something else or for background."""
        return self.classes[self.checkpoint.about.num_classes - 1 :]

    @property
    def hears(self) -> bool:
        """Whether the sound can make a difference."""
        about = self.checkpoint.about
        return about.network == AUDIO_VISUAL and about.config.get("modalities", "both") != "picture"


def predict() -> int:
    """The verb."""
    made = argparse.ArgumentParser(prog="python -m orchestrator.predict", description=(__doc__ or "").split("\n", 1)[1].strip())
    made.add_argument("model", metavar="MODEL", help=FORMS)
    made.add_argument("input", metavar="INPUT", type=Path, help="a video file, or a folder of png or jpg frames with one wav")
    made.add_argument("--output", type=Path, default=None, metavar="DIR", help="where to write (OUTPUTS/predictions/INPUT)")
    made.add_argument("--outputs", type=Path, default=None, help="folder of all results (CAVS_OUTPUTS, else ./outputs)")
    made.add_argument("--fps", type=int, default=5, metavar="N",
                      help="frames a second to be answered, each with the second of sound that begins with it; 1 is the "
                      "benchmarks' protocol; never more than the clip has (%(default)s)")  # fmt: skip
    made.add_argument("--frame-rate", type=float, default=1.0, metavar="N",
                      help="how many frames of a folder are one second (%(default)s, as in AVSBench)")  # fmt: skip
    made.add_argument("--as", choices=KINDS, default="video", dest="kind", help="the overlay as an mp4 or as png (%(default)s)")
    made.add_argument("--silent", action="store_true", help="answer as if nothing were heard; for clips without sound")
    made.add_argument("--task", type=int, default=None, metavar="N", help="of a run: the network after its N-th task (last)")
    made.add_argument("--dry-run", action="store_true", help="say what would be asked of which network; write nothing")
    made.add_argument("--debug", action="store_true", help=f"the first {DEBUG_PICTURES} pictures alone")
    made.add_argument("--device", choices=DEVICES, default="auto", help="auto is the GPU where there is one")
    made.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto is bf16 where the hardware has it")
    made.add_argument("--classes", metavar="NAMES", help="class names in learned order, commas between, or a file of them; for "
                      "checkpoints that do not say")  # fmt: skip
    made.add_argument("--size", type=int, metavar="PX", help="side of the network's frames; for checkpoints that do not say")
    made.add_argument("--frames", type=int, metavar="T", help="frames of one pass; for checkpoints that do not say")
    made.add_argument("--audio-weights", metavar="PATH", help="VGGish's weights, where they lie elsewhere than in training")
    arguments = made.parse_args()
    for name, value in (("--fps", arguments.fps), ("--frame-rate", arguments.frame_rate), ("--task", arguments.task or 1)):
        if not 0 < value < 1000:
            raise InputError(f"{name} must be positive and less than 1000, not {value}")
    if arguments.kind == "video":
        library()  # what is missing is told before anything is computed
    device = _device(arguments.device)
    outputs = cli.outputs_folder(arguments.outputs)
    with TemporaryDirectory() as downloads:
        model = _completed(load_model(arguments.model, outputs, Path(downloads), arguments.task), arguments)
    clip = open_clip(arguments.input, arguments.fps, arguments.frame_rate, model.hears and not arguments.silent)
    if arguments.silent:
        clip = replace(clip, wave=None)
    place = arguments.output or outputs / "predictions" / arguments.input.absolute().stem
    folder = place if arguments.dry_run else _folder(place)
    about = model.checkpoint.about
    print(f"model: {model.source}: {about.network}, {len(model.names) - 1} classes learned, {model.image_size_px} px")
    if model.never_learned:
        print(f"never learned: {', '.join(model.never_learned)}")
    heard = "" if clip.wave is not None else ", no sound"
    print(f"input: {arguments.input}: {clip.source}{heard}; {clip.per_second} answered a second, on {device}", flush=True)
    if arguments.dry_run:
        print(f"dry run, nothing is computed or written; results would lie in {folder}")
        return 0
    network = frozen(model.checkpoint.model(), arithmetic(arguments.precision, device))
    found = write(model, clip, network, device, folder, arguments.kind, DEBUG_PICTURES if arguments.debug else None)
    text = {"model": model.source, "input": str(arguments.input), "frames_per_second": clip.per_second,
            "sound": clip.wave is not None, **found}  # fmt: skip
    (folder / "prediction.json").write_text(json.dumps(text, indent=1) + "\n")
    for second in found["seconds"]:
        shown = ", ".join(f"{each['name']} {each['share']:.1%} (sure {each['confidence']:.2f})" for each in second["classes"])
        print(f"second {second['second']}: {shown or 'background alone'}")
    print(f"results: {folder}", flush=True)
    return 0


def load_model(name: str, outputs: Path, downloads: Path, task: int | None = None) -> Model:
    """The model of a name (FORMS). `task`, from 1, chooses among the networks of a run. InputError for a name of nothing."""
    if name.startswith(("models:/", "runs:/")):
        folder = _tracker(outputs).download_model(name, downloads)
        return _read(_only_checkpoint(folder, name), name)
    if Path(name).is_dir():
        return _read(_only_checkpoint(Path(name), name), name)
    if re.fullmatch("[0-9a-f]{32}", name):
        tracker = _tracker(outputs)
        if task is None and tracker.tags(name).get("kind") == "sweep":  # its best configuration's model was logged with it
            return replace(load_model(f"runs:/{name}/model", outputs, downloads), source=f"the best of sweep {name}")
        key, learned = _network_of_run(tracker, name, task)
        try:
            found = _of_store(key, outputs)
        except InputError as error:
            if task is not None:
                raise
            # The store may lie elsewhere or be pruned; a run whose model was logged, that after the last task, has it still.
            uri = f"runs:/{name}/model"
            try:
                found = _read(_only_checkpoint(tracker.download_model(uri, downloads), uri), uri)
            except InputError:
                raise error from None
        return replace(found, source=f"run {name} after task {learned}")
    if re.fullmatch("[0-9a-f]{4,40}", name.removeprefix("networks/")):
        return _of_store(name.removeprefix("networks/"), outputs)
    raise InputError(f"no model {name!r}; give {FORMS}")


def _tracker(outputs: Path) -> Tracker:
    return Tracker(tracking_uri(outputs), outputs / "artifacts")


def _network_of_run(tracker: Tracker, run: str, task: int | None) -> tuple[str, int]:
    """Key of the audio-visual network of a stream after a task, and the task's number from 1."""
    kind = tracker.tags(run).get("kind", "")
    if kind != "stream":
        streams = tracker.streams_below(run)
        listed = "; ".join(f"{each} ({name})" for each, name in list(streams.items())[:10]) or "none"
        raise InputError(f"run {run} is no stream but a {kind or 'run of something else'}; choose one of its streams: {listed}")
    networks = tracker.networks_of(run)
    if not networks:
        raise InputError(f"run {run} does not say which networks it trained: it learned no task, or by an earlier version")
    learned = max(networks) + 1 if task is None else task
    if learned - 1 not in networks:
        raise unknown("--task", learned, [str(number + 1) for number in sorted(networks)])
    return networks[learned - 1].removeprefix("networks/"), learned


def _of_store(beginning: str, outputs: Path) -> Model:
    """The network of the store whose key begins like this."""
    if not re.fullmatch("[0-9a-f]{4,40}", beginning):  # a run's record is a file of somebody's
        raise InputError(f"{shown(beginning)} is no key of a network")
    entries = Entries(outputs / "store")
    keys = sorted(path.name for path in (entries.root / "networks").glob(f"{beginning}*"))
    if len(keys) != 1:
        more = f"{len(keys)} networks begin with it: {', '.join(keys[:5])}" if keys else "has none of this key"
        raise InputError(f"the store {entries.root} {more}; `python -m orchestrator.store` lists them, --outputs names another")
    try:
        entries.read("networks", keys[0])
    except DamagedError as error:
        raise InputError(f"damaged store entry {entries.path('networks', keys[0])}: {error}") from error
    return _read(entries.path("networks", keys[0]), f"networks/{keys[0]}")


def _only_checkpoint(folder: Path, name: str) -> Path:
    """The folder below, or this one, that holds a checkpoint."""
    found = sorted(path.parent for path in folder.rglob(ABOUT) if (path.parent / WEIGHTS).is_file())
    if len(found) != 1:
        many = f"{len(found)} checkpoints, such as {found[0]}" if found else f"no checkpoint ({ABOUT} and {WEIGHTS})"
        raise InputError(f"{name} holds {many}; give {FORMS}")
    return found[0]


def _read(folder: Path, source: str) -> Model:
    """The model in a folder. What its checkpoint does not say may stand in classes.json beside it or above it."""
    checkpoint = read(folder)
    about = checkpoint.about
    classes, size, frames = about.classes, about.image_size_px, about.frames
    told = next((path for path in (folder / CLASSES, folder.parent / CLASSES) if path.is_file()), None)
    if told is not None and not (classes and size and frames):
        try:
            content = read_json(told)
            listed = content if isinstance(content, list) else content["classes"]
            classes = classes or tuple(name for name in map(str, listed) if name != "background")
            if isinstance(content, dict):
                size, frames = size or int(content.get("image_size_px", 0)), frames or int(content.get("frames", 0))
        except (FaultError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"damaged file {told}: {error}") from error
    return Model(checkpoint, classes, size, frames, source)


def _completed(model: Model, arguments: argparse.Namespace) -> Model:
    """The model with what the command line adds. InputError for what is still missing."""
    if arguments.classes is not None:
        model = replace(model, classes=_names(arguments.classes))
    about = model.checkpoint.about
    if len(model.classes) < about.num_classes - 1 or len(set(model.classes)) != len(model.classes):
        raise InputError(
            f"{model.source} answers {about.num_classes - 1} classes and "
            f"{f'{len(model.classes)} different names are given' if model.classes else 'does not say their names'}; "
            "give all by --classes a,b,c, in the order in which they were learned"
        )
    size, frames = arguments.size or model.image_size_px, arguments.frames or model.frames
    for name, value in (("--size", size), ("--frames", frames)):
        if not 1 <= value <= 4096:
            raise InputError(f"{model.source} does not say what it was trained with; give {name}")
    if size % 32:
        raise InputError(f"--size must be a multiple of 32, not {size}")
    if arguments.audio_weights is not None:
        config = {**about.config, "audio_weights": arguments.audio_weights}
        model = replace(model, checkpoint=replace(model.checkpoint, about=replace(about, config=config)))
    return replace(model, image_size_px=size, frames=frames)


def _names(text: str) -> tuple[str, ...]:
    """Names between commas, or of a file: lines, a JSON list, or a JSON mapping with "classes"."""
    if Path(text).is_file():
        try:
            lines = read_bounded(text, LARGEST_JSON_BYTES)
        except FaultError as fault:
            raise InputError(f"--classes {text} {fault}") from None
        try:
            content = json.loads(lines)
        except (ValueError, RecursionError):
            content = lines.decode(errors="replace").splitlines()
        if not isinstance(content, list) and not (isinstance(content, dict) and isinstance(content.get("classes"), list)):
            raise InputError(f'--classes {text} must hold a name a line, a JSON list, or {{"classes": [...]}}')
        text = ",".join(map(str, content["classes"] if isinstance(content, dict) else content))
    return tuple(name for part in text.split(",") if (name := part.strip()) and name != "background")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _folder(folder: Path) -> Path:
    """The folder, made and without what an earlier prediction left in it. InputError where it holds something else."""
    ours = {"masks", "overlay", "overlay.mp4", "legend.json", "prediction.json"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted({path.name for path in folder.iterdir()} - ours):
            raise InputError(f"--output {folder} holds {others[0]!r}, which is no prediction's; choose a new folder")
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (folder / "masks").mkdir()
    except OSError as error:
        raise InputError(f"cannot write to --output {folder}: {error.strerror}") from error
    return folder


def write(
    model: Model, clip: Clip, network: Network, device: torch.device, folder: Path, kind: str, most: int | None = None
) -> dict[str, Any]:
    """Answers a clip, or its first `most` pictures, and writes overlay, masks and legend; what was found, as JSON values.

    InputError where the clip has no picture.
    """
    names, colours = model.names, palette()
    legend = [
        {"index": index, "name": name, "colour": f"#{colours[index].tobytes().hex()}"} for index, name in enumerate(names)
    ]
    (folder / "legend.json").write_text(json.dumps(legend, indent=1) + "\n")
    seconds: list[Shares] = []
    whole = Shares.none(len(names))
    with ExitStack() as stack:
        video = (
            stack.enter_context(VideoWriter(folder / "overlay.mp4", clip.per_second, clip.wave)) if kind == "video" else None
        )
        if video is None:
            (folder / "overlay").mkdir()
        answered = _answered(clip, network, model.image_size_px, model.frames, device, most)
        for number, (picture, answer) in enumerate(answered):
            if number % clip.per_second == 0:
                seconds.append(Shares.none(len(names)))
            for shares in (seconds[-1], whole):
                shares.add(answer)
            mask = Image.fromarray(answer.label)  # indexed, once it has a palette
            mask.putpalette(colours.tobytes())
            mask.save(folder / "masks" / f"{number:06d}.png", optimize=True)
            drawn = overlay(picture, answer, names, colours)
            if video is not None:
                video.add(drawn)
            else:
                Image.fromarray(drawn).save(folder / "overlay" / f"{number:06d}.png")
    if not whole.frames:
        raise InputError("the clip has no picture in it")
    return {
        "classes": list(names[1:]),
        "never_learned": list(model.never_learned),
        "seconds": [{"second": number, **_found(shares, names)} for number, shares in enumerate(seconds)],
        "whole": _found(whole, names),
    }


def _answered(
    clip: Clip, network: Network, image_size_px: int, frames: int, device: torch.device, most: int | None
) -> Iterator[tuple[np.ndarray, Answer]]:
    """The clip's pictures with their answers. Holds as many pictures as the passes of `frames` seconds need."""
    pictures = islice(clip.pictures(), most)
    wave = np.zeros(0, np.float32) if clip.wave is None else clip.wave
    begun = 0
    while held := list(islice(pictures, clip.per_second * frames)):
        found: dict[int, Answer] = {}
        for numbers in phases(len(held), clip.per_second, frames):
            sound = np.stack([second_of_sound(wave, (begun + number) / clip.per_second) for number in numbers])
            chosen = [held[number] for number in numbers]
            found |= zip(numbers, answers(network, chosen, sound, image_size_px, device), strict=True)
        yield from ((held[number], found[number]) for number in range(len(held)))
        begun += len(held)


def _found(shares: Shares, names: Sequence[str]) -> dict[str, Any]:
    """The background's share, and of every class that covers a pixel its share and mean confidence, largest first."""
    there = sorted((c for c in range(1, len(names)) if shares.pixels[c]), key=lambda c: -shares.pixels[c])
    return {
        "frames": shares.frames,
        "background": _entry(shares, BACKGROUND),
        "classes": [{"name": names[c], **_entry(shares, c)} for c in there],
    }


def _entry(shares: Shares, class_id: int) -> Mapping[str, float]:
    return {"share": round(shares.share(class_id), 6), "confidence": round(shares.mean_confidence(class_id), 6)}


def palette() -> np.ndarray:
    """Colours uint8 [256 3] by index, as in Pascal VOC: the bits of the index, dealt out to red, green and blue in turn."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            colours[index, bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return colours


def overlay(picture: np.ndarray, answer: Answer, names: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """The picture [H W 3] under its mask, with the names of the larger areas and how sure the network is of them."""
    shown = answer.label != BACKGROUND
    drawn = picture.copy()
    drawn[shown] = (picture[shown] * (1 - TINT) + colours[answer.label[shown]] * TINT).astype(np.uint8)
    if picture.shape[0] < SMALLEST_NAMED_PX:
        return drawn
    shares = Shares.none(len(names))
    shares.add(answer)
    there = [c for c in range(1, len(names)) if shares.share(c) >= NAMED_SHARE]
    image = Image.fromarray(drawn)
    canvas, height = ImageDraw.Draw(image, "RGBA"), max(11, picture.shape[0] // 24)
    font = ImageFont.load_default(height)
    for line, c in enumerate(sorted(there, key=lambda c: -shares.pixels[c])):
        text, top = f"{names[c]} {shares.mean_confidence(c):.2f}", 4 + line * (height + 6)
        box = canvas.textbbox((8 + height, top), text, font)
        canvas.rectangle((2, top - 2, box[2] + 4, top + height + 4), fill=(0, 0, 0, 150))
        canvas.rectangle((5, top, 5 + height, top + height), fill=tuple(colours[c].tolist()))
        canvas.text((9 + height, top), text, "white", font)
    return np.asarray(image)


if __name__ == "__main__":
    sys.exit(cli.main(predict))
