"""EIR: what is kept, what is pasted where, and the losses, against loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, part, real_pixels, softmax, step, task
from test_train import BOTH, DATA, LATER, ROWS, base_job, later_job, left, trained
from test_worker import on_two_workers

from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES, SAMPLE_RATE_HZ, log_mel, mel_matrix
from cavs_model.methods.eir import EIR, box, components, least_covering, mix
from cavs_model.train import train_task
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, IGNORE, Batch, Memory, Paste, Prediction, Row, Sample, ScoreTable
from cavs_model.worker import LocalWorker

SAMPLES = tuple(Sample(f"s{index}", (4, 5) if index % 3 == 0 else (4 + index % 2,)) for index in range(12))
# Stored instances of the old classes 1 and 2; class 3 has none.
MEMORY = Memory({1: tuple(Row(f"one-{n}", 1) for n in range(3)), 2: tuple(Row(f"two-{n}", 2) for n in range(3)), 3: ()})


def chance(seed=0):
    return np.random.default_rng(seed)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# What is kept.


def test_components_are_the_most_of_any_frame_and_touch_by_corners():
    label = np.full((2, 3, 5, 5), IGNORE, np.uint8)
    label[0, :2] = label[1, 0] = BACKGROUND
    label[0, 0, 0, 0] = label[0, 0, 1, 1] = 4  # touch by a corner
    label[0, 1, 0, 0] = label[0, 1, 0, 2] = label[0, 1, 4, 4] = 5
    label[0, 2, 0, 0] = label[0, 2, 4, 4] = IGNORE  # without annotation
    label[1, 0, 2, 2:4] = 5
    given = batch_of(torch.from_numpy(label))
    table = EIR().score_after({}, given, task())
    assert table.columns == {"components_4": (1.0, 0.0), "components_5": (3.0, 1.0)}
    assert components(label[0, 1] == 5) == 3
    assert components(label[0, 0] == 5) == 0


def test_whole_instances_are_kept_first_then_others_that_show_the_class():
    numbers = {"s0": 1, "s2": 2, "s4": 1, "s6": 0, "s8": 3, "s10": 1, "s3": 2, "s9": 0}  # all with class 4
    ids = tuple(sample.id for sample in SAMPLES)
    table = ScoreTable(ids, {"components_4": tuple(float(numbers.get(each, 0)) for each in ids), "components_5": (1.0,) * 12})
    kept = EIR(samples_per_class=5).remember(table, Memory(), task(SAMPLES), chance()).by_class
    assert {row.sample_id for row in kept[4][:3]} == {"s0", "s4", "s10"}
    assert {row.sample_id for row in kept[4][3:]} <= {"s2", "s3", "s8"}
    assert all(row.scores["components"] == numbers[row.sample_id] for row in kept[4])
    assert all(5 in SAMPLES[ids.index(row.sample_id)].classes for row in kept[5])
    few = EIR(samples_per_class=9).remember(table, Memory(), task(SAMPLES), chance()).by_class
    assert [row.sample_id for row in few[4][:5]] == [row.sample_id for row in kept[4]]
    assert len(few[4]) == 6  # the samples that do not show it are none
    one = EIR(samples_per_class=1)
    others = [one.remember(table, Memory(), task(SAMPLES), chance(seed)).by_class[4] for seed in range(30)]
    assert {row.sample_id for [row] in others} == {"s0", "s4", "s10"}


# What is pasted.


def evidence(*pixels):
    """A table of scores from each sample's pixels of the classes 1 to 3."""
    columns = {f"pixels_{class_id}": tuple(map(float, column)) for class_id, column in enumerate(zip(*pixels, strict=True), 1)}
    return ScoreTable(tuple(f"s{index}" for index in range(len(pixels))), columns)


def pasted(method, scores, seed=0):
    found = {sample_id: [] for sample_id in scores.sample_ids}
    for paste in method.rehearse(scores, MEMORY, task(SAMPLES), chance(seed)).pastes:
        found[paste.sample_id].append((paste.class_id, paste.instance_id))
    return found


