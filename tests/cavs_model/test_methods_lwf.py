"""LwF's equations against loops, and its limits."""

import numpy as np
import pytest
import torch
from method_cases import OLD, real_pixels, softmax, step

from cavs_model.methods.finetune import Finetune
from cavs_model.methods.lwf import LwF


def test_distillation_looks_at_old_classes_alone():
    given = step()
    losses = [-float(np.sum(softmax(known) * np.log(softmax(z[:OLD])))) / OLD for z, known, _, _ in real_pixels(given)]
    terms = LwF().loss(given)
    assert float(terms["distillation"].value().detach()) == pytest.approx(100 * np.mean(losses), rel=1e-5)
    assert terms["distillation"].count == len(losses)
    gradient = torch.autograd.grad(terms["distillation"].total, given.student.logits)[0]
    assert not gradient[:, :, OLD:].any()


def test_cross_entropy_is_fine_tunings():
    given = step()
    assert torch.equal(LwF().loss(given)["cross_entropy"].total, Finetune().loss(given)["cross_entropy"].total)


def test_without_weight_it_is_fine_tuning_and_needs_no_teacher():
    given = step()
    assert LwF().needs_teacher
    assert not LwF(kd_weight=0).needs_teacher
    terms = LwF(kd_weight=0).loss(given)
    assert list(terms) == ["cross_entropy"]
    assert torch.equal(terms["cross_entropy"].total, Finetune().loss(given)["cross_entropy"].total)


def test_distillation_pulls_towards_the_teacher():
    given = step()
    gradient = torch.autograd.grad(LwF().loss(given)["distillation"].total, given.student.logits)[0][:, :, :OLD]
    excess = given.student.logits.detach()[:, :, :OLD].softmax(2) - given.teacher.logits.softmax(2)
    expected = 100 / OLD * excess * given.batch.real_frame[:, :, None, None, None]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
