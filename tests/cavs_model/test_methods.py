"""The contracts that every method keeps, whichever file of methods/ it is in; and those of the knobs."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, base_task, batch, each_tensor, part, prediction, step, task
from torch import nn

import cavs_model.methods
from cavs_model.errors import InputError
from cavs_model.losses import cross_entropy
from cavs_model.methods.base import Method, acting, knob
from cavs_model.methods.cmr import CMR
from cavs_model.methods.eir import EIR
from cavs_model.methods.ewc import EWC
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.ilt import ILT
from cavs_model.methods.joint import Joint
from cavs_model.methods.lwf import LwF
from cavs_model.methods.lwf_mc import LwFMC
from cavs_model.methods.mib import MiB
from cavs_model.methods.plop import PLOP
from cavs_model.methods.replay import Replay, random_rows
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY, Mean, Memory, Sample, ScoreTable

STAGES = ("train", "consolidate", "score_before", "rehearse", "score_after", "remember")


def discovered() -> list[type[Method]]:
    found = []
    for info in pkgutil.iter_modules(cavs_model.methods.__path__):
        if info.name == "base":
            continue
        module = importlib.import_module(f"cavs_model.methods.{info.name}")
        own = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
        methods = [each for each in own if issubclass(each, Method) and each is not Method]
        assert len(methods) == 1, f"{info.name}.py must hold exactly one method"
        found += methods
    return found


METHODS = discovered()
VARIANTS = [PLOP(pod_maps="encoder"), MiB(unbiased_distillation=False), EIR(activation="sigmoid")]
NAMES = [each.__name__ for each in METHODS] + ["PLOP-encoder", "MiB-biased", "EIR-sigmoid"]
every_method = pytest.mark.parametrize("method", [*(each() for each in METHODS), *VARIANTS], ids=NAMES)


def prepared(method, given):
    """The step with what the method prepares, from a teacher that says what the step's teacher says."""
    if given.teacher is None:
        return given
    fresh = dataclasses.replace(given.batch, rehearsed=torch.zeros_like(given.batch.rehearsed))
    found = method.prepare(lambda _: given.teacher, iter([fresh]), given.task, lambda tensor: tensor)
    return dataclasses.replace(given, prepared=found)


def distilled_maps(method, student):
    """The maps that a method holds to the teacher's, by what its knobs say."""
    losses = getattr(method, "base", method)
    if isinstance(losses, PLOP):
        return student.features if losses.pod_maps == "fused" else (*student.encoder, student.features[-1])
    return student.encoder if isinstance(losses, ILT) else ()


def tensors(given):
    parts = [given.batch, given.student, given.teacher or given.student]
    named = [getattr(each, item.name) for each in parts for item in dataclasses.fields(each)]
    return [one for each in named for one in (each if isinstance(each, tuple) else (each,)) if isinstance(one, torch.Tensor)]


def test_the_methods_are_found():
    assert {Finetune, Joint, Replay, LwF, LwFMC, EWC, EIR, ILT, MiB, PLOP, CMR} <= set(METHODS)


@every_method
def test_is_a_frozen_dataclass_of_knobs_that_pickles(method):
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert all("acts" in item.metadata for item in dataclasses.fields(method))
    assert pickle.loads(pickle.dumps(method)) == method
    assert hash(method) == hash(copy.deepcopy(method))
    assert set(method.networks) <= {AUDIO_VISUAL, VISUAL_ONLY}
    for stage in STAGES:
        assert acting(method, stage)["method"] == type(method).__name__


@every_method
def test_files_tell_their_source_and_their_disagreements(method):
    text = inspect.getmodule(type(method)).__doc__
    assert "disagree" in text or "No paper of its own" in text


@every_method
def test_base_task_is_plain_cross_entropy(method):
    given = step(base=True)
    terms = method.loss(given)
    plain = cross_entropy(given.student.logits, given.batch.label, given.batch.real_frame)
    assert list(terms) == ["cross_entropy"]
    assert torch.equal(terms["cross_entropy"].total, plain.total)
    assert torch.equal(terms["cross_entropy"].count, plain.count)


