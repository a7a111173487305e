"""The search: Ray Tune asks Optuna for knobs, a trial runs the continual protocol over its seeds.

A trial is a driver function: it owns no CPU, starts fits and tasks, and reports between them, when no worker group lives that
a stopped trial would leave behind. Seeds run inside the trial; a failed seed fails the trial, it is never averaged away.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from cavs_model.errors import unknown
from orchestrator.cli import SearchSpace
from orchestrator.experiment import Experiment, Objective, override
from orchestrator.ray_backend import RayBackend
from orchestrator.store import StoredBackend
from orchestrator.stream import TaskOutcome, run_stream
from orchestrator.tracker import record_of

Sampler = Literal["tpe", "gp"]
SAMPLERS = ("tpe", "gp")
STARTUP_TRIALS = 4  # drawn at random before the model of the objective is trusted
DRIVER_MEMORY_BYTES = 512 * 2**20  # what a trial's driver takes; Tune refuses a trial that asks for nothing


@dataclass(frozen=True)
class Plan:
    """What a trial needs besides its knobs. Pickles."""

    experiment: Experiment
    objectives: tuple[Objective, ...]
    backend: RayBackend
    store: Path


def run_trial(config: Mapping[str, Any], plan: Plan) -> None:
    """One trial: all seeds' streams abreast, task by task; the mean over seeds is reported after every task."""
    mailbox = plan.backend.mailbox
    number = ray.get(mailbox.number.remote(tune.get_context().get_trial_id()))
    label = f"trial {number}"

    def post(kind: str, **fields: Any) -> None:
        ray.get(mailbox.post.remote({"kind": kind, "trial": number, "label": label, **fields}))

    experiment = override(plan.experiment, config)
    post("start", config=dict(config), experiment=experiment)
    backend = StoredBackend(
        plan.backend, plan.store, on_wait=lambda what: post("note", text=f"{what}: another trial is computing it")
    )
    streams = [run_stream(experiment, seed, backend, label=f"{label} ") for seed in experiment.seeds]
    try:
        for outcomes in zip(*streams, strict=True):
            for outcome in outcomes:
                post("task", seed=outcome.seed, task=outcome.task.index, num_tasks=outcome.num_tasks,
                     record=record_of(outcome), text=outcome.headline())  # fmt: skip
            report = mean_over_seeds(outcomes)
            report |= {"reused_worker_seconds": backend.reuse.reused_seconds,
                       "computed_worker_seconds": backend.reuse.computed_seconds}  # fmt: skip
            post("report", metrics=report, task=outcomes[0].task.index)
            tune.report(report)
    except BaseException as error:
        post("trial", status="FAILED", text=f"failed: {type(error).__name__}: {error}", value=None)
        raise
    value = report[plan.objectives[0].metric]
    post("trial", status="FINISHED", text=f"done, {plan.objectives[0].metric} {value:.4f}", value=value)


def mean_over_seeds(outcomes: tuple[TaskOutcome, ...]) -> dict[str, Any]:
    """Mean of every metric over the seeds under its own name, and its spread (standard deviation) under "<name>/std".

    Diagnoses are among them; which names there are follows from the labels alone, so all seeds have the same.
    """
    metrics = [outcome.metrics() | outcome.diagnoses() for outcome in outcomes]
    report: dict[str, Any] = {}
    for name in metrics[0]:
        values = [of_seed[name] for of_seed in metrics]
        report[name] = statistics.fmean(values)
        if len(values) > 1:
            report[f"{name}/std"] = statistics.stdev(values)
    return report


def sampler_of(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler by name. InputError for an unknown one."""
    if kind == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    if kind == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    raise unknown("sampler", kind, SAMPLERS)


@dataclass(frozen=True)
class TrialResult:
    """One row of the table of trials. `error` is empty where the trial ended well."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    error: str = ""


def search(
    space: SearchSpace, plan: Plan, trials: int, concurrency: int, sampler: str, seed: int, folder: Path
) -> list[TrialResult]:
    """Runs the trials and returns them all, failed ones too. Tune's own state lies under `folder`/tune."""
    objective = plan.objectives[0]
    # Tune's own table of trials and Optuna's greeting would run into our progress lines.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    algorithm = OptunaSearch(
        space=space.define, metric=objective.metric, mode=objective.mode, sampler=sampler_of(sampler, seed)
    )
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"cpu": 0, "memory": DRIVER_MEMORY_BYTES})
    results = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            metric=objective.metric,
            mode=objective.mode,
            num_samples=trials,
            max_concurrent_trials=concurrency,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=0)
        ),
    ).fit()
    return [
        TrialResult(result.config or {}, result.metrics or {}, str(result.error).strip() if result.error else "")
        for result in (results[index] for index in range(len(results)))
    ]
