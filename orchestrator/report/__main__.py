"""The verb: `python -m orchestrator.report NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator import cli
from orchestrator.entries import write_atomically
from orchestrator.report import sections, sources
from orchestrator.tracker import Tracker, tracking_uri

FILE = "report.html"


def report() -> int:
    """The verb."""
    made = argparse.ArgumentParser(
        prog="python -m orchestrator.report",
        description="Write what a sweep, a comparison or a run found as one HTML file that needs no network.",
    )
    made.add_argument("name", help="a sweep or comparison by name, the --name of a run, or the id of a run in MLflow")
    made.add_argument("--outputs", type=Path, default=None, help="folder of all results (CAVS_OUTPUTS, else ./outputs)")
    made.add_argument("--to", type=Path, default=None, metavar="FILE", help=f"the file ({FILE} beside the results)")
    made.add_argument("--split", default="", help="the split that figures are of (the first that was evaluated)")
    made.add_argument("--entry", action="append", default=[], metavar="ENTRY",
                      help="an entry of a comparison to look at closely; may be repeated (best, reference)")  # fmt: skip
    made.add_argument("--no-clips", action="store_true", help="no clips: nothing is computed again")
    made.add_argument("--dry-run", action="store_true", help="say what it would be of and where it would lie; write nothing")
    made.add_argument("--debug", action="store_true", help="one clip of each kind alone")
    arguments = made.parse_args()
    outputs = cli.outputs_folder(arguments.outputs)
    tracker = Tracker(tracking_uri(outputs), outputs / "artifacts")
    source = sources.find(arguments.name, outputs, tracker)
    wishes = sections.Wishes(
        arguments.split,
        tuple(arguments.entry),
        not arguments.no_clips,
        1 if arguments.debug else None,
        lambda text: print(f"note: {text}", flush=True),
    )
    path = (arguments.to or source.folder / FILE).absolute()
    if arguments.dry_run:
        splits = dict.fromkeys(split for stream in source.streams for split in stream.splits)
        streams = f"{source.kind} {source.name}, {len(source.streams)} streams, splits {', '.join(splits)}"
        print(f"dry run, nothing is computed or written: {streams}; the report would be {path}")
        return 0
    text = sections.written(source, wishes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    tracker.attach(source.parent.run, path)
    print(f"report: {path} ({len(text.encode()) / 2**20:.1f} MB), and in MLflow with run {source.parent.run}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(report))
