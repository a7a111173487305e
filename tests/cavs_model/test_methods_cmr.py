"""CMR's selection and resampling against loops over pixels and closed forms."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, SIZE, base_task, batch, part, prediction, step, task

from cavs_model.methods.cmr import CMR, as_new_data, collision_pairs
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.plop import PLOP
from cavs_model.types import AUDIO_VISUAL, IGNORE, VISUAL_ONLY, Memory, Row, Sample, ScoreTable

THRESHOLDS = torch.tensor([0.5, 0.6, 0.3, 0.7])


def network(classes, seed):
    """A network whose answer for a clip depends on its name only, not on the batch it comes in."""

    def run(given):
        every = [prediction(1, given.label.shape[1], classes, seed + sum(map(ord, each))) for each in given.sample_id]
        return replace(every[0], logits=torch.cat([each.logits for each in every]), features=())

    return run


def rng(seed=0):
    return np.random.default_rng(seed)


def table(**columns):
    length = len(next(iter(columns.values())))
    return ScoreTable(
        tuple(f"v{index}" for index in range(length)), {name: tuple(map(float, c)) for name, c in columns.items()}
    )


def collisions(*pairs):
    """A table with one video per (old, new, share)."""
    old, new, share = zip(*pairs, strict=True)
    return table(old_class=old, new_class=new, pixels=[100] * len(pairs), share=share)


def memory(**stored):
    """memory(c1=5) holds five rows of class 1."""
    return Memory({int(name[1:]): tuple(Row(f"{name}-{i}", int(name[1:])) for i in range(n)) for name, n in stored.items()})


# What is needed when.


def test_asks_only_for_what_it_reads():
    assert CMR().networks == (AUDIO_VISUAL, VISUAL_ONLY)
    assert CMR().scores_before
    assert CMR().scores_after
    assert CMR().remembers
    assert CMR(selection="random").networks == (AUDIO_VISUAL,)
    assert not CMR(selection="random").scores_after
    assert CMR(selection="mixed").scores_after
    for off in (CMR(resampling="off"), CMR(resampling_ratio=0), CMR(resample_by="uniform")):
        assert not off.scores_before


# Training.


def test_kept_truth_trains_as_the_base_and_overwritten_truth_as_new_data():
    given = replace(step(), prepared=THRESHOLDS)
    assert ((given.batch.label[3] > 0) & (given.batch.label[3] < OLD)).any()
    kept, overwritten = CMR().loss(given), CMR(memory_truth="overwritten").loss(given)
    assert torch.equal(kept["cross_entropy"].total, PLOP().loss(given)["cross_entropy"].total)
    hidden = given.batch.label.clone()
    hidden[3][(hidden[3] > 0) & (hidden[3] < OLD)] = 0
    as_new = replace(given, batch=replace(given.batch, label=hidden, rehearsed=torch.zeros(4, dtype=torch.bool)))
    assert torch.equal(overwritten["cross_entropy"].total, PLOP().loss(as_new)["cross_entropy"].total)
    assert not torch.equal(overwritten["cross_entropy"].total, kept["cross_entropy"].total)


def test_overwriting_spares_new_data_new_classes_and_ignored_pixels():
    given = step().batch
    given.label[0, 0, 0] = 2
    changed = as_new_data(given, task())
    assert torch.equal(changed.label[:3], given.label[:3])
    assert torch.equal(changed.label == 4, given.label == 4)
    assert torch.equal(changed.label == IGNORE, given.label == IGNORE)
    assert not ((changed.label[3] > 0) & (changed.label[3] < OLD)).any()
    assert not changed.rehearsed.any()


def test_any_base_will_do():
    given = step()
    assert list(CMR(base=Finetune()).loss(given)) == ["cross_entropy"]


# CSR: scores.


def naive_collision(given, said, clip):
    pairs = Counter()
    for t in range(given.label.shape[1]):
        if given.real_frame[clip, t] and given.labelled_frame[clip, t]:
            for y in range(SIZE):
                for x in range(SIZE):
                    true, guess = int(given.label[clip, t, y, x]), int(said[clip, t, y, x])
                    if true in range(OLD, CLASSES) and guess != 0:
                        pairs[guess, true] += 1
    if not pairs:
        return 0, 0, 0, 0.0
    (old, new), pixels = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    return old, new, pixels, pixels / sum(pairs.values())


def test_collisions_of_a_batch_are_those_of_each_pixel():
    given, old = batch(), network(OLD, 5)
    given.label[0][given.label[0] >= OLD] = 0  # a clip without new classes
    given.label[1, -1] = 4  # padding counts for nothing, whatever its label
    given.label[1, 0, :4] = 2  # old truth (sequential filter) is no collision
    scores = CMR().score_before({AUDIO_VISUAL: old}, given, task())
    assert scores.sample_ids == given.sample_id
    said = old(given).logits.argmax(2)
    for clip, sample_id in enumerate(given.sample_id):
        assert tuple(scores.row(sample_id).values()) == pytest.approx(naive_collision(given, said, clip))
    assert scores.row("clip-0") == {"old_class": 0, "new_class": 0, "pixels": 0, "share": 0}


def test_scores_do_not_depend_on_the_batch():
    given = step().batch
    models = {AUDIO_VISUAL: network(CLASSES, 5), VISUAL_ONLY: network(CLASSES, 6)}
    old = {AUDIO_VISUAL: network(OLD, 5)}
    pieces = [part(replace(step(), batch=given), clips).batch for clips in (slice(0, 1), slice(1, 4))]
    method = CMR()
    assert ScoreTable.concatenate([method.score_before(old, each, task()) for each in pieces]) == method.score_before(
        old, given, task()
    )
    assert ScoreTable.concatenate([method.score_after(models, each, task()) for each in pieces]) == method.score_after(
        models, given, task()
    )


def test_a_collision_needs_more_than_its_share():
    scores = collisions((1, 4, 0.9), (1, 4, 0.8), (2, 4, 0.7), (3, 5, 0.71), (0, 0, 0.0))
    assert collision_pairs(scores, 0.7) == {(1, 4): 2, (3, 5): 1}
    assert collision_pairs(scores, 0.0) == {(1, 4): 2, (2, 4): 1, (3, 5): 1}
    none = table(old_class=[0], new_class=[0], pixels=[0], share=[0])
    assert collision_pairs(none, 0.0) == {}


# CSR: resampling.


def test_frequencies_are_sigmoids_of_normalised_counts():
    counts = np.array([6, 3, 0])
    sigmoid = [1 / (1 + math.exp(-value)) for value in ((6 - 3) / math.sqrt(6), 0.0, -3 / math.sqrt(6))]
    assert CMR().frequencies(counts) == pytest.approx(sigmoid)
    by_max = [1 / (1 + math.exp(-value)) for value in (1.0, 0.5, 0.0)]
    assert CMR(collision_normalisation="max").frequencies(counts) == pytest.approx(by_max)
    raw = [1 / (1 + math.exp(-value)) for value in counts.tolist()]
    assert CMR(collision_normalisation="none").frequencies(counts) == pytest.approx(raw)
    for normalisation in ("zscore", "max", "none"):
        alike = CMR(collision_normalisation=normalisation).frequencies(np.zeros(3, dtype=int))
        assert alike == pytest.approx([0.5] * 3)


def test_resampling_adds_rows_by_frequency():
    held, scores = memory(c1=50, c2=50, c3=50), collisions(*[(1, 4, 0.9)] * 6, *[(2, 5, 0.8)] * 3)
    found = CMR(resampling_ratio=1.0).rehearse(scores, held, task(), rng())
    assert found.rows == held.rows + found.drawn
    assert len(found.drawn) == 150
    frequency = CMR().frequencies(np.array([6, 3, 0]))
    assert [each["collisions"] for each in found.table] == [6, 3, 0]
    assert [each["frequency"] for each in found.table] == pytest.approx(frequency.tolist())
    assert [each["probability"] for each in found.table] == pytest.approx((frequency / frequency.sum()).tolist())
    assert [each["drawn"] for each in found.table] == [sum(row.class_id == c for row in found.drawn) for c in (1, 2, 3)]
    assert [each["stored"] for each in found.table] == [50, 50, 50]
    assert found.pairs == ({"old_class": 1, "new_class": 4, "videos": 6}, {"old_class": 2, "new_class": 5, "videos": 3})


def test_draws_follow_the_probabilities_and_are_uniform_over_rows():
    held, scores = memory(c1=5, c2=5, c3=5), collisions(*[(1, 4, 0.9)] * 6, *[(2, 5, 0.8)] * 3)
    rows = [row for seed in range(400) for row in CMR(resampling_ratio=1.0).rehearse(scores, held, task(), rng(seed)).drawn]
    expected = CMR().frequencies(np.array([6, 3, 0]))
    shares = [sum(row.class_id == c for row in rows) / len(rows) for c in (1, 2, 3)]
    assert shares == pytest.approx((expected / expected.sum()).tolist(), abs=0.025)
    counts = Counter(row.sample_id for row in rows if row.class_id == 1)
    assert len(counts) == 5
    assert min(counts.values()) / max(counts.values()) > 0.8


def test_rehearsal_is_determined_by_its_rng():
    held, scores = memory(c1=5, c2=5, c3=5), collisions((1, 4, 0.9))
    for method in (CMR(), CMR(resampling="replace"), CMR(resample_by="uniform")):
        one, other = (method.rehearse(scores, held, task(), rng(4)) for _ in range(2))
        assert one == other
        assert len(one.drawn) == 3


def test_replacing_keeps_the_size():
    held, scores = memory(c1=5, c2=5, c3=5), collisions((1, 4, 0.9))
    found = CMR(resampling="replace", resampling_ratio=0.4).rehearse(scores, held, task(), rng())
    assert len(found.drawn) == 6
    assert len(found.rows) == 15
    assert found.rows[9:] == found.drawn
    assert len({row.sample_id for row in found.rows[:9]}) == 9


def test_uniform_resampling_needs_no_scores():
    held = memory(c1=5, c3=5)
    found = CMR(resample_by="uniform", resampling_ratio=0.5).rehearse(None, held, task(), rng())
    assert len(found.drawn) == 5
    assert [each["probability"] for each in found.table] == [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match="score_before"):
        CMR().rehearse(None, held, task(), rng())


def test_without_resampling_every_row_comes_once():
    held = memory(c1=5, c2=2)
    for method in (CMR(resampling="off"), CMR(resampling_ratio=0)):
        assert method.rehearse(None, held, task(), rng()).rows == held.rows


@pytest.mark.parametrize("resampling", ["add", "replace"])
def test_edges_of_resampling(resampling):
    method = CMR(resampling=resampling)
    scores = collisions((1, 4, 0.9), (2, 4, 0.2))
    assert method.rehearse(scores, Memory(), task(), rng()).rows == ()
    assert method.rehearse(scores, Memory({1: (), 2: ()}), task(), rng()).rows == ()
    only_other = method.rehearse(scores, memory(c1=0, c2=10), task(), rng())  # class 1 collides and has no rows
    assert {row.class_id for row in only_other.drawn} == {2}
    assert only_other.table[0]["probability"] == 0
    assert only_other.table[0]["collisions"] == 1
    none = method.rehearse(collisions((0, 0, 0.0)), memory(c1=5, c2=5, c3=5), task(), rng())  # no collisions: uniform
    assert [each["probability"] for each in none.table] == pytest.approx([1 / 3] * 3)
    assert len(none.drawn) == 3
    assert none.pairs == ()


# MSS.


def naive_score(given, said, clip, classes, released):
    total, frames = 0.0, 0
    for t in range(given.label.shape[1]):
        if not (given.real_frame[clip, t] and given.labelled_frame[clip, t]):
            continue
        label, guess = given.label[clip, t], said[clip, t]
        inside = label != IGNORE
        if not inside.any():
            continue
        ious = []
        for c in range(classes):
            hit = int((inside & (label == c) & (guess == c)).sum())
            union = int((inside & ((label == c) | (guess == c))).sum())
            if union:
                ious.append(hit / union)
        frames += 1
        total += sum(ious) if released else sum(ious) / len(ious)
    return total if released else total / max(frames, 1)


@pytest.mark.parametrize("delta", ["mean", "sum_released"])
def test_scores_are_ious_of_both_networks(delta):
    given = batch()
    given.label[0, 1] = IGNORE  # an annotated frame without a labelled pixel
    models = {AUDIO_VISUAL: network(CLASSES, 5), VISUAL_ONLY: network(CLASSES, 6)}
    scores = CMR(delta=delta).score_after(models, given, task())
    for clip, sample_id in enumerate(given.sample_id):
        row = scores.row(sample_id)
        both = [naive_score(given, models[name](given).logits.argmax(2), clip, CLASSES, delta != "mean") for name in models]
        assert [row["audio_visual"], row["visual_only"]] == pytest.approx(both)
        assert row["delta"] == pytest.approx(both[0] - both[1])
    assert scores.columns["frames"] == (2, 2, 2, 3)


def test_a_perfect_network_scores_one():
    given = batch()
    label = given.label.long().where(given.label != IGNORE, 0)

    def perfect(_):
        return replace(prediction(1, 1, 1, 0), logits=torch.nn.functional.one_hot(label, CLASSES).movedim(-1, 2).float())

    scores = CMR().score_after({AUDIO_VISUAL: perfect, VISUAL_ONLY: network(CLASSES, 6)}, given, task())
    assert scores.columns["audio_visual"] == (1, 1, 1, 1)


DELTAS = {"a": 0.3, "b": -0.1, "c": 0.1, "d": 0.0, "e": -0.9, "f": 0.5}
SAMPLES = tuple(Sample(each, (4,) if each != "d" else (4, 5)) for each in DELTAS)


def delta_table(frames=5.0):
    return ScoreTable(tuple(DELTAS), {"delta": tuple(DELTAS.values()), "frames": (frames,) * 6})


@pytest.mark.parametrize(
    ("selection", "expected"), [("mss", "dbc"), ("largest", "efa"), ("mixed", "dbe")], ids=["mss", "largest", "mixed"]
)
def test_selection_by_delta(selection, expected):
    kept = CMR(selection=selection, samples_per_class=3).remember(delta_table(), Memory(), task(SAMPLES), rng())
    assert [row.sample_id for row in kept.by_class[4]] == list(expected)
    assert [row.sample_id for row in kept.by_class[5]] == ["d"]
    assert kept.by_class[4][0].scores == {"delta": DELTAS[expected[0]], "frames": 5.0}
    assert kept.sample_ids == tuple(sorted({*expected, "d"}))


@pytest.mark.parametrize("selection", ["mss", "largest", "mixed"])
def test_fewer_samples_than_places(selection):
    kept = CMR(selection=selection, samples_per_class=9).remember(delta_table(), Memory(), task(SAMPLES), rng())
    assert sorted(row.sample_id for row in kept.by_class[4]) == sorted(DELTAS)
    assert CMR(selection=selection).remember(ScoreTable((), {}), Memory(), task(), rng()).by_class == {4: (), 5: ()}


@pytest.mark.parametrize("selection", ["mss", "largest"])
def test_clips_without_annotation_come_last(selection):
    scores = ScoreTable(tuple(DELTAS), {"delta": (0.0,) * 6, "frames": (0.0, 5, 5, 5, 5, 5)})
    kept = CMR(selection=selection, samples_per_class=5).remember(scores, Memory(), task(SAMPLES), rng())
    assert "a" not in [row.sample_id for row in kept.by_class[4]]


def test_memory_grows_by_class_and_is_never_selected_again():
    first = Memory({1: (Row("x", 1),), 2: (), 3: (Row("x", 3),)})
    kept = CMR().remember(delta_table(), first, task(SAMPLES), rng())
    assert kept.by_class[1] == first.by_class[1]
    assert kept.by_class[3] == first.by_class[3]
    with pytest.raises(ValueError, match="already holds"):
        CMR().remember(delta_table(), kept, task(SAMPLES), rng())
    base = (Sample("a", (1, 3)),)
    assert CMR(selection="random").remember(None, Memory(), base_task(base), rng()).sample_ids == ("a",)


def test_missing_scores_are_named():
    with pytest.raises(ValueError, match="score_after"):
        CMR().remember(None, Memory(), task(SAMPLES), rng())
    with pytest.raises(ValueError, match="first is 'z'"):
        CMR().remember(delta_table(), Memory(), task((*SAMPLES, Sample("z", (4,)))), rng())
