"""MiB's equations against loops and closed forms. Its start of the classifier is tested with PLOP's, which shares it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, SIZE, real_pixels, softmax, step, task
from torch import nn

from cavs_model.losses import cross_entropy, distillation
from cavs_model.methods.lwf import LwF
from cavs_model.methods.mib import (
    MiB,
    hides_old_classes,
    new_classes_as_background,
    open_pixels,
    start_from_background,
    unbiased_cross_entropy,
)
from cavs_model.types import BACKGROUND, IGNORE, LabelRule, Prediction

SEQUENTIAL = replace(task(), train_rule=LabelRule(range(1, CLASSES), BACKGROUND))


def test_background_of_new_data_is_any_old_class():
    given = step()
    given.batch.label[0, 0, 0] = 2  # truth of an old class, wherever it comes from, is truth
    losses = []
    for z, _, label, rehearsed in real_pixels(given):
        if label != IGNORE:
            p = softmax(z)
            losses.append(-np.log(p[:OLD].sum() if label == BACKGROUND and not rehearsed else p[label]))
    term = MiB().loss(given)["cross_entropy"]
    assert term.count == len(losses)
    assert float(term.value().detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_distillation_takes_new_classes_for_background():
    given = step()
    losses = []
    for z, known, _, _ in real_pixels(given):
        p, q = softmax(z), softmax(known)
        as_old = np.concatenate([[p[BACKGROUND] + p[OLD:].sum()], p[1:OLD]])
        losses.append(-np.sum(q * np.log(as_old)) / OLD)
    term = MiB().loss(given)["distillation"]
    assert term.count == len(losses)
    assert float(term.value().detach()) == pytest.approx(10 * np.mean(losses), rel=1e-5)


def test_probabilities_of_all_visible_labels_sum_to_one():
    logits, real = torch.randn(1, 1, CLASSES, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    total = 0.0
    for label in (BACKGROUND, *range(OLD, CLASSES)):
        pixel = torch.full((1, 1, 1, 1), label, dtype=torch.uint8)
        total += float(torch.exp(-unbiased_cross_entropy(logits, pixel, real, pixel == BACKGROUND, OLD).total))
    assert total == pytest.approx(1, rel=1e-5)


def test_folded_logits_give_summed_probabilities():
    logits = torch.randn(2, 3, CLASSES, 4, 4)
    whole, folded = logits.softmax(2), new_classes_as_background(logits, OLD).softmax(2)
    torch.testing.assert_close(folded[:, :, 0], whole[:, :, 0] + whole[:, :, OLD:].sum(2))
    torch.testing.assert_close(folded[:, :, 1:], whole[:, :, 1:OLD])


def test_impossible_new_classes_leave_lwfs_distillation():
    given = step()
    logits = given.student.logits.detach().clone()
    logits[:, :, OLD:] = -1e4
    folded = distillation(new_classes_as_background(logits, OLD), given.teacher.logits, given.batch.real_frame)
    torch.testing.assert_close(
        folded.total, distillation(logits[:, :, :OLD], given.teacher.logits, given.batch.real_frame).total
    )


def test_a_task_starts_at_the_least_distillation():
    """New rows start such that nothing that the old network says has changed."""
    given = step()
    old, grown = nn.Conv2d(3, OLD, 1), nn.Conv2d(3, CLASSES, 1)
    with torch.no_grad():
        grown.weight[:OLD], grown.bias[:OLD] = old.weight, old.bias
    start_from_background(grown, task())
    pixels = torch.randn(12, 3, SIZE, SIZE)
    teacher = old(pixels).detach().view(4, 3, OLD, SIZE, SIZE)
    student = grown(pixels).detach().view(4, 3, CLASSES, SIZE, SIZE).requires_grad_()
    term = MiB().loss(replace(given, student=Prediction(student, ()), teacher=Prediction(teacher, ())))["distillation"]
    entropy = torch.special.entr(teacher.softmax(2)).sum(2)[given.batch.real_frame].mean()
    torch.testing.assert_close(term.value().detach(), 10 / OLD * entropy)
    term.value().backward()
    assert student.grad.abs().max() < 1e-6


def test_rehearsed_samples_have_true_background():
    given = step()
    given = replace(given, batch=replace(given.batch, rehearsed=torch.ones(4, dtype=torch.bool)))
    plain = cross_entropy(given.student.logits, given.batch.label, given.batch.real_frame)
    term = MiB().loss(given)["cross_entropy"]
    torch.testing.assert_close(term.total, plain.total)
    assert term.count == plain.count
    assert not open_pixels(given.batch).any()


def test_background_is_true_where_labels_of_old_classes_are_kept():
    assert hides_old_classes(task())
    assert not hides_old_classes(SEQUENTIAL)
    given = replace(step(), task=SEQUENTIAL)
    plain = cross_entropy(given.student.logits, given.batch.label, given.batch.real_frame)
    assert torch.equal(MiB().loss(given)["cross_entropy"].total, plain.total)


def test_parts_can_be_switched_off():
    given = step()
    off = MiB(kd_weight=100.0, unbiased_cross_entropy=False, unbiased_distillation=False, background_start=False)
    ours, theirs = off.loss(given), LwF().loss(given)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].total, theirs[name].total) for name in ours)
    grown = nn.Conv2d(3, CLASSES, 1)
    before = grown.weight.detach().clone()
    off.init_new_classes(grown, task())
    assert torch.equal(grown.weight, before)
    MiB().init_new_classes(grown, task())
    assert torch.equal(grown.weight[OLD], grown.weight[BACKGROUND])


def test_without_weight_it_needs_no_teacher():
    given = step()
    assert MiB().needs_teacher
    assert not MiB(kd_weight=0).needs_teacher
    terms = MiB(kd_weight=0).loss(replace(given, teacher=None))
    assert list(terms) == ["cross_entropy"]
    assert torch.equal(terms["cross_entropy"].total, MiB().loss(given)["cross_entropy"].total)
