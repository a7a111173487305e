"""Lines and estimates against a clock that only moves when told to."""

import io
import threading
import time

import pytest

from cavs_model.datasets.tones import Tones
from cavs_model.methods.cmr import CMR
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.joint import Joint
from cavs_model.scenario import Scenario
from cavs_model.train import TEACHER_COST, Schedule
from orchestrator import progress as progress_module
from orchestrator.experiment import Experiment
from orchestrator.progress import BlockNotes, Progress, clock, planned_work, silent, watched


class Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


class Watched:
    """Progress with its clock and its lines."""

    def __init__(self, plan, seeds=(0,), trials=1):
        self.clock, self.out = Clock(), io.StringIO()
        self.progress = Progress(self.out, plan, seeds, trials, now=self.clock)

    @property
    def lines(self):
        return self.out.getvalue().splitlines()

    @property
    def left(self):
        return self.progress.seconds_left()

    def epochs(self, label, clips, epochs, of=None, seconds=0.0):
        """`epochs` epochs of `clips` clips each, which take `seconds` each."""
        for epoch in range(1, epochs + 1):
            self.clock.seconds += seconds
            self.progress(
                {"kind": "epoch", "label": label, "epoch": epoch, "epochs": of or epochs, "work": clips,
                 "seconds": seconds, "clips_per_second": 10.0, "loss": 0.5}
            )  # fmt: skip

    def task(self, trial, task, seed=0):
        self.progress(
            {"kind": "task", "trial": trial, "seed": seed, "task": task, "label": f"trial {trial}", "text": "learned"}
        )

    def trial(self, trial, value=None):
        self.progress({"kind": "trial", "trial": trial, "label": f"trial {trial}", "text": "ended", "value": value})


def test_the_plan_counts_epochs_clips_and_networks():
    tones = Tones()
    scenario, schedule = Scenario(setting="2-1"), Schedule(base_epochs=6, epochs=4)
    sizes = [len(task.train) for task in scenario.tasks(tones)]
    plain = Experiment(benchmark=tones, scenario=scenario, schedule=schedule, method=Finetune())
    assert planned_work(plain) == (6 * sizes[0], 4 * sizes[1], 4 * sizes[2])
    both = Experiment(benchmark=tones, scenario=scenario, schedule=schedule, method=CMR(samples_per_class=5))
    assert planned_work(both) == pytest.approx(
        # A teacher beside every later task's network; no companion after the last task. 5 rows of 2 and 3 classes, and a fifth.
        (12 * sizes[0], 8 * (sizes[1] + 12) * TEACHER_COST, 4 * (sizes[2] + 18) * TEACHER_COST)
    )


def test_the_plan_of_joint_training_counts_all_samples_so_far_and_the_base_tasks_epochs():
    tones, scenario = Tones(), Scenario(setting="2-1")
    seen, expected = set(), []
    for task in scenario.tasks(tones):
        seen |= set(task.train)
        expected.append(6 * len(seen))
    schedule = Schedule(base_epochs=6, epochs=4)
    assert planned_work(Experiment(benchmark=tones, scenario=scenario, schedule=schedule, method=Joint())) == tuple(expected)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00"), (59.6, "00:01:00"), (3661, "01:01:01"), (360000, "100:00:00"), (-5, "00:00:00")]
)
def test_the_clock(seconds, text):
    assert clock(seconds) == text


def test_the_estimate_is_what_is_left_at_the_speed_so_far():
    watched = Watched(plan=(100, 50), seeds=(0, 1), trials=3)
    assert watched.left is None
    watched.clock.seconds += 60.0  # starting processes and making data is no training
    assert "estimating" in watched.progress.state()
    # 20 clips in 4 s; 2 bases of 100 and 3 x 2 later tasks of 50 are 500 clips.
    watched.epochs("trial 1 seed 0 task 1/2 audio_visual", 10, 2, of=10, seconds=2.0)
    assert watched.left == pytest.approx((500 - 20) / 5)
    assert "0/3 trials done, about 00:01:36 left" in watched.progress.state()


def test_finished_tasks_are_subtracted_once():
    watched = Watched(plan=(100, 50), trials=2)
    label = "trial 1 seed 0 task 1/2 audio_visual"
    watched.epochs(label, 10, 10, seconds=1.0)  # 10 clips a second
    assert watched.left == pytest.approx((200 - 100) / 10)
    watched.task(trial=1, task=0)
    assert watched.left == pytest.approx((200 - 100) / 10)
    watched.task(trial=2, task=0)  # the same base, from the store
    assert watched.left == pytest.approx((200 - 100) / 10)
    watched.task(trial=2, task=1)  # the store had this one too
    assert watched.left == pytest.approx((200 - 150) / 10)


def test_the_first_of_two_networks_stays_counted_while_the_second_trains():
    watched = Watched(plan=(200, 100))
    watched.epochs("seed 0 task 1/2 audio_visual", 10, 10, seconds=1.0)
    assert watched.left == pytest.approx((300 - 100) / 10)
    watched.epochs("seed 0 task 1/2 visual_only", 10, 5, of=10, seconds=1.0)
    assert watched.left == pytest.approx((300 - 150) / 10)
    watched.progress({"kind": "task", "trial": 1, "seed": 0, "task": 0, "label": "cmr tones 2-2", "text": "learned"})
    assert watched.left == pytest.approx((300 - 200) / 10)


