"""The pieces both networks are made of.

Activations are "b c t h w" tensors whose memory is (b, t, h, w, c), that is `torch.channels_last_3d`. In that memory

* the frames, "(b t) c h w", are a channels-last view (`frames`): every spatial convolution runs on it;
* "b c t (h w)" is a channels-last view: joint group normalisation and convolutions over time run on it;
* "(b t) (h w) c" is a contiguous view (`tokens`): attention and feed-forward layers run on it.

No layer has to rearrange anything. Every module also accepts any other memory layout, at the price of a copy.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav import buffers, native, winograd
from vsuav.operators import affine, convolve, fused, inferring


def memory(x: Tensor) -> Tensor:
    """From "b c t h w" to "b t h w c", contiguous: the activation as it lies in memory."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def video(m: Tensor) -> Tensor:
    """From "b t h w c" back to "b c t h w"."""
    return m.permute(0, 4, 1, 2, 3)


def frames(x: Tensor) -> Tensor:
    """From "b c t h w" to "(b t) c h w", channels-last."""
    return memory(x).flatten(0, 1).permute(0, 3, 1, 2)


def clip(x: Tensor, t: int) -> Tensor:
    """From "(b t) c h w" back to "b c t h w"."""
    return video(x.permute(0, 2, 3, 1).unflatten(0, (-1, t)))


def timeline(x: Tensor) -> Tensor:
    """From "b c t h w" to "b c t (h w)", channels-last."""
    return memory(x).flatten(2, 3).permute(0, 3, 1, 2)


def untimeline(x: Tensor, h: int, w: int) -> Tensor:
    """From "b c t (h w)" back to "b c t h w"."""
    return video(x.permute(0, 2, 3, 1).unflatten(2, (h, w)))


def tokens(x: Tensor) -> Tensor:
    """From "b c t h w" to "(b t) (h w) c", contiguous."""
    return memory(x).flatten(2, 3).flatten(0, 1)


def untokens(z: Tensor, like: Tensor) -> Tensor:
    """From "(b t) (h w) c" back to "b c t h w", with the sizes b, t, h, w of `like`."""
    b, _, t, h, w = like.shape
    return video(z.view(b, t, h, w, -1))


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenation on channels, done in memory order (one straight copy per pixel)."""
    a, b = memory(a), memory(b)
    shape = *a.shape[:-1], a.shape[-1] + b.shape[-1]
    return video(torch.cat([a, b], dim=-1, out=buffers.out(shape, a) if a.dtype == b.dtype else None))


def plus(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh + other; `fresh` is overwritten where no gradient needs it."""
    return fresh + other if torch.is_grad_enabled() else fresh.add_(other)


