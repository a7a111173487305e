"""Which of CMR's many choices matter on Collage? Every field of the method that the paper or its code leaves open.

Eight knobs want more trials than the default: --sampler tpe --trials 40 or so.
"""

from orchestrator.experiment import Objective, Trial
from search_spaces import cmr_collage

BASE = cmr_collage.BASE

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """What is kept, what is drawn again, and how strongly PLOP's maps are held."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_categorical("method.selection", ["mss", "random", "largest", "mixed"])
    trial.suggest_categorical("method.resampling", ["add", "replace", "off"])
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
    trial.suggest_float("method.collision_share", 0.5, 0.9)
    trial.suggest_categorical("method.collision_normalisation", ["zscore", "max", "none"])
    trial.suggest_categorical("method.memory_truth", ["kept", "overwritten"])
    trial.suggest_float("method.base.pod_weight", 1e-6, 1e-3, log=True)
