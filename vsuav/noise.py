"""The noise of frame n: a pure function of (seed, stream, frame), the same on every device.

A counter-based generator (Philox 4x64) is keyed with the seed and starts at a counter made of the stream and the
frame, so no frame's noise depends on which frames were asked for before it. Numbers are drawn on the CPU.
"""

import operator

import numpy as np
import torch
from torch import Tensor

from vsuav.store import Store

STREAMS = {"lr": 0, "latent": 1}
"""`lr` is the noise added to the conditioning frames, `latent` the start of the sampling."""


def frame_noise(seed: int, stream: str, frame: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one frame.

    Args:
        seed: 0 … 2**64-1.
        stream: a key of `STREAMS`.
        frame: absolute frame number, >= 0.
        shape: of the result, for example ``(4, h, w)``.

    Returns:
        float32 tensor of `shape` on the CPU.
    """
    counter = np.array([0, 0, operator.index(frame), STREAMS[stream]], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=operator.index(seed), counter=counter))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


class Noise:
    """The noise of one seed; the latest is kept, for windows overlap and every step reads that of the input frames.

    Args:
        seed: as in `frame_noise`.
        kept: bytes to keep.
    """

    def __init__(self, seed: int, kept: int = 64 << 20):
        self._seed, self._store = seed, Store(kept)

    def __call__(self, stream: str, frame: int, shape: tuple[int, ...]) -> Tensor:
        """Noise of a frame, float32 `shape`, to be read only; `stream` as in `STREAMS`."""
        key = (stream, frame, tuple(shape))
        value = self._store.get(key)
        return self._store.put(key, frame_noise(self._seed, *key)) if value is None else value
