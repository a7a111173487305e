"""ILT's equations against loops, and its limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import step

from cavs_model.methods.finetune import Finetune
from cavs_model.methods.ilt import ILT, squared_distance
from cavs_model.methods.lwf import LwF


def test_encoder_term_is_the_mean_over_elements_and_maps():
    given = step()
    per_map = []
    for ours, theirs in zip(given.student.encoder, given.teacher.encoder, strict=True):
        frames = given.batch.real_frame.nonzero().tolist()
        squares = [(ours[b, t] - theirs[b, t]).detach().double().numpy() ** 2 for b, t in frames]
        per_map.append(np.concatenate([each.ravel() for each in squares]).mean())
    term = ILT().loss(given)["encoder_features"]
    assert len(per_map) == 4
    assert float(term.value().detach()) == pytest.approx(100 * np.mean(per_map), rel=1e-5)
    assert term.count == given.batch.real_frame.sum()


def test_every_map_counts_alike_whatever_its_size():
    real = torch.ones(1, 1, dtype=torch.bool)
    maps = [torch.zeros(1, 1, 5, 8, 8), torch.zeros(1, 1, 2, 1, 1)]
    for changed in (0, 1):
        others = [each + (2.0 if position == changed else 0.0) for position, each in enumerate(maps)]
        assert float(squared_distance(others, maps, real).value()) == pytest.approx(4 / 2)


def test_equal_maps_have_no_distance_and_no_gradient():
    given = step()
    maps = [each.detach().clone().requires_grad_() for each in given.teacher.encoder]
    term = squared_distance(maps, given.teacher.encoder, given.batch.real_frame)
    term.total.backward()
    assert float(term.total.detach()) == 0
    assert not any(each.grad.any() for each in maps)


def test_without_the_encoder_it_is_lwf_and_without_both_fine_tuning():
    given = step()
    for method, other in ((ILT(encoder_weight=0), LwF()), (ILT(kd_weight=0, encoder_weight=0), Finetune())):
        ours, theirs = method.loss(given), other.loss(given)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name].total, theirs[name].total) for name in ours)
        assert method.needs_teacher is other.needs_teacher
    assert list(ILT(kd_weight=0).loss(given)) == ["cross_entropy", "encoder_features"]
    assert ILT(kd_weight=0).needs_teacher


def test_maps_that_do_not_fit_are_named():
    given = step()
    for teacher, student in (((), ()), (given.teacher.encoder[:3], given.student.encoder)):
        wrong = replace(given, teacher=replace(given.teacher, encoder=teacher), student=replace(given.student, encoder=student))
        with pytest.raises(ValueError, match="encoder maps of the same shapes"):
            ILT().loss(wrong)
