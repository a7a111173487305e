"""How many samples per class should CMR keep on Collage, at the paper's resampling ratio of 20 %? (CMR, section 5.)"""

from orchestrator.experiment import Objective, Trial
from search_spaces import cmr_collage

BASE = cmr_collage.BASE

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """Buffer size in samples per class."""
    trial.suggest_int("method.samples_per_class", 1, 20)
