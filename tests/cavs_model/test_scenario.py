"""Class orders, settings, filters and label rules, against naive loops; and AVSBench's published task sizes."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cavs_model.datasets.base import Benchmark, digest
from cavs_model.datasets.cache import renumbering
from cavs_model.datasets.collage import Collage
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.evaluate import Data
from cavs_model.scenario import FILTERS, Scenario
from cavs_model.types import BACKGROUND, IGNORE, Sample

METADATA = Path(__file__).parents[3] / "shared" / "avsbench_metadata"
NAMES = """
accordion airplane axe baby bassoon bell bird boat boy bus car cat cello clarinet clipper clock dog donkey drum duck
elephant emergency-car erhu flute frying-food girl goose guitar gun guzheng hair-dryer handpan harmonica harp helicopter
hen horse keyboard leopard lion man marimba missile-rocket motorcycle mower parrot piano pig pipa saw saxophone sheep sitar
sorna squirrel tabla tank tiger tractor train trombone truck trumpet tuba ukulele utv vacuum-cleaner violin wolf
woman
"""
AVSBENCH_CLASSES = tuple(NAMES.split())
# Training videos of every task, overlapped and disjoint.
PUBLISHED = {
    ("CI", "60-10"): ((7392, 1764), (6708, 1764)),
    ("CI", "60-5"): ((7392, 425, 1363), (6708, 401, 1363)),
    ("CIS", "60-10"): ((5615, 1039), (5615, 1039)),
    ("CIM", "60-10"): ((1777, 725), (1093, 725)),
}
VIDEOS = {
    "CI": {"train": 8498, "val": 1304, "test": 1554},
    "CIS": {"train": 6680, "val": 1133, "test": 1278},
    "CIM": {"train": 1818, "val": 171, "test": 276},
}
# The same kinds of rows, a few of each: single and multiple sources, old with new, sounds of no class, other splits.
SAMPLE_CSV = """vid,uid,s_min,s_sec,a_obj,split,label
v0,u0,0,0,accordion,train,v1s
v1,u1,0,0,accordion,train,v1s
v2,u2,0,0,saxophone,train,v2
v3,u3,0,0,woman,train,v2
v4,u4,0,0,off-the-screen,train,v2
v5,u5,0,0,background,train,v2
v6,u6,0,0,man_woman,train,v1m
v7,u7,0,0,man_piano,train,v1m
v8,u8,0,0,violin_woman,train,v2
v9,u9,0,0,guitar_truck,train,v2
v10,u10,0,0,truck_woman,train,v2
v11,u11,0,0,trumpet,train,v2
v12,u12,0,0,bird,val,v1s
v13,u13,0,0,man_woman,test,v1m
"""
SAMPLE_SIZES = {  # counted by hand; classes 61..65 are trombone to ukulele, 66..70 utv to woman
    ("CI", "60-10"): ((6, 6), (4, 6)),
    ("CI", "60-5"): ((6, 3, 4), (4, 2, 4)),
    ("CIS", "60-10"): ((3, 2), (3, 2)),
    ("CIM", "60-10"): ((3, 4), (1, 4)),
}


@dataclass(frozen=True)
class Rows(Benchmark):
    """AVSBench's index without clips: a row of the csv files is a sample."""

    paths: tuple[Path, ...] = ()
    subset: str = "CI"
    frames: int = 10
    image_size_px: int = 224

    @property
    def name(self):
        return "rows"

    def class_names(self):
        return AVSBENCH_CLASSES

    def orders(self):
        return {"alphabetical": AVSBENCH_CLASSES}

    def settings(self):
        return ("60-10", "60-5", "65-1")

    def splits(self):
        return ("train", "val", "test")

    def samples(self, split):
        position = {name: index + 1 for index, name in enumerate(AVSBENCH_CLASSES)}
        found = []
        for path in self.paths:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    names = row["a_obj"].split("_")
                    wanted = {"CI": True, "CIS": len(names) == 1, "CIM": len(names) > 1}[self.subset]
                    if wanted and row["split"] == split:
                        classes = sorted(position[name] for name in names if name in position)
                        found.append(Sample(f"{row['label']}/{row['uid']}", tuple(classes)))
        return tuple(found)

    def render(self, split, positions):
        raise NotImplementedError

    def fingerprint(self):
        return digest({"subset": self.subset})

    def check(self):
        pass


