"""How large a memory and how much resampling does CMR want on Collage? (CMR, section 5: 5 samples per class, 20 %.)

Expected: see the results table of the README for the measured objective, hardware and wall time of the default sweep.
"""

from cavs_model.datasets.collage import Collage
from cavs_model.methods.cmr import CMR
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective, Trial

BASE = Experiment(
    benchmark=Collage(),
    scenario=Scenario(setting="16-8", order="co-occurring-last"),
    method=CMR(),
    schedule=Schedule(base_epochs=12, epochs=8, batch_size=16, learning_rate=1e-3, decay="cosine"),
)

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """The two open knobs: buffer size in samples per class, and the share of it that is drawn again."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
