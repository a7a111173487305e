"""Each loss against a naive loop over pixels or windows, and under splits of the batch."""

import math

import pytest
import torch
from method_cases import CLASSES, batch, prediction

from cavs_model.losses import cross_entropy, distillation, local_pod
from cavs_model.types import IGNORE


def naive_cross_entropy(logits, label, real_frame, weight):
    total, count = 0.0, 0
    for b, t, y, x in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        if real_frame[b, t] and label[b, t, y, x] != IGNORE:
            scores = logits[b, t, :, y, x].double()
            total += float(weight[b, t]) * float(scores.exp().sum().log() - scores[int(label[b, t, y, x])])
            count += 1
    return total, count


def test_cross_entropy_is_the_sum_over_labelled_pixels_of_real_frames():
    given, logits = batch(), prediction(4, 3, CLASSES, 1).logits
    given.label[1, -1] = 4  # padding counts for nothing, whatever its label
    ones, weight = torch.ones(4, 3), torch.rand(4, 3)
    for weights, argument in ((ones, None), (ones, ones), (weight, weight)):
        loss = cross_entropy(logits, given.label, given.real_frame, argument)
        total, count = naive_cross_entropy(logits, given.label, given.real_frame, weights)
        assert loss.count == count
        assert float(loss.total) == pytest.approx(total, rel=1e-5)


def test_cross_entropy_without_any_label_is_a_zero_with_a_gradient():
    given, logits = batch(), prediction(4, 3, CLASSES, 1, grad=True).logits
    loss = cross_entropy(logits, torch.full_like(given.label, IGNORE), given.real_frame)
    loss.total.backward()
    assert loss.count == 0
    assert float(loss.total.detach()) == 0
    assert not logits.grad.any()


def test_cross_entropy_is_computed_in_fp32_under_autocast():
    given, logits = batch(), prediction(4, 3, CLASSES, 1).logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(logits, given.label, given.real_frame)
    assert loss.total.dtype == torch.float32
    assert float(loss.total) == pytest.approx(float(cross_entropy(logits.float(), given.label, given.real_frame).total))


def test_distillation_is_the_mean_over_pixels_divided_by_the_classes():
    given = batch()
    student, teacher = prediction(4, 3, CLASSES, 1).logits, 3 * prediction(4, 3, CLASSES, 2).logits
    total, pixels = 0.0, 0
    for b, t in given.real_frame.nonzero().tolist():
        for y, x in torch.cartesian_prod(*map(torch.arange, student.shape[-2:])).tolist():
            q, p = teacher[b, t, :, y, x].double().softmax(0), student[b, t, :, y, x].double().softmax(0)
            total -= float((q * p.log()).sum()) / CLASSES
            pixels += 1
    loss = distillation(student, teacher, given.real_frame)
    assert loss.count == pixels
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


def test_distillation_is_least_where_both_say_the_same():
    given = batch()
    teacher = prediction(4, 3, CLASSES, 2).logits.requires_grad_()
    student = (teacher.detach() + 5.0).requires_grad_()  # the same softmax
    least = distillation(student, teacher, given.real_frame)
    least.total.backward()
    assert student.grad.abs().max() < 1e-6
    assert teacher.grad is None
    entropy = torch.special.entr(teacher.detach().softmax(2)).sum(2)[given.real_frame].mean() / CLASSES
    torch.testing.assert_close(least.value().detach(), entropy)
    for seed in range(5):
        other = student.detach() + 0.1 * prediction(4, 3, CLASSES, seed).logits
        assert distillation(other, teacher, given.real_frame).total > least.total


def test_distillation_gives_padding_no_gradient_and_names_shapes_that_differ():
    student, teacher = torch.randn(1, 2, 4, 8, 8, requires_grad=True), torch.randn(1, 2, 4, 8, 8)
    loss = distillation(student, teacher, torch.tensor([[True, False]]))
    loss.total.backward()
    assert loss.count == 64
    assert student.grad[0, 0].any()
    assert not student.grad[0, 1].any()
    with pytest.raises(ValueError, match="one shape"):
        distillation(student, teacher[:, :, :3], torch.tensor([[True, False]]))