def times(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh · other; `fresh` is overwritten where no gradient needs it."""
    return fresh * other if torch.is_grad_enabled() else fresh.mul_(other)


def shuffled(x: Tensor, side: int) -> Tensor:
    """Blocks of pixels that are channels "b (c side side) t h w" as pixels "b c t (h side) (w side)", which in memory
    are planes: on a CPU that is twice as fast to write as pixels, and then to use."""
    blocks = x.permute(0, 2, 1, 3, 4).unflatten(2, (-1, side, side))
    return blocks.permute(0, 1, 2, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4).transpose(1, 2)


class Linear(nn.Linear):
    """A linear layer, and the sum with what it is a residual to."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return affine(x, self.weight, self.bias, add)


LARGE, PART = 1 << 17, 1 << 14
"""Pixels of a clip from which on its norms are computed in parts, and pixels of a part."""


class JointNorm(nn.GroupNorm):
    """Group normalisation of "b c t h w", optionally followed by SiLU.

    Mean and variance run over a group's channels and over ALL frames and pixels together: which frames are given
    together changes the result.
    """

    def forward(self, x: Tensor, act: bool = False) -> Tensor:
        if inferring(x, self.weight) and native.reads(x, x.shape[1]):
            m = memory(x)
            return video(native.line(m, *self.line(m), act))
        if x.device.type == "cpu" and x[0, 0].numel() > LARGE and not torch.is_grad_enabled():
            clips = [self.large(m) for m in memory(x).split(1)]
            y = (clips[0] if len(clips) == 1 else torch.cat(clips)).permute(0, 3, 1, 2)
        else:
            if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
                x = x.detach().requires_grad_()  # asked for the weights' gradients alone, torch 2.9 crashes on a CPU
            y = torch.group_norm(timeline(x), self.num_groups, self.weight, self.bias, self.eps)
        if act:
            y = F.silu(y, inplace=not torch.is_grad_enabled())
        return untimeline(y, *x.shape[3:])

    def line(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """What normalises "b t h w c": scale and shift "b c", where `native` normalises it."""
        return native.moments(m, self.weight, self.bias, self.num_groups, self.eps)

    def large(self, m: Tensor) -> Tensor:
        """The same for one large clip "1 t h w c" -> "1 t (h w) c", as exact as for a small one.

        On a CPU, torch sums all pixels of a channel one after the other in float32, which at a million pixels is wrong
        in the fourth digit. So the sums of parts are taken, and joined in float64.
        """
        return self.apply_moments(m, *self.moments(m))

    def moments(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of every group over a clip "1 t h w c", float64."""
        _, t, h, w, c = m.shape
        if m.device.type != "cpu":
            parts = m.double().unflatten(-1, (self.num_groups, -1))
            variance, mean = torch.var_mean(parts, dim=(0, 1, 2, 3, 5), correction=0)
            return mean, variance
        rows = next((n for n in range(t * h, 0, -1) if t * h % n == 0 and n * w <= PART), 1)
        parts = m.reshape(-1, rows * w, 1, c).permute(0, 3, 1, 2)
        ones, k = parts.new_ones(c), len(parts)
        _, mean, rstd = torch.native_group_norm(parts, ones, 0 * ones, k, c, rows * w, self.num_groups, self.eps)
        mean, variance = mean.double(), rstd.double() ** -2 - self.eps
        return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)

    def apply_moments(self, m: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Normalise "1 t h w c" -> "1 t (h w) c" by the groups' mean and variance."""
        each = m.shape[-1] // self.num_groups
        mean, variance = (v.float().to(m.device).repeat_interleave(each) for v in (mean, variance))
        y = F.batch_norm(
            m.flatten(2, 3).permute(0, 3, 1, 2), mean, variance, self.weight.float(), self.bias.float(), eps=self.eps
        )
        return y.permute(0, 2, 3, 1)


class Conv(nn.Module):
    """What convolutions share: `forward(x, shift, add)` = convolution + bias + shift + add.

    shift "b c" or "1 c" is broadcast over frames and pixels; one that all clips share costs nothing, being part of the
    bias. add "b c t h w" is what the convolution is a residual to. norm: what is convolved is SiLU(norm(x)) instead.
    """

    def forward(
        self, x: Tensor, shift: Tensor | None = None, add: Tensor | None = None, norm: "JointNorm | None" = None
    ) -> Tensor:
        bias = self.bias
        if shift is not None and len(shift) == 1:
            bias, shift = bias + shift[0], None
        if shift is None and inferring(x, self.weight) and self.native_pays(x):
            m = memory(x)
            line, add = norm and norm.line(m), None if add is None else memory(add)
            return video(self.natively(m, bias, add, line))
        x = x if norm is None else norm(x, act=True)
        if self.kernel_size == (1, 1):
            y = affine(memory(x), self.weight.flatten(1), bias, None if add is None else memory(add))
            return video(y) if shift is None else video(y) + shift[:, :, None, None, None]
        y = self.convolve(x, bias)
        if shift is not None:
            y = plus(y, shift[:, :, None, None, None])
        return y if add is None else plus(y, add)

    def native_pays(self, x: Tensor) -> bool:
        """Is there machine code of our own for it?"""
        return self.small() and native.pays(x, self.weight)

    def natively(self, m: Tensor, bias: Tensor, add: Tensor | None, line: tuple[Tensor, Tensor] | None) -> Tensor:
        """The whole of `forward` by that code, on the activations as they lie in memory."""
        return native.convolve(m, self.weight, bias, add, line)

    def small(self) -> bool:
        """Does it see 3x3 pixels (of one frame or three), and give as many as it gets?"""
        return (*self.kernel_size[-2:], *self.padding) == (3, 3, *[1] * len(self.padding)) and max(self.stride) == 1


class FrameConv(Conv, nn.Conv2d):
    """A 2-D convolution of every frame of "b c t h w"."""

    def activated(self, x: Tensor) -> Tensor:
        """SiLU of what it gives."""
        if inferring(x, self.weight) and self.native_pays(x):
            return video(native.convolve(memory(x), self.weight, self.bias, activate=True))
        return F.silu(self(x), inplace=not torch.is_grad_enabled())

    def convolve(self, x: Tensor, bias: Tensor) -> Tensor:
        y = frames(x)
        if self.small() and fused(x, self.weight) and winograd.pays(y, self.weight):
            return clip(winograd.convolve(y, self.weight, bias), x.shape[2])
        return clip(convolve(y, self.weight, bias, self.padding, self.stride), x.shape[2])


class TimeConv(Conv, nn.Conv3d):
    """A convolution over time only, kernel (k, 1, 1), zero padding (k-1)/2; run as a 2-D one on "b c t (h w)"."""

    def __init__(self, cin: int, cout: int, k: int):
        super().__init__(cin, cout, (k, 1, 1), padding=(k // 2, 0, 0))

    def native_pays(self, x: Tensor) -> bool:
        many = x[0, 0, 0].numel() >= native.BLOCK
        return many and x.shape[1] % native.MULTIPLE == 0 and native.multiplies(x, self.weight)

    def natively(self, m: Tensor, bias: Tensor, add: Tensor | None, line: tuple[Tensor, Tensor] | None) -> Tensor:
        return native.affine(m, self.weight[..., 0, 0], bias, add, line)

    def convolve(self, x: Tensor, bias: Tensor) -> Tensor:
        y = convolve(timeline(x), self.weight[..., 0], bias, self.padding[:2])
        return untimeline(y, *x.shape[3:])


class VolumeConv(Conv, nn.Conv3d):
    """A full 3-D convolution of "b c t h w"."""

    def convolve(self, x: Tensor, bias: Tensor) -> Tensor:
        if not (fused(x, self.weight) and x.dtype == torch.float32):
            return convolve(video(memory(x)), self.weight, bias, self.padding)
        # torch's own in float32 takes several times as long as three of frames
        before, there, after = (w.contiguous(memory_format=torch.channels_last) for w in self.weight.unbind(2))
        y = clip(convolve(frames(x), there, bias, (1, 1)), x.shape[2])
        if x.shape[2] > 1:
            y[:, :, 1:] += clip(convolve(frames(x[:, :, :-1]), before, None, (1, 1)), x.shape[2] - 1)
            y[:, :, :-1] += clip(convolve(frames(x[:, :, 1:]), after, None, (1, 1)), x.shape[2] - 1)
        return y


class ResBlock(nn.Module):
    """R2 of the architecture (2): out = skip(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + proj(SiLU(e)))))."""

    def __init__(
        self, cin: int, cout: int, *, eps: float, groups: int, groups_in: int | None = None, emb: int | None = None
    ):
        super().__init__()
        self.norm1 = JointNorm(groups_in or groups, cin, eps)
        self.conv1 = self.convolution(cin, cout, first=True)
        if emb is not None:
            self.time_emb_proj = nn.Linear(emb, cout)
        self.norm2 = JointNorm(groups, cout, eps)
        self.conv2 = self.convolution(cout, cout, first=False)
        if cin != cout:
            self.conv_shortcut = FrameConv(cin, cout, 1)
        self.takes_embedding, self.changes_width = emb is not None, cin != cout

    def convolution(self, cin: int, cout: int, first: bool) -> nn.Module:
        return FrameConv(cin, cout, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """x "b c t h w"; e "b d" or "1 d", only where the block was built with `emb`."""
        h = self.conv1(x, self.shift(e), norm=self.norm1)
        h = self.conv2(h, add=None if self.changes_width else x, norm=self.norm2)
        return self.conv_shortcut(x, add=h) if self.changes_width else h

    def shift(self, e: Tensor | None) -> Tensor | None:
        """What an embedding "b d" adds to the first convolution, "b c"; None where the block takes none."""
        return self.time_emb_proj(F.silu(e)) if self.takes_embedding else None


class TimeResBlock(ResBlock):
    """RT of the architecture (2): the same block with convolutions over time, k and 3 frames long, and eps 1e-6."""

    def __init__(self, channels: int, k: int, *, groups: int, emb: int | None = None):
        self.k = k
        super().__init__(channels, channels, eps=1e-6, groups=groups, emb=emb)

    def convolution(self, cin: int, cout: int, first: bool) -> nn.Module:
        return TimeConv(cin, cout, self.k if first else 3)


class PlusResBlock(ResBlock):
    """R2+ of the architecture (2): y = R2(x); out = y + conv_3d(SiLU(norm_3d(y))). A fresh block equals R2."""

    def __init__(
        self, cin: int, cout: int, *, eps: float, groups: int, groups_in: int | None = None, emb: int | None = None
    ):
        super().__init__(cin, cout, eps=eps, groups=groups, groups_in=groups_in, emb=emb)
        self.norm_3d = JointNorm(groups, cout, eps)
        self.conv_3d = zeroed(VolumeConv(cout, cout, 3, padding=1))

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        y = super().forward(x, e)
        return self.conv_3d(y, add=y, norm=self.norm_3d)


class Down(nn.Module):
    """A stride-2 convolution: zero padding 1 all around, or (`corner`) only one column right and one row below."""

    def __init__(self, channels: int, corner: bool = False):
        super().__init__()
        self.corner = corner
        self.conv = FrameConv(channels, channels, 3, stride=2, padding=0 if corner else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.corner else x)


class Up(nn.Module):
    """Nearest-neighbour enlargement of h and w to `size` (default: twice as large), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        b, _, t, h, w = x.shape
        size, weight = size or (2 * h, 2 * w), self.conv.weight
        if size == (2 * h, 2 * w) and inferring(x, weight) and native.pays(x, weight):
            return video(native.convolve(memory(x), weight, self.conv.bias, enlarge=2))
        if size == (2 * h, 2 * w) and b * t * h * w >= 256 and not torch.is_grad_enabled():
            return doubled(x, weight, self.conv.bias)
        return self.conv(clip(F.interpolate(frames(x), size=size, mode="nearest"), t))


def doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution (zero padding 1) of x enlarged twice by nearest neighbour, in 4/9 of the multiplications.

    An output pixel of phase (p, q) in 0..1 squared sees 2x2 pixels of x, whose weights are sums of the nine: over the
    rows, phase 0 has w0 | w1 + w2 and phase 1 has w0 + w1 | w2; the columns likewise.
    """

    def phase(w: Tensor, axis: int, p: int) -> Tensor:
        first, middle, last = w.unbind(axis)
        return torch.stack([first + middle, last] if p else [first, middle + last], axis)

    (b, _, t, h, w), m = x.shape, frames(x)
    wide = weight.float().permute(0, 2, 3, 1)
    y = torch.empty(b * t, h, 2, w, 2, len(weight), dtype=x.dtype, device=x.device)
    for p in (0, 1):
        rows = phase(wide, 1, p)
        for q in (0, 1):
            kernel = phase(rows, 2, q).to(weight.dtype).permute(0, 3, 1, 2)
            part = convolve(m, kernel, bias, (1, 1)).permute(0, 2, 3, 1)
            y[:, :, p, :, q] = part[:, p : p + h, q : q + w]
    return video(y.view(b, t, 2 * h, 2 * w, -1))


def zeroed[M: nn.Module](module: M) -> M:
    """The same module with all its parameters zero: what a residual branch ends in before it is trained."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def lay_out[M: nn.Module](model: M) -> M:
    """The same model with its convolutions' weights in channels-last memory, which spares a conversion per call."""
    for p in model.parameters():
        if p.dim() >= 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)
    return model


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Architecture 3.1: [cos(t f_i), sin(t f_i)], f_i = 10000^(-i / (width/2)), float32; timestep "b" -> "b width"."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(10000) / half)
    angle = timestep.float()[:, None] * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
