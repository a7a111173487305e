"""Audio encoders: one second of log-mel spectrogram -> one vector. Light ones of our own, trained with the rest, and VGGish.

To add an encoder: write a module [n 96 64] -> [n audio_dim] and name it in AUDIO_ENCODERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from cavs_model.errors import InputError, unknown
from cavs_model.networks.vggish import AUDIO_DIM, FrozenVGGish


class LogMelCNN(nn.Module):
    """A small convolutional net: stages of 3x3 convolution (stride 2), batch norm and ReLU, mean over time, one linear layer.

    The last map's frequency bands stay apart (only time is averaged), because pitch tells classes apart. Input: log-mel frames
    as Batch.audio has them, float32 [n 96 64] (time, mel bin); output [n audio_dim].
    """

    def __init__(self, audio_dim: int, stages: Sequence[int] = (32, 64, 128, 128), mel_bins: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, bands = 1, mel_bins
        for width in stages:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels, bands = width, (bands + 1) // 2
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels * bands, audio_dim)

    def forward(self, audio: Tensor) -> Tensor:
        x: Tensor = self.layers(audio.unsqueeze(1))  # [n D time bands]
        return self.linear(x.mean(2).flatten(1))  # type: ignore[no-any-return]


def _tiny(audio_dim: int) -> nn.Module:
    return LogMelCNN(audio_dim, stages=(4, 8))


AUDIO_ENCODERS: Mapping[str, Callable[[int], nn.Module]] = {"log_mel_cnn": LogMelCNN, "tiny": _tiny}
VGGISH = "vggish"


def build_audio_encoder(name: str, audio_dim: int, weights: str = "none") -> nn.Module:
    """The encoder of that name with outputs [n audio_dim]; `weights` is vggish's file, "none" for every other encoder.

    InputError for an unknown name, weights for an encoder that takes none, and vggish with another audio_dim than 128.
    """
    if name == VGGISH:
        if audio_dim != AUDIO_DIM:
            raise InputError(f"audio_dim must be {AUDIO_DIM} with audio_encoder 'vggish', got {audio_dim}")
        return FrozenVGGish(weights)
    if name not in AUDIO_ENCODERS:
        raise unknown("audio encoder", name, (*AUDIO_ENCODERS, VGGISH))
    if weights != "none":
        raise InputError(f'audio_weights must be "none" with audio_encoder {name!r}, which is trained; got {weights!r}')
    return AUDIO_ENCODERS[name](audio_dim)