@every_method
def test_terms_are_finite_and_reach_logits_and_distilled_features(method):
    given = prepared(method, step())
    terms = method.loss(given)
    assert all(isinstance(term, Mean) and term.total.shape == () and term.value().isfinite() for term in terms.values())
    sum(term.value() for term in terms.values()).backward()
    reached = [given.student.logits, *distilled_maps(method, given.student)]
    assert all(each.grad.isfinite().all() and each.grad.any() for each in reached)


@every_method
def test_the_teacher_is_read_where_the_method_says_so_and_gets_no_gradient(method):
    given = prepared(method, step())
    teacher = each_tensor(given.teacher, lambda tensor: tensor.clone().requires_grad_())
    sum(term.value() for term in method.loss(dataclasses.replace(given, teacher=teacher)).values()).backward()
    assert teacher.logits.grad is None
    assert all(each.grad is None for each in (*teacher.features, *teacher.encoder))
    if not method.needs_teacher:
        without = method.loss(dataclasses.replace(given, teacher=None))
        assert all(torch.equal(without[name].total, term.total) for name, term in method.loss(given).items())


@every_method
def test_all_is_computed_in_fp32_under_autocast(method):
    """Networks give maps in half precision there, and logits in fp32."""
    given = prepared(method, step())

    def with_maps(change):
        def changed(network):
            return dataclasses.replace(each_tensor(network, change), logits=network.logits.detach())

        return dataclasses.replace(given, student=changed(given.student), teacher=changed(given.teacher))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.loss(with_maps(lambda tensor: tensor.detach().bfloat16()))
    for name, term in method.loss(with_maps(lambda tensor: tensor.detach().bfloat16().float())).items():
        assert terms[name].total.dtype == torch.float32
        torch.testing.assert_close(terms[name].total, term.total, rtol=1e-5, atol=1e-6)


@every_method
def test_inputs_stay_as_they_are(method):
    given = prepared(method, step())
    before = [each.detach().clone() for each in tensors(given)]
    sum(term.value() for term in method.loss(given).values()).backward()
    assert all(torch.equal(one, other) for one, other in zip(before, tensors(given), strict=True))


@every_method
@pytest.mark.parametrize("base", [True, False])
def test_number_of_workers_changes_nothing(method, base):
    given = prepared(method, step(base=base))
    whole = method.loss(given)
    shares = [method.loss(part(given, clips)) for clips in (slice(0, 1), slice(1, 4))]
    for name, term in whole.items():
        assert sum(share[name].count for share in shares) == term.count
        total = sum(share[name].total for share in shares)
        torch.testing.assert_close(total, term.total)


@every_method
def test_padding_means_nothing(method):
    given = prepared(method, step())
    padded = ~given.batch.real_frame

    def changed(tensor):
        tensor = tensor.detach().clone()
        tensor[padded] = 7.5
        return tensor

    student, teacher = each_tensor(given.student, changed), each_tensor(given.teacher, changed)
    other = method.loss(dataclasses.replace(given, student=student, teacher=teacher))
    for name, term in method.loss(given).items():
        torch.testing.assert_close(other[name].total, term.total.detach())
        assert other[name].count == term.count


@every_method
def test_new_rows_leave_old_class_weights_alone(method):
    classifier = nn.Conv2d(3, CLASSES, 1)
    before = copy.deepcopy(classifier)
    method.init_new_classes(classifier, task())
    assert torch.equal(classifier.weight[:OLD], before.weight[:OLD])
    assert torch.equal(classifier.bias[1:OLD], before.bias[1:OLD])
    classifier = nn.Conv2d(3, OLD, 1)
    before = copy.deepcopy(classifier)
    method.init_new_classes(classifier, base_task())
    assert torch.equal(classifier.weight, before.weight)
    assert torch.equal(classifier.bias, before.bias)