def avsbench(subset, folder):
    """The published index where it lies beside the repository, else the sample above; and the sizes to expect."""
    published = tuple(METADATA / name for name in ("metav2s.csv", "metav2m.csv"))
    if all(path.exists() for path in published):
        return Rows(published, subset), PUBLISHED
    path = folder / "metadata.csv"
    path.write_text(SAMPLE_CSV)
    return Rows((path,), subset), SAMPLE_SIZES


def sizes(benchmark, setting, kind):
    return tuple(len(task.train) for task in Scenario(setting, filter=kind).tasks(benchmark))


@pytest.mark.parametrize(("subset", "setting"), PUBLISHED)
def test_avsbench_tasks_have_their_published_sizes(subset, setting, tmp_path):
    benchmark, expected = avsbench(subset, tmp_path)
    overlapped, disjoint = expected[subset, setting]
    assert sizes(benchmark, setting, "overlapped") == overlapped
    assert sizes(benchmark, setting, "disjoint") == disjoint
    assert sizes(benchmark, setting, "sequential") == disjoint
    if expected is PUBLISHED:
        assert {split: len(benchmark.samples(split)) for split in benchmark.splits()} == VIDEOS[subset]


def test_the_few_rows_written_here_are_cut_as_counted_by_hand(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(SAMPLE_CSV)
    for (subset, setting), (overlapped, disjoint) in SAMPLE_SIZES.items():
        benchmark = Rows((path,), subset)
        assert (sizes(benchmark, setting, "overlapped"), sizes(benchmark, setting, "disjoint")) == (overlapped, disjoint)


@pytest.mark.parametrize(
    ("benchmark", "setting", "learned"),
    [
        (Collage(), "16-8", [17, 8]),
        (Collage(), "16-4", [17, 4, 4]),
        (Collage(), "20-1", [21, 1, 1, 1, 1]),
        (Collage(), "24", [25]),
        (Rows(), "60-10", [61, 10]),
        (Rows(), "60-5", [61, 5, 5]),
        (Rows(), "65-1", [66, 1, 1, 1, 1, 1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_cut_the_classes(benchmark, setting, learned):
    counts = Scenario(setting).class_counts(benchmark)
    assert [counts[0] + 1, *counts[1:]] == learned
    assert sum(counts) == len(benchmark.class_names())


@pytest.mark.parametrize("benchmark", [Collage(), Tones(), Tones(num_classes=3)], ids=lambda each: each.name)
def test_usual_settings_make_tasks_that_follow_one_another(benchmark):
    for setting in benchmark.settings():
        scenario = Scenario(setting)
        tasks = scenario.tasks(benchmark)
        assert [task.index for task in tasks] == list(range(len(tasks)))
        assert [task.num_old for task in tasks] == [0, *(task.num_classes for task in tasks[:-1])]
        assert tasks[-1].num_classes == len(benchmark.class_names()) + 1
        assert [class_id for task in tasks for class_id in task.new_classes] == list(range(1, tasks[-1].num_classes))
        assert [len(task.new_classes) for task in tasks] == list(scenario.class_counts(benchmark))


@pytest.mark.parametrize(
    "setting", ["16-7", "24-1", "25-1", "0-8", "16-0", "16", "25", "024", "24-0", "16-", "16-8-8", "-16-8", "all", ""]
)
def test_impossible_settings_are_named(setting):
    with pytest.raises(InputError) as caught:
        Scenario(setting).tasks(Collage())
    assert repr(setting) in str(caught.value)
    assert "16-8" in str(caught.value)
    assert "24 classes of collage" in str(caught.value)
    assert '"24" for one task' in str(caught.value)


@pytest.mark.parametrize("kind", FILTERS)
def test_all_classes_in_one_task_are_every_sample_with_all_its_labels(kind):
    scenario = Scenario("5", order="reversed", filter=kind)
    (task,) = scenario.tasks(TONES)
    assert task.train == scenario.samples(TONES, "train")
    assert (task.is_base, task.num_old, task.num_classes, list(task.new_classes)) == (True, 0, 6, [1, 2, 3, 4, 5])
    assert set(task.train_rule.table()[: task.num_classes]) == set(range(6))


def test_unknown_names_are_named():
    tones = Tones()
    with pytest.raises(InputError, match=r"'backwards'.*alphabetical, reversed, random"):
        Scenario("2-2", order="backwards").tasks(tones)
    with pytest.raises(InputError, match=r"'none'.*overlapped, disjoint, sequential"):
        Scenario("2-2", filter="none").tasks(tones)
    names = tones.class_names()
    with pytest.raises(InputError, match=r"'e-disc'.*a-disc"):
        Scenario("2-2", class_order=(*names[:3], "e-disc")).tasks(tones)
    with pytest.raises(InputError, match=r"missing: \['d-cross'\]"):
        Scenario("2-2", class_order=names[:3]).tasks(tones)
    with pytest.raises(InputError, match="repeats"):
        Scenario("2-2", class_order=(*names, names[0])).tasks(tones)
    with pytest.raises(InputError, match=r"order_seed.*-1"):
        Scenario("2-2", order="random", order_seed=-1).tasks(tones)


def test_a_task_without_samples_is_named(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(SAMPLE_CSV)
    with pytest.raises(InputError, match=r"task 1 of setting '65-1' \(overlapped\)"):
        Scenario("65-1").tasks(Rows((path,)))


def test_orders():
    tones = Tones(num_classes=12)
    names = tones.class_names()
    assert Scenario().learned_order(tones) == names
    assert Scenario(order="reversed").learned_order(tones) == names[::-1]
    drawn = Scenario(order="random", order_seed=3).learned_order(tones)
    assert sorted(drawn) == sorted(names)
    assert drawn == Scenario(order="random", order_seed=3).learned_order(tones)
    assert drawn != Scenario(order="random", order_seed=4).learned_order(tones)
    assert all(type(name) is str for name in drawn)  # not numpy's, which JSON does not know
    assert Scenario(class_order=names[1:] + names[:1]).learned_order(tones) == names[1:] + names[:1]


SHUFFLED = Scenario("2-1", order="random", order_seed=1)
TONES = Tones(num_classes=5, train_clips=40, image_size_px=16)


def test_learned_ids_follow_the_order():
    order = SHUFFLED.learned_order(TONES)
    assert order != TONES.class_names()
    for split in TONES.splits():
        for sample, learned in zip(TONES.samples(split), SHUFFLED.samples(TONES, split), strict=True):
            names = {TONES.class_names()[class_id - 1] for class_id in sample.classes}
            assert learned.id == sample.id
            assert {order[class_id - 1] for class_id in learned.classes} == names
            assert list(learned.classes) == sorted(learned.classes)


@pytest.mark.parametrize("kind", FILTERS)
def test_filters_against_a_naive_loop(kind):
    order, known = SHUFFLED.learned_order(TONES), 0
    tasks = replace(SHUFFLED, filter=kind).tasks(TONES)
    assert len(tasks) == 4
    for task, added in zip(tasks, (2, 1, 1, 1), strict=True):
        current, future = order[known : known + added], order[known + added :]
        expected = []
        for sample in TONES.samples("train"):
            names = [TONES.class_names()[class_id - 1] for class_id in sample.classes]
            belongs = False
            for name in names:
                belongs = belongs or name in current
            for name in names:
                if kind != "overlapped" and name in future:
                    belongs = False
            if belongs:
                expected.append(sample.id)
        assert [sample.id for sample in task.train] == expected
        known += added
    assert sum(map(len, (task.train for task in tasks))) > len(TONES.samples("train")) * (kind == "overlapped")


@pytest.mark.parametrize("kind", FILTERS)
def test_label_rules_against_a_naive_loop_over_pixels(kind):
    scenario = replace(SHUFFLED, filter=kind)
    order = scenario.learned_order(TONES)
    data = Data(TONES, "", order)
    raw = TONES.render("train", range(12)).label
    raw[0, 0, 0, :3] = IGNORE, BACKGROUND, IGNORE
    assert set(np.unique(raw)) == {0, 1, 2, 3, 4, 5, IGNORE}
    for task in scenario.tasks(TONES):
        rules = {"train": task.train_rule, "val": task.current_rule, "memory": task.seen_rule}
        seen = {split: data.table(rule)[raw] for split, rule in rules.items()}
        for place, label in np.ndenumerate(raw[:, :, ::2, ::2]):
            clip, frame, row, column = place
            if label in (BACKGROUND, IGNORE):
                expected = dict.fromkeys(rules, label)
            else:
                learned = order.index(TONES.class_names()[label - 1]) + 1
                current, old = learned in task.new_classes, learned < task.num_old
                expected = {
                    "train": learned if current or (old and kind == "sequential") else BACKGROUND,
                    "val": learned if current else IGNORE,
                    "memory": learned if current or old else IGNORE,  # and the test splits
                }
            assert {split: labels[clip, frame, 2 * row, 2 * column] for split, labels in seen.items()} == expected
    assert np.array_equal(data.table(scenario.tasks(TONES)[-1].seen_rule), renumbering(TONES.class_names(), order))
