"""The networks written the plain way, in float32: what scripts/bench.py compares ours with.

Default memory layout, 3-D kernels for the convolutions over time, tensors rearranged between layers, attention matrices
written out, the text's keys computed in every call. It reads the state dicts of `UNetVideo` and `VAE` and gives the
same numbers; nothing is made fast and nothing is made slow on purpose.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav.attention import ROTARY_CHANNELS, relative_bucket
from vsuav.layers import sinusoid
from vsuav.unet import UNetConfig
from vsuav.vae import VAEConfig


class Node(SimpleNamespace):
    """The tensors of a state dict by their dotted names: node.resnets[0].conv1.weight."""

    def __getitem__(self, index: int) -> "Node":
        return vars(self)[str(index)]

    def __contains__(self, name: str | int) -> bool:
        return str(name) in vars(self)


def tree(state: Mapping[str, Tensor]) -> Node:
    """A state dict as nodes, in float32 and the default memory layout."""
    root = Node()
    for name, tensor in state.items():
        node, (*path, last) = root, name.split(".")
        for part in path:
            node = vars(node).setdefault(part, Node())
        setattr(node, last, tensor.float().contiguous())
    return root


def linear(x: Tensor, p: Node) -> Tensor:
    return F.linear(x, p.weight, getattr(p, "bias", None))


def norm(x: Tensor, p: Node, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, p.weight, p.bias, eps)


def conv(x: Tensor, p: Node, stride: int = 1) -> Tensor:
    """A convolution of "b c t h w" that keeps its size: 2-D weights frame by frame, 3-D ones as they are."""
    if p.weight.ndim == 5:
        return F.conv3d(x, p.weight, p.bias, padding=tuple(k // 2 for k in p.weight.shape[2:]))
    b, _, t, _, _ = x.shape
    y = F.conv2d(x.transpose(1, 2).flatten(0, 1), p.weight, p.bias, stride, p.weight.shape[-1] // 2)
    return y.unflatten(0, (b, t)).transpose(1, 2).contiguous()


def enlarge(x: Tensor, size: tuple[int, int], mode: str = "nearest") -> Tensor:
    b, _, t, _, _ = x.shape
    y = F.interpolate(x.transpose(1, 2).flatten(0, 1), size=size, mode=mode)
    return y.unflatten(0, (b, t)).transpose(1, 2).contiguous()


def residual(x: Tensor, p: Node, groups: int, eps: float, e: Tensor | None = None, groups_in: int = 0) -> Tensor:
    h = conv(F.silu(norm(x, p.norm1, groups_in or groups, eps)), p.conv1)
    if "time_emb_proj" in p:
        h = h + linear(F.silu(e), p.time_emb_proj)[:, :, None, None, None]
    h = conv(F.silu(norm(h, p.norm2, groups, eps)), p.conv2)
    y = h + (conv(x, p.conv_shortcut) if "conv_shortcut" in p else x)
    return y + conv(F.silu(norm(y, p.norm_3d, groups, eps)), p.conv_3d) if "conv_3d" in p else y


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention of "n heads i d" to "n heads j d" -> "n i (heads d)"."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def split(x: Tensor, heads: int) -> Tensor:
    """From "n i (heads d)" to "n heads i d"."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """The rotary embedding of "n heads t d"."""
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * freqs
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0:ROTARY_CHANNELS:2], x[..., 1:ROTARY_CHANNELS:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., ROTARY_CHANNELS:]], dim=-1)


class PlainUNet:
    """`UNetVideo`'s prediction, from its configuration and its state dict."""

    def __init__(self, config: UNetConfig, state: Mapping[str, Tensor]):
        self.config, self.state, self.weights = config, state, tree(state)

    def __call__(self, sample: Tensor, timestep: Tensor, low_res: Tensor, context: Tensor, level: Tensor) -> Tensor:
        """sample "b c t h w", timestep (b,), low_res "b 3 t h w", context "b l d", level (b,) -> v "b c t h w"."""
        w, last = self.weights, len(self.config.block_out_channels) - 1
        s = linear(sinusoid(timestep, self.config.block_out_channels[0]), w.time_embedding.linear_1)
        e = linear(F.silu(s), w.time_embedding.linear_2) + w.class_embedding.weight[level]
        x = conv(torch.cat([sample, low_res], dim=1), w.conv_in)
        skips = [x]
        for i in range(last + 1):
            block = w.down_blocks[i]
            for j in range(self.config.layers_per_block):
                x = self.layer(x, block, j, e, context, self.config.only_cross_attention[i])
                skips.append(x)
            if "downsamplers" in block:
                x = conv(x, block.downsamplers[0].conv, stride=2)
                skips.append(x)
            x = self.temporal(x, w, "down_temp_blocks", i, e)
        x = self.layer(x, w.mid_block, 0, e, context, False)
        x = residual(x, w.mid_block.resnets[1], self.config.norm_num_groups, self.config.norm_eps, e)
        if "mid_temp_block" in w:
            x = self.module(x, w.mid_temp_block, e)
        for i in range(last + 1):
            block = w.up_blocks[i]
            for j in range(self.config.layers_per_block + 1):
                x, only_text = torch.cat([x, skips.pop()], dim=1), self.config.only_cross_attention[last - i]
                x = self.layer(x, block, j, e, context, only_text)
            if "upsamplers" in block:
                x = conv(enlarge(x, tuple(skips[-1].shape[3:])), block.upsamplers[0].conv)
            x = self.temporal(x, w, "up_temp_blocks", i, e)
        return conv(F.silu(norm(x, w.conv_norm_out, self.config.norm_num_groups, self.config.norm_eps)), w.conv_out)

    def layer(self, x: Tensor, block: Node, j: int, e: Tensor, context: Tensor, only_text: bool) -> Tensor:
        x = residual(x, block.resnets[j], self.config.norm_num_groups, self.config.norm_eps, e)
        return self.transformer(x, block.attentions[j], context, only_text) if "attentions" in block else x

    def temporal(self, x: Tensor, w: Node, path: str, i: int, e: Tensor) -> Tensor:
        blocks = getattr(w, path, Node())
        return self.module(x, blocks[i], e) if i in blocks else x

    def module(self, x: Tensor, p: Node, e: Tensor) -> Tensor:
        groups = self.config.temporal_norm_num_groups
        y = residual(x, p.resblocks_3d_temporal, groups, 1e-6, e)
        return x + conv(residual(y, p.resblocks_3d_spatial, groups, 1e-6, e), p.shift_conv)

    def transformer(self, x: Tensor, p: Node, context: Tensor, only_text: bool) -> Tensor:
        x = residual(x, p.resblock_temporal, self.config.temporal_norm_num_groups, 1e-6)
        (b, c, t, h, w), heads, block = x.shape, self.config.attention_head_dim, p.transformer_blocks[0]
        frames = x.transpose(1, 2).flatten(0, 1)
        z = norm(frames, p.norm, self.config.norm_num_groups, 1e-6).flatten(2).transpose(1, 2).contiguous()
        z = linear(z, p.proj_in)
        text = context.repeat_interleave(t, dim=0)

        def attention(z: Tensor, p: Node, source: Tensor) -> Tensor:
            q, k, v = (split(y, heads) for y in (linear(z, p.to_q), linear(source, p.to_k), linear(source, p.to_v)))
            return linear(attend(q, k, v), p.to_out[0])

        y = F.layer_norm(z, (c,), block.norm1.weight, block.norm1.bias)
        z = z + attention(y, block.attn1, text if only_text else y)
        y = F.layer_norm(z, (c,), block.norm2.weight, block.norm2.bias)
        z = z + attention(y, block.attn2, text)
        z = z.unflatten(0, (b, t)).transpose(1, 2).flatten(0, 1)  # (b t) n c -> (b n) t c
        y, p_time = F.layer_norm(z, (c,), block.norm_temporal.weight, block.norm_temporal.bias), block.attn_temporal
        q, k, v = (split(linear(y, to), heads) for to in (p_time.to_q, p_time.to_k, p_time.to_v))
        table = p_time.time_rel_pos_bias.relative_attention_bias.weight
        freqs = self.weights.temporal_rotary_emb.freqs
        y = attend(rotate(q, freqs), rotate(k, freqs), v, table[relative_bucket(t, table.device)].permute(2, 0, 1))
        z = (z + linear(y, p_time.to_out[0])).unflatten(0, (b, -1)).transpose(1, 2).flatten(0, 1)
        y = F.layer_norm(z, (c,), block.norm3.weight, block.norm3.bias)
        a, gate = linear(y, block.ff.net[0].proj).chunk(2, dim=-1)
        z = linear(z + linear(a * F.gelu(gate), block.ff.net[2]), p.proj_out)
        return x + z.transpose(1, 2).reshape(b, t, c, h, w).transpose(1, 2)


