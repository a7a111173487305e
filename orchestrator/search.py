"""The search: Ray Tune asks Optuna for knobs, a trial runs the continual protocol over its seeds.

A trial is a driver function: it owns no CPU, starts fits and tasks, and reports between them, when no worker group lives that
a stopped trial would leave behind. Seeds run inside the trial; a failed seed fails the trial, it is never averaged away.

Optuna's study lives in memory and is made anew from the ledger when a sweep goes on. A trial is drawn by a sampler of its own,
seeded by the search's seed and the trial's number: what is drawn depends on the trials known by then, not on interruptions.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import ray
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, TrialState, create_trial
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from cavs_model.errors import InputError, OutageError, unknown
from cavs_model.train import DivergedError
from orchestrator.cli import SearchSpace
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, Objective, override
from orchestrator.ledger import COMPUTED, COMPUTED_OUTCOMES, REUSED, REUSED_OUTCOMES, Ledger
from orchestrator.orphans import remove_orphans
from orchestrator.outage import Patience
from orchestrator.ray_backend import RayBackend
from orchestrator.store import Reuse, StoredBackend
from orchestrator.stream import TaskOutcome, run_stream
from orchestrator.tracker import record_of

Sampler = Literal["tpe", "gp", "nsga2"]
SAMPLERS = ("tpe", "gp", "nsga2")
STARTUP_TRIALS = 4  # drawn at random before the model of the objective is trusted
NUMBER = "trial"  # in the journal, where trials stand in the order in which they ended
JOURNAL = "study.journal"  # the study as optuna-dashboard reads it, beside the ledger
GENERATION = ":generation"  # how the attribute ends by which NSGA-II knows a trial's generation
POPULATION = 8  # of NSGA-II; Optuna's 50 would make a search of this size a random one
DRIVER_MEMORY_BYTES = 512 * 2**20  # what a trial's driver takes; Tune refuses a trial that asks for nothing
MEMORY_BYTES, WORKER_SECONDS = "memory/bytes", "cost/worker_seconds"  # of a trial, beside the metrics of its outcomes
WATCH_SECONDS = 60.0  # after a driver's death: of a lost node Ray learns late, and the order of its news is nowhere promised
TASKS_LEFT = "tasks_left"  # of a report: 0 where none follows
FAILURE, OUTAGE = "failure", "outage"  # of a report: why there is no value


@dataclass(frozen=True)
class Plan:
    """What a trial needs besides its knobs. Pickles."""

    experiment: Experiment
    objectives: tuple[Objective, ...]
    backend: RayBackend
    store: Entries
    user: str  # on whose account entries of the store are used
    patience: Patience  # with outages


def run_trial(config: Mapping[str, Any], plan: Plan) -> None:
    """One trial: all seeds' streams abreast, task by task; the mean over seeds is reported after every task.

    `config` is {"number": ..., "knobs": {path: value}}. What would fail again the same way is reported, not raised, so that
    Tune does not try it again.
    """
    number, knobs = config["number"], config["knobs"]
    label = f"trial {number}"
    reuse, reported = Reuse(), 0

    def post(kind: str, **fields: Any) -> None:
        ray.get(plan.backend.mailbox.post.remote({"kind": kind, "trial": number, "label": label, **fields}))

    def learn(experiment: Experiment) -> None:
        nonlocal reported
        backend = StoredBackend(
            plan.backend,
            plan.store,
            on_wait=lambda what: post("note", text=f"{what}: another trial is computing it"),
            reuse=reuse,
            user=plan.user,
            on_damage=lambda text: post("note", text=text),
        )
        streams = [run_stream(experiment, seed, backend, label=f"{label} ") for seed in experiment.seeds]
        worker_seconds = 0.0
        for outcomes in zip(*streams, strict=True):
            worker_seconds += statistics.fmean(_worker_seconds(outcome) for outcome in outcomes)
            task = outcomes[0].task.index
            if task < reported:  # before an outage
                continue
            for outcome in outcomes:
                post("task", seed=outcome.seed, task=task, num_tasks=outcome.num_tasks,
                     record=record_of(outcome), text=outcome.headline())  # fmt: skip
            report = mean_over_seeds(outcomes)
            report |= {MEMORY_BYTES: statistics.fmean(outcome.memory_bytes for outcome in outcomes),
                       WORKER_SECONDS: worker_seconds,
                       REUSED_OUTCOMES: reuse.reused,
                       REUSED: reuse.reused_seconds,
                       COMPUTED_OUTCOMES: reuse.computed,
                       COMPUTED: reuse.computed_seconds}  # fmt: skip
            post("report", metrics=report, task=task)
            if outcomes[0].is_last:  # said before Tune knows: it may stop a trial at any report
                value = report[plan.objectives[0].metric]
                text = f"done, {plan.objectives[0].metric} {value:.4f}"
                post("trial", status="FINISHED", text=text, value=value)
            reported = task + 1
            tune.report(report | {TASKS_LEFT: outcomes[0].num_tasks - reported})

    try:
        experiment = override(plan.experiment, knobs)
        post("start", config=dict(knobs), experiment=experiment)
        plan.patience.through(lambda: learn(experiment), lambda text: post("note", text=text), lambda: reported)
    except OutageError as outage:  # nothing of the trial's: it goes on with the sweep
        post("note", text=f"given up for now: {outage}")
        tune.report(_nothing(plan) | {OUTAGE: str(outage)})
    except Exception as error:  # an interrupt is no failure: the trial goes on with the sweep
        final = isinstance(error, (InputError, DivergedError))
        reason = f"{type(error).__name__}: {error}"
        post("trial", status="FAILED", final=final, text=f"failed: {reason}", error=reason, value=None)
        if not final:
            raise
        tune.report(_nothing(plan) | {FAILURE: reason})


def _nothing(plan: Plan) -> dict[str, Any]:
    """A report without a value, whose trial ends."""
    return {TASKS_LEFT: 0, **{objective.metric: float("nan") for objective in plan.objectives}}


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


def _worker_seconds(outcome: TaskOutcome) -> float:
    return sum(about.seconds * about.world_size for about in outcome.trained.values())


def sampler_of(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler by name. InputError for an unknown one."""
    if kind == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
    if kind == "gp":
        # The same configuration gives the same stream: to a sampler that expects noise its best one is worth drawing again.
        with warnings.catch_warnings():  # every sweep would begin by telling its user that this argument may change
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.GPSampler(n_startup_trials=STARTUP_TRIALS, seed=seed, deterministic_objective=True)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    raise unknown("sampler", kind, SAMPLERS)


