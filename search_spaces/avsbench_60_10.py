"""AVSBench-semantic, 60-10 (two tasks): how large a memory and how much resampling does CMR want? (CMR, section 5.)

The data lie in a folder of yours: --set benchmark.root=/data/avsbench (absolute). The published setting is this file's:
ResNet-50 and VGGish, 30 epochs, overlapped, the classes that often sound together last. VGGish's weights are a file of yours
too: --set network.audio_weights=/data/vggish.pth. Single- and multi-source clips alone are benchmark.subset=cis and cim.
"""

from cavs_model.datasets.avsbench import AVSBench
from cavs_model.methods.cmr import CMR
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective, Trial

BASE = Experiment(
    benchmark=AVSBench(),
    scenario=Scenario(setting="60-10", order="co-occurring-last"),
    network=NetworkConfig(visual_encoder="resnet50", audio_encoder="vggish", width=256),
    method=CMR(),
    schedule=Schedule(),
)

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """Buffer size in samples per class, and the share of it that is drawn again."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
