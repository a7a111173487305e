"""The decoder of AVSBench's network, as the CMR paper's release uses it: four fusion blocks from coarse to fine, then the head.

Departures from the release: its in-place ReLU also clips the shortcuts (and the fused maps that are distilled), here a
shortcut is the unit's input; the coarsest block has nothing to merge, so the unit that never ran there does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualUnit(nn.Module):
    """x + conv3x3(ReLU(conv3x3(ReLU(x)))): [n D h w] -> [n D h w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.conv1(F.relu(x)), inplace=True)
        return self.conv2(inside) + x  # type: ignore[no-any-return]


class FusionBlock(nn.Module):
    """Merges a fused map into the path from the coarser level and doubles the size: [n D h w] -> [n D 2h 2w]."""

    def __init__(self, width: int, merges: bool) -> None:
        """`merges` is False at the coarsest level, where there is no path yet."""
        super().__init__()
        self.skip = ResidualUnit(width) if merges else None
        self.unit = ResidualUnit(width)

    def forward(self, fused: Tensor, path: Tensor | None) -> Tensor:
        """`fused` [n D h w]; `path` the output of the coarser block, of the same shape."""
        if self.skip is not None:
            assert path is not None
            fused = path + self.skip(fused)
        merged = self.unit(fused)
        return F.interpolate(merged, scale_factor=2, mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """Fused maps of strides 4, 8, 16, 32 -> the decoder map at stride 2 and the classifier's input at full resolution."""

    def __init__(self, width: int, middle_channels: int, head_channels: int, levels: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(width, merges=level < levels - 1) for level in range(levels))  # fine to coarse
        self.conv1 = nn.Conv2d(width, middle_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(middle_channels, head_channels, 3, padding=1)

    def forward(self, fused: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [n D h w] from fine to coarse -> (map [n D H/2 W/2], head [n head_channels H W])."""
        device = fused[0].device.type
        path: Tensor | None = None
        for block, item in zip(reversed(self.blocks), reversed(fused), strict=True):
            if torch.is_autocast_enabled(device):
                # TPAVI gives float32; without this the shortcuts, and the up-sampling with them, would stay in float32.
                item = item.to(torch.get_autocast_dtype(device))
            path = block(item, path)
        assert path is not None
        head = F.interpolate(self.conv1(path), scale_factor=2, mode="bilinear", align_corners=False)
        return path, F.relu(self.conv2(head), inplace=True)
