"""What does a better mIoU cost on Collage? Validation mIoU against the memory's bytes and the workers' seconds.

Three objectives: the sweep writes the Pareto front to pareto.csv. Use --sampler tpe or nsga2. Worker-seconds are those of the
training wherever it was done, so that a trial that found its networks in the store is not taken for a cheap one.
"""

from orchestrator.experiment import Objective, Trial
from search_spaces import cmr_collage

BASE = cmr_collage.BASE

OBJECTIVES = (
    Objective("val/miou/all", "max"),
    Objective("memory/bytes", "min"),
    Objective("cost/worker_seconds", "min"),
)


def define(trial: Trial) -> None:
    """Buffer size, resampling, and the length of every later task."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
    trial.suggest_int("schedule.epochs", 2, 6)
