"""The denoising U-Net: an image diffusion U-Net with temporal layers; it predicts v for a window of frames.

Parameter names are the keys of the released checkpoint. Numbers in brackets refer to sections of the architecture
description in the documentation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav.attention import ROTARY_CHANNELS, PreparedContext, Rotary, SelfAttention, TemporalAttention, TextAttention
from vsuav.configs import network_config
from vsuav.layers import (
    Down,
    FrameConv,
    JointNorm,
    Linear,
    ResBlock,
    TimeResBlock,
    Up,
    clip,
    concat,
    frames,
    plus,
    sinusoid,
    tokens,
    untokens,
    zeroed,
)
from vsuav.operators import gated


@dataclass(frozen=True)
class UNetConfig:
    """What may differ between U-Nets. The defaults are the released network's.

    `attention_head_dim` is the NUMBER of heads (the released file misnames it); lists per level begin at the finest.
    """

    block_out_channels: tuple[int, ...] = (256, 512, 512, 1024)
    layers_per_block: int = 2
    attention_head_dim: int = 8
    cross_attention_dim: int = 1024
    down_block_types: tuple[str, ...] = ("DownBlock3D",) + 3 * ("CrossAttnDownBlock3D",)
    up_block_types: tuple[str, ...] = 3 * ("CrossAttnUpBlock3D",) + ("UpBlock3D",)
    only_cross_attention: tuple[bool, ...] = (True, True, True, False)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    temporal_norm_num_groups: int = 32
    num_class_embeds: int = 1000
    max_noise_level: int = 350
    in_channels: int = 7
    out_channels: int = 4
    down_temporal_idx: tuple[int, ...] | None = None
    mid_temporal: bool = True
    up_temporal_idx: tuple[int, ...] | None = None

    FIXED = {
        "act_fn": ("silu",),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "downsample_padding": (1,),
        "flip_sin_to_cos": (True,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "resnet_out_scale_factor": (1,),
        "resnet_time_scale_shift": ("default",),
        "temporal_module_config": ({}, {"attention_block_types": ["", ""]}, {"attention_block_types": ("", "")}),
        "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,),
        "upcast_attention": (False, True),
        "use_linear_projection": (True,),
    }
    IGNORED = ("sample_size",)
    FREE = ("max_noise_level", "down_temporal_idx", "up_temporal_idx")

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"UNetConfig: {name} must have one entry for each of the {levels} block_out_channels, "
                    f"got {getattr(self, name)}"
                )
        if levels < 2:
            raise ValueError(f"UNetConfig: block_out_channels needs at least two levels, got {self.block_out_channels}")
        if self.in_channels != self.out_channels + 3:
            raise ValueError(
                f"UNetConfig: in_channels must be out_channels + 3 (latents and the input frames), got "
                f"{self.in_channels} for out_channels {self.out_channels}"
            )
        for width, attends in zip(self.block_out_channels, self.attends(), strict=True):
            if attends and (width % self.attention_head_dim or width // self.attention_head_dim < ROTARY_CHANNELS):
                raise ValueError(
                    f"UNetConfig: {self.attention_head_dim} heads at {width} channels; a head needs a whole number of "
                    f"channels, at least {ROTARY_CHANNELS}"
                )

    def attends(self) -> list[bool]:
        """Per level, finest first: does it have transformers?"""
        kinds = [_attends(kind, "Down") for kind in self.down_block_types]
        if kinds != [_attends(kind, "Up") for kind in reversed(self.up_block_types)]:
            raise ValueError(
                f"UNetConfig: up_block_types must mirror down_block_types, got {self.up_block_types} "
                f"for {self.down_block_types}"
            )
        return kinds

    @property
    def deep_channels(self) -> int:
        """Channels of what enters the last up block."""
        return self.block_out_channels[1]

    def temporal(self, path: str) -> set[int]:
        """Indices of the down or up blocks that a temporal module follows."""
        given = self.down_temporal_idx if path == "down" else self.up_temporal_idx
        return set(range(len(self.block_out_channels)) if given is None else given)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """From a config.json of this network, or of the image U-Net it is inflated from."""
        if isinstance(config.get("only_cross_attention"), bool) and isinstance(config.get("block_out_channels"), list):
            each = [config["only_cross_attention"]] * len(config["block_out_channels"])
            config = {**config, "only_cross_attention": each}
        return network_config(cls, config)


def _attends(kind: str, way: str) -> bool:
    kinds = {f"{cross}{way}Block{d}D": bool(cross) for cross in ("", "CrossAttn") for d in (2, 3)}
    if kind not in kinds:
        raise ValueError(f"UNetConfig: unknown block type {kind!r}; known: {', '.join(kinds)}")
    return kinds[kind]


class GEGLU(nn.Module):
    """a * GELU(g), exact GELU, where (a, g) are the halves of one projection."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = Linear(channels, 2 * inner)

    def forward(self, z: Tensor) -> Tensor:
        return gated(z, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """C -> 4C -> C with a gated activation."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.net:
            z = layer(z)
        return z


class TransformerBlock(nn.Module):
    """Attention 1 (text or pixels), attention 2 (text), attention over time, feed-forward (3.3)."""

    def __init__(self, channels: int, config: UNetConfig, only_text: bool, slots: Iterator[int], rotary: Rotary):
        super().__init__()
        heads, context = config.attention_head_dim, config.cross_attention_dim
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm_temporal = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        if only_text:
            self.attn1 = TextAttention(channels, heads, context, next(slots))
        else:
            self.attn1 = SelfAttention(channels, heads)
        self.attn2 = TextAttention(channels, heads, context, next(slots))
        self.attn_temporal = TemporalAttention(channels, heads, rotary)
        self.ff = FeedForward(channels)
        self.temporal = True

    def forward(self, z: Tensor, context: "Tensor | PreparedContext", t: int) -> Tensor:
        """z "(b t) n c" -> "(b t) n c"."""
        z = z + self.attn1(self.norm1(z), context)
        z = plus(z, self.attn2(self.norm2(z), context))
        if self.temporal:
            y = self.attn_temporal(self.norm_temporal(z).unflatten(0, (-1, t)))
            z = plus(z.unflatten(0, (-1, t)), y.transpose(1, 2)).flatten(0, 1)
        return plus(z, self.ff(self.norm3(z)))


class Transformer(nn.Module):
    """A temporal residual block, then one transformer block on the frames' pixels, as a residual (3.3)."""

    def __init__(self, channels: int, config: UNetConfig, only_text: bool, slots: Iterator[int], rotary: Rotary):
        super().__init__()
        self.resblock_temporal = TimeResBlock(channels, 3, groups=config.temporal_norm_num_groups)
        zeroed(self.resblock_temporal.conv2)
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config, only_text, slots, rotary)])
        self.proj_out = Linear(channels, channels)
        self.temporal = True

    def forward(self, x: Tensor, context: "Tensor | PreparedContext") -> Tensor:
        """x "b c t h w", context "b l d"."""
        if self.temporal:
            x = self.resblock_temporal(x)
        t = x.shape[2]
        z = self.proj_in(tokens(clip(self.norm(frames(x)), t)))
        z = self.transformer_blocks[0](z, context, t)
        return untokens(self.proj_out(z, add=tokens(x)), x)


