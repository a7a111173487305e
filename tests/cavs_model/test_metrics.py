"""The measures against naive loops over pixels and classes."""

import math

import pytest
import torch

from cavs_model.metrics import confusion, iou, summary
from cavs_model.types import IGNORE


def scene(classes=5, absent=(), seed=0):
    draw = torch.Generator().manual_seed(seed)
    prediction = torch.randint(classes, (2, 3, 6, 7), generator=draw)
    label = torch.randint(classes, (2, 3, 6, 7), generator=draw).to(torch.uint8)
    for class_id in absent:
        label[label == class_id] = 0
    label[torch.rand(label.shape, generator=draw) < 0.2] = IGNORE
    return prediction, label


def naive_iou(prediction, label, class_id):
    hit = false = missed = 0
    for said, true in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
        if true != IGNORE:
            hit += said == class_id and true == class_id
            false += said == class_id and true != class_id
            missed += said != class_id and true == class_id
    return hit / (hit + false + missed) if hit + missed else math.nan


def test_confusion_counts_pairs_of_labelled_pixels():
    prediction, label = scene()
    counts = confusion(prediction, label, 5)
    assert counts.dtype == torch.int64
    assert counts.sum() == (label != IGNORE).sum()
    for true in range(5):
        for said in range(5):
            assert counts[true, said] == ((label == true) & (prediction == said)).sum()
    assert torch.equal(counts, confusion(prediction[:1], label[:1], 5) + confusion(prediction[1:], label[1:], 5))


def test_confusion_accepts_uint8_and_nothing_labelled():
    prediction, label = scene()
    assert torch.equal(confusion(prediction.to(torch.uint8), label, 5), confusion(prediction, label, 5))
    assert not confusion(prediction, torch.full_like(label, IGNORE), 5).any()


def test_confusion_refuses_labels_beyond_the_classes():
    prediction, label = scene()
    with pytest.raises(ValueError, match="beyond the 3 classes"):
        confusion(prediction % 3, label, 3)


def test_iou_per_class():
    prediction, label = scene(absent=(3,))
    ious = iou(confusion(prediction, label, 5)).tolist()
    assert ious == pytest.approx([naive_iou(prediction, label, class_id) for class_id in range(5)], nan_ok=True)
    assert math.isnan(ious[3])  # predicted, never true: skipped


def test_summary_means_over_groups():
    prediction, label = scene(absent=(3,))
    values = [naive_iou(prediction, label, class_id) for class_id in range(5)]
    means = summary(confusion(prediction, label, 5), num_base=3)
    assert means == pytest.approx(
        {
            "miou/all": (values[0] + values[1] + values[2] + values[4]) / 4,
            "miou/old": (values[0] + values[1] + values[2]) / 3,
            "miou/new": values[4],
            "miou/foreground": (values[1] + values[2] + values[4]) / 3,
            "miou/all_zero_absent": (values[0] + values[1] + values[2] + values[4]) / 5,
        }
    )


def test_summary_leaves_out_groups_without_classes():
    prediction, label = scene()
    assert "miou/new" not in summary(confusion(prediction, label, 5), num_base=5)
    prediction, label = scene(absent=(3, 4))
    assert "miou/new" not in summary(confusion(prediction, label, 5), num_base=3)
    assert summary(torch.zeros(5, 5, dtype=torch.int64), 3) == {"miou/all_zero_absent": 0.0}


def test_perfect_prediction_scores_one():
    _, label = scene()
    means = summary(confusion(label.long().clamp(max=4), label, 5), 3)
    assert set(means.values()) == {1.0}
