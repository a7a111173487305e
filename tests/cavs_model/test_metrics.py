"""The measures against naive loops over pixels and classes, hand-made numbers, and scikit-learn where it has them."""

import json
import math
from statistics import fmean

import pytest
import torch
from sklearn.metrics import confusion_matrix, fbeta_score, jaccard_score

from cavs_model.metrics import (
    F_BETA_SQUARED,
    added_classes,
    backward_transfer,
    confusion,
    diagnoses,
    f_score,
    forgetting,
    frame_ious,
    frame_miou,
    frame_summary,
    frame_sums,
    iou,
    numbers,
    stream_summary,
    summary,
    task_matrix,
)
from cavs_model.types import IGNORE


def scene(classes=5, absent=(), seed=0):
    draw = torch.Generator().manual_seed(seed)
    prediction = torch.randint(classes, (2, 3, 6, 7), generator=draw)
    label = torch.randint(classes, (2, 3, 6, 7), generator=draw).to(torch.uint8)
    for class_id in absent:
        label[label == class_id] = 0
    label[torch.rand(label.shape, generator=draw) < 0.2] = IGNORE
    return prediction, label


def labelled(prediction, label):
    """The pixels that count, as (truth, prediction), which is the order of scikit-learn."""
    pairs = zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True)
    return [(true, said) for true, said in pairs if true != IGNORE]


def columns(pairs):
    return [true for true, _ in pairs], [said for _, said in pairs]


def outcomes(prediction, label, class_id):
    """Hits, false alarms and misses of a class."""
    hit = false = missed = 0
    for true, said in labelled(prediction, label):
        hit += said == class_id and true == class_id
        false += said == class_id and true != class_id
        missed += said != class_id and true == class_id
    return hit, false, missed


def naive_iou(prediction, label, class_id):
    hit, false, missed = outcomes(prediction, label, class_id)
    return hit / (hit + false + missed) if hit + missed else math.nan


def naive_f_score(prediction, label, class_id, beta_squared):
    hit, false, missed = outcomes(prediction, label, class_id)
    if not hit:
        return 0.0 if missed else math.nan
    precision, recall = hit / (hit + false), hit / (hit + missed)
    return (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)


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
    for wrong in (3, 4, 200, 254):
        with pytest.raises(ValueError, match="beyond the 3 classes"):
            confusion(torch.zeros(1, dtype=torch.int64), torch.tensor([wrong], dtype=torch.uint8), 3)


