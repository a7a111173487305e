"""AVSBench-semantic, 60-5 (three tasks): how large a memory and how much resampling does CMR want?

All but the setting, and what must be given on the command line, is as in avsbench_60_10.
"""

from orchestrator.experiment import Objective, Trial, override
from search_spaces import avsbench_60_10

BASE = override(avsbench_60_10.BASE, {"scenario.setting": "60-5"})

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """Buffer size in samples per class, and the share of it that is drawn again."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
