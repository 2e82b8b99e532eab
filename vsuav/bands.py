"""A decoder run in bands of rows, layer by layer, with the group-norm statistics of whole frames.

Between two layers the whole activation lies at `home`; a layer sees a band of it at a time, with the one row around
that a 3x3 kernel reads, on the device of its weights. The statistics of a norm are gathered over all bands before the
first is normalised. So the result is that of the whole frame but for rounding, however narrow the bands; a device holds
what a band needs, and a home the largest input and output instead of twice as much.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav.layers import FrameConv, JointNorm, PlusResBlock, ResBlock, clip, concat, frames, memory, untimeline
from vsuav.vae import ConditionFuse, Decoder, Middle, Stage

Layer = Callable[[Tensor], Tensor]


class BandedDecoder:
    """Called as `decoder` is, for one clip (b = 1), and gives the same.

    Args:
        decoder: what decodes.
        rows: height of a band in rows of the latent, at least 1; at the finest level there are four times as many.
        home: device on which activations lie between layers.
    """

    def __init__(self, decoder: Decoder, rows: int, home: str | torch.device = "cpu"):
        if rows < 1:
            raise ValueError(f"BandedDecoder: rows must be at least 1, got {rows}")
        self.decoder, self.rows, self.home = decoder, rows, torch.device(home)

    def __call__(self, z: Tensor, low_res: Tensor | None, level: Tensor | None, w: float) -> Tensor:
        """z "1 c t h w", low_res "1 3 t h w", level (1,) -> "1 3 t 4h 4w" at home."""
        decoder, e = self.decoder, self.decoder.embedded(level)
        x = self._activation(z, z.shape[3])
        x.apply(decoder.conv_in)
        if hasattr(decoder, "condition_in"):
            condition = self._activation(low_res, z.shape[3])
            for block in decoder.condition_in:
                condition.residual(block)
            x.fuse(decoder.condition_fuse, condition.x, w)
            del condition
        x.middle(decoder.mid_block, e)
        for stage in decoder.up_blocks:
            x.stage(stage, e)
        norm = x.normed(decoder.conv_norm_out)
        x.apply(lambda band: decoder.conv_out(norm(band)))
        return decoder.arranged(x.x)

    def _activation(self, x: Tensor, height: int) -> "Activation":
        return Activation(x, self.rows, height, next(self.decoder.parameters()).device, self.home)


class Activation:
    """An activation "1 c t h w" at home, and what the layers of a decoder make of it; nothing else holds it.

    `rows` is the height of a band where the activation is `height` rows high, more in proportion where it is higher.
    """

    def __init__(self, x: Tensor, rows: int, height: int, device: torch.device, home: torch.device):
        self.x, self.rows, self.height, self.device, self.home = x.to(home), rows, height, device, home

    def apply(self, layer: Layer, ratio: int = 1) -> None:
        """Replace the activation by `layer` of it; `ratio`: how many times higher that is."""
        self.x = self._through(layer, self.x, ratio)

    def residual(self, block: ResBlock, e: Tensor | None = None) -> None:
        norm, shift = self.normed(block.norm1), block.shift(e)
        h = self._through(lambda band: block.conv1(norm(band), shift), self.x)
        if block.changes_width:
            self._shorten(block.conv_shortcut)
        norm = self.normed(block.norm2, h)
        self._through(lambda band: block.conv2(norm(band)), h, add_to=self.x)
        del h
        if isinstance(block, PlusResBlock):
            norm = self.normed(block.norm_3d)
            self.apply(lambda band: block.conv_3d(norm(band), add=band))

    def _shorten(self, layer: FrameConv) -> None:
        """A convolution of single pixels, in the place of the activation where that has enough channels."""
        if layer.out_channels > layer.in_channels:
            return self.apply(layer)
        for top, bottom in self._bands(self.x.shape[3]):
            band = self.x[:, :, :, top:bottom]
            band[:, : layer.out_channels] = layer(band.to(self.device)).to(self.home)
        self.x = self.x[:, : layer.out_channels]

    def fuse(self, block: ConditionFuse, condition: Tensor, w: float) -> None:
        u = Activation(concat(condition, self.x), self.rows, self.height, self.device, self.home)
        for each in block.shared:
            u.residual(each)
        scaled = self._through(block.scale, u.x).mul_(self.x)
        self._through(block.shift, u.x, add_to=scaled)
        self.x = scaled.mul_(w).add_(self.x)

    def middle(self, block: Middle, e: Tensor | None) -> None:
        """The attention between the residual blocks sees whole frames: at this level they are small."""
        self.residual(block.resnets[0], e)
        if hasattr(block, "attentions"):
            for n in range(self.x.shape[2]):
                frame = self.x[:, :, n : n + 1]
                frame.copy_(clip(block.attentions[0](frames(frame.to(self.device))), 1))
        for each in block.resnets[1:]:
            self.residual(each, e)

    def stage(self, stage: Stage, e: Tensor | None) -> None:
        for block in stage.resnets:
            self.residual(block, e)
        for enlarge in getattr(stage, "upsamplers", ()):
            self.apply(enlarge, ratio=2)

    def normed(self, norm: JointNorm, x: Tensor | None = None) -> Layer:
        """`norm` and SiLU for bands of the activation (or of x), by the statistics of all its bands."""
        x = self.x if x is None else x
        height = x.shape[3]
        count = torch.tensor([bottom - top for top, bottom in self._bands(height)], dtype=torch.float64) / height
        moments = [norm.moments(memory(x[:, :, :, top:bottom].to(self.device))) for top, bottom in self._bands(height)]
        means, variances = (torch.stack([each.cpu() for each in kind]) for kind in zip(*moments, strict=True))
        mean = count @ means
        variance = count @ (variances + (means - mean) ** 2)

        def layer(band: Tensor) -> Tensor:
            y = norm.apply_moments(memory(band), mean, variance).permute(0, 3, 1, 2)
            return untimeline(F.silu(y, inplace=True), *band.shape[3:])

        return layer

    def _bands(self, height: int) -> Iterator[tuple[int, int]]:
        rows = self.rows * height // self.height
        return ((top, min(top + rows, height)) for top in range(0, height, rows))

    def _through(self, layer: Layer, x: Tensor, ratio: int = 1, add_to: Tensor | None = None) -> Tensor:
        """`layer` of x, band by band; or `add_to` plus that, in its place."""
        height, made = x.shape[3], add_to
        for top, bottom in self._bands(height):
            low, high = max(top - 1, 0), min(bottom + 1, height)
            y = layer(x[:, :, :, low:high].to(self.device))[:, :, :, ratio * (top - low) : ratio * (bottom - low)]
            if made is None:
                shape = (y.shape[0], y.shape[2], ratio * height, *y.shape[4:], y.shape[1])
                made = torch.empty(shape, dtype=y.dtype, device=self.home).permute(0, 4, 1, 2, 3)
            place = made[:, :, :, ratio * top : ratio * bottom]
            place.copy_(y) if add_to is None else place.add_(y.to(self.home))
        return made


__all__ = ["BandedDecoder"]