def test_the_commonest_predicted_classes_are_pasted_and_random_ones_fill_up():
    scores = evidence((0, 9, 0), (5, 9, 99), (7, 7, 0), (0, 0, 50), (1, 3, 0))
    found = pasted(EIR(), scores)
    assert [class_id for class_id, _ in found["s0"][:1]] == [2]
    assert [class_id for class_id, _ in found["s1"]] == [2, 1]  # nothing is stored of class 3
    assert [class_id for class_id, _ in found["s2"]] == [1, 2]
    for each in found.values():
        assert len(each) == len(set(each)) == 2
    only = pasted(EIR(max_classes=1, min_classes=0), scores)
    assert [[class_id for class_id, _ in each] for each in only.values()] == [[2], [2], [1], [], [2]]
    assert all(len(each) == 6 for each in pasted(EIR(min_classes=99), scores).values())  # no more than there are


def test_instances_are_drawn_uniformly():
    scores = evidence((0, 9, 0))
    drawn = [pasted(EIR(), scores, seed)["s0"] for seed in range(600)]
    firsts = [first[1] for first, _ in drawn]
    assert min(firsts.count(f"two-{n}") for n in range(3)) > 140
    seconds = [second for _, second in drawn]  # any of the five others
    assert 0.3 < sum(class_id == 2 for class_id, _ in seconds) / 600 < 0.5


def test_pastes_depend_on_the_set_of_scores_and_the_draws_alone():
    scores = evidence(*((index % 3, index % 2, 1) for index in range(10)))
    first = EIR().rehearse(scores, MEMORY, task(SAMPLES), chance())
    turned = ScoreTable(scores.sample_ids[::-1], {name: column[::-1] for name, column in scores.columns.items()})
    assert EIR().rehearse(turned, MEMORY, task(SAMPLES), chance()) == first
    assert EIR().rehearse(scores, MEMORY, task(SAMPLES), chance(1)) != first
    assert first.rows == ()
    classes = [paste.class_id for paste in first.pastes]
    assert [(record["class"], record["stored"], record["pasted"]) for record in first.table] == [
        (class_id, len(MEMORY.by_class[class_id]), classes.count(class_id)) for class_id in (1, 2, 3)
    ]
    assert [record["predicted"] for record in first.table] == [6, 5, 0]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_scores_count_confident_old_classes_on_background(activation):
    given, method = step(), EIR(activation=activation, confidence=0.5)
    fresh = replace(given.batch, rehearsed=torch.zeros(4, dtype=torch.bool))
    table = method.score_before({AUDIO_VISUAL: lambda _: given.teacher}, fresh, given.task)
    expected = np.zeros((4, OLD))
    for b, t, y, x in (given.batch.label == BACKGROUND).nonzero().tolist():
        if given.batch.real_frame[b, t]:
            logits = given.teacher.logits[b, t, :, y, x].double().numpy()
            sure = sigmoid(logits) if activation == "sigmoid" else softmax(logits)
            best = 1 + int(np.argmax(sure[1:]))
            expected[b, best] += sure[best] >= 0.5
    assert [table.columns[f"pixels_{class_id}"] for class_id in range(1, OLD)] == [
        tuple(column) for column in expected.T[1:].tolist()
    ]
    assert expected[:, 1:].any(0).all()


# How it is pasted.


def batch_of(label, seed=0, **changes):
    """A batch of these labels [B T H W] with random pictures and sounds; frames that are all IGNORE are not annotated."""
    draw = torch.Generator().manual_seed(seed)
    clips, frames, height, width = label.shape
    annotated = (label != IGNORE).flatten(2).any(2)
    fields = {
        "sample_id": tuple(f"clip-{index}" for index in range(clips)),
        "image": torch.randint(256, (clips, frames, 3, height, width), generator=draw, dtype=torch.uint8),
        "audio": torch.randn(clips, frames, NUM_FRAMES, NUM_BINS, generator=draw),
        "label": label.clone(),
        "real_frame": torch.ones(clips, frames, dtype=torch.bool),
        "labelled_frame": annotated,
        "rehearsed": torch.zeros(clips, dtype=torch.bool),
    }
    return Batch(**{**fields, **changes})


def scene():
    """Three clips of three frames with class 4 in places; the second has padding, the third two frames without annotation."""
    draw = torch.Generator().manual_seed(5)
    label = torch.where(torch.rand(3, 3, 12, 12, generator=draw) < 0.3, 4, BACKGROUND).to(torch.uint8)
    label[0, :, :, :5] = BACKGROUND
    label[1, 2] = label[2, 1:] = IGNORE
    real = torch.ones(3, 3, dtype=torch.bool)
    real[1, 2] = False
    return batch_of(label, real_frame=real)


