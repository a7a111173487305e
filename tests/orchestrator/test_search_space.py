"""The contract of a file in search_spaces/: what it defines, and that its knobs fit its base."""

import pickle
import pkgutil

import optuna
import pytest
import torch

import search_spaces
from cavs_model.datasets.avsbench import AVSBench
from cavs_model.datasets.clip_files import VideoFolder
from cavs_model.metrics import summary
from orchestrator.cli import DEFAULT_SPACE, load_space, open_knobs
from orchestrator.experiment import Experiment, Objective, flatten, override
from orchestrator.search import MEMORY_BYTES, WORKER_SECONDS

NAMES = sorted(info.name for info in pkgutil.iter_modules(search_spaces.__path__))


def test_the_default_is_there():
    assert DEFAULT_SPACE in NAMES


@pytest.mark.parametrize("name", NAMES)
class TestEverySpace:
    def test_it_says_what_it_asks(self, name):
        space = load_space(name)
        assert space.name == name
        assert space.doc.strip()
        assert isinstance(space.base, Experiment)
        assert space.objectives
        assert all(isinstance(objective, Objective) for objective in space.objectives)

    def test_it_travels_to_workers(self, name):
        space = load_space(name)
        assert space.define.__module__ == f"search_spaces.{name}"
        assert pickle.loads(pickle.dumps(space.define)) is space.define
        assert pickle.loads(pickle.dumps(space.base)) == space.base

    def test_its_scenario_fits_its_benchmark(self, name):
        base = load_space(name).base
        assert len(base.scenario.class_counts(base.benchmark)) > 1
        assert base.scenario.learned_order(base.benchmark)
        if not isinstance(base.benchmark, VideoFolder):  # whose videos are the user's
            assert len(base.scenario.tasks(base.benchmark)) > 1
        assert "val" in base.benchmark.splits()

    def test_its_metric_is_one_that_outcomes_report(self, name):
        space = load_space(name)
        counts = space.base.scenario.class_counts(space.base.benchmark)
        matrix = torch.eye(1 + sum(counts), dtype=torch.int64)
        reported = {f"val/{metric}" for metric in summary(matrix, 1 + counts[0])}
        # The objective is read after every task, the base task included.
        after_base = {f"val/{metric}" for metric in summary(matrix[: 1 + counts[0], : 1 + counts[0]], 1 + counts[0])}
        for objective in space.objectives:
            assert objective.metric in (reported & after_base) | {MEMORY_BYTES, WORKER_SECONDS}
        assert space.objectives[0].metric in reported  # the best by it is tested

    def test_its_knobs_are_fields_of_the_base_and_stay_in_range(self, name):
        space = load_space(name)
        knobs = open_knobs(space)
        assert set(knobs) <= set(flatten(space.base))
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(50):
            trial = study.ask()
            space.define(trial)
            assert set(trial.params) == set(knobs)
            flat = flatten(override(space.base, trial.params))
            assert {path: flat[path] for path in trial.params} == trial.params


def test_the_default_search_opens_buffer_size_and_resampling_ratio():
    assert open_knobs(load_space(DEFAULT_SPACE)) == {"method.samples_per_class": 1, "method.resampling_ratio": 0.05}


def test_every_published_setting_of_avsbench_has_a_space():
    spaces = [load_space(name).base for name in NAMES]
    found = {base.scenario.setting for base in spaces if isinstance(base.benchmark, AVSBench)}
    assert found == set(AVSBench().settings())
