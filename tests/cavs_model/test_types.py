"""The values that pass between the parts: label rules pixel by pixel, batches, means, score tables and memories."""

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from method_cases import base_task, batch, task

from cavs_model.types import BACKGROUND, IGNORE, LabelRule, Mean, Memory, Row, Sample, ScoreTable, State


@pytest.mark.parametrize("otherwise", [BACKGROUND, IGNORE])
@pytest.mark.parametrize("keep", [range(1, 4), range(4, 6), range(0)])
def test_a_label_rule_keeps_its_classes_background_and_ignore(keep, otherwise):
    table = LabelRule(keep, otherwise).table()
    assert table.shape == (256,)
    for label in range(256):
        stays = label in keep or label in (BACKGROUND, IGNORE)
        assert table[label] == (label if stays else otherwise)


def test_a_task_knows_its_classes():
    base, later = base_task(), task()
    assert (base.is_base, later.is_base) == (True, False)
    assert list(base.new_classes) == [1, 2, 3]
    assert list(later.new_classes) == [4, 5]
    assert (base.num_new, later.num_new) == (4, 2)
    assert later.current_rule == LabelRule(range(4, 6), IGNORE)
    assert later.seen_rule == LabelRule(range(1, 6), IGNORE)


def test_a_batch_moves_as_a_whole():
    given = batch()
    moved = given.to("meta")
    assert len(moved) == len(given) == 4
    assert moved.sample_id == given.sample_id
    tensors = {item.name: value for item in fields(moved) if isinstance(value := getattr(moved, item.name), torch.Tensor)}
    assert len(tensors) == 7
    assert tensors.pop("real_frame_cpu") is given.real_frame  # so that nobody asks the device for it
    assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert given.image.device.type == "cpu"
    assert moved.to("meta").real_frame_cpu is given.real_frame
    assert given.to("cpu").real_frame_cpu is None
    assert replace(given, real_frame=given.real_frame.to("meta")).to("meta").real_frame_cpu is None


def test_a_batch_is_pinned_for_a_gpu_alone(monkeypatch):
    given = replace(batch(), image=batch().image[:, :2])
    assert given.pinned_for(torch.device("cpu")) is given
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    pinned = given.pinned_for(torch.device("cuda", 1))
    assert pinned.real_frame_cpu is None
    for item in fields(given):
        before, after = getattr(given, item.name), getattr(pinned, item.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(after, before)
            assert after is not before
            assert after.is_contiguous()


def test_a_batch_drops_the_frames_that_pad_every_clip():
    given = batch()
    clips, frames = given.real_frame.shape
    assert frames > 1
    real = torch.arange(frames) < torch.tensor([frames - 1] + [1] * (clips - 1))[:, None]
    padded = replace(given, real_frame=real, audio_feature=torch.randn(clips, frames, 128))
    trimmed = padded.trimmed()
    for item in fields(padded):
        before, after = getattr(padded, item.name), getattr(trimmed, item.name)
        expected = before[:, : frames - 1] if isinstance(before, torch.Tensor) and before.dim() > 1 else before
        assert torch.equal(after, expected) if isinstance(after, torch.Tensor) else after == expected
    assert trimmed.trimmed() is trimmed
    assert replace(given, real_frame=torch.zeros_like(real)).trimmed().image.shape[1] == 1


def test_a_mean_is_its_total_over_its_count():
    assert Mean(torch.tensor(6.0), torch.tensor(4)).value() == 1.5
    assert Mean(torch.tensor(6.0), 4).value() == 1.5


def test_score_tables_join_by_rows():
    first = ScoreTable(("a", "b"), {"delta": (1.0, 2.0), "frames": (5.0, 5.0)})
    second = ScoreTable(("c",), {"delta": (3.0,), "frames": (0.0,)})
    joined = ScoreTable.concatenate([first, second])
    assert joined.sample_ids == ("a", "b", "c")
    assert joined.columns == {"delta": (1.0, 2.0, 3.0), "frames": (5.0, 5.0, 0.0)}
    assert joined.row("c") == {"delta": 3.0, "frames": 0.0}
    assert ScoreTable.concatenate([]) == ScoreTable(())
    with pytest.raises(KeyError, match="d"):
        joined.row("d")


def test_score_tables_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="'delta' has 1 rows, expected 2"):
        ScoreTable(("a", "b"), {"delta": (1.0,)})
    with pytest.raises(ValueError, match="different columns"):
        ScoreTable.concatenate([ScoreTable(("a",), {"delta": (1.0,)}), ScoreTable(("b",), {"share": (1.0,)})])


def test_a_memory_counts_rows_and_stores_samples_once():
    memory = Memory().extended({2: (Row("x", 2), Row("a", 2)), 1: (Row("x", 1, {"delta": 0.5}),)})
    assert [(row.sample_id, row.class_id) for row in memory.rows] == [("x", 1), ("x", 2), ("a", 2)]
    assert memory.sample_ids == ("a", "x")
    grown = memory.extended({3: ()})
    assert set(memory.by_class) == {1, 2}
    assert set(grown.by_class) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"\[2\]"):
        grown.extended({2: (Row("b", 2),)})


def test_values_are_frozen_and_pickle():
    memory = Memory({1: (Row("x", 1, {"delta": 0.5}),)})
    for value in (Sample("a", (1, 2)), base_task((Sample("a", (1,)),)), State({"audio_visual": "somewhere"}, memory)):
        assert pickle.loads(pickle.dumps(value)) == value
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