def instances():
    """Three stored clips: a moving 1, one without annotation after its first frame, and a 2 in two pieces, gone at the end."""
    label = torch.zeros(3, 3, 12, 12, dtype=torch.uint8)
    for t in range(3):
        label[0, t, 5:8, 7 + t : 10 + t] = 1
    label[1, 0, 0:2, 9:12] = 1
    label[1, 1:] = IGNORE
    label[2, :2, 0, 0] = label[2, :2, 3, 4] = 2
    label[2, :, 6, 6] = 1  # another class stays where it is
    return batch_of(label, seed=1)


PLACES = [(0, 1), (1, 1), (2, 2)]


def composed_by_loops(batch, stored, places):
    image, audio, label = batch.image.clone(), batch.audio.clone(), batch.label.clone()
    for index, (clip, class_id) in enumerate(places):
        frames = [t for t in range(3) if batch.real_frame[clip, t] and stored.labelled_frame[index, t]]
        pixels = [(t, y, x) for t in frames for y in range(12) for x in range(12) if stored.label[index, t, y, x] == class_id]
        if not pixels:
            continue
        top, left = min(y for _, y, _ in pixels), min(x for _, _, x in pixels)
        height, width = max(y for _, y, _ in pixels) + 1 - top, max(x for _, _, x in pixels) + 1 - left
        grids = [[round(k * (12 - size) / 7) for k in range(8)] for size in (height, width)]
        best = None
        for down, across in [(top, left)] + [(y, x) for y in grids[0] for x in grids[1]]:
            covered = sum(
                int(label[clip, t, y - top + down, x - left + across]) not in (BACKGROUND, IGNORE) for t, y, x in pixels
            )
            rank = (covered, (down - top) ** 2 + (across - left) ** 2, down, across)
            best = rank if best is None else min(best, rank)
        down, across = best[2:]
        for t, y, x in pixels:
            image[clip, t, :, y - top + down, x - left + across] = stored.image[index, t, :, y, x]
            if batch.labelled_frame[clip, t]:
                label[clip, t, y - top + down, x - left + across] = class_id
        for t in {t for t, _, _ in pixels}:
            loud = [np.maximum(np.exp(each.double().numpy()) - 0.01, 0) for each in (audio[clip, t], stored.audio[index, t])]
            audio[clip, t] = torch.from_numpy(np.log(np.sqrt(loud[0] ** 2 + loud[1] ** 2) + 0.01))
    return image, audio, label


@pytest.mark.parametrize(
    "places", [PLACES, [(1, 1), (2, 1), (0, 2)], [(0, 1), (0, 1), (0, 2)], [(0, 1), (2, 1), (2, 2)]], ids=str
)
def test_composed_clips_are_those_of_the_loops(places):
    batch, stored = scene(), instances()
    before = [each.clone() for each in (batch.image, batch.audio, batch.label, stored.image, stored.audio, stored.label)]
    found = EIR().compose(batch, stored, places)
    image, audio, label = composed_by_loops(batch, stored, places)
    assert torch.equal(found.image, image)
    assert torch.equal(found.label, label)
    torch.testing.assert_close(found.audio, audio, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.label, batch.label)
    for name in ("sample_id", "real_frame", "labelled_frame", "rehearsed"):
        assert getattr(found, name) is getattr(batch, name)
    after = (batch.image, batch.audio, batch.label, stored.image, stored.audio, stored.label)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_is_pasted_keeps_its_pixels_its_movement_and_its_frames():
    batch, stored = scene(), instances()
    found = EIR().compose(batch, stored, PLACES)
    ours = found.label[0] == 1
    assert ours.flatten(1).sum(1).tolist() == [9, 9, 9]
    lefts = [int(frame.any(0).nonzero()[0]) for frame in ours]
    assert lefts == [lefts[0], lefts[0] + 1, lefts[0] + 2]
    assert (batch.label[0][ours] == BACKGROUND).all()  # there is room: nothing labelled is covered
    # The second clip's instance is known in its first frame alone.
    assert torch.equal(found.image[1, 1:], batch.image[1, 1:])
    assert torch.equal(found.audio[1, 1:], batch.audio[1, 1:])
    # The third clip has labels in its first frame alone, and the instance, with its sound, in two.
    assert (found.label[2, 1:] == IGNORE).all()
    for t, changed in ((0, True), (1, True), (2, False)):
        assert (found.image[2, t] != batch.image[2, t]).any() == changed
        assert (found.audio[2, t] != batch.audio[2, t]).any() == changed


