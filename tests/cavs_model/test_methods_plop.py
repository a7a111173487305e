"""PLOP's equations against loops and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, SIZE, batch, step, task
from torch import nn

from cavs_model.losses import cross_entropy, local_pod
from cavs_model.methods.plop import (
    ENTROPY_BINS,
    PLOP,
    as_old_logits,
    median_entropies,
    opinion,
    pseudo_labelled,
)
from cavs_model.types import IGNORE, Prediction

THRESHOLDS = torch.tensor([0.5, 0.6, 0.3, 0.7])


def ready(method=None, **changes):
    return replace(step(), prepared=THRESHOLDS, **changes), method or PLOP()


def test_start_shares_the_backgrounds_probability():
    features = torch.randn(2, 3, 5, 5)
    old = nn.Conv2d(3, OLD, 1)
    grown = nn.Conv2d(3, CLASSES, 1)
    with torch.no_grad():
        grown.weight[:OLD], grown.bias[:OLD] = old.weight, old.bias
    PLOP().init_new_classes(grown, task())
    before, after = old(features).softmax(1), grown(features).softmax(1)
    torch.testing.assert_close(after[:, 0] + after[:, OLD:].sum(1), before[:, 0])
    torch.testing.assert_close(after[:, 1:OLD], before[:, 1:])
    torch.testing.assert_close(after[:, 0], after[:, OLD])
    with pytest.raises(ValueError, match="bias"):
        PLOP().init_new_classes(nn.Conv2d(3, CLASSES, 1, bias=False), task())


def test_start_can_be_left_out():
    grown = nn.Conv2d(3, CLASSES, 1)
    before = grown.weight.detach().clone()
    PLOP(background_start=False).init_new_classes(grown, task())
    assert torch.equal(grown.weight, before)


def test_the_folded_logits_have_the_gradient_of_slices_and_sums():
    logits, wanted = torch.randn(2, 3, CLASSES, 4, 4, requires_grad=True), torch.randn(2, 3, OLD, 4, 4)
    plain = logits.detach().clone().requires_grad_()
    background = plain[:, :, :1] + plain[:, :, OLD:].sum(2, keepdim=True)
    folded = torch.cat([background, plain[:, :, 1:OLD]], dim=2)
    assert torch.equal(as_old_logits(logits, OLD), folded)
    (as_old_logits(logits, OLD) * wanted).sum().backward()
    (folded * wanted).sum().backward()
    assert torch.equal(logits.grad, plain.grad)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 80.0])
def test_the_entropy_is_the_sum_of_its_terms_at_any_spread(spread):
    logits = spread * torch.randn(2, 3, OLD, 8, 8) + 5.0
    classes, entropy = opinion(logits)
    expected = torch.special.entr(logits.double().softmax(2)).sum(2) / math.log(OLD)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=3e-7)
    assert torch.equal(classes, logits.argmax(2))


def test_new_logits_are_added_to_the_background():
    logits = torch.randn(2, 3, CLASSES, 4, 4)
    folded = as_old_logits(logits, OLD)
    assert folded.shape == (2, 3, OLD, 4, 4)
    torch.testing.assert_close(folded[:, :, 0], logits[:, :, 0] + logits[:, :, 4] + logits[:, :, 5])
    assert torch.equal(folded[:, :, 1:], logits[:, :, 1:4])


def test_entropy_is_normalised():
    flat, sure = torch.zeros(1, 1, OLD, 1, 1), torch.zeros(1, 1, OLD, 1, 1)
    sure[:, :, 2] = 500.0
    assert float(opinion(flat)[1]) == pytest.approx(1.0)
    assert float(opinion(sure)[1]) == 0.0
    assert int(opinion(sure)[0]) == 2
    logits = torch.randn(1, 1, OLD, 1, 1)
    q = logits.flatten().double().softmax(0)
    assert float(opinion(logits)[1]) == pytest.approx(float(-(q * q.log()).sum() / math.log(OLD)), rel=1e-5)


def naive_labels(given, thresholds):
    """Label, certain and open pixels, one pixel at a time."""
    label = given.batch.label.clone()
    certain, open_ = torch.zeros(label.shape[:2]), torch.zeros(label.shape[:2])
    for b, t, y, x in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        if label[b, t, y, x] != 0 or given.batch.rehearsed[b] or not given.batch.real_frame[b, t]:
            continue
        q = given.teacher.logits[b, t, :, y, x].double().softmax(0)
        best = int(q.argmax())
        sure = float(-(q * q.log()).sum()) / math.log(len(q)) < float(thresholds[best])
        label[b, t, y, x] = best if sure else IGNORE
        open_[b, t] += 1
        certain[b, t] += sure
    return label, torch.where(open_ > 0, certain / open_.clamp(min=1), 1.0)


def test_pseudo_labels_and_adaptive_factor():
    given, _ = ready()
    given.batch.label[0, 0] = 4  # a frame without background
    label, share = pseudo_labelled(given.batch, given.teacher.logits, THRESHOLDS)
    expected, expected_share = naive_labels(given, THRESHOLDS)
    assert torch.equal(label, expected)
    torch.testing.assert_close(share, expected_share)
    assert share[0, 0] == 1
    assert 0 < float(share.min()) < 1


def test_old_truth_and_rehearsed_samples_are_not_touched():
    given, _ = ready()
    given.batch.label[0, 0, 0] = 2  # old truth in new data: the sequential filter
    label, share = pseudo_labelled(given.batch, given.teacher.logits, torch.zeros(OLD))
    assert (label[0, 0, 0] == 2).all()
    assert torch.equal(label[3], given.batch.label[3])
    assert (share[3] == 1).all()
    assert not (label[:3] == 0).any()  # threshold 0: nothing is certain


def test_cross_entropy_term_weighs_frames_and_counts_labelled_pixels():
    given, method = ready()
    label, share = naive_labels(given, THRESHOLDS)
    term = method.loss(given)["cross_entropy"]
    total = 0.0
    for b in range(4):
        for t in range(3):
            one = cross_entropy(
                given.student.logits[b : b + 1, t : t + 1],
                label[b : b + 1, t : t + 1],
                given.batch.real_frame[b : b + 1, t : t + 1],
            )
            total += float(share[b, t]) * float(one.total.detach())
    assert float(term.total.detach()) == pytest.approx(total, rel=1e-5)
    assert term.count == int(((label != IGNORE) & given.batch.real_frame[:, :, None, None]).sum())
    unweighted = PLOP(adaptive_factor=False).loss(given)["cross_entropy"]
    torch.testing.assert_close(unweighted.total, cross_entropy(given.student.logits, label, given.batch.real_frame).total)


def test_pod_terms_are_means_over_maps_with_their_weights():
    given, method = ready()
    real, share = given.batch.real_frame, 1 / 6
    terms = method.loss(given)
    features = sum(
        float(local_pod(ours.detach(), theirs, real).value())
        for ours, theirs in zip(given.student.features, given.teacher.features, strict=True)
    )
    logits = float(local_pod(as_old_logits(given.student.logits.detach(), OLD), given.teacher.logits, real).value())
    assert float(terms["pod_features"].value().detach()) == pytest.approx(0.01 * share * features, rel=1e-5)
    assert float(terms["pod_logits"].value().detach()) == pytest.approx(0.0005 * share * logits, rel=1e-5)


def test_pod_can_take_the_encoders_maps_and_the_decoders():
    given, _ = ready()
    terms = PLOP(pod_maps="encoder").loss(given)
    pairs = [*zip(given.student.encoder, given.teacher.encoder, strict=True)]
    pairs += [(given.student.features[-1], given.teacher.features[-1])]
    total = sum(float(local_pod(ours.detach(), theirs, given.batch.real_frame).value()) for ours, theirs in pairs)
    assert float(terms["pod_features"].value().detach()) == pytest.approx(0.01 / 6 * total, rel=1e-5)
    plain = PLOP().loss(given)
    assert torch.equal(terms["pod_logits"].total, plain["pod_logits"].total)
    blind = replace(given, student=replace(given.student, encoder=()), teacher=replace(given.teacher, encoder=()))
    assert torch.equal(PLOP().loss(blind)["pod_features"].total, plain["pod_features"].total)
    with pytest.raises(ValueError, match="encoder maps"):
        PLOP(pod_maps="encoder").loss(blind)


def test_schedule_multiplies_the_pod_terms():
    given, method = ready()
    plain, scheduled = method.loss(given), PLOP(pod_schedule=True).loss(given)
    for name, factor in {
        "pod_features": math.sqrt(CLASSES / 2),
        "pod_logits": math.sqrt(CLASSES / 2),
        "cross_entropy": 1,
    }.items():
        torch.testing.assert_close(scheduled[name].total, factor * plain[name].total)


def test_parts_can_be_switched_off():
    given, _ = ready()
    plain = PLOP(pod_weight=0, pod_logits_weight=0, pseudo_labels=False)
    terms = plain.loss(replace(given, prepared=plain.prepare(None, iter(()), task(), None)))
    assert list(terms) == ["cross_entropy"]
    expected = cross_entropy(given.student.logits, given.batch.label, given.batch.real_frame)
    assert torch.equal(terms["cross_entropy"].total, expected.total)


def entropies_by_class(teacher, batches):
    found = [[] for _ in range(OLD)]
    for given in batches:
        classes, entropy = opinion(teacher(given).logits)
        inside = (given.label == 0) & given.real_frame[:, :, None, None]
        for class_id in range(OLD):
            found[class_id] += entropy[inside & (classes == class_id)].tolist()
    return found


def noisy_teacher(given):
    draw = torch.Generator().manual_seed(int(given.label.long().sum()))
    logits = torch.randn(*given.label.shape[:2], OLD, SIZE, SIZE, generator=draw) * torch.tensor([4.0, 2, 1, 1]).view(-1, 1, 1)
    logits[:, :, 3] = -9  # a class that the teacher never says
    return Prediction(logits, ())


def test_thresholds_are_medians():
    batches = [batch(seed=seed) for seed in range(6)]
    found = entropies_by_class(noisy_teacher, batches)
    medians = median_entropies(noisy_teacher, iter(batches), task(), lambda tensor: tensor)
    bound = 0.5 / ENTROPY_BINS + 1e-7
    for class_id in range(3):
        assert len(found[class_id]) > 50
        assert abs(float(medians[class_id]) - float(torch.tensor(found[class_id]).median())) <= bound
        if len(found[class_id]) % 2:
            assert abs(float(medians[class_id]) - float(np.median(found[class_id]))) <= bound
    assert medians[3] == 0
    thresholds = PLOP(entropy_floor=0.2).prepare(noisy_teacher, iter(batches), task(), lambda tensor: tensor)
    torch.testing.assert_close(thresholds, medians.clamp(min=0.2))
    assert thresholds[3] == np.float32(0.2)


def test_medians_are_values_not_sums_of_bin_indices():
    """Half of the pixels at entropy a, a quarter each below and above: the median is a."""
    values = torch.tensor([0.1, 0.5, 0.5, 0.9])
    sharpness = []
    for value in values.tolist():  # two-class-like logits with a given entropy, by bisection
        low, high = 0.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            q = torch.tensor([middle, 0, 0, 0], dtype=torch.float64).softmax(0)
            low, high = (middle, high) if float(-(q * q.log()).sum()) / math.log(OLD) > value else (low, middle)
        sharpness.append(low)
    given = batch(clips=1, frames=1)
    given.label[:] = IGNORE
    given.label[0, 0, 0, :4] = 0
    logits = torch.zeros(1, 1, OLD, SIZE, SIZE)
    logits[0, 0, 0, 0, :4] = torch.tensor(sharpness)
    medians = median_entropies(lambda _: Prediction(logits, ()), iter([given]), task(), lambda tensor: tensor)
    assert float(medians[0]) == pytest.approx(0.5, abs=1e-4)


def test_medians_do_not_depend_on_the_number_of_workers():
    batches = [batch(seed=seed) for seed in range(4)]
    whole = median_entropies(noisy_teacher, iter(batches), task(), lambda tensor: tensor)
    parts = []

    def collect(tensor):
        parts.append(tensor)
        return tensor

    for share in (batches[:1], batches[1:], []):  # the third worker has no data
        median_entropies(noisy_teacher, iter(share), task(), collect)
    assert torch.equal(median_entropies(noisy_teacher, iter(()), task(), lambda _: sum(parts)), whole)


def test_wrong_thresholds_are_refused():
    given, _ = ready()
    with pytest.raises(ValueError, match="one threshold per old class"):
        pseudo_labelled(given.batch, given.teacher.logits, torch.zeros(3))