class TemporalModule(nn.Module):
    """The module that follows a block (3.4): x + shift_conv(R2(RT(x, e), e)). A fresh one passes x on."""

    def __init__(self, channels: int, groups: int, emb: int):
        super().__init__()
        self.resblocks_3d_temporal = TimeResBlock(channels, 5, groups=groups, emb=emb)
        self.resblocks_3d_spatial = ResBlock(channels, channels, eps=1e-6, groups=groups, emb=emb)
        self.shift_conv = zeroed(FrameConv(channels, channels, 1))
        self.temporal = True

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        if not self.temporal:
            return x
        return self.shift_conv(self.resblocks_3d_spatial(self.resblocks_3d_temporal(x, e), e), add=x)


class Stage(nn.Module):
    """Residual blocks, each followed by a transformer where the level has them."""

    def __init__(self, widths: list[tuple[int, int]], transformers: list[Transformer], config: UNetConfig, emb: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nn.ModuleList(ResBlock(i, o, eps=eps, groups=groups, emb=emb) for i, o in widths)
        if transformers:
            self.attentions = nn.ModuleList(transformers)

    def layer(self, j: int, x: Tensor, e: Tensor, context: "Tensor | PreparedContext") -> Tensor:
        x = self.resnets[j](x, e)
        return self.attentions[j](x, context) if hasattr(self, "attentions") else x


class DownStage(Stage):
    """Returns its result and the skip tensors it leaves; without `down` neither is made smaller."""

    def __init__(self, *args, down: int | None):
        super().__init__(*args)
        if down:
            self.downsamplers = nn.ModuleList([Down(down)])

    def forward(self, x, e, context, down: bool = True) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, e, context)
            skips.append(x)
        if down and hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MiddleStage(Stage):
    """Residual block, transformer with self-attention, residual block."""

    def forward(self, x, e, context) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, e), context)
        return self.resnets[1](x, e)


