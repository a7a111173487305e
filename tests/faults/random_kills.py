"""Kills a sweep by SIGKILL at random moments, starts it again each time, and compares its end with an undisturbed one's.

    python tests/faults/random_kills.py [SPACE] --outputs FOLDER [--kills 3] [--seed 0] [-- ARGUMENTS OF THE SWEEP]

Both sweeps have stores of their own below FOLDER. An undisturbed one that lies there from an earlier call is taken as it is.
The moments are drawn uniformly from its duration. What passes between two of them is the time from a start to its kill, so that
the sweep, which loses a little at each, is still under way at the last.
Status 0 where trials.csv and best.json are the same bytes and nothing that was done before a kill was done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fault_tools import Process, left_behind, running, verb

from orchestrator.entries import FOLDER_KINDS, KINDS

NAME = "killed"
SWEEP_SECONDS = 12 * 3600.0
CLUSTER_SECONDS = 180.0  # a cluster whose driver was killed ends by itself, Ray's agents after a minute of looking for its head


def made(outputs: Path) -> dict[str, float]:
    """When each outcome in the store was made, by its place there: what is computed again gets another time."""
    sealed = {kind: "[!.]*/entry.json" if kind in FOLDER_KINDS else "[!.]*.json" for kind in KINDS}
    files = [path for kind, pattern in sealed.items() for path in (outputs / "store" / kind).glob(pattern)]
    return {str(path.relative_to(outputs)): json.loads(path.read_text())["made"] for path in files}


def kept(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether everything that was there is still the same."""
    return before.items() <= after.items()


def ending(outputs: Path) -> tuple[str, ...]:
    """What a sweep ended with."""
    return tuple((outputs / "sweeps" / NAME / name).read_text() for name in ("trials.csv", "best.json"))


def kill(process: Process, seconds: float) -> bool:
    """Kills the process after so many seconds; False where it ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.popen.poll() is not None:
            return False
        time.sleep(0.05)
    process.signal(signal.SIGKILL)
    return True


def undisturbed(outputs: Path, arguments: Sequence[str]) -> Path:
    """The folder of a sweep that nobody disturbs, with its duration in the file `seconds`; run only where that is missing."""
    if not (outputs / "seconds").exists():
        begun = time.monotonic()
        with running(verb("sweep", *arguments, "--name", NAME, "--outputs", str(outputs))) as process:
            assert process.end(SWEEP_SECONDS) == 0, process.output
        (outputs / "seconds").write_text(str(time.monotonic() - begun))
    return outputs


def run(outputs: Path, calm: Path, kills: int, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The record of a sweep below `outputs` that was killed. AssertionError where it differs from the undisturbed one."""
    command = verb("sweep", *arguments, "--name", NAME, "--outputs", str(outputs))
    whole = float((calm / "seconds").read_text())
    chance, moments, there = random.Random(seed), [], []
    drawn = sorted(chance.uniform(0, whole) for _ in range(kills))
    for last, moment in itertools.pairwise([0.0, *drawn]):
        before = made(outputs)
        with running(command) as process:
            killed = kill(process, moment - last)
            process.end()
        assert killed or process.popen.returncode == 0, process.output
        left = process.outlived_by(CLUSTER_SECONDS)
        assert not left, left
        assert kept(before, made(outputs))
        moments.append(f"{moment:.0f} s" if killed else f"{moment:.0f} s (had ended)")
        there.append(len(made(outputs)))
    before = made(outputs)
    with running(command) as process:
        assert process.end(SWEEP_SECONDS) == 0, process.output
    assert kept(before, made(outputs))
    assert ending(outputs) == ending(calm)
    assert sorted(made(outputs)) == sorted(made(calm))
    assert not (left := left_behind(outputs)), left
    return {"undisturbed_seconds": round(whole), "killed_after": moments, "outcomes_there": there,
            "outcomes": len(made(calm)), "equal": True}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("space", nargs="?", default="cmr_collage")
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    ours, theirs = sys.argv[1:], []
    if "--" in ours:  # argparse takes none after it for a list that follows an optional argument
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1 :]
    chosen = parser.parse_args(ours)
    outputs = chosen.outputs.absolute()
    outputs.mkdir(parents=True, exist_ok=True)
    command = [chosen.space, *theirs]
    calm = undisturbed(outputs / "undisturbed", command)
    print(json.dumps(run(outputs / NAME, calm, chosen.kills, chosen.seed, command), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
