"""The noise of a frame: pinned for ever, the same in whatever order it is asked for, independent between frames."""

from hashlib import blake2b

import numpy as np
import pytest
import torch

from vsuav.noise import STREAMS, frame_noise

SHAPE = (4, 30, 40)


def test_the_numbers_never_change():
    """Golden hash: a numpy that draws other numbers must not pass unseen."""
    digest = blake2b(digest_size=16)
    for seed in (0, 1, 2**64 - 1):
        for stream in ("lr", "latent"):
            for frame in (0, 1, 123456789):
                digest.update(frame_noise(seed, stream, frame, (3, 7, 5)).numpy().tobytes())
    assert digest.hexdigest() == "faa49f9f8ef80d52029e8dc3166b47ea"
    first = frame_noise(0, "latent", 0, (4,))
    assert first.dtype == torch.float32
    expected = [1.50533032, 0.5184232, 0.12157429, -0.900835633]
    np.testing.assert_array_equal(first.numpy(), np.array(expected, np.float32))


def test_is_what_numpy_draws_from_philox_at_that_counter():
    """The counter is written out here once more: block numbers in the low words, then frame and stream."""
    bits = np.random.Philox(key=7)
    state = bits.state
    state["state"]["counter"] = np.array([0, 0, 12, 1], np.uint64)
    bits.state = state
    expected = np.random.Generator(bits).standard_normal(SHAPE, dtype=np.float32)
    np.testing.assert_array_equal(frame_noise(7, "latent", 12, SHAPE).numpy(), expected)


def test_a_frame_does_not_depend_on_what_was_drawn_before():
    alone = frame_noise(3, "lr", 5, SHAPE)
    for frame in (9, 4, 5, 0):
        frame_noise(3, "lr", frame, SHAPE)
    np.random.standard_normal(10)
    torch.manual_seed(99)
    assert torch.equal(alone, frame_noise(3, "lr", 5, SHAPE))


def test_streams_frames_and_seeds_are_independent_standard_normals():
    noises = [frame_noise(s, stream, n, SHAPE).flatten() for s in (0, 1) for stream in STREAMS for n in (0, 1, 2)]
    correlation = np.corrcoef(torch.stack(noises).numpy())
    size = noises[0].numel()
    assert np.abs(correlation - np.eye(len(noises))).max() < 5 / size**0.5
    everything = torch.cat(noises)
    assert abs(everything.mean().item()) < 5 / everything.numel() ** 0.5
    assert everything.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("frame", [1.5, "1", None])
def test_frame_numbers_are_whole(frame):
    with pytest.raises(TypeError):
        frame_noise(0, "lr", frame, (1,))