def test_an_instance_that_does_not_show_changes_nothing():
    batch, stored = scene(), instances()
    found = EIR().compose(batch, stored, [(0, 3), (1, 3), (2, 3)])
    assert torch.equal(found.image, batch.image)
    assert torch.equal(found.label, batch.label)
    assert torch.equal(found.audio, batch.audio)


def test_places():
    mask = np.zeros((2, 6, 7), bool)
    mask[0, 2, 3] = mask[1, 4, 1] = True
    assert box(mask) == (2, 1, 5, 4)
    cut, empty = np.ones((1, 2, 2), bool), np.zeros((1, 6, 6), bool)
    assert least_covering(cut, empty, (3, 1)) == (3, 1)
    full = np.ones((1, 6, 6), bool)
    assert least_covering(cut, full, (3, 1)) == (3, 1)
    full[0, 4:, :2] = False
    assert least_covering(cut, full, (1, 1)) == (4, 0)
    assert least_covering(full, full, (0, 0)) == (0, 0)


def test_sounds_add_in_power_in_the_front_ends_units():
    draw = np.random.default_rng(0)
    waves = draw.normal(0, 0.1, (2, SAMPLE_RATE_HZ)).astype(np.float32)
    one, other, both, silence = (
        torch.from_numpy(log_mel(wave)) for wave in (waves[0], waves[1], waves.sum(0), np.zeros(SAMPLE_RATE_HZ))
    )
    torch.testing.assert_close(mix(one, silence), one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mix(one, other), mix(other, one))
    # Two noises heard at once are, in the mean, what the sum of their powers is.
    bands = mel_matrix().sum(0) > 0
    power = [each.exp()[:, bands].square().mean() for each in (mix(one, other), both)]
    assert float(power[0] / power[1]) == pytest.approx(1, rel=0.05)
    assert mix(torch.tensor([-9.0]), torch.tensor([-9.0])).item() == pytest.approx(np.log(0.01))  # noise below silence


# Losses.


def loss_by_loops(given, method):
    """The means of both terms."""
    real, sharp = given.batch.real_frame, sigmoid if method.activation == "sigmoid" else softmax
    label = given.batch.label.clone()
    for b in range(len(label)):
        candidates = {}
        for t, y, x in np.ndindex(*label.shape[1:]):
            if real[b, t] and label[b, t, y, x] == BACKGROUND and not given.batch.rehearsed[b]:
                sure = sharp(given.teacher.logits[b, t, :, y, x].double().numpy())
                best = 1 + int(np.argmax(sure[1:]))
                if sure[best] >= method.confidence:
                    candidates.setdefault(best, []).append((t, y, x))
        for class_id in sorted(candidates, key=lambda each: (-len(candidates[each]), each))[: method.max_classes]:
            for place in candidates[class_id]:
                label[b][place] = class_id
    classified, distilled = [], []
    pairs = zip(real_pixels(given), real_pixels(replace(given, batch=replace(given.batch, label=label))), strict=True)
    for (z, known, own, rehearsed), (_, _, target, _) in pairs:
        if target != IGNORE:
            y = np.eye(CLASSES)[target]
            binary = -np.sum(y * np.log(sigmoid(z)) + (1 - y) * np.log(1 - sigmoid(z)))
            classified.append(binary if method.activation == "sigmoid" else -np.log(softmax(z)[target]))
        if own == BACKGROUND and not rehearsed:
            q, p = sharp(known), sharp(z[:OLD])
            cross = q * np.log(p) + ((1 - q) * np.log(1 - p) if method.activation == "sigmoid" else 0)
            distilled.append(-np.sum(cross))
    return label, np.mean(classified), np.mean(distilled), len(distilled)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("max_classes", [0, 2, 3])