def seed_of_trial(seed: int, number: int) -> int:
    """The seed of the sampler that draws a trial."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _study(directions: Sequence[Literal["maximize", "minimize"]], sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """A study in memory, without a greeting."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=directions, sampler=sampler)


def _journal(folder: Path, directions: Sequence[StudyDirection]) -> optuna.Study:
    """An empty study in a journal file, to which trials are added as they end: `optuna-dashboard FOLDER/study.journal`.

    It is a copy and never read here. One that is there is made anew: a process that was killed may have left half a line.
    """
    for leftover in folder.glob(f"{JOURNAL}*"):  # its lock too
        leftover.unlink()
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.create_study(study_name=folder.name, directions=directions, storage=storage)


def described(space: SearchSpace) -> dict[str, Any]:
    """The space's knobs with their ranges, as plain values."""
    trial = _study(["maximize"], optuna.samplers.RandomSampler(seed=0)).ask()
    try:
        space.define(trial)
    except Exception as error:  # whatever a user's file does, and what Optuna says of it
        raise InputError(f"search space {space.name}: define(trial) failed: {type(error).__name__}: {error}") from error
    return {
        name: json.loads(optuna.distributions.distribution_to_json(distribution))
        for name, distribution in trial.distributions.items()
    }


def importance(
    knobs: Mapping[str, Any], trials: Sequence[tuple[Mapping[str, Any], float]], mode: Literal["max", "min"]
) -> dict[str, float]:
    """How much of an objective's variation over trials each knob accounts for, by Optuna's default method; largest first.

    `knobs` as `described` has them; trials are knobs with the objective's value. Empty for fewer than three trials, or where
    the knobs that trials have differ, or the objective does not.
    """
    if len(trials) < 3 or len({value for _, value in trials}) < 2 or any(set(config) != set(knobs) for config, _ in trials):
        return {}
    distributions = {name: optuna.distributions.json_to_distribution(json.dumps(each)) for name, each in knobs.items()}
    study = _study(["maximize" if mode == "max" else "minimize"], optuna.samplers.RandomSampler(seed=0))
    for config, value in trials:
        study.add_trial(create_trial(params=dict(config), distributions=distributions, value=value))
    return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}


