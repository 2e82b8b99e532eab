"""The two VAEs: frames to latents (4x smaller) and back; the video one has 3-D layers and sees the low-resolution clip.

Parameter names are the keys of the released checkpoints. All group normalisations but the attention's are joint over
the frames given together (chunks of three, by the reference).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav.attention import attend
from vsuav.color import bicubic
from vsuav.configs import network_config
from vsuav.enlarger import Enlarger
from vsuav.layers import (
    Down,
    FrameConv,
    JointNorm,
    Linear,
    PlusResBlock,
    ResBlock,
    Up,
    clip,
    concat,
    frames,
    plus,
    shuffled,
    times,
    zeroed,
)

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """What may differ between VAEs; the defaults are the released image VAE's. `block_out_channels`: finest first.

    A decoder block named `UpDecoderBlock3D_plus` has 3-D layers; where the first block has, so do the middle block and
    the condition's. `bicubic_skip` adds the low-resolution clip, enlarged four times, to the decoder's output.
    `unshuffle`: the finest level works on blocks of so many pixels a side as channels, which spares the full size.
    `mid_block_layers`: residual blocks of the decoder's middle behind its attention; those from the second on are 2-D.
    `fading`: the last number of a latent says where the input's colour is to go, see `without_colour`.
    `num_class_embeds`: a decoder that knows the noise level has a table of so many levels, as the U-Net has.
    `enlarger_channels`, `enlarger_layers`: an `Enlarger` so wide and deep, with which the decoder's picture is mixed;
    for a decoder with `bicubic_skip` that knows the noise level. `enlarger_meeting`: frames meet in it, in so wide
    blocks. `enlarger_beside`: it is told what the frames before and after each frame would change in it.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    up_block_types: tuple[str, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.08333
    condition_img: bool = False
    condition_channels: int = 128
    mid_block_add_attention: bool = True
    mid_block_layers: int = 1
    bicubic_skip: bool = False
    unshuffle: int = 1
    fading: bool = False
    num_class_embeds: int | None = None
    enlarger_channels: int | None = None
    enlarger_layers: int = 6
    enlarger_meeting: int | None = None
    enlarger_beside: bool = False

    FIXED = {
        "act_fn": ("silu",),
        "down_block_types": tuple([f"DownEncoderBlock{d}D"] * n for d in (2, 3) for n in range(9)),
        "force_upcast": (True, False),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
        "use_temporal_block": (True, False),
    }
    IGNORED = ("sample_size",)
    FREE = ()

    def __post_init__(self):
        if self.up_block_types is None:
            object.__setattr__(self, "up_block_types", ("UpDecoderBlock3D",) * len(self.block_out_channels))
        if len(self.up_block_types) != len(self.block_out_channels):
            raise ValueError(
                f"VAEConfig: up_block_types must have one entry for each of the {len(self.block_out_channels)} "
                f"block_out_channels, got {self.up_block_types}"
            )
        known = ("UpDecoderBlock2D", "UpDecoderBlock3D", "UpDecoderBlock3D_plus")
        if self.enlarger_channels and not (self.bicubic_skip and self.num_class_embeds):
            raise ValueError(
                f"VAEConfig: enlarger_channels needs bicubic_skip and num_class_embeds, got {self.enlarger_channels} "
                f"with {self.bicubic_skip} and {self.num_class_embeds}"
            )
        for name in ("enlarger_meeting", "enlarger_beside"):
            if getattr(self, name) and not self.enlarger_channels:
                raise ValueError(f"VAEConfig: {name} {getattr(self, name)} needs enlarger_channels, got None")
        for kind in self.up_block_types:
            if kind not in known:
                raise ValueError(f"VAEConfig: unknown block type {kind!r}; known: {', '.join(known)}")

    @property
    def factor(self) -> int:
        """How many times smaller than frames latents are."""
        return self.unshuffle * 2 ** (len(self.block_out_channels) - 1)

    def plus(self) -> list[bool]:
        """Per decoder block, coarsest first: does it have 3-D layers?"""
        return [kind.endswith("_plus") for kind in self.up_block_types]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """From a config.json of one of these VAEs, or of the image VAE of the same shape."""
        return network_config(cls, config)


def residual(
    cin: int, cout: int, config: VAEConfig, plus: bool, groups_in: int | None = None, emb: int | None = None
) -> ResBlock:
    kind = PlusResBlock if plus else ResBlock
    return kind(cin, cout, eps=EPS, groups=config.norm_num_groups, groups_in=groups_in, emb=emb)


class PixelAttention(nn.Module):
    """Single-head attention among the pixels of each frame, as a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.query = Linear(channels, channels)
        self.key = Linear(channels, channels)
        self.value = Linear(channels, channels)
        self.proj_attn = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x "(b t) c h w"."""
        z = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        z = self.proj_attn(attend(self.query(z), self.key(z), self.value(z), heads=1))
        return x + z.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Middle(nn.Module):
    """Residual block, attention, residual blocks; those from the third on change nothing when they are fresh."""

    def __init__(self, channels: int, config: VAEConfig, plus: bool, emb: int | None = None, layers: int = 1):
        super().__init__()
        kinds = [plus] * 2 + [False] * (layers - 1)
        self.resnets = nn.ModuleList(residual(channels, channels, config, kind, emb=emb) for kind in kinds)
        for block in self.resnets[2:]:
            zeroed(block.conv2)
        if config.mid_block_add_attention:
            self.attentions = nn.ModuleList([PixelAttention(channels, config.norm_num_groups)])

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, e)
        if hasattr(self, "attentions"):
            x = clip(self.attentions[0](frames(x)), x.shape[2])
        for block in self.resnets[1:]:
            x = block(x, e)
        return x


