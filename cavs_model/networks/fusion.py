"""Fusion of picture and sound: TPAVI, the attention of AVSBench (Zhou et al., "Audio-Visual Segmentation", ECCV 2022).

The CMR paper's release uses it on all four levels in mode "dot", each after a sum of dilated convolutions; its visual-only
network puts the picture in place of the sound. Padded frames are taken out before any of this (`RealFrames`).

Where the sources disagree, and what is done here:
- AVSBench's code cuts clips of 10 frames into two of 5 before the attention. Here a clip is attended to as a whole, whatever
  its length; for clips of 5 frames it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class RealFrames:
    """Which frames of a batch are computed: n of its B * T. Frames travel flattened, [n ...], and return to [B T ...].

    `index` [n] holds the positions of the real frames in the flattened batch, on the data's device; it is None when every frame
    is real, and then nothing is copied. `counts` [B] float32 is the number of real frames of each clip, at least 1.
    """

    clips: int
    frames: int
    index: Tensor | None
    counts: Tensor

    @staticmethod
    def of(real_frame: Tensor, real_frame_cpu: Tensor | None = None) -> RealFrames:
        """From Batch.real_frame, bool [B T], and its copy on the CPU. ValueError where no frame at all is real.

        Everything is decided on the CPU, so an accelerator is waited for only where T > 1 (a clip without any frame does not
        exist) and there is no such copy yet.
        """
        clips, frames = real_frame.shape
        index = None
        counts = torch.full((clips,), float(frames), device=real_frame.device)
        if frames > 1:
            mask = real_frame.cpu() if real_frame_cpu is None else real_frame_cpu
            if not mask.all():
                if not mask.any():
                    raise ValueError("a batch needs at least one real frame")
                index = mask.flatten().nonzero().squeeze(1).to(real_frame.device, non_blocking=True)
                counts = mask.sum(1).clamp(min=1).float().to(real_frame.device, non_blocking=True)
        return RealFrames(clips, frames, index, counts)

    def select(self, x: Tensor) -> Tensor:
        """[B T ...] -> [n ...], the real frames in order; a view when all are real."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def scatter(self, x: Tensor) -> Tensor:
        """[n ...] -> [B T ...] with zeros at padded frames, differentiable; a view when all are real."""
        if self.index is not None:
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                zeros = torch.zeros_like(x[:1]).expand(self.clips * self.frames, -1, -1, -1)
                zeros = zeros.contiguous(memory_format=torch.channels_last)
            else:
                zeros = x.new_zeros((self.clips * self.frames, *x.shape[1:]))
            x = zeros.index_copy(0, self.index, x)
        return x.view(self.clips, self.frames, *x.shape[1:])


