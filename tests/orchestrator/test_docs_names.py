"""docs/ against the names of the code: hooks and stages of methods, metrics, and the words that architecture.md explains."""

import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import torch

import cavs_model.methods
from cavs_model.checkpoint import About
from cavs_model.methods.base import Method, RehearsalMethod, Stage
from cavs_model.metrics import diagnoses, frame_summary, stream_summary, summary
from cavs_model.scenario import FILTERS
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, LabelRule, Rehearsal, State, Task
from orchestrator import ledger, search
from orchestrator.entries import KINDS
from orchestrator.experiment import members
from orchestrator.node_metrics import Sampler, gpus
from orchestrator.stream import TaskOutcome
from orchestrator.tracker import record_of

DOCS = Path(__file__).parents[2] / "docs"
METHODS = members(cavs_model.methods, Method)


def rows(page, head):
    """The rows of the tables of a page whose header begins with this cell; cells as text, the first without backquotes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (DOCS / page).read_text(), re.M):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        if lines[0][0] == head:
            assert {len(line) for line in lines} == {len(lines[0])}, block
            found += [[line[0].strip("`"), *line[1:]] for line in lines[2:]]
    return found


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


def changed_by(name):
    """The methods that define a hook themselves."""
    own = {file: [each for each in kind.__mro__ if each not in (Method, RehearsalMethod)] for file, kind in METHODS.items()}
    return {file for file, kinds in own.items() if any(name in vars(each) for each in kinds)}


# extending.md


def test_every_hook_stands_in_extending():
    hooks = rows("extending.md", "hook")
    assert sorted(row[0] for row in hooks) == sorted(public(Method))
    for name, *_, who in hooks:
        if who == "every method but replay":
            assert changed_by(name) >= {*METHODS} - {"replay"}
        else:  # a method of yours need not be named
            assert {*filter(None, who.split(", "))} <= changed_by(name), name


def test_what_is_passed_on_to_the_base_is_told():
    [told] = re.findall(r"^`RehearsalMethod` is for.*?(?=\n\n)", (DOCS / "extending.md").read_text(), re.M | re.S)
    passed = re.search(r"passes (.*) on to `base`", told, re.S)[1]
    assert {*re.findall(r"`(\w+)`", passed), "remembers"} == public(RehearsalMethod)


def test_every_stage_stands_in_extending():
    assert [row[0] for row in rows("extending.md", "stage")] == list(typing.get_args(Stage))


# metrics.md


def named(page):
    """What stands between backquotes, `a/b/c` with the forms that follow it: `, `/d` is a/b/d."""
    found = set()
    for first, more in re.findall(r"`([^`\n]+)`((?:, `/[^`\n]+`)*)", (DOCS / page).read_text()):
        found |= {first, *(first.rpartition("/")[0] + other for other in re.findall(r"`(/[^`\n]+)`", more))}
    return found


def metrics_of_a_stream():
    """All names that a stream's task can have: the second task, in which every class has pixels, with means over frames."""
    counts, before = np.full((5, 5), 3, np.int64), np.full((3, 3), 3, np.int64)
    frames = np.full((6, 3), 7, np.int64)
    names = ("background", "a", "b", "c", "d")
    about = About(AUDIO_VISUAL, 5, {}, ({"loss": 1.0},), 10, 2.0, 3)
    outcome = TaskOutcome(
        0, Task(1, 3, 5, (), LabelRule(range(3, 5), BACKGROUND)), 2, names, 3, State({AUDIO_VISUAL: "x"}), None, Rehearsal(),
        None, {AUDIO_VISUAL: about}, {"val": counts}, 0, 0, earlier=({"val": before.tolist()},), frames={"val": frames},
    )  # fmt: skip
    # The measures by themselves too, should record_of leave one out.
    history = [torch.from_numpy(before), torch.from_numpy(counts)]
    measured = summary(history[-1], 3) | diagnoses(history[-1], 3) | stream_summary(history)
    measured |= frame_summary(torch.from_numpy(frames))
    return {name.removeprefix("val/") for name in {*record_of(outcome).metrics, *measured}}


def test_every_metric_of_a_stream_stands_in_metrics():
    wanted = metrics_of_a_stream()
    assert {"miou/all", "drift/old", "stream/forgetting", "frame/miou/mean_of_frames", "cost/worker_seconds"} <= wanted
    assert wanted - named("metrics.md") == set()


def test_every_metric_of_a_trial_stands_in_metrics():
    costs = {search.MEMORY_BYTES, search.WORKER_SECONDS, ledger.COMPUTED, ledger.COMPUTED_OUTCOMES, ledger.REUSED}
    costs |= {ledger.REUSED_OUTCOMES, "objective", "<name>/std"}
    assert costs - named("metrics.md") == set()


def test_every_metric_of_a_node_stands_in_metrics():
    found = {f"system/<node>/{name}" for name in {*Sampler().sample(), *(gpus("1, 2, 3"))}}
    assert {name.replace("gpu_0_", "gpu_<i>_") for name in found} - named("metrics.md") == set()


def test_metrics_names_nothing_that_is_not_there():
    groups = ("miou/", "f_score/", "drift/", "confusion/", "stream/", "frame/", "memory/", "cost/")
    told = {row[0].split("`")[0] for row in rows("metrics.md", "name")}
    assert {name for name in told if name.startswith(groups)} <= metrics_of_a_stream()


def test_every_artifact_of_a_task_stands_in_metrics():
    text = (DOCS / "metrics.md").read_text()
    for name in ("confusion_<split>", "matrix_<split>", "memory", "networks", "scores", "collisions"):
        assert f"`task_<i>/{name}.json`" in text


# architecture.md


def words():
    text = (DOCS / "architecture.md").read_text()
    section = text[text.index("## Words used here") :].partition("\n## ")[0]
    return {word: told for told in section.split("\n- ")[1:] for word in re.findall(r"\*\*([^*]+)\*\*", told)}


def test_words_of_the_code_and_of_the_readme_are_explained():
    told = {word.lower() for word in words()}
    wanted = {"16-8", *FILTERS, "base task", "stream", "trial", "outcome", "row", "pod", "tpavi", "mss", "csr", "asha", "knob"}
    assert wanted | {"store entry", "worker-second", "memory", "teacher", "driver", "fingerprint"} <= told
    for kind in KINDS:
        assert kind in words()["Outcome"]


def test_the_index_leads_to_the_words():
    assert "(architecture.md#words-used-here)" in (DOCS / "README.md").read_text()


def test_methods_have_no_field_that_a_stage_of_the_page_does_not_know():
    stages = {row[0] for row in rows("extending.md", "stage")}
    for kind in METHODS.values():
        for item in dataclasses.fields(kind):
            assert set(item.metadata["acts"]) <= stages