@every_method
def test_what_is_trained_has_the_last_tasks_classes_and_a_base_task_stays_as_it_is(method):
    first, last = base_task(SAMPLES[:3]), task(SAMPLES)
    assert method.training_task([first]) == first
    learned = method.training_task([first, last])
    assert (learned.index, learned.num_classes) == (last.index, last.num_classes)
    assert set(learned.train) >= set(last.train)


@every_method
def test_who_consolidates_keeps_a_tensor_per_parameter_and_holds_the_parameters_by_it(method):
    draw = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=draw) for name, shape in (("a", (2, 3)), ("classifier", (OLD, 3)))}
    now = {"a": start["a"] + 1, "classifier": torch.ones(CLASSES, 3)}
    means = {name: torch.rand(each.shape, generator=draw, dtype=torch.float64) for name, each in start.items()}
    if not method.consolidates:
        assert method.penalty(now, start, means) == {}
        return
    state = method.consolidate(means, None)
    assert {name: each.shape for name, each in state.items()} == {name: each.shape for name, each in start.items()}
    still = {**start, "classifier": torch.cat([start["classifier"], torch.ones(CLASSES - OLD, 3)])}
    for given, moved in ((now, True), (still, False)):
        [term] = method.penalty(given, start, state).values()
        assert term.count == 1
        assert (term.total > 0) == moved


def test_a_method_with_a_memory_holds_parameters_as_its_base_does():
    for method in (Replay(base=EWC()), CMR(base=EWC())):
        assert method.consolidates
        assert acting(method, "consolidate")["base"] == acting(EWC(), "consolidate")
        assert acting(method, "train")["base"] == acting(EWC(), "train")
        given = {"a": torch.full((2,), 3.0)}, {"a": torch.ones(2)}, {"a": torch.ones(2)}
        assert method.penalty(*given) == EWC().penalty(*given)
        assert method.consolidate({"a": torch.ones(2)}, None).keys() == {"a"}
    assert not Replay().consolidates


SAMPLES = tuple(Sample(f"s{index:02}", ((4,), (5,), (4, 5), (1, 4))[index % 4 if index < 9 else 0]) for index in range(14))


def scores_for(samples, seed=0):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(3, len(samples))).round(1).tolist()
    return ScoreTable(
        tuple(each.id for each in samples),
        {
            **dict(zip(("delta", "audio_visual", "visual_only"), values, strict=True)),
            "frames": (5.0,) * len(samples),
            **{f"components_{class_id}": tuple(map(float, draw.integers(1, 4, len(samples)))) for class_id in (4, 5)},
        },
    )


REMEMBERING = [Replay(), Replay(samples_per_class=2), CMR()]
REMEMBERING += [CMR(selection=each, samples_per_class=3) for each in ("mss", "random", "largest", "mixed")]
REMEMBERING += [each() for each in METHODS if each().remembers and each not in (Replay, CMR)]


@pytest.mark.parametrize("method", REMEMBERING, ids=repr)
def test_memory_keeps_its_budget_and_depends_on_nothing_but_its_inputs(method):
    budget = method.samples_per_class
    stream = task(SAMPLES)
    kept = method.remember(scores_for(SAMPLES), Memory(), stream, np.random.default_rng(3))
    shuffled = np.random.default_rng(9).permutation(len(SAMPLES))
    other = task(tuple(SAMPLES[position] for position in shuffled))
    assert method.remember(scores_for(SAMPLES), Memory(), other, np.random.default_rng(3)) == kept
    assert set(kept.by_class) == {4, 5}
    for class_id, rows in kept.by_class.items():
        containing = {each.id for each in SAMPLES if class_id in each.classes}
        assert len(rows) == min(budget, len(containing))
        assert len({row.sample_id for row in rows}) == len(rows)
        assert {row.sample_id for row in rows} <= containing
        assert {row.class_id for row in rows} == {class_id}


