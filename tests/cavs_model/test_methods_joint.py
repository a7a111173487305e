"""Joint training: what it is given to learn."""

import pytest

from cavs_model.datasets.tones import Tones
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.joint import Joint
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from cavs_model.types import BACKGROUND, IGNORE

TONES = Tones(num_classes=6, train_clips=40)


def tasks(filter_):
    return Scenario("2-2", filter=filter_).tasks(TONES)


@pytest.mark.parametrize("filter_", ["overlapped", "disjoint", "sequential"])
def test_it_learns_every_sample_of_the_tasks_so_far_once(filter_):
    stream = tasks(filter_)
    for index, last in enumerate(stream):
        learned = Joint().training_task(stream[: index + 1])
        expected = {sample.id for task in stream[: index + 1] for sample in task.train}
        assert [sample.id for sample in learned.train] == list(dict.fromkeys(sample.id for sample in learned.train))
        assert {sample.id for sample in learned.train} == expected
        assert (learned.index, learned.num_old, learned.num_classes) == (index, 0, last.num_classes)
    shared = set(stream[0].train) & set(stream[1].train)
    assert bool(shared) == (filter_ == "overlapped")


def test_all_classes_so_far_are_labelled_and_the_rest_is_background():
    table = Joint().training_task(tasks("overlapped")[:2]).train_rule.table()
    assert table[:7].tolist() == [0, 1, 2, 3, 4, BACKGROUND, BACKGROUND]
    assert table[IGNORE] == IGNORE


def test_its_tasks_are_base_tasks_with_all_classes_current():
    stream = tasks("overlapped")
    assert Joint().training_task(stream[:1]) == stream[0]
    learned = Joint().training_task(stream)
    assert learned.is_base
    assert not stream[-1].is_base
    assert learned.new_classes == range(1, 7)
    assert learned.current_rule == stream[-1].seen_rule
    assert Schedule(base_epochs=7, epochs=3).epochs_of(learned) == 7
    assert Finetune().training_task(stream) == stream[-1]