@dataclass(frozen=True)
class Budgets:
    """What ends a search besides its number of trials; None where it does not.

    A budget that is spent lets no further trial begin, and running ones end after the task that they are in: nothing is
    stopped while workers train.
    """

    wall_clock_s: float | None = None  # of this command
    worker_seconds: float | None = None  # of the whole sweep; what the store had costs nothing
    target: float | None = None  # of the first objective
    plateau: int | None = None  # trials in a row without a better first objective

    def __post_init__(self) -> None:
        for name in ("wall_clock_s", "worker_seconds", "plateau"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.removesuffix('_s').replace('_', '-')} must be positive, not {value:g}")

    def spent(self, values: Sequence[float], objective: Objective, seconds: float, worker_seconds: float) -> str:
        """Which budget is spent, in words; empty where none is.

        `values` of the objective in the order of the trials, `seconds` since the search began.
        """
        if self.wall_clock_s is not None and seconds >= self.wall_clock_s:
            return f"the wall clock of {self.wall_clock_s:g} s ran out"
        if self.worker_seconds is not None and worker_seconds >= self.worker_seconds:
            return f"{worker_seconds:.0f} of {self.worker_seconds:g} worker-seconds were used"
        sign = -1 if objective.mode == "max" else 1
        costs = [sign * value for value in values]
        if self.target is not None and costs and min(costs) <= sign * self.target:
            return f"the target of {objective.metric} {self.target:g} was reached"
        if self.plateau is not None and costs and len(costs) - 1 - costs.index(min(costs)) >= self.plateau:
            return f"{self.plateau} trials in a row were no better"
        return ""


@dataclass(frozen=True)
class Search:
    """How knobs are drawn, and when it is enough."""

    trials: int
    sampler: str = "gp"
    seed: int = 0
    retries: int = 1  # of a trial that failed for another reason than its input or a diverged loss
    budgets: Budgets = Budgets()
    asha: int = 0  # ASHA's reduction factor: of the trials that learned as many tasks, one in so many goes on; 0: all do


class StudySearch(Searcher):
    """Optuna's study as Tune's searcher: knobs drawn and trials told, with what the ledger knows told first.

    Trials that were cut off are asked again before new ones are drawn. `post` gets the event of a trial that was pruned.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        ledger: Ledger,
        wanted: Search,
        post: Callable[[Mapping[str, Any]], object] = lambda event: None,
    ) -> None:
        super().__init__()
        self._post = post
        self._space, self._objectives, self._ledger, self._wanted = space, objectives, ledger, wanted
        self._started = time.monotonic()
        self._asked: dict[str, optuna.Trial] = {}  # by Tune's id
        self._study = _study(
            ["maximize" if objective.mode == "max" else "minimize" for objective in objectives],
            sampler_of(wanted.sampler, wanted.seed),
        )
        self._mirror = _journal(ledger.folder, self._study.directions)
        self._waiting = 0  # trials that were cut off
        self.outage = ""  # what a trial did not get through
        for number in range(1, max(ledger.trials, default=0) + 1):
            self._tell_of(number)

    def spent(self) -> str:
        """Why no further trial shall begin and those that run shall end; empty where nothing speaks against it."""
        if self.outage:
            return self.outage
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))  # by number
        return self._wanted.budgets.spent(
            [trial.values[0] for trial in ended],
            self._objectives[0],
            time.monotonic() - self._started,
            self._ledger.worker_seconds(),
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's own type forgets FINISHED
        """The next trial's number and knobs, or that there is none."""
        if (not self._waiting and len(self._study.trials) >= self._wanted.trials) or self.spent():
            return str(Searcher.FINISHED)
        number = len(self._study.trials) + 1
        if self._waiting:
            self._waiting -= 1
            number = 1 + min(trial.number for trial in self._study.get_trials(states=(TrialState.WAITING,)))
        self._study.sampler = sampler_of(self._wanted.sampler, seed_of_trial(self._wanted.seed, number))
        trial = self._study.ask()
        self._space.define(trial)
        trial.set_user_attr(NUMBER, number)
        self._asked[trial_id] = trial
        noted = self._study.trials[trial.number].system_attrs
        attrs = {name: value for name, value in noted.items() if name.endswith(GENERATION)}
        self._ledger.begin(number, trial.params, attrs)
        return {"number": number, "knobs": trial.params}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: what a trial reports on its way is in the ledger."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how a trial ended. One that was stopped between tasks is nothing that it could learn from."""
        trial = self._asked.pop(trial_id)
        if not error and result and OUTAGE in result:
            self.outage = str(result[OUTAGE])
            return
        ended = not error and result and FAILURE not in result and result.get(TASKS_LEFT) == 0
        values = [float(result[objective.metric]) for objective in self._objectives] if ended and result else []
        pruned = self._wanted.asha and not error and result and result.get(TASKS_LEFT) and not self.spent()
        if ended and all(math.isfinite(value) for value in values):
            self._study.tell(trial, values)
        elif pruned and result:  # Tune's own adapter would tell the value as if it were that of all tasks
            learned, number = int(result["training_iteration"]), trial.number + 1
            trial.report(float(result[self._objectives[0].metric]), learned)
            self._study.tell(trial, state=TrialState.PRUNED)
            text = f"pruned after {learned} of {learned + result[TASKS_LEFT]} tasks"
            self._post({"kind": "trial", "trial": number, "label": f"trial {number}", "status": "PRUNED", "text": text,
                        "value": None})  # fmt: skip
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self._mirror.add_trial(self._study.trials[trial.number])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it into a file that nobody reads

    def _tell_of(self, number: int) -> None:
        """Adds a trial of the ledger to the study, under its number."""
        known = self._ledger.trials.get(number)
        if known is None:
            raise InputError(f"damaged ledger in {self._ledger.folder}: trial {number} is missing; use --fresh")
        if known.state == "RUNNING":
            # As Study.enqueue_trial, which takes no attributes: NSGA-II gives a trial with fixed knobs no generation.
            attrs = {"fixed_params": dict(known.config), **known.attrs}
            self._study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
            self._waiting += 1
            return
        well, seen = known.state == "FINISHED", {}
        if known.state == "PRUNED":
            seen = {known.logged[known.run] + 1: float(known.metrics[self._objectives[0].metric])}
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if well else TrialState.PRUNED if seen else TrialState.FAIL,
                intermediate_values=seen,
                values=[float(known.metrics[objective.metric]) for objective in self._objectives] if well else None,
                params=dict(known.config),
                distributions=_distributions(self._space, known.config),
                system_attrs=dict(known.attrs),
                user_attrs={NUMBER: number},
            )
        )
        self._mirror.add_trial(self._study.trials[-1])


