"""CMR's training step (student, teacher, pseudo-labels, local POD, Adam) against a plain reading of the reference.

`python -m benchmarks.train_step` times AVSBench's network (ResNet-50, width 256, 224 px, 61 + 10 classes, a clip of 5 frames)
and, with `--network light`, the one the Collage spaces train. The plain reading is written here from what the papers and the
authors' release do: N x N attention, frames that pad a clip to 10 computed like real ones, fp32 in contiguous layout, one pass
for every softmax and every window of POD, both networks' maps kept in full. It shares the modules' weights, so that without
padding loss and gradients must be those of our step: that is checked in fp32 first, with the encoder's maps in one memory
layout. What the layout alone does is told beside it: torch's own convolutions and batch norms sum in another order in each, and
a network whose batch statistics are over few values carries that far. Padding alone has a row of its own, because it shifts
batch statistics and so cannot give the same numbers.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import Report, alternate, arguments, peak_memory
from cavs_model.evaluate import frozen
from cavs_model.methods.cmr import CMR
from cavs_model.methods.plop import PLOP, median_entropies
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.networks.fusion import TPAVI, DilatedSum
from cavs_model.train import global_means
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, IGNORE, Batch, LabelRule, Step, Task
from cavs_model.worker import LocalWorker, arithmetic

PLAIN_CLIP = 5  # frames that attend to one another in AVSBench's code


@dataclass(frozen=True)
class Case:
    """A network and the batch it is given."""

    config: NetworkConfig
    image_size_px: int
    clips: int
    frames: int  # real ones
    padded: int  # frames after padding, as the release has them
    num_old: int
    num_classes: int

    def batch(self, padded: bool, seed: int = 0) -> Batch:
        """Smooth pictures and labels of blobs; the last clip is from the memory."""
        g = torch.Generator().manual_seed(seed)
        b, t, size = self.clips, self.padded if padded else self.frames, self.image_size_px
        coarse = torch.rand(b * t, 3, 8, 8, generator=g) * 255
        image = F.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8).view(b, t, 3, size, size)
        classes = torch.randint(self.num_old, self.num_classes, (b, t, 4, 4), generator=g)
        blobs = torch.where(torch.rand(b, t, 4, 4, generator=g) < 0.6, BACKGROUND, classes).to(torch.uint8)
        label = blobs.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
        audio = torch.randn(b, t, 96, 64, generator=g)
        real = (torch.arange(t) < self.frames).expand(b, t).clone()
        image[~real], audio[~real], label[~real] = 0, 0.0, IGNORE
        rehearsed = torch.arange(b) == b - 1 if b > 1 else torch.zeros(b, dtype=torch.bool)
        return Batch(tuple(map(str, range(b))), image, audio, label, real, real.clone(), rehearsed)

    def task(self) -> Task:
        return Task(1, self.num_old, self.num_classes, (), LabelRule(range(self.num_old, self.num_classes), BACKGROUND))


def case(network: str, short: bool) -> Case:
    """The case of that name: "avsbench" or "light"."""
    if network == "light":
        return Case(NetworkConfig(), 96, 4 if short else 16, 1, 1, 17, 25)
    config = NetworkConfig("resnet50", "none", width=64 if short else 256)
    return Case(config, 96 if short else 224, 1, 5, 10, 61, 71)


def networks(case: Case) -> tuple[AVSegmenter, AVSegmenter]:
    """A student and its teacher: near one another, alike but for the classifier, attention not zero as at the start."""
    torch.manual_seed(0)
    teacher = AVSegmenter(case.config, case.num_old, AUDIO_VISUAL)
    for name, module in teacher.named_modules():
        if isinstance(module, TPAVI):
            torch.nn.init.normal_(module.bn.weight, std=0.5)
        elif isinstance(module, torch.nn.BatchNorm2d) and name.endswith("bn3"):
            # ResNet's random start amplifies rounding a hundredfold from the last layer to the first; a trained one does not.
            torch.nn.init.constant_(module.weight, 0.2)
    student = copy.deepcopy(teacher)
    student.classifier.grow(case.num_classes)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 * parameter.std().nan_to_num(0.0)))
    return student, teacher


METHOD = CMR(base=PLOP())


class Ours:
    """The step as cavs_model.train takes it."""

    def __init__(self, case: Case, precision: str, padded: bool) -> None:
        student, teacher = networks(case)
        self.worker = LocalWorker()
        self.numbers = arithmetic(precision, torch.device("cpu"))  # type: ignore[arg-type]
        self.student = self.numbers.place(student).train()
        self.old = teacher
        self.teacher = frozen(teacher, self.numbers)
        self.batch, self.task = case.batch(padded), case.task()
        self.thresholds = median_entropies(self.teacher, [self.batch], self.task, lambda x: x).clamp(min=0.001)
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=1e-4)

    def terms(self) -> dict[str, Tensor]:
        with self.numbers.autocast():
            prediction = self.student(self.batch)
        step = Step(self.batch, prediction, self.teacher(self.batch), self.task, self.thresholds)
        return global_means(METHOD.loss(step), self.worker)

    def gradients(self) -> dict[str, Tensor]:
        """The loss terms by name; the student's parameters have the gradients of their sum."""
        terms = self.terms()
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        return {name: value.detach() for name, value in terms.items()}

    def step(self) -> None:
        self.gradients()
        self.optimiser.step()