class DilatedSum(nn.Module):
    """The sum of 3x3 convolutions with several dilations, padded to keep the size: [n in h w] -> [n out h w].

    Weights start as N(0, 0.01), biases as nn.Conv2d's; no normalisation and no non-linearity (AVSBench).
    """

    def __init__(self, in_channels: int, out_channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 3, padding=d, dilation=d) for d in dilations)
        for branch in self._convs():
            nn.init.normal_(branch.weight, std=0.01)

    def _convs(self) -> list[nn.Conv2d]:
        return [branch for branch in self.branches if isinstance(branch, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        # Where the dilation is not smaller than the map, the eight outer taps see padding only: what is left of all such
        # branches is one 1x1 convolution with the sum of their middle taps. Exact, and most of the work at the coarse levels.
        size = max(x.shape[-2:])
        wide = [conv for conv in self._convs() if conv.dilation[0] >= size]
        bias: Tensor | None = torch.stack([conv.bias for conv in self._convs() if conv.bias is not None]).sum(0)
        total: Tensor | None = None
        if wide:
            middle = torch.stack([conv.weight[:, :, 1, 1] for conv in wide]).sum(0)
            total, bias = F.conv2d(x, middle[:, :, None, None], bias), None
        for conv in self._convs():
            if conv.dilation[0] < size:
                part = F.conv2d(x, conv.weight, bias, padding=conv.padding, dilation=conv.dilation)
                total, bias = part if total is None else total + part, None
        assert total is not None
        return total


class TPAVI(nn.Module):
    """Every position of a clip looks at every (frame, position) of the same clip through the sound, or through the picture.

    With v the picture's features and a the sound's, one vector a frame, spread over the frame (or a = v):
    A = theta(v) phi(a)^T / N, z = LayerNorm(BN(W_z(A g(v))) + v), N = real frames of the clip * h * w. BN starts at zero, so
    that z starts as LayerNorm(v).

    Mode "dot" has no softmax, so the N x N matrix A is never formed: A g(v) = theta(v) M with M = phi(a)^T g(v) / N per clip.
    Two more exact steps keep everything but one product per position out of the maps. All four transforms are affine, so
    W_z(theta(v) M) is v K + k with K [D D] per clip. And M needs only sums over positions: with sound, phi(a) does not vary
    within a frame, M = sum_t phi(a_t) (sum_p g(v_tp))^T / N; without, M follows from the moments sum v v^T and sum v.

    All of it runs in float32, under autocast too: sums over N (thousands of) positions and the product of four weight matrices
    lose too much in bfloat16, overflow in float16, and are a small part of the cost.
    """

    def __init__(self, width: int, inner_channels: int, audio_dim: int | None) -> None:
        """`audio_dim` is the length of the sound's vector, or None for the visual-only network."""
        super().__init__()
        # 1x1x1 convolutions of the original; as Linear they are the same map with the same initialisation.
        self.theta = nn.Linear(width, inner_channels)
        self.phi = nn.Linear(width, inner_channels)
        self.g = nn.Linear(width, inner_channels)
        # Without the original's bias: the batch norm takes it out again, so its gradient is rounding noise, which Adam turns
        # into steps of the full learning rate, other ones for another number of workers.
        self.w_z = nn.Linear(inner_channels, width, bias=False)
        self.bn = nn.BatchNorm2d(width)  # on flattened frames the same statistics as BatchNorm3d on clips
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)
        self.norm = nn.LayerNorm(width)
        self.align = None if audio_dim is None else nn.Linear(audio_dim, width, bias=False)

    def forward(self, visual: Tensor, frames: RealFrames, audio: Tensor | None = None) -> Tensor:
        """Real frames' visual [n D h w] and audio [n A] (visual-only network: None) -> z [n D h w], float32 or finer."""
        with torch.autocast(visual.device.type, enabled=False):
            visual = visual.to(torch.promote_types(visual.dtype, torch.float32))
            v = visual.permute(0, 2, 3, 1)  # [n h w D], a view of channels_last memory
            positions = frames.scatter(v).flatten(1, 3)  # [B T*h*w D]; the zeros of padded frames add nothing to any sum below
            area = v.shape[1] * v.shape[2]
            total = (frames.counts * area)[:, None, None]  # N [B 1 1]
            if self.align is not None:
                assert audio is not None
                inner = self._moment_of_sound(positions, frames, audio.to(v.dtype), area)
            else:
                inner = self._moment_of_picture(positions, total)
            inner = F.linear(inner / total, self.w_z.weight)  # M W_z^T [B D/2 D]
            scale = self.theta.weight.t() @ inner  # K [B D D]
            shift = self.theta.bias @ inner  # k [B D]
            y = torch.baddbmm(shift.unsqueeze(1), positions, scale)
            y = frames.select(y.view(frames.clips, frames.frames, *v.shape[1:]))
            y = self.bn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            z: Tensor = self.norm(y + v)
            return z.permute(0, 3, 1, 2)

    def _moment_of_sound(self, positions: Tensor, frames: RealFrames, audio: Tensor, area: int) -> Tensor:
        """N M [B D/2 D/2] from positions [B T*h*w D] and audio [n A]."""
        assert self.align is not None
        phi = frames.scatter(self.phi(self.align(audio)))  # [B T D/2], zero at padded frames, which drops their g
        sums = positions.view(frames.clips, frames.frames, area, -1).sum(2)  # [B T D]
        g = F.linear(sums, self.g.weight) + area * self.g.bias  # sums of g over each frame [B T D/2]
        return phi.transpose(1, 2) @ g

    def _moment_of_picture(self, positions: Tensor, total: Tensor) -> Tensor:
        """N M [B D/2 D/2] from positions [B T*h*w D] and N [B 1 1]."""
        second = positions.transpose(1, 2) @ positions  # [B D D]
        first = positions.sum(1, keepdim=True)  # [B 1 D]
        phi, g = F.linear(first, self.phi.weight), F.linear(first, self.g.weight)  # [B 1 D/2]
        product = self.phi.weight @ F.linear(second, self.g.weight)
        phi_bias, g_bias = self.phi.bias[:, None], self.g.bias[None, :]
        return product + phi.transpose(1, 2) * g_bias + phi_bias * (g + total * g_bias)
