"""What the low-resolution frames alone say of large ones: a small network without diffusion, and how far to trust it.

The decoder of a bundled model draws what the latents say. Where the input is hardly damaged its own pixels know better,
so the decoder's picture is mixed with this one, pixel by pixel and noise level by noise level.
"""

import torch
from torch import Tensor, nn

from vsuav.layers import FrameConv, VolumeConv, plus, shuffled, zeroed

SCALE = 4
UNTRAINED = -4.0
"""What every noise level's share starts from: 2 % of the picture."""


class Plain(nn.Module):
    """x + conv2(SiLU(conv1(x))): without normalisation, which costs an enlarger fidelity (Lim et al. 2017, EDSR).

    Args:
        channels: of x.
        inner: what conv1 gives.
        second: conv2's class; with `VolumeConv` it also sees the frames before and after.
    """

    def __init__(self, channels: int, inner: int, second: type[FrameConv | VolumeConv] = FrameConv):
        super().__init__()
        self.conv1 = FrameConv(channels, inner, 3, padding=1)
        self.conv2 = zeroed(second(inner, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """x "b c t h w"."""
        return self.conv2(self.conv1.activated(x), add=x)


class Enlarger(nn.Module):
    """What is to be added to bicubic enlargement, and the share of it that counts beside the decoder's.

    Args:
        channels: width.
        layers: residual blocks.
        levels: noise levels that have a share of their own.
        meeting: inner width of further blocks, one behind every second of the others, in which a frame meets those
            before and after it; None: there are none.
        beside: it may be told what the frames before and after would change, brought to the frame's place.
    """

    def __init__(self, channels: int, layers: int, levels: int, meeting: int | None = None, beside: bool = False):
        super().__init__()
        self.conv_in = FrameConv(3, channels, 3, padding=1)
        if beside:
            self.beside_in = zeroed(FrameConv(6, channels, 3, padding=1))
        self.blocks = nn.ModuleList(Plain(channels, channels) for _ in range(layers))
        self.meetings = nn.ModuleList(Plain(channels, meeting, VolumeConv) for _ in range(layers // 2) if meeting)
        self.conv_out = zeroed(FrameConv(channels, 4 * SCALE**2, 3, padding=1))
        self.class_embedding = nn.Embedding(levels, 1)
        nn.init.constant_(self.class_embedding.weight, UNTRAINED)

    def forward(self, low_res: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """low_res "b 3 t h w" in [-1, 1] -> detail "b 3 t 4h 4w" and trust "b 1 t 4h 4w", which `mixed` wants.

        beside "b 6 t h w": what `degrain.beside` finds before and after each frame; None: nothing.
        """
        x = self.conv_in(low_res)
        if hasattr(self, "beside_in"):
            nothing = low_res.shape[0], 6, *low_res.shape[2:]
            x = self.beside_in(low_res.new_zeros(nothing) if beside is None else beside, add=x)
        first = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.meetings and i % 2:
                x = self.meetings[i // 2](x)
        detail, trust = self.conv_out(plus(x, first)).split((3 * SCALE**2, SCALE**2), dim=1)
        return shuffled(detail, SCALE), shuffled(trust, SCALE)

    def mixed(self, drawn: Tensor, low_res: Tensor, level: Tensor, beside: Tensor | None = None) -> Tensor:
        """`drawn` "b 3 t 4h 4w", what a decoder adds to bicubic, mixed with what this network adds; level (b,), int64.

        The share of a pixel is the sigmoid of its trust and its noise level's.
        """
        detail, trust = self(low_res, beside)
        share = torch.sigmoid(trust + self.class_embedding(level)[:, :, None, None, None].to(trust))
        detail = detail.to(drawn)
        in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return torch.lerp(drawn, detail, share.to(drawn), out=detail if in_place else None)