def test_terms_are_those_of_the_loops(activation, max_classes):
    given, method = step(), EIR(activation=activation, max_classes=max_classes, confidence=0.6)
    given.batch.label[0, 0, :3, :3] = 1  # a pasted instance
    label, classified, distilled, pixels = loss_by_loops(given, method)
    assert (label != given.batch.label).any() == (max_classes > 0)
    terms = method.loss(given)
    name = "binary_cross_entropy" if activation == "sigmoid" else "cross_entropy"
    assert list(terms) == [name, "distillation"]
    assert float(terms[name].value().detach()) == pytest.approx(classified, rel=1e-5)
    assert float(terms["distillation"].value().detach()) == pytest.approx(5 * distilled, rel=1e-5)
    assert terms["distillation"].count == pixels


def test_at_most_so_many_classes_of_a_clip_become_labels():
    label = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    logits = torch.full((2, 1, OLD, 3, 3), -9.0)
    for place, class_id in enumerate((1, 1, 2, 3, 3, 3)):
        logits[0, 0, class_id].view(-1)[place] = 9
        logits[1, 0, class_id].view(-1)[place] = 9 if class_id != 3 else 0.5  # not sure enough
    open_ = torch.ones_like(label, dtype=torch.bool)
    open_[:, 0, 0, 0] = False
    found = EIR(activation="sigmoid", max_classes=1).pseudo_labelled(label, open_, logits).view(2, -1)
    assert found.tolist() == [[0, 0, 0, 3, 3, 3, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]


def test_without_distillation_the_teacher_still_labels():
    given = step()
    assert list(EIR(kd_weight=0).loss(given)) == ["cross_entropy"]
    assert EIR(kd_weight=0).needs_teacher
    alone = part(given, slice(0, 1))
    other = replace(alone, teacher=Prediction(-99 * torch.ones_like(alone.teacher.logits), ()))
    method = EIR(activation="sigmoid")
    assert method.loss(alone)["binary_cross_entropy"].total != method.loss(other)["binary_cross_entropy"].total


# In training.

PASTES = tuple(Paste(sample.id, row.sample_id, row.class_id) for sample in LATER.train[::2] for row in ROWS[:2])


def eir_job(folder, start, **changes):
    return later_job(folder, start, EIR(), rows=(), pastes=PASTES, **changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eir")
    train_task(base_job(folder), LocalWorker())
    return folder


def eir_part(worker, folder, start):
    train_task(eir_job(folder / "shared", start), worker)


def test_two_workers_learn_what_one_learns(start, tmp_path):
    on_two_workers(eir_part, tmp_path, tmp_path, start)
    weights, about = trained(eir_job(tmp_path / "alone", start))
    shared, told = left(tmp_path / "shared")
    assert (told.world_size, about.world_size) == (2, 1)
    for one, two in zip(about.history, told.history, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    difference = torch.cat([(weights[name].double() - shared[name].double()).flatten() for name in weights])
    assert difference.abs().max() < 3e-4
    assert difference.square().mean() < 1e-5**2


def test_the_loop_pastes_into_the_samples_it_is_told_to(start, tmp_path, monkeypatch):
    seen = {}
    loss = EIR.loss

    def watched(self, given):
        for index, key in enumerate(zip(given.batch.sample_id, given.batch.rehearsed.tolist(), strict=True)):
            seen[key] = given.batch.label[index].clone()
        return loss(self, given)

    monkeypatch.setattr(EIR, "loss", watched)
    again = BOTH[0].id  # is learned as a new sample, with instances, and as a rehearsed one, without
    own = Paste(again, ROWS[0].sample_id, ROWS[0].class_id)
    pastes = (*(paste for paste in PASTES if paste.sample_id != again), own)
    trained(replace(eir_job(tmp_path, start), rows=ROWS, pastes=pastes))
    split, new, old = DATA.open("train"), DATA.table(LATER.train_rule), DATA.table(LATER.seen_rule)
    due = {paste.sample_id for paste in pastes}
    for sample in LATER.train:
        expected = split.batch([sample.id], [False], [new])
        if mine := [paste for paste in pastes if paste.sample_id == sample.id]:
            stored = split.batch([paste.instance_id for paste in mine], [True] * len(mine), [old] * len(mine))
            expected = EIR().compose(expected, stored, [(0, paste.class_id) for paste in mine])
        label = seen[sample.id, False]
        assert torch.equal(label, expected.label[0])
        assert bool(((label > BACKGROUND) & (label < LATER.num_old)).any()) == (sample.id in due)
    assert len(due) < len(LATER.train)
    assert torch.equal(seen[again, True], split.batch([again], [True], [old]).label[0])