def test_confusion_takes_no_notice_of_what_is_said_where_nothing_is_labelled():
    label = torch.tensor([[IGNORE, 0], [1, IGNORE]], dtype=torch.uint8)
    assert confusion(torch.tensor([[7, 1], [0, 9]]), label, 2).tolist() == [[0, 1], [1, 0]]
    nothing = torch.zeros(0, 1, 1, dtype=torch.int64)
    assert confusion(nothing, nothing, 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("classes", [1, 2, 25, 254])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_confusion_equals_a_loop(classes, dtype):
    draw = torch.Generator().manual_seed(classes)
    prediction, label = (torch.randint(classes, (3, 1, 5, 7), generator=draw) for _ in range(2))
    label[torch.rand(label.shape, generator=draw) < 0.3] = IGNORE
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for true, said in labelled(prediction, label):
        expected[true, said] += 1
    assert torch.equal(confusion(prediction.to(dtype), label.to(torch.uint8), classes), expected)


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


@pytest.mark.parametrize("absent", [(), (3,), (0, 4)])
def test_scikit_learn_agrees_on_counts_iou_and_f_score(absent):
    prediction, label = scene(absent=absent, seed=1)
    if 0 in absent:
        label[label == 0] = 1
    counts, classes = confusion(prediction, label, 5), list(range(5))
    pairs = columns(labelled(prediction, label))
    assert counts.tolist() == confusion_matrix(*pairs, labels=classes).tolist()
    true = [class_id for class_id in classes if class_id not in absent]
    # scikit-learn gives 0 where a class is predicted and never true; here such a class has no value.
    options = {"labels": true, "average": None, "zero_division": 0}
    assert iou(counts)[true].tolist() == pytest.approx(jaccard_score(*pairs, **options).tolist())
    for beta_squared in (F_BETA_SQUARED, 1.0, 4.0):
        expected = fbeta_score(*pairs, beta=math.sqrt(beta_squared), **options)
        assert f_score(counts, beta_squared)[true].tolist() == pytest.approx(expected.tolist())
    for measure in (iou, f_score):
        assert measure(counts)[list(absent)].isnan().all()


def test_f_score_per_class():
    prediction, label = scene(absent=(3,))
    prediction[prediction == 4] = 1  # true, never predicted
    counts = confusion(prediction, label, 5)
    expected = [naive_f_score(prediction, label, class_id, 0.3) for class_id in range(5)]
    assert f_score(counts).tolist() == pytest.approx(expected, nan_ok=True)
    assert f_score(counts)[4] == 0
    # Precision 1/2, recall 1/4: the smaller beta^2, the nearer to precision.
    few = torch.tensor([[0, 1], [3, 1]])
    assert f_score(few, 0.3)[1].item() == pytest.approx(1.3 / 8 / (0.3 / 2 + 1 / 4))
    assert f_score(few, 1e-9)[1].item() == pytest.approx(1 / 2)
    assert f_score(few, 1e9)[1].item() == pytest.approx(1 / 4)


# Drift and confusion.


def test_diagnoses_against_loops_over_pixels():
    prediction, label = scene(classes=6, seed=2)
    pairs, old, new = labelled(prediction, label), {1, 2}, {3, 4, 5}

    def share(of, taken_for):
        return fmean(said in taken_for for true, said in pairs if true in of)

    ious = [naive_iou(prediction, label, class_id) for class_id in range(6)]
    scores = [naive_f_score(prediction, label, class_id, 0.3) for class_id in range(6)]
    found = diagnoses(confusion(prediction, label, 6), num_base=3)
    assert found == pytest.approx(
        {
            "miou/old_foreground": fmean(ious[1:3]),
            "f_score/all": fmean(scores),
            "f_score/foreground": fmean(scores[1:]),
            "drift/old": share(old, {0}),
            "confusion/old_as_new": share(old, new),
            "confusion/new_as_old": share(new, old),
        }
    )


def test_the_means_of_scikit_learn():
    prediction, label = scene(classes=6, seed=3)
    counts, pairs = confusion(prediction, label, 6), columns(labelled(prediction, label))
    found = summary(counts, 3) | diagnoses(counts, 3)
    groups = {"all": range(6), "old": range(3), "new": range(3, 6), "foreground": range(1, 6), "old_foreground": (1, 2)}
    for group, classes in groups.items():
        expected = jaccard_score(*pairs, labels=list(classes), average="macro")
        assert found[f"miou/{group}"] == pytest.approx(expected)
    for group in ("all", "foreground"):
        expected = fbeta_score(*pairs, beta=math.sqrt(0.3), labels=list(groups[group]), average="macro")
        assert found[f"f_score/{group}"] == pytest.approx(expected)


def test_diagnoses_of_a_matrix_made_by_hand():
    counts = torch.tensor(
        [
            [90, 5, 3, 2],  # background, of which no share is taken
            [30, 50, 10, 10],
            [0, 20, 60, 20],
            [7, 1, 2, 40],
        ]
    )
    found = diagnoses(counts, num_base=3)
    assert found["drift/old"] == pytest.approx(30 / 200)
    assert found["confusion/old_as_new"] == pytest.approx(30 / 200)
    assert found["confusion/new_as_old"] == pytest.approx(3 / 50)
    assert found["miou/old_foreground"] == pytest.approx((50 / 126 + 60 / 115) / 2)


def test_diagnoses_leave_out_what_has_no_pixel_or_no_class():
    prediction, label = scene(classes=3)
    at_base = diagnoses(confusion(prediction, label, 3), num_base=3)
    assert set(at_base) == {"miou/old_foreground", "f_score/all", "f_score/foreground", "drift/old"}
    prediction, label = scene(absent=(3, 4))
    assert "confusion/new_as_old" not in diagnoses(confusion(prediction, label, 5), num_base=3)
    assert "confusion/old_as_new" in diagnoses(confusion(prediction, label, 5), num_base=3)
    assert diagnoses(torch.zeros(5, 5, dtype=torch.int64), 3) == {}


def test_numbers_for_json():
    assert numbers(torch.tensor([0.5, math.nan, 1.0])) == [0.5, None, 1.0]
    assert json.dumps(numbers(torch.tensor([math.nan]))) == "[null]"


# Over a stream.


def stream(absent=(), ends=(3, 4, 6)):
    """Maps after every task, the classes seen growing; later tasks see the same labels and future classes are IGNORE."""
    _, label = scene(classes=ends[-1], absent=absent, seed=4)
    seen = []
    for seed, end in enumerate(ends):
        visible = label.clone()
        visible[label >= end] = IGNORE
        draw = torch.Generator().manual_seed(seed)
        wrong = torch.rand(label.shape, generator=draw) < 0.5
        prediction = torch.where(wrong, torch.randint(end, label.shape, generator=draw), visible.long() % end)
        seen.append((prediction, visible, end))
    return seen, [confusion(*each) for each in seen]


def naive_matrix(seen):
    rows = []
    for t, (prediction, label, _) in enumerate(seen):
        rows.append([math.nan] * len(seen))
        for k, classes in enumerate([(1, 2), (3,), (4, 5)][: t + 1]):
            ious = [naive_iou(prediction, label, class_id) for class_id in classes]
            known = [value for value in ious if not math.isnan(value)]
            rows[t][k] = fmean(known) if known else math.nan
    return rows


@pytest.mark.parametrize("absent", [(), (1,), (3,), (1, 2, 3)])
def test_measures_of_a_stream_against_loops(absent):
    seen, history = stream(absent)
    naive, matrix = naive_matrix(seen), task_matrix(history)
    assert matrix.shape == (3, 3)
    for found, expected in zip(matrix.tolist(), naive, strict=True):
        assert found == pytest.approx(expected, nan_ok=True)
    lost = [max(naive[t][k] for t in range(k, 2)) - naive[2][k] for k in range(2)]
    moved = [naive[2][k] - naive[k][k] for k in range(2)]
    assert forgetting(matrix).tolist() == pytest.approx(lost, nan_ok=True)
    assert backward_transfer(matrix).tolist() == pytest.approx(moved, nan_ok=True)
    expected = {"stream/average_miou": fmean(summary(counts, 3)["miou/all"] for counts in history)}
    for name, values in (("stream/forgetting", lost), ("stream/backward_transfer", moved)):
        if known := [value for value in values if not math.isnan(value)]:
            expected[name] = fmean(known)
    assert stream_summary(history) == pytest.approx(expected)


def test_the_task_matrix_of_scikit_learn():
    seen, history = stream()
    matrix = task_matrix(history)
    for t, (prediction, label, _) in enumerate(seen):
        pairs = columns(labelled(prediction, label))
        for k, classes in enumerate(added_classes(history)[: t + 1]):
            assert matrix[t, k].item() == pytest.approx(jaccard_score(*pairs, labels=list(classes), average="macro"))


def test_background_is_in_no_task_and_nothing_is_known_of_later_ones():
    _, history = stream()
    assert added_classes(history) == [range(1, 3), range(3, 4), range(4, 6)]
    matrix = task_matrix(history)
    assert matrix.isnan().tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    history[0][0, 0] += 1000  # background that is right moves no entry
    assert torch.equal(task_matrix(history).nan_to_num(), matrix.nan_to_num())


def test_forgetting_and_transfer_of_a_matrix_made_by_hand():
    unknown = math.nan
    matrix = torch.tensor(
        [
            [0.5, unknown, unknown, unknown],
            [0.75, 0.25, unknown, unknown],  # the first task was best here
            [0.25, 0.125, unknown, unknown],  # the third task has no pixel of truth, ever
            [0.375, 0.5, unknown, 1.0],
        ]
    )
    assert forgetting(matrix).tolist() == pytest.approx([0.375, -0.25, unknown], nan_ok=True)
    assert backward_transfer(matrix).tolist() == pytest.approx([-0.125, 0.25, unknown], nan_ok=True)


def test_a_stream_of_one_task_forgets_nothing():
    _, history = stream()
    assert forgetting(task_matrix(history[:1])).tolist() == backward_transfer(task_matrix(history[:1])).tolist() == []
    expected = {"stream/average_miou": summary(history[0], 3)["miou/all"]}
    assert stream_summary(history[:1]) == pytest.approx(expected)
    assert stream_summary([torch.zeros_like(counts) for counts in history]) == {}


# Over frames.


def test_frame_ious_and_their_means():
    prediction, label = scene(absent=(3,))
    prediction[0, 0][prediction[0, 0] == 3] = 0  # a frame with the class in neither map
    label[1, 2] = IGNORE
    found = frame_ious(prediction, label, 5)
    frames = list(zip(prediction.flatten(0, 1), label.flatten(0, 1), strict=True))
    means = []
    for row, (said, true) in zip(found.tolist(), frames, strict=True):
        counted = [outcomes(said, true, class_id) for class_id in range(5)]
        values = [hit / (hit + false + missed) if hit + false + missed else math.nan for hit, false, missed in counted]
        assert row == pytest.approx(values, nan_ok=True)
        if known := [value for value in values if not math.isnan(value)]:
            means.append(fmean(known))
    assert len(means) == 5
    assert found[0, 3].isnan()
    assert found[1, 3] == 0  # predicted, never true: AVSBench counts it
    assert frame_miou(prediction, label, 5) == pytest.approx(fmean(means))
    assert math.isnan(frame_miou(prediction, torch.full_like(label, IGNORE), 5))


def test_frame_miou_of_scikit_learn():
    prediction, label = scene(seed=5)
    means = []
    for said, true in zip(prediction.flatten(0, 1), label.flatten(0, 1), strict=True):
        pairs = columns(labelled(said, true))
        present = sorted({*pairs[0], *pairs[1]})
        means.append(jaccard_score(*pairs, labels=present, average="macro", zero_division=0))
    assert frame_miou(prediction, label, 5) == pytest.approx(fmean(means))


def test_means_over_frames_against_loops():
    prediction, label = scene(absent=(3,))
    prediction[prediction == 3] = 0
    label[1, 2] = IGNORE  # one frame does not count, and class 3 is nowhere
    label[0, 0][label[0, 0] == 4], prediction[0, 0][prediction[0, 0] == 4] = 0, 0  # class 4 is not in every frame
    prediction[0, 1][prediction[0, 1] == 2] = 0
    label[0, 1][label[0, 1] == 2] = 1
    prediction[0, 1, 0, 0], label[0, 1, 0, 0] = 2, 1  # class 2 is predicted there and never true
    found = frame_summary(frame_sums(prediction, label, 5))
    frames = list(zip(prediction.flatten(0, 1), label.flatten(0, 1), strict=True))
    ious, scores, of_frames = {c: [] for c in range(5)}, {c: [] for c in range(5)}, []
    for said, true in frames:
        of_frame = []
        for c in range(5):
            hit, false, missed = outcomes(said, true, c)
            if hit + false + missed:
                of_frame.append(hit / (hit + false + missed))
                ious[c].append(of_frame[-1])
                scores[c].append(naive_f_score(said, true, c, 0.3) if hit else 0.0)
        if of_frame:
            of_frames.append(fmean(of_frame))
    assert [len(ious[c]) for c in range(5)] == [5, 5, 5, 0, 4]
    expected = {"frame/miou/mean_of_frames": fmean(of_frames)}
    for name, values in (("miou", ious), ("f_score", scores)):
        means = [fmean(values[c]) for c in (0, 1, 2, 4)]
        expected[f"frame/{name}/all"] = fmean(means)
        expected[f"frame/{name}/foreground"] = fmean(means[1:])
        expected[f"frame/{name}/all_zero_absent"] = sum(means) / 5
    assert found == pytest.approx(expected, abs=1e-8)
    assert found["frame/miou/mean_of_frames"] == pytest.approx(frame_miou(prediction, label, 5), abs=1e-8)
    assert found["frame/miou/all"] == pytest.approx(frame_ious(prediction, label, 5).nanmean(0).nanmean().item(), abs=1e-8)


def test_sums_over_frames_add_up_and_nothing_labelled_is_nothing():
    prediction, label = scene()
    parts = [frame_sums(prediction[n], label[n], 5) for n in range(2)]
    assert torch.equal(parts[0] + parts[1], frame_sums(prediction, label, 5))
    assert frame_summary(frame_sums(prediction, torch.full_like(label, IGNORE), 5)) == {}
    assert not frame_sums(prediction[:0], label[:0], 5).any()
    with pytest.raises(ValueError, match="beyond the 3 classes"):
        frame_sums(prediction % 3, label, 3)