def test_random_rows_are_nested_balanced_and_vary_with_the_seed():
    chosen = {k: random_rows(SAMPLES, range(4, 7), k, np.random.default_rng(1)) for k in (2, 4)}
    assert all(chosen[4][class_id][:2] == chosen[2][class_id] for class_id in (4, 5))
    assert chosen[2][6] == ()
    picks = [random_rows(SAMPLES, [4], 1, np.random.default_rng(seed))[4][0].sample_id for seed in range(600)]
    counts = [picks.count(each.id) for each in SAMPLES if 4 in each.classes]
    assert min(counts) > 0.5 * 600 / len(counts)


def test_replay_rehearses_every_row_once_and_trains_as_its_base():
    memory = Memory(random_rows(SAMPLES, [4, 5], 3, np.random.default_rng(0)))
    assert Replay().rehearse(None, memory, task(), np.random.default_rng(0)).rows == memory.rows
    method, given = Replay(base=PLOP()), prepared(PLOP(), step())
    ours, theirs = method.loss(given), PLOP().loss(given)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].total, theirs[name].total) for name in ours)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replay(samples_per_class=0), "method.samples_per_class = 0; expected a whole number at least 1"),
        (lambda: Replay(samples_per_class=2.5), "expected a whole number at least 1"),
        (lambda: Replay(samples_per_class=True), "expected a whole number"),
        (lambda: Replay(base=CMR()), "expected a method that keeps no memory of its own"),
        (lambda: CMR(base=Joint()), "method.base = Joint(); expected a method that keeps no memory of its own and learns one "),
        (lambda: Replay(base=Joint()), "at a time, such as: ewc, finetune, ilt, lwf, lwf_mc, mib, plop"),
        (lambda: Replay(base=EIR()), "such as: ewc, finetune, ilt, lwf, lwf_mc, mib, plop"),
        (lambda: Replay(base="plop"), "method.base = 'plop'; expected a method"),
        (lambda: PLOP(pod_weight=-1), "method.pod_weight = -1; expected a number at least 0"),
        (lambda: PLOP(pod_weight=float("nan")), "expected a number"),
        (lambda: PLOP(pod_schedule=1), "expected true or false"),
        (lambda: PLOP(pod_scales=(1, 0)), "expected a tuple, each item a whole number at least 1"),
        (lambda: PLOP(pod_scales=()), "expected a tuple"),
        (lambda: PLOP(pod_scales=2), "expected a tuple"),
        (lambda: CMR(resampling_ratio=1.2), "method.resampling_ratio = 1.2; expected a number at least 0 and at most 1"),
        (lambda: CMR(selection="best"), "method.selection = 'best'; expected one of: mss, random, largest, mixed"),
        (lambda: CMR(base=None), "method.base = None"),
        (lambda: PLOP(pod_maps="both"), "method.pod_maps = 'both'; expected one of: fused, encoder"),
        (lambda: LwF(kd_weight=-1), "method.kd_weight = -1; expected a number at least 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


def test_a_whole_number_will_do_for_a_float():
    assert CMR(resampling_ratio=0).resampling_ratio == 0


def test_knobs_act_where_they_are_read():
    part_of = {stage: set(acting(CMR(), stage)) - {"method"} for stage in STAGES}
    assert part_of == {
        "train": {"base", "memory_truth"},
        "consolidate": {"base"},
        "score_before": set(),
        "rehearse": {"resampling", "resampling_ratio", "resample_by", "collision_share", "collision_normalisation"},
        "score_after": {"delta"},
        "remember": {"samples_per_class", "selection"},
    }
    assert acting(CMR(), "train")["base"] == acting(PLOP(), "train")


def test_a_field_that_is_no_knob_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Careless(Finetune):
        weight: float = 1.0
        good: int = knob(2)

    with pytest.raises(ValueError, match=r"Careless\.weight"):
        acting(Careless(), "train")


def test_batch_and_predictions_of_the_cases_fit():
    given = batch()
    assert prediction(4, 3, OLD, 0).logits.shape[-2:] == given.label.shape[-2:]
