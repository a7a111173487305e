"""VGGish, the sound network of AVSBench (Hershey et al., "CNN architectures for large-scale audio classification", 2017).

It is never trained: one second of log-mel gives the same 128 numbers in every task, so a stream computes them once per clip
and keeps them beside the decoded clips (`datasets/cache.py`). Being a function of its weight file alone, it belongs to no
network's parameters and no checkpoint; a checkpoint holds the file's digest.

Where the sources disagree, and what is done here:
- The TensorFlow release maps the numbers through a PCA and quantises them; AVSBench and the CMR authors do not, nor is it
  done here. The last layer ends with a ReLU, as in the torchvggish release that they use.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES
from cavs_model.errors import InputError
from cavs_model.networks.weight_files import copy_weights, decode, read_bytes
from cavs_model.worker import without_tf32

AUDIO_DIM = 128
VERSION = 1  # of what is computed here from a weight file: part of the name of what is kept
CHOICES = '"none" (fixed random numbers) or the path of a VGGish state_dict (.pt, .pth or .safetensors)'

_CONVOLUTIONS = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M")  # channels, or a max-pool that halves both sides


class VGGish(nn.Module):
    """Log-mel [n 96 64] (time, mel bin) -> [n 128], with the names of the published state_dict."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, pools = 1, 0
        for item in _CONVOLUTIONS:
            if isinstance(item, int):
                layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU(inplace=True)]
                channels = item
            else:
                layers.append(nn.MaxPool2d(2))
                pools += 1
        self.features = nn.Sequential(*layers)
        cells = (NUM_FRAMES >> pools) * (NUM_BINS >> pools)  # 6 x 4
        self.embeddings = nn.Sequential(
            nn.Linear(cells * channels, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, AUDIO_DIM),
            nn.ReLU(inplace=True),
        )

    def forward(self, audio: Tensor) -> Tensor:
        maps = self.features(audio.unsqueeze(1))  # [n 512 time bands]
        # TensorFlow's order, in which the released weights were trained: channels vary fastest.
        return self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]


class FrozenVGGish(nn.Module):
    """VGGish as a part of a network: no parameters to train or store, weights are read when it first has to run.

    Its state is the SHA-256 of the weight file, uint8 [32]. It refuses to run with weights of another content than that.
    """

    def __init__(self, weights: str) -> None:
        """`weights`: "none" (random, but always the same) or the path of a state_dict."""
        super().__init__()
        self.weights = weights
        self._digest = ""

    def identify(self) -> str:
        """The SHA-256 (hex) of its weights, from a checkpoint or else of the file. InputError where there is no such file."""
        self._digest = self._digest or weights_digest(self.weights)
        return self._digest

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(bytes.fromhex(self.identify())), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self._digest = bytes(state.tolist()).hex()

    def forward(self, audio: Tensor) -> Tensor:
        """Log-mel [n 96 64] -> [n 128] without a gradient, in float32 under autocast too, like what is kept on disk.

        InputError where the weight file is missing, does not fit, or is another one than the network was trained with.
        """
        if self.identify() != weights_digest(self.weights):
            raise InputError(f"audio_weights: {self.weights!r} is not the file that this network was trained with")
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False), without_tf32():
            return load_vggish(self.weights, audio.device)(audio.float())  # type: ignore[no-any-return]


def weights_digest(weights: str) -> str:
    """SHA-256 (hex) of a weight file, zeros for "none". InputError where there is no such file."""
    if weights == "none":
        return "0" * 64
    try:
        status = Path(weights).stat()
    except OSError as error:
        raise InputError(f"audio_weights: cannot read {weights!r} ({error.strerror}); choose {CHOICES}") from None
    return _digest(weights, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _digest(weights: str, modified_ns: int, size: int) -> str:
    """A file has 288 MB, so it is read again only where its time or size changed."""
    return hashlib.sha256(_content(weights)).hexdigest()


def _content(weights: str) -> bytes:
    return read_bytes(Path(weights), "audio_weights", CHOICES)


def feature_name(weights: str) -> str:
    """What the vectors made with these weights are called on disk, such as "vggish-v1-0123456789abcdef"."""
    return f"vggish-v{VERSION}-{weights_digest(weights)[:16]}"


def load_vggish(weights: str, device: torch.device) -> VGGish:
    """VGGish with these weights, frozen, one a process and device. InputError where the file is missing or does not fit."""
    return _loaded(weights, weights_digest(weights), device)


@lru_cache(maxsize=1)
def _loaded(weights: str, digest: str, device: torch.device) -> VGGish:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VGGish()
    if weights != "none":
        stored = decode(_content(weights), Path(weights), "audio_weights")
        copy_weights(network, stored, f"audio_weights: {weights!r}", "VGGish")
    return network.to(device).eval().requires_grad_(False)
