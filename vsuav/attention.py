"""How pixels attend: to the text, to each other, and to themselves in other frames.

Numbers in brackets refer to sections of the architecture description in the documentation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vsuav import native
from vsuav.layers import Linear, zeroed
from vsuav.operators import fused, inferring, softmax_attention

ROTARY_CHANNELS = 32
BUCKETS = 32
FARTHEST = 32
QUERIES = 256
"""Rows of an attention matrix that are made at a time."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention; heads are contiguous slices of the channels.

    q "n i c", k and v "n j c" (n may be 1 there), bias broadcastable to "n heads i j" -> "n i c".
    """
    if bias is None and inferring(q, k) and native.attends(q, k, heads):
        return native.attend(q, k, v, heads)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if bias is None and q.dtype is torch.bfloat16 and fused(q, k) and k.shape[2] >= QUERIES and len(k) == len(q):
        return sliced(q, k, v)
    return softmax_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of "n heads i d" as products of matrices, some rows at a time -> "n i (heads d)".

    On a CPU torch's own attention is no faster in bfloat16 than in float32; products of matrices are.
    """
    n, heads, i, d = q.shape
    q, out = q * d**-0.5, q.new_empty(n, i, heads, d).transpose(1, 2)
    for each, key, value, result in zip(q, k, v, out, strict=True):
        key, value = key.transpose(1, 2).contiguous(), value.contiguous()
        for rows, place in zip(each.split(QUERIES, 1), result.split(QUERIES, 1), strict=True):
            place.copy_((rows @ key).softmax(-1) @ value)
    return out.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class PreparedContext:
    """Keys and values "b l c" of every attention to the text, by the attention's number: once per prompt."""

    pairs: tuple[tuple[Tensor, Tensor], ...]


class TextAttention(nn.Module):
    """Attention of all pixels to the text; `slot` is its number in a `PreparedContext`."""

    def __init__(self, channels: int, heads: int, context: int, slot: int):
        super().__init__()
        self.heads, self.slot = heads, slot
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context, channels, bias=False)
        self.to_v = Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def pair(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(context), self.to_v(context)

    def forward(self, z: Tensor, context: "Tensor | PreparedContext") -> Tensor:
        """z "(b t) n c", context "b l d" -> "(b t) n c"."""
        k, v = context.pairs[self.slot] if isinstance(context, PreparedContext) else self.pair(context)
        q = self.to_q(z).view(len(k), -1, z.shape[-1])
        return self.to_out[0](attend(q, k, v, self.heads)).view(z.shape)


class SelfAttention(nn.Module):
    """Attention among the pixels of each frame."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, z: Tensor, context: "Tensor | PreparedContext | None" = None) -> Tensor:
        """z "(b t) n c" -> "(b t) n c"."""
        return self.to_out[0](attend(self.to_q(z), self.to_k(z), self.to_v(z), self.heads))


class Rotary(nn.Module):
    """The rotary embedding of frame positions. One module, shared by every temporal attention (3.3)."""

    def __init__(self):
        super().__init__()
        # on the CPU even where a network is built on the meta device: a power there would load torch's compiler
        k = torch.arange(ROTARY_CHANNELS // 2, dtype=torch.float32, device="cpu")
        self.freqs = nn.Parameter(10000.0 ** (-2 * k / ROTARY_CHANNELS))

    def turns(self, t: int) -> Tensor:
        """exp(i · frame position · frequency), "t 16", complex64."""
        angle = torch.arange(t, device=self.freqs.device, dtype=torch.float32)[:, None] * self.freqs.float()
        return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates adjacent pairs of the first 32 channels of each head; x "b t n heads d", turns "t 16".

    x is overwritten where no gradient needs it.
    """
    head, rest = x.split([ROTARY_CHANNELS, x.shape[-1] - ROTARY_CHANNELS], dim=-1)
    wide = head.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turns[:, None, None]).flatten(-2).to(x.dtype)
    if torch.is_grad_enabled():
        return torch.cat([turned, rest], dim=-1)
    head.copy_(turned)
    return x


def _buckets(distance: Tensor) -> Tensor:
    """Architecture 3.3: bucket 0..31 of key frames `distance` behind the query frame, integers of any shape."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    m = distance.abs()
    scale = (half - exact) / math.log(FARTHEST / exact)
    far = exact + (torch.log(m.clamp(min=1).float() / exact) * scale).floor().long()
    return torch.where(m < exact, m, far.clamp(max=half - 1)) + half * (distance > 0)


_BUCKETS = _buckets(torch.arange(-FARTHEST, FARTHEST + 1, device="cpu")).tolist()


def relative_bucket(t: int, device: torch.device | None = None) -> Tensor:
    """Bucket of (query frame i, key frame j), "t t" integers in 0..31; all from `FARTHEST` frames on share theirs.

    Numbers, not tensor arithmetic: torch's compiler trips over the latter on a GPU (torch 2.11).
    """
    place = lambda distance: max(-FARTHEST, min(FARTHEST, distance)) + FARTHEST  # noqa: E731
    return torch.tensor([[_BUCKETS[place(j - i)] for j in range(t)] for i in range(t)], device=device)


class RelativeBias(nn.Module):
    """A learned addition to the attention scores, by head and distance in time."""

    def __init__(self, heads: int):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, t: int) -> Tensor:
        """The addition for t frames, "1 heads t t"."""
        table = self.relative_attention_bias.weight
        return table[relative_bucket(t, table.device)].permute(2, 0, 1)[None]


class TemporalAttention(nn.Module):
    """Attention among the frames at each pixel, with rotary positions and a relative bias (3.3)."""

    def __init__(self, channels: int, heads: int, rotary: Rotary):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([zeroed(Linear(channels, channels))])
        self.time_rel_pos_bias = RelativeBias(heads)
        self.rotary_emb = rotary

    def forward(self, z: Tensor) -> Tensor:
        """z "b t n c" -> "b n t c"."""
        t = z.shape[1]
        turns, bias = self.rotary_emb.turns(t), self.time_rel_pos_bias(t)
        q, k, v = self.to_q(z), self.to_k(z), self.to_v(z)
        if inferring(q, bias) and native.attends_over_time(q, self.heads):
            return self.to_out[0](native.attend_over_time(q, k, v, self.heads, turns, bias[0])).transpose(1, 2)
        return self.to_out[0](self.attend(q, k, v, turns, bias.to(q.dtype)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, bias: Tensor) -> Tensor:
        """q, k and v "b t n c", turns "t 16", bias "1 heads t t" -> "b n t c"."""
        b, t, n, _ = q.shape
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, turns), rotate(k, turns)
        # Short windows: two pixels share a sequence, each blind to the other's frames; twice as fast on a CPU.
        share = 2 if t <= 8 and n % 2 == 0 else 1
        q, k, v = (x.unflatten(2, (-1, share)).permute(0, 2, 4, 3, 1, 5).flatten(0, 1).flatten(2, 3) for x in (q, k, v))
        out = softmax_attention(q, k, v, shared(bias, share))
        return out.transpose(1, 2).unflatten(0, (b, -1)).flatten(3).view(b, n, t, -1)


def shared(bias: Tensor, share: int) -> Tensor:
    """The relative bias "1 heads t t" for `share` sequences of t frames in one, "1 heads (share t) (share t)"."""
    if share == 1:
        return bias
    apart = torch.full_like(bias, -torch.inf)
    rows = [torch.cat([bias if i == j else apart for j in range(share)], dim=-1) for i in range(share)]
    return torch.cat(rows, dim=-2)
