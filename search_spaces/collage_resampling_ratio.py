"""How much of CMR's memory should be drawn again on Collage, at the paper's 5 samples per class? (CMR, section 5: 5-30 %.)

Alone, so that every trial shares all that comes before the first rehearsal.
"""

from orchestrator.experiment import Objective, Trial
from search_spaces import cmr_collage

BASE = cmr_collage.BASE

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """The share of the memory's rows that is drawn again."""
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
