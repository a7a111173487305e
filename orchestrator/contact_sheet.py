"""`python -m orchestrator.contact_sheet`: scenes of a benchmark with their masks and sounds, for a person to look at."""

from __future__ import annotations

import sys

from cavs_model.datasets.contact_sheet import contact_sheet
from cavs_model.errors import unknown
from orchestrator import cli

DEBUG_SCENES = 2


def draw() -> int:
    """The verb."""
    made = cli.parser("contact_sheet", "Draw scenes of the experiment's benchmark with masks and log-mel.")
    made.add_argument("--split", default="train", help="split to draw from (%(default)s)")
    made.add_argument("--count", type=int, default=12, help="number of scenes (%(default)s)")
    made.add_argument("--dry-run", action="store_true", help="say what would be drawn, and where; write nothing")
    made.add_argument("--debug", action="store_true", help="two scenes of a benchmark of two clips a class")
    arguments = made.parse_args()
    _, experiment = cli.experiment_of(arguments)
    benchmark = experiment.benchmark
    if arguments.split not in benchmark.splits():
        raise unknown("split", arguments.split, benchmark.splits())
    benchmark.check()
    path = cli.outputs_folder(arguments.outputs) / f"contact_sheet_{benchmark.name}_{arguments.split.replace('/', '_')}.png"
    count = DEBUG_SCENES if arguments.debug else arguments.count
    if arguments.dry_run:
        print(f"dry run, nothing is drawn: {count} scenes of {benchmark.name}'s {arguments.split} would be {path}")
        return 0
    contact_sheet(benchmark, arguments.split, count).save(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(draw))
