"""LwF-MC's equations against loops, and its limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, real_pixels, step

from cavs_model.methods.lwf_mc import LwFMC, one_hot_cross_entropy, sigmoid_distillation
from cavs_model.types import IGNORE


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def binary_cross_entropy(z, y):
    return float(-np.sum(y * np.log(sigmoid(z)) + (1 - y) * np.log(1 - sigmoid(z))))


def test_labels_are_one_hot_and_summed_over_classes():
    given = step()
    losses = [binary_cross_entropy(z, np.eye(CLASSES)[y]) for z, _, y, _ in real_pixels(given) if y != IGNORE]
    term = LwFMC().loss(given)["binary_cross_entropy"]
    assert term.count == len(losses)
    assert float(term.value().detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_distillation_is_the_old_classes_mean_times_their_number():
    given = step()
    means = [binary_cross_entropy(z[:OLD], sigmoid(known)) / OLD for z, known, _, _ in real_pixels(given)]
    term = LwFMC().loss(given)["distillation"]
    assert term.count == len(means)
    assert float(term.value().detach()) == pytest.approx(10 * OLD * np.mean(means), rel=1e-5)
    gradient = torch.autograd.grad(term.total, given.student.logits)[0]
    assert not gradient[:, :, OLD:].any()


def test_distillation_is_least_where_both_say_the_same():
    given = step()
    teacher, real = given.teacher.logits, given.batch.real_frame
    student = teacher.clone().requires_grad_()
    least = sigmoid_distillation(student, teacher, real)
    least.total.backward()
    assert student.grad.abs().max() < 1e-6
    for shift in (-0.2, 0.2):  # no softmax: a shift of all logits is a difference
        assert sigmoid_distillation(teacher + shift, teacher, real).total > least.total


def test_large_logits_stay_finite():
    given = step()
    logits = 1e4 * given.student.logits.detach()
    assert one_hot_cross_entropy(logits, given.batch.label, given.batch.real_frame).total.isfinite()
    assert sigmoid_distillation(logits[:, :, :OLD], given.teacher.logits, given.batch.real_frame).total.isfinite()


def test_without_weight_it_needs_no_teacher():
    given = step()
    assert LwFMC().needs_teacher
    assert not LwFMC(kd_weight=0).needs_teacher
    terms = LwFMC(kd_weight=0).loss(replace(given, teacher=None))
    assert list(terms) == ["binary_cross_entropy"]
    assert torch.equal(terms["binary_cross_entropy"].total, LwFMC().loss(given)["binary_cross_entropy"].total)