class UpStage(Stage):
    """Takes its skips off the end of the list; enlarges to the size of the skip that is last then."""

    def __init__(self, *args, up: int | None):
        super().__init__(*args)
        if up:
            self.upsamplers = nn.ModuleList([Up(up)])

    def forward(self, x, e, context, skips: list[Tensor]) -> Tensor:
        for j in range(len(self.resnets)):
            x = self.layer(j, concat(x, skips.pop()), e, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, tuple(skips[-1].shape[3:]))
        return x


class TimeEmbedding(nn.Module):
    """linear_2(SiLU(linear_1(s)))."""

    def __init__(self, width: int, emb: int):
        super().__init__()
        self.linear_1 = Linear(width, emb)
        self.linear_2 = Linear(emb, emb)

    def forward(self, s: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(s)))


class UNetVideo(nn.Module):
    """v = unet(sample, timestep, low_res, context, noise_level) for a window of frames.

    The joint group normalisation makes every frame's result depend on all frames of the window. Freshly built, the
    temporal layers pass their input on: what is left for one frame is the image network of the same spatial weights.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        attends, only_text = config.attends(), config.only_cross_attention
        emb, last = 4 * widths[0], len(widths) - 1
        slots = iter(range(10**6))
        rotary = Rotary()

        def transformers(level: int, count: int, text: bool) -> list[Transformer]:
            return [Transformer(widths[level], config, text, slots, rotary) for _ in range(count)]

        def temporal(level: int) -> TemporalModule:
            return TemporalModule(widths[level], config.temporal_norm_num_groups, emb)

        self.conv_in = FrameConv(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], emb)
        self.class_embedding = nn.Embedding(config.num_class_embeds, emb)
        self.temporal_rotary_emb = rotary
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.down_temp_blocks, self.up_temp_blocks = nn.ModuleDict(), nn.ModuleDict()
        left, width = [widths[0]], widths[0]
        for i, out in enumerate(widths):
            pairs = [(width if j == 0 else out, out) for j in range(layers)]
            attention = transformers(i, layers if attends[i] else 0, only_text[i])
            self.down_blocks.append(DownStage(pairs, attention, config, emb, down=out if i < last else None))
            if i in config.temporal("down"):
                self.down_temp_blocks[str(i)] = temporal(i)
            left += [out] * (layers + (i < last))
            width = out
        self.mid_block = MiddleStage([(width, width)] * 2, transformers(last, 1, False), config, emb)
        if config.mid_temporal:
            self.mid_temp_block = temporal(last)
        for i, out in enumerate(reversed(widths)):
            level = last - i
            pairs = [((width if j == 0 else out) + left.pop(), out) for j in range(layers + 1)]
            attention = transformers(level, layers + 1 if attends[level] else 0, only_text[level])
            self.up_blocks.append(UpStage(pairs, attention, config, emb, up=out if i < last else None))
            if i in config.temporal("up"):
                self.up_temp_blocks[str(i)] = temporal(level)
            width = out
        self.conv_norm_out = JointNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = FrameConv(width, config.out_channels, 3, padding=1)

    def prepare(self, context: Tensor) -> PreparedContext:
        """The text's keys and values for every attention to it; context "b l d"."""
        layers = sorted((m for m in self.modules() if isinstance(m, TextAttention)), key=lambda m: m.slot)
        return PreparedContext(tuple(m.pair(context.to(m.to_k.weight.dtype)) for m in layers))

    def embed(self, timestep: Tensor | int, noise_level: Tensor | int) -> Tensor:
        """The embedding "b 4c" (or "1 4c") of time step and noise level (3.1)."""
        table = self.class_embedding.weight
        level = torch.as_tensor(noise_level, device=table.device).reshape(-1)
        if int(level.min()) < 0 or int(level.max()) > self.config.max_noise_level:
            raise ValueError(
                f"UNetVideo: noise_level must be between 0 and {self.config.max_noise_level}, got {level.tolist()}"
            )
        s = sinusoid(torch.as_tensor(timestep, device=table.device).reshape(-1), self.config.block_out_channels[0])
        return self.time_embedding(s.to(table.dtype)) + self.class_embedding(level)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        low_res: Tensor,
        context: Tensor | PreparedContext,
        noise_level: Tensor | int,
        deep: Tensor | None = None,
        keep: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction of v, "b c t h w"; with `keep` also the deep features, "b deep_channels t h w".

        sample "b c t h w": latents. low_res "b 3 t h w": the noised input frames, [-1, 1] before the noise.
        timestep: one for all, or (b,), 0..999. noise_level: the level low_res was noised at, 0..350, one or (b,).
        context "b l d": text states; or what `prepare` made of them.
        deep: what enters the last up block, kept from another call: then only the outer ring is computed, that is
            the layers of the finest level before the first reduction and after the last enlargement (DeepCache,
            arXiv 2312.00858).
        """
        e = self.embed(timestep, noise_level)
        dtype = self.conv_in.weight.dtype
        if isinstance(context, Tensor):
            context = context.to(dtype)
        x = torch.cat([sample.to(dtype), low_res.to(dtype)], dim=1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        skips = [x]
        x = self._down(0, x, e, context, skips, deep is None)
        if deep is None:
            deep = self._inner(x, e, context, skips)
        x = self._up(len(self.up_blocks) - 1, deep.to(dtype), e, context, skips)
        v = self.conv_out(x, norm=self.conv_norm_out)
        return (v, deep) if keep else v

    def _inner(self, x: Tensor, e: Tensor, context: Tensor | PreparedContext, skips: list[Tensor]) -> Tensor:
        """Everything between the first down block and the last up block: the deep features."""
        for i in range(1, len(self.down_blocks)):
            x = self._down(i, x, e, context, skips)
        x = self.mid_block(x, e, context)
        if self.config.mid_temporal:
            x = self.mid_temp_block(x, e)
        for i in range(len(self.up_blocks) - 1):
            x = self._up(i, x, e, context, skips)
        return x

    def _down(self, i: int, x, e, context, skips: list[Tensor], down: bool = True) -> Tensor:
        x, new = self.down_blocks[i](x, e, context, down)
        skips += new
        return self.down_temp_blocks[str(i)](x, e) if down and str(i) in self.down_temp_blocks else x

    def _up(self, i: int, x, e, context, skips: list[Tensor]) -> Tensor:
        x = self.up_blocks[i](x, e, context, skips)
        return self.up_temp_blocks[str(i)](x, e) if str(i) in self.up_temp_blocks else x


def temporal_parameters(unet: UNetVideo) -> Iterator[str]:
    """Names of the parameters an image checkpoint does not have, each parameter once."""
    parts = ("_temp_block", "resblock_temporal.", "attn_temporal.", "norm_temporal.", "temporal_rotary_emb.")
    for name, _ in unet.named_parameters():
        if any(part in name for part in parts):
            yield name


def set_temporal(unet: UNetVideo, on: bool) -> None:
    """Switches all temporal layers off (for training on images: they cost nothing then) or on again."""
    for module in unet.modules():
        if hasattr(module, "temporal"):
            module.temporal = on
