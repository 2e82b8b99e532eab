"""What is put right in the mixed picture where truth counts more than sharpness: a small network for low noise levels.

Decoder and enlarger serve all noise levels with the same layers. This one serves the level for fidelity alone, so that
what it learns there takes nothing from the others; and where it does not count it is not computed.
"""

from torch import Tensor, nn

from vsuav.enlarger import SCALE, Plain
from vsuav.layers import FrameConv, plus, shuffled, times, unshuffled, zeroed


class Corrector(nn.Module):
    """What is to be changed in a picture, by the picture and by what the enlarger found in its input.

    Args:
        features: width of the enlarger.
        channels: width.
        layers: residual blocks.
        until: the noise level from which on it counts nothing; it counts fully at 0 and fades in between.
    """

    def __init__(self, features: int, channels: int, layers: int, until: int):
        super().__init__()
        self.until = until
        self.features_in = FrameConv(features, channels, 3, padding=1)
        self.picture_in = FrameConv(3 * SCALE**2, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Plain(channels, channels) for _ in range(layers))
        self.conv_out = zeroed(FrameConv(channels, 3 * SCALE**2, 3, padding=1))

    def forward(self, features: Tensor, picture: Tensor) -> Tensor:
        """features "b c t h w" and picture "b 3 t 4h 4w" -> what is to be added to the picture."""
        x = first = self.picture_in(unshuffled(picture, SCALE), add=self.features_in(features))
        for block in self.blocks:
            x = block(x)
        return shuffled(self.conv_out(plus(x, first)), SCALE)

    def corrected(self, picture: Tensor, features: Tensor, level: Tensor) -> Tensor:
        """The picture, which may be overwritten, with as much of the change as level (b,), int64, lets count."""
        share = (1 - level / self.until).clamp(min=0)
        return plus(picture, times(self(features, picture), share[:, None, None, None, None].to(picture)))