class PlainDecoder:
    """`VAE.decode`, from the configuration and the state dict of a `VAE`."""

    def __init__(self, config: VAEConfig, state: Mapping[str, Tensor]):
        self.config, self.state, self.weights = config, state, tree(state)

    def __call__(
        self, z: Tensor, low_res: Tensor, level: Tensor | None = None, beside: Tensor | None = None
    ) -> Tensor:
        """z "b c t h w", unscaled; low_res "b 3 t h w", level (b,) and beside "b 6 t h w" if the decoder knows them ->
        "b 3 t 4h 4w"."""
        w = self.weights.decoder
        e = w.class_embedding.weight[level] if "class_embedding" in w else None
        x = conv(conv(z, self.weights.post_quant_conv), w.conv_in)
        if "condition_in" in w:
            u = self.block(low_res, w.condition_in[0], groups_in=self.config.in_channels)
            u = torch.cat([self.block(u, w.condition_in[1]), x], dim=1)
            u = self.block(self.block(u, w.condition_fuse.shared[0]), w.condition_fuse.shared[1])
            x = x + x * conv(u, w.condition_fuse.scale) + conv(u, w.condition_fuse.shift)
        x = self.block(x, w.mid_block.resnets[0], e)
        if "attentions" in w.mid_block:
            x = self.attention(x, w.mid_block.attentions[0])
        for j in range(self.config.mid_block_layers):
            x = self.block(x, w.mid_block.resnets[1 + j], e)
        for i in range(len(self.config.block_out_channels)):
            for j in range(self.config.layers_per_block + 1):
                x = self.block(x, w.up_blocks[i].resnets[j], e)
            if "upsamplers" in w.up_blocks[i]:
                h, width = x.shape[3:]
                x = conv(enlarge(x, (2 * h, 2 * width)), w.up_blocks[i].upsamplers[0].conv)
        x = conv(F.silu(norm(x, w.conv_norm_out, self.config.norm_num_groups, 1e-6)), w.conv_out)
        if (side := self.config.unshuffle) > 1:
            x = torch.stack([F.pixel_shuffle(frame, side) for frame in x.unbind(2)], dim=2)
        x = self.mixed(x, low_res, level, beside) if self.config.enlarger_channels else x
        x = x + enlarge(low_res, tuple(x.shape[3:]), "bicubic") if self.config.bicubic_skip else x
        if self.config.fading:
            h, width = z.shape[3:]
            faded = F.pad(z[:, -1:], (4, 4, 4, 4, 0, 0), mode="replicate")
            mean = sum(faded[..., i : i + h, j : j + width] for i in range(9) for j in range(9)) / 81
            share = enlarge(((mean - 0.5) / 0.2).clamp(0, 1), tuple(x.shape[3:]), "bilinear")
            x = x + share * ((0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]) - x)
        return x

    def mixed(self, drawn: Tensor, low_res: Tensor, level: Tensor, beside: Tensor | None) -> Tensor:
        p = self.weights.enlarger
        x = conv(low_res, p.conv_in)
        if "beside_in" in p:
            nothing = low_res.new_zeros(len(low_res), 6, *low_res.shape[2:])
            x = x + conv(nothing if beside is None else beside, p.beside_in)
        first = x
        for j in range(self.config.enlarger_layers):
            x = x + conv(F.silu(conv(x, p.blocks[j].conv1)), p.blocks[j].conv2)
            if "meetings" in p and j % 2:
                x = x + conv(F.silu(conv(x, p.meetings[j // 2].conv1)), p.meetings[j // 2].conv2)
        detail, trust = conv(x + first, p.conv_out).split((48, 16), dim=1)
        detail, trust = (torch.stack([F.pixel_shuffle(f, 4) for f in y.unbind(2)], dim=2) for y in (detail, trust))
        share = torch.sigmoid(trust + p.class_embedding.weight[level][:, :, None, None, None])
        return (1 - share) * drawn + share * detail

    def block(self, x: Tensor, p: Node, e: Tensor | None = None, groups_in: int = 0) -> Tensor:
        return residual(x, p, self.config.norm_num_groups, 1e-6, e, groups_in)

    def attention(self, x: Tensor, p: Node) -> Tensor:
        b, _, t, h, w = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        z = norm(frames, p.group_norm, self.config.norm_num_groups, 1e-6).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (split(linear(z, to), 1) for to in (p.query, p.key, p.value))
        z = linear(attend(q, k, v), p.proj_attn).transpose(1, 2).unflatten(2, (h, w))
        return x + z.unflatten(0, (b, t)).transpose(1, 2)