def _distributions(space: SearchSpace, knobs: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """What the space asks of a trial with these knobs."""
    trial = FixedTrial(dict(knobs))
    space.define(trial)
    return dict(trial.distributions)


class _StopBetweenTasks(tune.Stopper):
    """Stops a trial at a report, when none of its workers live, once a budget is spent."""

    def __init__(self, spent: Callable[[], str]) -> None:
        self._spent = spent

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return bool(result.get(TASKS_LEFT)) and bool(self._spent())

    def stop_all(self) -> bool:
        """Never: it would stop trials while their workers train."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Ending:
    """How a search ended: the budget that was spent ("" for the number of trials), and why trials broke off, by number.

    `outage` is what kept the search from its end, "" where nothing did.
    """

    reason: str
    errors: Mapping[int, str]
    outage: str = ""


class Undertaker(tune.Callback):
    """Removes what dead trials' drivers left. Tune tells of deaths, and who calls it gives it the time to look."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._until = now, float("-inf")

    def on_trial_recover(self, *_: Any, **__: Any) -> None:
        """A trial failed and will be tried again."""
        self._until = self._now() + WATCH_SECONDS

    on_trial_error = on_trial_recover

    def __call__(self) -> None:
        """Looks, within a while of a death."""
        if self._now() < self._until:
            remove_orphans()


def search(space: SearchSpace, plan: Plan, wanted: Search, concurrency: int, ledger: Ledger, undertaker: Undertaker) -> Ending:
    """Runs the trials that the ledger does not have yet. Tune's own state lies beside it in tune/.

    `undertaker` hears of trials whose driver died; whoever searches has to call it every now and then.
    """
    # Tune's own table of trials would run into our progress lines.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Its handler of SIGINT would end the search as if all trials had been run.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    mailbox, objective = plan.backend.mailbox, plan.objectives[0]
    algorithm = StudySearch(space, plan.objectives, ledger, wanted, lambda event: ray.get(mailbox.post.remote(event)))
    scheduler = None
    if wanted.asha:
        tasks = len(plan.experiment.scenario.class_counts(plan.experiment.benchmark))
        scheduler = ASHAScheduler(
            metric=objective.metric, mode=objective.mode, max_t=tasks, grace_period=1, reduction_factor=wanted.asha
        )
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"cpu": 0, "memory": DRIVER_MEMORY_BYTES})
    results = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=algorithm, scheduler=scheduler, num_samples=wanted.trials, max_concurrent_trials=concurrency
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(ledger.folder),
            verbose=0,
            callbacks=[undertaker],
            stop=_StopBetweenTasks(algorithm.spent),
            failure_config=tune.FailureConfig(max_failures=wanted.retries),
        ),
    ).fit()
    ended = [results[index] for index in range(len(results))]
    errors = {each.config["number"]: str(each.error).strip() for each in ended if each.config and each.error}
    return Ending(algorithm.spent(), errors, algorithm.outage)
