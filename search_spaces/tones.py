"""A search of seconds on synthetic tones: for tests, for debugging, and to see the whole machine turn once."""

from cavs_model.datasets.tones import Tones
from cavs_model.methods.cmr import CMR
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective, Trial

BASE = Experiment(
    benchmark=Tones(),
    scenario=Scenario(setting="2-2"),
    network=NetworkConfig(visual_encoder="tiny", visual_weights="none", audio_encoder="tiny", audio_dim=32, width=16),
    method=CMR(),
    schedule=Schedule(base_epochs=6, epochs=4, batch_size=8, learning_rate=3e-3),
    precision="fp32",
)

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """The knobs of the default search, on toys."""
    trial.suggest_int("method.samples_per_class", 1, 4)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