def test_the_estimate_never_rises_while_the_speed_stays():
    watched = Watched(plan=(40, 20, 20), seeds=(0, 1), trials=2)
    estimates = []
    for trial in (1, 2):
        for seed in (0, 1):
            for task, clips in enumerate(watched.progress.plan):
                if trial == 1 or task:
                    for _ in range(2):
                        watched.epochs(f"trial {trial} seed {seed} task {task + 1}/3 n", clips / 2, 1, of=2, seconds=clips / 2)
                        estimates.append(watched.left)
                watched.task(trial, task, seed)
                estimates.append(watched.left)
        watched.trial(trial, 0.5)
        estimates.append(watched.left)
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[-1] == 0


def test_tasks_of_ten_and_more_are_told_apart():
    watched = Watched(plan=(10,) * 12, trials=11)
    for trial in (1, 11):
        watched.epochs(f"trial {trial} seed 0 task 11/12 n", 5, 1, of=2, seconds=1.0)
    before = watched.left
    watched.task(trial=1, task=0)
    assert watched.left == pytest.approx(before - 10 / 5)
    watched.task(trial=1, task=10)
    assert watched.left == pytest.approx(before - 10 / 5 - 5 / 5)


def test_a_trial_that_fails_leaves_nothing_to_do():
    watched = Watched(plan=(100, 50), trials=2)
    watched.epochs("trial 1 seed 0 task 1/2 n", 100, 1, seconds=10.0)
    watched.task(1, 0)
    watched.epochs("trial 1 seed 0 task 2/2 n", 10, 2, of=5, seconds=1.0)
    watched.trial(1)
    assert watched.left == pytest.approx(50 / 10)
    assert "1/2 trials done, about" in watched.progress.state()
    watched.trial(2, 0.25)
    assert watched.left == 0
    assert "2/2 trials done, best 0.2500" in watched.progress.state()


def test_rehearsed_rows_never_make_the_estimate_negative():
    watched = Watched(plan=(10,))
    watched.epochs("seed 0 task 1/1 n", 15, 1, of=2, seconds=1.0)
    assert watched.left == 0


def test_the_best_value_is_the_highest():
    watched = Watched(plan=(10,), trials=4)
    for trial, value in enumerate((0.3, 0.5, 0.4, None), start=1):
        watched.trial(trial, value)
    assert watched.progress.best == 0.5


def test_epochs_print_at_most_every_five_seconds_and_all_else_at_once():
    watched = Watched(plan=(1000,))
    watched.epochs("seed 0 task 1/1 n", 1, 100, seconds=0.5)
    assert len(watched.lines) == 10
    assert watched.lines[0].startswith("[00:00:05] seed 0 task 1/1 n epoch 10/100 loss 0.5000 10 clips/s | 0/1 trials done")
    watched.progress({"kind": "note", "text": "hello"})
    watched.progress({"kind": "note", "text": "again"})
    assert watched.lines[-2:] == ["[00:00:50] hello", "[00:00:50] again"]
    watched.epochs("seed 0 task 1/1 n", 1, 9, of=200, seconds=0.5)
    assert len(watched.lines) == 12


def test_there_is_a_line_every_twenty_seconds_whatever_happens():
    watched = Watched(plan=(10,))
    for _ in range(200):
        watched.clock.seconds += 0.5
        watched.progress.heartbeat()
    assert [line[:10] for line in watched.lines] == [f"[{clock(20 * n)}]" for n in range(1, 6)]
    watched.progress({"kind": "note", "text": "x"})
    watched.clock.seconds += 19.5
    watched.progress.heartbeat()
    assert len(watched.lines) == 6
    assert progress_module.POLL_SECONDS < 1


def test_tasks_and_trials_are_told():
    watched = Watched(plan=(10, 10))
    watched.task(1, 0)
    watched.trial(1, 0.125)
    assert watched.lines == [
        "[00:00:00] trial 1: learned | 0/1 trials done, estimating",
        "[00:00:00] trial 1: ended | 1/1 trials done, best 0.1250, about 00:00:00 left",
    ]
    silent({"kind": "note"})


def test_a_watcher_hands_on_what_arrives_and_what_is_left_at_the_end(monkeypatch):
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.005)
    queue, got, idle = [{"kind": "a"}], [], threading.Event()

    def source():
        events, queue[:] = list(queue), []
        return events

    with watched(source, got.append, idle.set):
        assert idle.wait(5)
        queue.append({"kind": "b"})
    assert got == [{"kind": "a"}, {"kind": "b"}]


def test_a_watcher_raises_at_its_end_what_went_wrong(monkeypatch):
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.005)

    def source():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), watched(source, silent, lambda: None):
        time.sleep(0.05)


def test_missing_blocks_are_told_every_few_seconds_and_at_the_end():
    clock, told = iter([0.0, 2.0, 6.0, 8.0, 9.0]), []
    notes = BlockNotes("set", told.append, now=lambda: next(clock))
    for done in range(1, 5):
        notes(done, 4)
    assert [event["text"] for event in told] == [
        "set: 2 of 4 missing blocks done, about 00:00:06 left",
        "set: 4 of 4 missing blocks done, about 00:00:00 left",
    ]
    assert {event["kind"] for event in told} == {"note"}
