"""The segmenter: AVSBench's TPAVI encoder-decoder (Zhou et al., ECCV 2022) with a growing classifier, as the CMR paper's.

Two networks share this file: audio_visual, and visual_only, which has no part for the sound at all. Only real frames are
computed; the paper's release computes padding too, which costs time and shifts the statistics of batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cavs_model.errors import InputError, unknown
from cavs_model.networks.audio_encoders import VGGISH, build_audio_encoder
from cavs_model.networks.decoder import Decoder
from cavs_model.networks.fusion import TPAVI, DilatedSum, RealFrames
from cavs_model.networks.growing_classifier import GrowingClassifier
from cavs_model.networks.vggish import FrozenVGGish
from cavs_model.networks.visual_encoders import build_visual_encoder
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY, Batch, Prediction

Modalities = Literal["both", "picture", "sound"]
MODALITIES = ("both", "picture", "sound")
MID_GREY = 128
LARGEST_WIDTH, LARGEST_AUDIO_DIM, MOST_DILATIONS = 1024, 4096, 16  # of a network that can be built at all


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of a network and where its weights come from. AVSBench's is resnet50 or pvt_v2_b5 with vggish, width 256.

    The defaults are ours, for light training. `modalities` makes references for results: "picture" builds the audio-visual
    network without hearing, like the visual-only one; "sound" shows it mid-grey in place of the picture.

    InputError for sizes that make no network. Encoder names and weight files are checked when the network is built.
    """

    visual_encoder: str = "efficientnet_lite0"  # or resnet50, pvt_v2_b5 (needs timm), tiny (for tests)
    visual_weights: str = "imagenet"  # "imagenet", "none" (random) or the path of a state_dict
    audio_encoder: str = "log_mel_cnn"  # or vggish (never trained), tiny (for tests)
    audio_weights: str = "none"  # of vggish alone, which is never trained: the path of its state_dict, "none" is random
    audio_dim: int = 128  # numbers that stand for a second of sound
    width: int = 64  # channels of the fused maps and of the decoder
    dilations: tuple[int, ...] = (3, 6, 12, 18)  # of the parallel convolutions that reduce each map
    modalities: Modalities = "both"  # what the audio-visual network perceives

    def __post_init__(self) -> None:
        if not 2 <= self.width <= LARGEST_WIDTH or self.width % 2:
            raise InputError(f"width must be a positive even number of at most {LARGEST_WIDTH}, got {self.width}")
        if not 1 <= self.audio_dim <= LARGEST_AUDIO_DIM:
            raise InputError(f"audio_dim must be positive and at most {LARGEST_AUDIO_DIM}, got {self.audio_dim}")
        if not 1 <= len(self.dilations) <= MOST_DILATIONS or not 1 <= min(self.dilations) <= max(self.dilations) <= 1024:
            raise InputError(f"dilations must be 1 to {MOST_DILATIONS} numbers from 1 to 1024, got {self.dilations[:20]}")
        if self.modalities not in MODALITIES:
            raise unknown("modalities", self.modalities, MODALITIES)

    @property
    def frozen_sound(self) -> str | None:
        """The weights of the sound network that is never trained, so that its answers can be kept; None where there is none."""
        return self.audio_weights if self.audio_encoder == VGGISH and self.modalities != "picture" else None

    @property
    def inner_channels(self) -> int:
        """Channels inside TPAVI, and of the decoder's map before the last up-sampling (128 of 256 in AVSBench)."""
        return self.width // 2

    @property
    def head_channels(self) -> int:
        """Channels at full resolution, the classifier's input (32 of 256 in AVSBench), never fewer than 16."""
        return max(16, self.width // 8)


class AVSegmenter(nn.Module):
    """Batch -> Prediction: logits at full resolution, the four fused maps (strides 4 to 32) and the decoder map (stride 2).

    Made for channels_last memory (module.to(memory_format=torch.channels_last)) and for autocast: logits and fused maps are
    float32 always, the decoder map and the encoder maps have autocast's type.
    """

    def __init__(self, config: NetworkConfig, num_classes: int, network: str) -> None:
        """`network` is AUDIO_VISUAL or VISUAL_ONLY; `num_classes` counts background. InputError: unknown name, bad weights."""
        super().__init__()
        if network not in (AUDIO_VISUAL, VISUAL_ONLY):
            raise unknown("network", network, (AUDIO_VISUAL, VISUAL_ONLY))
        if network == VISUAL_ONLY and config.modalities == "sound":
            raise InputError(
                'network.modalities = "sound" leaves the visual-only network nothing to perceive; choose "both" or "picture", '
                "or a method without that network"
            )
        hears = network == AUDIO_VISUAL and config.modalities != "picture"
        self.sees = config.modalities != "sound"
        width = config.width
        self.visual_encoder = build_visual_encoder(config.visual_encoder, config.visual_weights)
        self.audio_encoder = (
            build_audio_encoder(config.audio_encoder, config.audio_dim, config.audio_weights) if hears else None
        )
        self.reduce = nn.ModuleList(DilatedSum(channels, width, config.dilations) for channels in self.visual_encoder.channels)
        self.fuse = nn.ModuleList(
            TPAVI(width, config.inner_channels, config.audio_dim if hears else None) for _ in self.visual_encoder.channels
        )
        self.decoder = Decoder(width, config.inner_channels, config.head_channels, levels=len(self.visual_encoder.channels))
        self.classifier = GrowingClassifier(config.head_channels, num_classes)

    def forward(self, batch: Batch) -> Prediction:
        """Logits float32 [B T C H W], features and encoder maps, each [B T D h w]; zeros at padded frames.

        InputError where a picture's side is not a multiple of 32 pixels, ValueError where no frame of the batch is real.
        """
        frames = RealFrames.of(batch.real_frame, batch.real_frame_cpu)
        image = frames.select(batch.image)
        maps = self.visual_encoder(image if self.sees else torch.full_like(image, MID_GREY))
        audio = self._heard(batch, frames)
        reduced = [reduce(item) for item, reduce in zip(maps, self.reduce, strict=True)]
        fused = [fuse(item, frames, audio) for item, fuse in zip(reduced, self.fuse, strict=True)]
        decoded, head = self.decoder(fused)
        logits = self.classifier(head)
        return Prediction(
            frames.scatter(logits),
            features=tuple(frames.scatter(item) for item in (*fused, decoded)),
            encoder=tuple(frames.scatter(item) for item in reduced),
        )

    def _heard(self, batch: Batch, frames: RealFrames) -> Tensor | None:
        """One vector of sound for each real frame [n A]: kept ones where the encoder is frozen and the batch has them."""
        if self.audio_encoder is None:
            return None
        if batch.audio_feature is not None and isinstance(self.audio_encoder, FrozenVGGish):
            return frames.select(batch.audio_feature)
        heard: Tensor = self.audio_encoder(frames.select(batch.audio))
        return heard


def build(config: NetworkConfig, num_classes: int, network: str) -> AVSegmenter:
    """A new network for `num_classes` classes (background included), initialised from torch's current random state.

    InputError for weight files that are missing or do not fit.
    """
    model = AVSegmenter(config, num_classes, network)
    if isinstance(model.audio_encoder, FrozenVGGish):
        model.audio_encoder.identify()
    return model


def check_weights(config: NetworkConfig) -> None:
    """Downloads and reads the first weights of a network, so that what is wrong with them is told before hours are spent.

    InputError for weight files that are missing, cannot be downloaded or do not fit. torch's random state stays.
    """
    with torch.random.fork_rng(devices=[]):
        build_visual_encoder(config.visual_encoder, config.visual_weights)
        if config.modalities != "picture":
            encoder = build_audio_encoder(config.audio_encoder, config.audio_dim, config.audio_weights)
            if isinstance(encoder, FrozenVGGish):
                encoder.identify()
