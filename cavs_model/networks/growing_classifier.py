"""The classifier of a continual model: one 1x1 convolution whose rows, one a class, grow with every task."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GrowingClassifier(nn.Module):
    """Scores of each pixel for the classes learned so far: [n D H W] -> [n C H W] float32."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)

    @property
    def num_classes(self) -> int:
        """C, background included."""
        return self.conv.out_channels

    def grow(self, num_classes: int) -> None:
        """Adds rows up to `num_classes`, initialised as nn.Conv2d does from torch's CPU generator on any device.

        Old rows keep their bits. `conv` becomes a new module, so an optimiser must be made after growing. ValueError for
        fewer classes than there are.
        """
        added = num_classes - self.num_classes
        if added < 0:
            raise ValueError(f"a classifier of {self.num_classes} classes cannot shrink to {num_classes}")
        if added == 0:
            return
        old = self.conv
        fresh = nn.Conv2d(old.in_channels, added, 1)  # the initialisation depends on in_channels alone, not on the rows
        grown = (
            nn.Conv2d(old.in_channels, num_classes, 1, device="meta").to_empty(device=old.weight.device).to(old.weight.dtype)
        )
        assert old.bias is not None
        assert fresh.bias is not None
        assert grown.bias is not None
        with torch.no_grad():
            grown.weight.copy_(torch.cat([old.weight, fresh.weight.to(old.weight)]))
            grown.bias.copy_(torch.cat([old.bias, fresh.bias.to(old.bias)]))
        grown.requires_grad_(old.weight.requires_grad)
        self.conv = grown.train(old.training)

    def forward(self, x: Tensor) -> Tensor:
        # In float32 under autocast too: logits feed softmax, entropies and distillation, and this is the cheapest layer. As a
        # product, because that writes contiguous [n C H W], which losses want, from channels_last input without a copy.
        weight, bias = self.conv.weight.flatten(1), self.conv.bias
        assert bias is not None
        with torch.autocast(x.device.type, enabled=False):
            pixels = x.float().flatten(2)  # [n D H*W]
            logits = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), pixels)
        return logits.view(len(x), self.num_classes, *x.shape[2:])