class Plain(Ours):
    """The same step as a plain reading has it; `padded` computes padding too, in fp32, in contiguous layout or in ours."""

    def __init__(self, case: Case, padded: bool, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__(case, "fp32", padded)
        self.layout = layout

    def terms(self) -> dict[str, Tensor]:
        said = plain_forward(self.student, self.batch, self.layout)
        with torch.no_grad():
            old = plain_forward(self.old, self.batch, self.layout)
        return plain_terms(said, old, self.batch, self.task, self.thresholds, METHOD.base)  # type: ignore[arg-type]


def plain_terms(
    said: tuple[Tensor, list[Tensor]],
    old: tuple[Tensor, list[Tensor]],
    batch: Batch,
    task: Task,
    thresholds: Tensor,
    base: PLOP,
) -> dict[str, Tensor]:
    """The terms of PLOP's loss, of what `plain_forward` gives of student and teacher, as means over this batch."""
    (logits, maps), (old_logits, old_maps) = said, old
    real = batch.real_frame.flatten()
    label, share = plain_pseudo_labels(batch, old_logits, thresholds)
    per_pixel = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    count = (label != IGNORE).sum()
    terms = {"cross_entropy": (per_pixel.mean((1, 2)) * share).sum() * per_pixel[0].numel() / count}
    pods = [plain_pod(new[real], old[real]) for new, old in zip(maps, old_maps, strict=True)]
    background = (logits[:, :1] + logits[:, task.num_old :].sum(1, keepdim=True))[real]
    folded = torch.cat([background, logits[real, 1 : task.num_old]], 1)
    terms["pod_features"] = base.pod_weight * torch.stack(pods).sum() / (len(maps) + 1)
    terms["pod_logits"] = base.pod_logits_weight * plain_pod(folded, old_logits[real]) / (len(maps) + 1)
    return terms


def plain_forward(
    model: AVSegmenter, batch: Batch, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, list[Tensor]]:
    """Logits [n C H W] and the five distilled maps, every frame computed; `layout` is the encoder's."""
    image = batch.image.flatten(0, 1).float().contiguous(memory_format=layout)
    encoder = model.visual_encoder
    maps = encoder.features((image - encoder.mean) / encoder.std)
    audio = None if model.audio_encoder is None else model.audio_encoder(batch.audio.flatten(0, 1))
    frames = batch.real_frame.shape[1]
    clip = PLAIN_CLIP if frames % PLAIN_CLIP == 0 else frames
    fused = []
    for item, reduce, fuse in zip(maps, model.reduce, model.fuse, strict=True):
        assert isinstance(reduce, DilatedSum)
        assert isinstance(fuse, TPAVI)
        total = sum(branch(item) for branch in reduce.branches)
        assert isinstance(total, Tensor)
        fused.append(plain_tpavi(fuse, total, audio, clip))
    path, head = model.decoder(fused)
    return F.conv2d(head, model.classifier.conv.weight, model.classifier.conv.bias), [*fused, path]


def plain_tpavi(block: TPAVI, visual: Tensor, audio: Tensor | None, clip: int) -> Tensor:
    """Attention with the N x N matrix of every clip; the visual-only network's, without audio, is on the picture itself."""
    n, width, height, wide = visual.shape
    x = visual.view(n // clip, clip, width, height, wide).transpose(1, 2).contiguous()  # [B D T h w]
    sound = x
    if audio is not None:
        assert block.align is not None
        sound = block.align(audio).view(n // clip, clip, width).transpose(1, 2)
        sound = sound[..., None, None].expand_as(x).contiguous()

    def pointwise(layer: torch.nn.Linear, value: Tensor) -> Tensor:
        return F.conv3d(value, layer.weight[:, :, None, None, None], layer.bias)

    g = pointwise(block.g, x).flatten(2).transpose(1, 2)
    theta = pointwise(block.theta, x).flatten(2).transpose(1, 2)
    phi = pointwise(block.phi, sound).flatten(2)
    attention = theta @ phi
    y = (attention / attention.shape[-1]) @ g
    y = pointwise(block.w_z, y.transpose(1, 2).contiguous().view(len(x), -1, *x.shape[2:]))
    bn = block.bn
    y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum or 0.0, bn.eps)
    z = block.norm((y + x).permute(0, 2, 3, 4, 1))
    return z.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()


def plain_pseudo_labels(batch: Batch, old_logits: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [n H W] with the teacher's classes, and the factor [n] of each frame; one frame after another."""
    frames = batch.label.shape[1]
    labels, shares = [], []
    for index, label in enumerate(batch.label.flatten(0, 1).long()):
        classes = old_logits[index].softmax(0).argmax(0)
        q, log_q = old_logits[index].softmax(0), old_logits[index].log_softmax(0)
        entropy = -(q * log_q).sum(0) / math.log(len(q))
        is_open = (label == BACKGROUND) & ~batch.rehearsed[index // frames] & batch.real_frame.flatten()[index]
        certain = is_open & (entropy < thresholds[classes])
        label = label.clone()
        label[is_open] = IGNORE
        label[certain] = classes[certain]
        labels.append(label)
        shares.append(certain.sum() / is_open.sum() if is_open.any() else torch.tensor(1.0))
    return torch.stack(labels), torch.stack(shares)


def plain_pod(student: Tensor, teacher: Tensor) -> Tensor:
    """Local POD of one map [n D h w], window by window, as a mean over frames."""

    def embedding(value: Tensor) -> Tensor:
        value = value**2
        parts = []
        for scale in (1, 2, 4):
            tall, wide = value.shape[2] // scale, value.shape[3] // scale
            for i in range(scale):
                for j in range(scale):
                    window = value[:, :, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
                    parts += [window.mean(3).flatten(1), window.mean(2).flatten(1)]
        return torch.cat([part for part in parts if part.numel()], 1)

    scales_that_fit = min(student.shape[2:]) >= 4
    assert scales_that_fit or min(student.shape[2:]) >= 2, "the case is too small for POD's scales"
    return torch.linalg.vector_norm(embedding(student) - embedding(teacher), dim=1).mean()


@contextmanager
def float64() -> Iterator[None]:
    """Lets everything that asks for float32 compute in float64, to tell rounding from other differences."""
    single = Tensor.float
    Tensor.float = Tensor.double  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Tensor.float = single  # type: ignore[method-assign]


@dataclass(frozen=True)
class Taken:
    """What one step found: loss terms by name, and the gradient of every parameter that has one."""

    terms: Mapping[str, Tensor]
    gradients: tuple[Tensor, ...]

    @staticmethod
    def of(program: Ours, double: bool = False) -> Taken:
        """Of our step or of the plain reading, without padding, in fp32 or in fp64."""
        program.thresholds = apart(program)
        if double:
            program.student.double()
            program.old.double()
            program.batch = replace(program.batch, audio=program.batch.audio.double())
        with float64() if double else nullcontext():
            terms = program.gradients()
        return Taken(terms, tuple(each.grad.double() for each in program.student.parameters() if each.grad is not None))

    def gap(self, other: Taken) -> dict[str, float]:
        """Relative differences to `other`: of each loss term, of the whole gradient, and the greatest of one parameter's.

        Of gradients the norm of the difference over the norm; parameters whose gradient is rounding noise are left out of the
        last.
        """
        found = {f"loss {name}": abs(float(self.terms[name] / value) - 1) for name, value in other.terms.items()}
        gaps = [(float((a - b).norm()), float(b.norm())) for a, b in zip(self.gradients, other.gradients, strict=True)]
        norm = math.hypot(*(size for _, size in gaps))
        found["all gradients"] = math.hypot(*(gap for gap, _ in gaps)) / norm
        found["worst parameter's gradient"] = max(gap / size for gap, size in gaps if size > 1e-4 * norm)
        return found


def apart(program: Ours) -> Tensor:
    """Thresholds [C] of the entropy near the medians, each in the widest gap there between the entropies of two pixels.

    At a median itself, which is the entropy of a pixel of this very batch, that pixel's last bit decides whether it counts.
    """
    logits = program.teacher(program.batch).logits.double().flatten(0, 1)
    entropy = (-(logits.softmax(1) * logits.log_softmax(1)).sum(1) / math.log(logits.shape[1])).flatten()
    classes, found = logits.argmax(1).flatten(), program.thresholds.clone()
    for each in classes.unique().tolist():
        ordered = entropy[classes == each].sort().values
        near = ordered[int(0.4 * len(ordered)) : int(0.6 * len(ordered)) + 2]
        if len(near) > 1:
            widest = int(near.diff().argmax())
            found[each] = float(near[widest : widest + 2].mean())
    return found


def programs(case: Case) -> Mapping[str, Callable[[], Ours]]:
    """What is compared, by name."""
    return {
        "plain, padded to 10": functools.partial(Plain, case, padded=True),
        "plain, real frames only": functools.partial(Plain, case, padded=False),
        "ours, fp32": functools.partial(Ours, case, "fp32", padded=True),
        "ours, auto": functools.partial(Ours, case, "auto", padded=True),
    }


def memory_of(network: str, short: bool, name: str, threads: int, mark: Callable[[], None]) -> None:
    """Two steps of a program, in a process of its own."""
    torch.set_num_threads(threads)
    program = programs(case(network, short))[name]()
    mark()
    program.step()
    program.step()


def profile(case: Case, precision: str) -> None:
    """Prints where our step spends its time."""
    program = Ours(case, precision, padded=True)
    program.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        program.step()
    print(
        found.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=45, max_shapes_column_width=70
        )
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=("avsbench", "light"), default="avsbench")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--profile", choices=("auto", "fp32"), help="only print where our step spends its time")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    this = case(options.network, options.short)
    if options.profile:
        profile(this, options.profile)
        return
    report = Report(f"train_step_{options.network}", "CMR's training step against a plain reading of the reference", options)
    report.say(f"{this}\n")
    ours, plain = Taken.of(Ours(this, "fp32", False)), Taken.of(Plain(this, False))
    alike, exact = Taken.of(Plain(this, False, torch.channels_last)), Taken.of(Plain(this, False), double=True)
    gaps = {
        "ours and plain, fp64": Taken.of(Ours(this, "fp32", False), double=True).gap(exact),
        "ours and plain, fp32, one layout": ours.gap(alike),
        "plain, fp32, in the other layout": alike.gap(plain),
        "plain, fp32 and fp64": plain.gap(exact),
    }
    report.raw["differences"] = gaps
    names = list(gaps["ours and plain, fp64"])
    report.table(
        ["relative difference, without padding", *gaps],
        [(name, *(f"{found[name]:.0e}" for found in gaps.values())) for name in names],
    )
    candidates: dict[str, Any] = dict(programs(this))
    if this.frames == this.padded:
        del candidates["plain, padded to 10"]
    first = next(iter(candidates))
    peaks = {name: peak_memory(memory_of, options.network, options.short, name, torch.get_num_threads()) for name in candidates}
    made = {name: make() for name, make in candidates.items()}
    times = alternate({name: program.step for name, program in made.items()}, options.rounds, options.pause)
    report.raw |= {**times.raw(), "peak_MiB": peaks}
    report.table(
        ["step", *times.columns(first), "peak memory, MiB", "of the first's"],
        [(name, *times.row(name, first), f"{peaks[name]:.0f}", f"{peaks[name] / peaks[first]:.2f}") for name in candidates],
    )
    report.say("Peak memory is what two steps need beyond the weights of student and teacher, Adam's state included.")
    report.end()


if __name__ == "__main__":
    main()
