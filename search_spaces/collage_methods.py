"""Which continual method holds on to the old classes of Collage, and what does each part of CMR bring? (docs/results.md)

For `python -m orchestrator.compare`: every method and CMR's ablations from one base task. Sized for 2 cores: so few scenes that
joint training levels off at a length that three seeds of all of them can have (docs/results.md). PLOP's POD weights are the
default search's, chosen on validation (docs/log.md); "plop, paper's weights" has the published ones. The open knob is PLOP's,
for whoever wants to search.
"""

from cavs_model.datasets.collage import Collage
from cavs_model.methods.cmr import CMR
from cavs_model.methods.plop import PLOP
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective, Trial

BASE = Experiment(
    benchmark=Collage(frames=1, train_clips=350),
    scenario=Scenario(setting="16-4", order="co-occurring-last"),
    method=CMR(base=PLOP(pod_weight=1e-5, pod_logits_weight=1e-6)),
    schedule=Schedule(base_epochs=32, epochs=10, batch_size=8, learning_rate=1e-3, decay="cosine"),
    precision="fp32",
)

OBJECTIVES = (Objective("val/miou/all", "max"),)

_PLOP = {"method": "plop", "method.pod_weight": 1e-5, "method.pod_logits_weight": 1e-6}

VARIANTS = {
    "cmr": {},
    "plop": _PLOP,
    "finetune": {"method": "finetune"},
    "replay": {"method": "replay"},
    "eir": {"method": "eir"},
    "mib": {"method": "mib"},
    "cmr, random instead of MSS": {"method.selection": "random"},
    "cmr, no resampling": {"method.resampling": "off"},
    "cmr, uniform instead of CSR": {"method.resample_by": "uniform"},
    "cmr, neither MSS nor CSR": {"method.selection": "random", "method.resampling": "off"},
    "joint": {"method": "joint"},
    "lwf": {"method": "lwf"},
    "lwf_mc": {"method": "lwf_mc"},
    "ilt": {"method": "ilt"},
    "ewc": {"method": "ewc"},
    "plop, paper's weights": {"method": "plop"},
    "eir, sigmoid": {"method": "eir", "method.activation": "sigmoid"},
    "cmr, largest delta": {"method.selection": "largest"},
    "cmr, half smallest, half largest": {"method.selection": "mixed"},
    "cmr, drawn rows replace others": {"method.resampling": "replace"},
    "cmr, F / max F": {"method.collision_normalisation": "max"},
    "cmr, memory truth overwritten": {"method.memory_truth": "overwritten"},
    "cmr over finetune": {"method.base": "finetune"},
    "joint, picture alone": {"method": "joint", "network.modalities": "picture"},
    "joint, sound alone": {"method": "joint", "network.modalities": "sound"},
}


def define(trial: Trial) -> None:
    """How strongly PLOP's maps are held under CMR."""
    trial.suggest_float("method.base.pod_weight", 1e-6, 1e-3, log=True)
