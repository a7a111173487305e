"""How large a memory and how much resampling does CMR want on Collage? (CMR, section 5: 5 samples per class, 20 %.)

Sized for 2 cores: one frame a clip, many scenes, few epochs (960 scenes and 12 epochs cost more and learn less); the base task,
which all trials share, may take the more of them: twelve cost a sweep of 20 trials 12 % more than five. Two defaults are
changed, for reasons measured on validation (docs/log.md): the POD weights, which at VOC's 0.01 let no new class in here, and
the precision, as fp32 is as fast as bf16 for this network on a CPU. Measured time and objective: README.
"""

from cavs_model.datasets.collage import Collage
from cavs_model.methods.cmr import CMR
from cavs_model.methods.plop import PLOP
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective, Trial

BASE = Experiment(
    benchmark=Collage(frames=1, train_clips=1200),
    scenario=Scenario(setting="16-8", order="co-occurring-last"),
    method=CMR(base=PLOP(pod_weight=1e-5, pod_logits_weight=1e-6)),
    schedule=Schedule(base_epochs=12, epochs=4, batch_size=16, learning_rate=1e-3, decay="cosine"),
    precision="fp32",
)

OBJECTIVES = (Objective("val/miou/all", "max"),)


def define(trial: Trial) -> None:
    """The two open knobs: buffer size in samples per class, and the share of it that is drawn again."""
    trial.suggest_int("method.samples_per_class", 1, 10)
    trial.suggest_float("method.resampling_ratio", 0.05, 0.30)