class Stage(nn.Module):
    """`layers` residual blocks, then a change of size or none."""

    def __init__(
        self, cin: int, cout: int, layers: int, config: VAEConfig, *, plus=False, down=False, up=False, emb=None
    ):
        super().__init__()
        widths = ((cin if j == 0 else cout, cout) for j in range(layers))
        self.resnets = nn.ModuleList(residual(i, o, config, plus, emb=emb) for i, o in widths)
        if down:
            self.downsamplers = nn.ModuleList([Down(cout, corner=True)])
        if up:
            self.upsamplers = nn.ModuleList([Up(cout)])

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, e)
        for resize in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resize(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        self.unshuffle = config.unshuffle
        self.conv_in = FrameConv(config.in_channels * self.unshuffle**2, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], out, layers, config, down=i < len(widths) - 1) for i, out in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], config, plus=False)
        self.conv_norm_out = JointNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = FrameConv(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.unshuffle > 1:
            x = x[..., : x.shape[3] // self.unshuffle * self.unshuffle, : x.shape[4] // self.unshuffle * self.unshuffle]
            x = clip(F.pixel_unshuffle(frames(x), self.unshuffle), x.shape[2])
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.mid_block(x), norm=self.conv_norm_out)


class ConditionFuse(nn.Module):
    """x + w (x scale(u) + shift(u)), u from condition and x. A fresh one passes x on."""

    def __init__(self, condition: int, channels: int, config: VAEConfig):
        super().__init__()
        self.shared = nn.Sequential(
            residual(condition + channels, channels, config, plus=False),
            residual(channels, channels, config, plus=False),
        )
        self.scale = zeroed(FrameConv(channels, channels, 3, padding=1))
        self.shift = zeroed(FrameConv(channels, channels, 3, padding=1))

    def forward(self, condition: Tensor, x: Tensor, w: float = 1.0) -> Tensor:
        u = self.shared(concat(condition, x))
        change = self.shift(u, add=times(self.scale(u), x))
        return plus(change if w == 1 else change * w, x)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block + 1
        plus, emb = config.plus(), widths[0] if config.num_class_embeds else None
        if emb:
            self.class_embedding = nn.Embedding(config.num_class_embeds, emb)
        self.conv_in = FrameConv(config.latent_channels, widths[0], 3, padding=1)
        if config.condition_img:
            c = config.condition_channels
            self.condition_in = nn.Sequential(
                residual(config.in_channels, c, config, plus[0], groups_in=config.in_channels),
                residual(c, c, config, plus[0]),
            )
            self.condition_fuse = ConditionFuse(c, widths[0], config)
        self.mid_block = Middle(widths[0], config, plus[0], emb, config.mid_block_layers)
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], out, layers, config, plus=plus[i], up=i < len(widths) - 1, emb=emb)
            for i, out in enumerate(widths)
        )
        self.conv_norm_out = JointNorm(config.norm_num_groups, widths[-1], EPS)
        self.shuffle = config.unshuffle
        self.conv_out = FrameConv(widths[-1], config.out_channels * self.shuffle**2, 3, padding=1)

    def forward(self, z: Tensor, low_res: Tensor | None, level: Tensor | None, w: float) -> Tensor:
        x, e = self.conv_in(z), self.embedded(level)
        if hasattr(self, "condition_in"):
            x = self.condition_fuse(self.condition_in(low_res), x, w)
        x = self.mid_block(x, e)
        for block in self.up_blocks:
            x = block(x, e)
        return self.arranged(self.conv_out(x, norm=self.conv_norm_out))

    def embedded(self, level: Tensor | None) -> Tensor | None:
        """What the residual blocks are told of the noise level."""
        return self.class_embedding(level) if hasattr(self, "class_embedding") else None

    def arranged(self, x: Tensor) -> Tensor:
        """The blocks of pixels that `conv_out` gives as channels, as pixels."""
        return shuffled(x, self.shuffle) if self.shuffle > 1 else x


