"""Optuna behind Tune's interface, without a cluster: what is drawn, what is told, and how a search goes on after a cut."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cavs_model.errors import InputError
from orchestrator.cli import SearchSpace
from orchestrator.experiment import Objective
from orchestrator.ledger import Ledger
from orchestrator.search import (
    FAILURE,
    JOURNAL,
    OUTAGE,
    SAMPLERS,
    STARTUP_TRIALS,
    TASKS_LEFT,
    WATCH_SECONDS,
    Budgets,
    Search,
    StudySearch,
    Undertaker,
    described,
    sampler_of,
    seed_of_trial,
)
from search_spaces import tones

METRIC = "val/miou/all"
SPACE = SearchSpace("tones", tones.BASE, (Objective(METRIC),), tones.define)
TWO = (Objective(METRIC), Objective("memory/bytes", "min"))


def value_of(knobs: dict[str, float]) -> float:
    """An objective with its optimum inside the ranges."""
    return -((knobs["method.samples_per_class"] - 3) ** 2) - 10 * (knobs["method.resampling_ratio"] - 0.2) ** 2


def searcher(ledger: Ledger, trials: int, sampler: str = "tpe", objectives: tuple[Objective, ...] = SPACE.objectives):
    return StudySearch(SPACE, objectives, ledger, Search(trials, sampler))


def run(search: StudySearch, ledger: Ledger, stop_after: int = 1000) -> bool:
    """Runs trials one at a time as Tune and the driver's log would; whether the search came to its end.

    The trial after `stop_after` is begun and cut off.
    """
    for count in range(stop_after + 1):
        suggested = search.suggest(str(count))
        if suggested == "FINISHED":
            return True
        if count == stop_after:
            return False
        number, knobs = suggested["number"], suggested["knobs"]
        metrics = {METRIC: value_of(knobs), "memory/bytes": knobs["method.samples_per_class"]}
        search.on_trial_complete(str(count), {**metrics, TASKS_LEFT: 0})
        ledger.change(number, state="FINISHED", metrics=metrics)
    raise AssertionError("no end")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objectives", [SPACE.objectives, TWO], ids=["one", "two"])
def test_a_search_that_was_cut_off_draws_what_an_undisturbed_one_does(sampler, objectives, tmp_path: Path) -> None:
    undisturbed = Ledger(tmp_path, {})
    assert run(searcher(undisturbed, 10, sampler, objectives), undisturbed)
    drawn = [tuple(trial.config.values()) for trial in undisturbed.trials.values()]
    assert len(drawn) == 10
    assert len(set(drawn[:STARTUP_TRIALS])) == STARTUP_TRIALS

    ledger = Ledger(tmp_path, {})
    for cut in (2, 4):
        assert not run(searcher(ledger, 10, sampler, objectives), ledger, cut)
        ledger = Ledger.open(tmp_path, {})
    assert run(searcher(ledger, 10, sampler, objectives), ledger)
    assert ledger.trials == undisturbed.trials


def test_trials_can_be_added_and_none_is_run_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    assert run(searcher(ledger, 3), ledger)
    before = dict(ledger.trials)
    assert searcher(ledger, 3).suggest("x") == "FINISHED"
    assert run(searcher(ledger, 5), ledger)
    assert set(ledger.trials) == {1, 2, 3, 4, 5}
    assert {number: ledger.trials[number] for number in before} == before


def test_a_pruned_trial_is_told_as_pruned_and_known_after_a_cut(tmp_path: Path) -> None:
    ledger, posted = Ledger(tmp_path, {}), []
    search = StudySearch(SPACE, SPACE.objectives, ledger, Search(5, "tpe", asha=2), posted.append)
    search.suggest("a")
    search.on_trial_complete("a", {METRIC: 0.25, TASKS_LEFT: 2, "training_iteration": 1})
    ((event),) = posted
    assert (event["trial"], event["status"], event["text"]) == (1, "PRUNED", "pruned after 1 of 3 tasks")
    ledger.change(1, state="PRUNED", metrics={METRIC: 0.25}, run="r", logged={"r": 0})
    before = journal(tmp_path)
    searcher(Ledger.open(tmp_path, {}), 5)
    for (trial,) in (before, journal(tmp_path)):
        assert trial.state is optuna.trial.TrialState.PRUNED
        assert trial.intermediate_values == {1: 0.25}


def test_the_journal_shows_every_trial_that_ended_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    run(searcher(ledger, 5), ledger, stop_after=2)
    assert [trial.values for trial in journal(tmp_path)] == [[value_of(ledger.trials[n].config)] for n in (1, 2)]
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"op_code": 4')  # as a killed process leaves it
    ledger = Ledger.open(tmp_path, {})
    run(searcher(ledger, 5), ledger)
    assert [trial.params for trial in journal(tmp_path)] == [trial.config for trial in ledger.trials.values()]


def journal(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.load_study(study_name=folder.name, storage=storage).trials


def test_a_trial_that_met_an_outage_is_told_nothing_and_goes_on_later(tmp_path: Path) -> None:
    """It ended every such trial as failed for good, so that a full disk left nothing of a sweep to go on with."""
    ledger = Ledger(tmp_path, {})
    search = searcher(ledger, 5)
    first, second = search.suggest("a"), search.suggest("b")
    search.on_trial_complete("a", {OUTAGE: "no space left", METRIC: math.nan, TASKS_LEFT: 0})
    assert search.spent() == "no space left"
    assert search.suggest("c") == "FINISHED"
    assert [trial.state.name for trial in search._study.trials] == ["RUNNING", "RUNNING"]
    search.on_trial_complete("b", {METRIC: 1.0, TASKS_LEFT: 1})  # stopped between its tasks
    assert [trial.state for trial in ledger.trials.values()] == ["RUNNING", "RUNNING"]
    again = searcher(Ledger.open(tmp_path, {}), 5)
    assert not again.spent()
    assert [again.suggest(name) for name in "ab"] == [first, second]


@pytest.mark.parametrize(
    ("result", "error"),
    [(None, True), ({METRIC: 1.0, TASKS_LEFT: 0, FAILURE: "x"}, False), ({METRIC: 1.0, TASKS_LEFT: 1}, False), (None, False),
     ({METRIC: math.nan, TASKS_LEFT: 0}, False)],
)  # fmt: skip
def test_a_trial_that_did_not_end_well_has_no_value(result, error, tmp_path: Path) -> None:
    search = StudySearch(SPACE, SPACE.objectives, Ledger(tmp_path, {}), Search(5, "tpe", budgets=Budgets(target=-1e9)))
    search.suggest("a")
    search.on_trial_complete("a", result, error)
    assert search.spent() == ""
    search.suggest("b")
    search.on_trial_complete("b", {METRIC: 0.5, TASKS_LEFT: 0})
    assert "target" in search.spent()
    assert search.suggest("c") == "FINISHED"


@pytest.mark.parametrize(
    ("budgets", "values", "mode", "told"),
    [
        (Budgets(), [1.0] * 50, "max", ""),
        (Budgets(wall_clock_s=61), [], "max", ""),
        (Budgets(wall_clock_s=60), [], "max", "wall clock"),
        (Budgets(worker_seconds=101), [], "max", ""),
        (Budgets(worker_seconds=100), [], "max", "100 of 100 worker-seconds"),
        (Budgets(target=0.5), [0.4, 0.49], "max", ""),
        (Budgets(target=0.5), [0.5, 0.1], "max", "target"),
        (Budgets(target=0.5), [0.6, 0.9], "min", ""),
        (Budgets(target=0.5), [0.4, 0.9], "min", "target"),
        (Budgets(plateau=2), [0.1, 0.2, 0.2], "max", ""),  # one trial without a better value
        (Budgets(plateau=2), [0.1, 0.2, 0.2, 0.1], "max", "2 trials in a row"),
        (Budgets(plateau=2), [0.1, 0.2, 0.3], "min", "2 trials in a row"),
    ],
)
def test_a_budget_is_spent_at_its_limit_and_not_before(budgets, values, mode, told) -> None:
    reason = budgets.spent(values, Objective(METRIC, mode), seconds=60.0, worker_seconds=100.0)
    assert told in reason
    assert bool(reason) == bool(told)


@pytest.mark.parametrize(
    ("name", "told"), [("wall_clock_s", "--wall-clock"), ("worker_seconds", "--worker-seconds"), ("plateau", "--plateau")]
)
def test_a_budget_of_nothing_is_refused(name, told) -> None:
    with pytest.raises(InputError, match=f"{told} must be positive, not 0"):
        Budgets(**{name: 0})


def test_a_space_is_described_by_its_knobs_and_ranges() -> None:
    found = described(SPACE)
    assert set(found) == {"method.samples_per_class", "method.resampling_ratio"}
    assert found["method.samples_per_class"]["attributes"]["high"] == 4


def test_the_gp_draws_no_configuration_twice():
    """A repeatable objective with ups and downs, best at a corner: expecting noise, it drew the corner again and again."""
    study, drawn = optuna.create_study(direction="maximize"), []
    for number in range(1, 16):
        study.sampler = sampler_of("gp", seed_of_trial(1, number))
        trial = study.ask()
        samples, ratio = trial.suggest_int("samples", 1, 10), trial.suggest_float("ratio", 0.05, 0.3)
        drawn.append((samples, round(ratio, 4)))
        study.tell(trial, 0.004 * samples / 10 + 0.012 * math.sin(1000 * ratio + samples))
    assert len(set(drawn)) == len(drawn)


def test_orphans_are_looked_for_a_while_after_a_death_and_never_else(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, clock = [], [100.0]
    monkeypatch.setattr("orchestrator.search.remove_orphans", lambda: looks.append(clock[0]))
    undertaker = Undertaker(lambda: clock[0])
    undertaker()
    assert looks == []
    for told in (undertaker.on_trial_recover, undertaker.on_trial_error):
        told(iteration=1, trials=[], trial=None)
        undertaker()
        clock[0] += WATCH_SECONDS - 1
        undertaker()
        clock[0] += 1
        undertaker()
    assert looks == [100.0, 99.0 + WATCH_SECONDS, 100.0 + WATCH_SECONDS, 99.0 + 2 * WATCH_SECONDS]
