"""A tiny decoder distilled from a large one: convolutions alone, frame by frame, no norms and no attention.

The layout is that of diffusers' `AutoencoderTiny`, names of its decoder's tensors included. Its encoder is not needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav.configs import network_config
from vsuav.layers import clip, frames


@dataclass(frozen=True)
class TinyConfig:
    """What may differ between tiny decoders that enlarge four times."""

    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 1)
    upsampling_scaling_factor: int = 2
    latent_channels: int = 4
    out_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    FIXED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "force_upcast": (True, False)}
    IGNORED = (
        "in_channels", "encoder_block_out_channels", "num_encoder_blocks", "latent_magnitude", "latent_shift",
        "block_out_channels", "sample_size",
    )  # fmt: skip
    FREE = ("shift_factor",)

    def __post_init__(self):
        widths, counts = self.decoder_block_out_channels, self.num_decoder_blocks
        if len(widths) != len(counts) or len(set(widths)) != 1:
            raise ValueError(
                f"TinyConfig: decoder_block_out_channels must be equal numbers, one for each of num_decoder_blocks "
                f"{counts}, got {widths}"
            )
        if self.factor != 4:
            raise ValueError(
                f"TinyConfig: the decoder must enlarge 4 times (3 blocks, factor 2), this one does {self.factor} times"
            )

    @property
    def factor(self) -> int:
        """How many times smaller than frames latents are."""
        return prod([self.upsampling_scaling_factor] * (len(self.num_decoder_blocks) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TinyConfig":
        """From a config.json with the class name `AutoencoderTiny`."""
        return network_config(cls, config)


class Block(nn.Module):
    """relu(x + conv relu conv relu conv x)."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class TinyDecoder(nn.Module):
    def __init__(self, config: TinyConfig):
        super().__init__()
        width, last = config.decoder_block_out_channels[0], len(config.num_decoder_blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in enumerate(config.num_decoder_blocks):
            layers += [Block(width) for _ in range(count)]
            if i < last:
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor, mode="nearest"))
            layers.append(nn.Conv2d(width, width if i < last else config.out_channels, 3, padding=1, bias=i == last))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layers(3 * torch.tanh(x / 3)) - 1


class TinyVAE(nn.Module):
    """Decodes latents; the low-resolution frames and the noise level are not looked at."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.decoder = TinyDecoder(config)

    def decode(self, z: Tensor, low_res: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        """Frames "b 3 t 4h 4w", about [-1, 1], not clamped, of z "b c t h w", already divided by the scaling factor.

        One frame after the other: no result depends on another frame, and the memory of one is enough.
        """
        z = z.to(next(self.parameters()).dtype)
        return torch.cat([clip(self.decoder(frames(z[:, :, n : n + 1])), 1) for n in range(z.shape[2])], dim=2)


__all__ = ["TinyConfig", "TinyVAE"]