class VAE(nn.Module):
    """`encode` frames, `decode` latents. Freshly built, the 3-D layers and the condition change nothing."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = FrameConv(moments, moments, 1)
        self.post_quant_conv = FrameConv(config.latent_channels, config.latent_channels, 1)
        if config.enlarger_channels:
            self.enlarger = Enlarger(
                config.enlarger_channels, config.enlarger_layers, config.num_class_embeds, config.enlarger_meeting,
                config.enlarger_beside,
            )  # fmt: skip

    def _enter(self, x: Tensor) -> Tensor:
        return x.to(self.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance "b c t h w" (unscaled) of frames "b 3 t H W" in [-1, 1]; h = H // 4, w = W // 4."""
        mean, logvar = self.quant_conv(self.encoder(self._enter(x))).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(
        self,
        z: Tensor,
        low_res: Tensor | None = None,
        level: Tensor | None = None,
        beside: Tensor | None = None,
        w: float = 1.0,
        decoder: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor] | None = None,
    ) -> Tensor:
        """Frames "b 3 t 4h 4w", about [-1, 1], not clamped.

        z "b c t h w": latents, already divided by `config.scaling_factor`. low_res "b 3 t h w": the clean input frames
        in [-1, 1], needed where the decoder was built for them; w: how much they count. level (b,), int64: the noise
        level the latents were made for, needed where the decoder knows it (`config.num_class_embeds`). beside
        "b 6 t h w": what the frames before and after would change in each (`degrain.beside`), for a decoder that is
        told (`config.enlarger_beside`); None: nothing. decoder: what runs in the place of `self.decoder` and gives the
        same in another way.

        With `config.fading` the picture loses its colour where the last channel says so, see `without_colour`.

        Raises:
            ValueError: low_res or level is needed and missing, or low_res has not the latents' size.
        """
        needs = self.config.condition_img or self.config.bicubic_skip
        if needs and low_res is None:
            raise ValueError("VAE.decode: this decoder needs low_res, the clean input frames, got None")
        if needs and low_res.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"VAE.decode: low_res must have the frames and size of z {tuple(z.shape[2:])}, "
                f"got {tuple(low_res.shape[2:])}"
            )
        if self.config.num_class_embeds and level is None:
            raise ValueError("VAE.decode: this decoder needs level, the noise level of each clip, got None")
        condition = self._enter(low_res) if self.config.condition_img else None
        x = (decoder or self.decoder)(self.post_quant_conv(self._enter(z)), condition, level, w)
        if self.config.enlarger_channels:
            x = self.enlarger.mixed(x, self._enter(low_res), level, None if beside is None else self._enter(beside))
        if self.config.bicubic_skip:
            skip = bicubic(low_res.transpose(1, 2).flatten(0, 1), self.config.factor)
            x = plus(x, skip.unflatten(0, (-1, z.shape[2])).transpose(1, 2).to(x))
        return without_colour(x, z[:, -1:]) if self.config.fading else x


def without_colour(x: Tensor, faded: Tensor) -> Tensor:
    """x "b 3 t H W" with as much less colour as `faded` "b 1 t h w" says: none less at 0.5 and below, all from 0.7 on.

    A latent's own number is noisy; the mean of its 9x9 neighbourhood counts. x is overwritten unless gradients need it.
    """
    mean = F.avg_pool2d(F.pad(frames(faded), (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    share = F.interpolate(((mean - 0.5) / 0.2).clamp(0, 1), x.shape[3:], mode="bilinear", align_corners=False)
    red, green, blue = x.split(1, dim=1)
    mix = torch.lerp if torch.is_grad_enabled() else Tensor.lerp_
    return mix(x, 0.299 * red + 0.587 * green + 0.114 * blue, clip(share, x.shape[2]).to(x))