def naive_local_pod(student, teacher, scales):
    """The norm for one frame [D h w]."""
    height, width = student.shape[1:]
    squares = 0.0
    for scale in scales:
        tall, wide = height // scale, width // scale
        for i in range(scale):
            for j in range(scale):
                ours, theirs = (
                    each.double()[:, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide] ** 2 for each in (student, teacher)
                )
                squares += float(((ours.mean(2) - theirs.mean(2)) ** 2).sum() + ((ours.mean(1) - theirs.mean(1)) ** 2).sum())
    return math.sqrt(squares)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (7, 7), (14, 14), (4, 5)])
@pytest.mark.parametrize("scales", [(1, 2, 4), (1,), (1, 3), (2, 4)])
def test_local_pod_is_the_norm_over_windows(height, width, scales):
    student, teacher = torch.randn(2, 3, 4, height, width), torch.randn(2, 3, 4, height, width)
    real = torch.tensor([[True, True, True], [True, False, True]])
    loss = local_pod(student, teacher, real, scales)
    expected = sum(naive_local_pod(student[b, t], teacher[b, t], scales) for b, t in real.nonzero().tolist())
    assert loss.count == 5
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


def plain_local_pod(student, teacher, real, scales):
    """The total by autograd through every window."""
    difference = (student.double() ** 2 - teacher.double() ** 2).flatten(0, 1)
    squares = torch.zeros(len(difference), dtype=torch.float64)
    height, width = difference.shape[2:]
    for scale in scales:
        for band in difference.unfold(2, height // scale, height // scale).unbind(2):  # [N D w h/s]
            for window in band.unfold(2, width // scale, width // scale).unbind(2):
                squares = squares + window.mean(2).square().sum((1, 2)) + window.mean(3).square().sum((1, 2))
    return squares.sqrt()[real.flatten()].sum()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width", "scales"), [(8, 12, (1, 2, 4)), (16, 16, (1, 4)), (7, 6, (1,)), (6, 6, (2, 3))])
def test_local_pod_by_hand_has_the_gradient_of_the_plain_form(height, width, scales, layout):
    ours, teacher = (torch.randn(6, 4, height, width).contiguous(memory_format=layout) for _ in range(2))
    real = torch.tensor([[True, True, True], [True, False, True]])
    found, expected = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    total = local_pod(found.view(2, 3, 4, height, width), teacher.view(2, 3, 4, height, width), real, scales).total
    (total * 3).backward()
    plain = plain_local_pod(expected.view(2, 3, 4, height, width), teacher.view(2, 3, 4, height, width), real, scales)
    (plain * 3).backward()
    torch.testing.assert_close(total, plain.float())
    torch.testing.assert_close(found.grad, expected.grad)


def test_local_pod_gives_a_bf16_map_a_bf16_gradient():
    student = torch.randn(1, 2, 4, 8, 8).bfloat16().requires_grad_()
    teacher, real = torch.randn(1, 2, 4, 8, 8).bfloat16(), torch.ones(1, 2, dtype=torch.bool)
    wide = student.detach().float().requires_grad_()
    local_pod(student, teacher, real).total.backward()
    local_pod(wide, teacher, real).total.backward()
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad, wide.grad.bfloat16())


def test_local_pod_leaves_out_scales_finer_than_the_map():
    student, teacher = torch.randn(1, 2, 4, 3, 2), torch.randn(1, 2, 4, 3, 2)
    real = torch.ones(1, 2, dtype=torch.bool)
    assert local_pod(student, teacher, real).total == local_pod(student, teacher, real, (1, 2)).total


def test_local_pod_of_equal_maps_is_zero_with_zero_gradient():
    student = torch.randn(1, 2, 4, 8, 8, requires_grad=True)
    loss = local_pod(student, student.detach().clone(), torch.ones(1, 2, dtype=torch.bool))
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert not student.grad.any()


def test_local_pod_gives_padding_and_the_teacher_no_gradient():
    student, teacher = torch.randn(1, 2, 4, 8, 8, requires_grad=True), torch.randn(1, 2, 4, 8, 8, requires_grad=True)
    local_pod(student, teacher, torch.tensor([[True, False]])).total.backward()
    assert student.grad[0, 0].any()
    assert not student.grad[0, 1].any()
    assert teacher.grad is None


def test_local_pod_stays_in_fp32_under_autocast():
    student, teacher = torch.randn(1, 2, 4, 8, 8), torch.randn(1, 2, 4, 8, 8)
    real = torch.ones(1, 2, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = local_pod(student, teacher, real)
    assert torch.equal(loss.total, local_pod(student, teacher, real).total)


def test_local_pod_names_shapes_that_differ():
    real = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        local_pod(torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 2, 4, 8, 7), real)
