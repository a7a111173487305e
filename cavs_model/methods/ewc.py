"""EWC, elastic weight consolidation: a parameter is held where it was, the harder the more the old tasks need it there.

Terms: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017. theta* are the parameters at the
start of a task, F the diagonal of the Fisher information. Carried over to segmentation by the authors of MiB (Cermelli et al.,
CVPR 2020) in their code; the default weight and decay are that code's, made for VOC.

Where the sources disagree, and what is done here:

- F: the paper's is an expectation over the model's own predictions; MiB's code averages squared gradients of whole batches over
  the optimiser's steps, during training. Here the empirical Fisher at the trained weights, network in evaluation mode: the
  mean over the task's training samples of the squared gradient of the sample's mean cross-entropy with its labels (the task's
  own). One sample, one gradient: batches and workers do not enter. A sample without labelled pixels counts with gradient 0.
- Several tasks: the paper adds a penalty per old task; the code has one F, a running average in which the latest squared
  gradient weighs 0.9. Here one F, averaged over tasks: `decay` * F before + (1 - `decay`) * the last task's, after the base
  task that task's alone. Parameters that are new (rows of the classifier) start with their first task's.
- Scale: the paper has F as it is; the code maps each tensor of F to [0, 1] by its least and greatest value. Here, with
  `normalise`, F is divided by its greatest value over all parameters, which keeps the proportions between layers.
- Weight: lambda / 2 in the paper, times a lambda of each experiment; in the code 500, without the half. Here as the code.
- New classifier rows have no theta*: paper and code leave them free, here too. Buffers of batch norm are no parameters.
- Background: cross-entropy takes the labels as they stand, as the code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cavs_model.losses import cross_entropy
from cavs_model.methods.base import Method, knob
from cavs_model.types import Batch, Mean, Network, Step, Task


@dataclass(frozen=True)
class EWC(Method):
    """Cross-entropy, plus `weight` times sum_i F_i (theta_i - theta*_i)^2."""

    weight: float = knob(500.0, at_least=0)  # lambda; MiB's code: 500 (VOC); 0 leaves the term out
    decay: float = knob(0.9, acts="consolidate", at_least=0, at_most=1)  # of F from one task to the next; MiB's code: see above
    normalise: bool = knob(True)  # MiB's code: on, per tensor; off is the paper's

    @property
    def consolidates(self) -> bool:
        return self.weight > 0

    def loss(self, step: Step) -> dict[str, Mean]:
        """Term "cross_entropy"; the penalty is one of the parameters."""
        return {"cross_entropy": cross_entropy(step.student.logits, step.batch.label, step.batch.real_frame)}

    def measure(self, network: Network, parameters: Mapping[str, Tensor], clip: Batch, task: Task) -> dict[str, Tensor]:
        """The squared gradient of the clip's mean cross-entropy."""
        found = cross_entropy(network(clip).logits, clip.label, clip.real_frame)
        mean = found.total / torch.as_tensor(found.count).clamp(min=1)
        gradients = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return {name: gradient.square() for name, gradient in zip(parameters, gradients, strict=True)}

    def consolidate(self, means: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """F, float32."""
        if before is None:
            return {name: new.float() for name, new in means.items()}
        fisher = {}
        for name, new in means.items():
            joined, known = new.clone(), before[name].double()
            old = slice(len(known))  # a classifier that has grown has further rows
            joined[old] = self.decay * known + (1 - self.decay) * new[old]
            fisher[name] = joined.float()
        return fisher

    def penalty(
        self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Mean]:
        """Term "penalty"; of a parameter that has grown, over the old rows."""
        moved = [(state[name] * (parameters[name][: len(old)] - old).square()).sum() for name, old in start.items()]
        total = torch.stack(moved).sum()
        if self.normalise:
            total = total / torch.stack([each.max() for each in state.values()]).max().clamp(min=torch.finfo(total.dtype).tiny)
        return {"penalty": Mean(self.weight * total, 1.0)}
