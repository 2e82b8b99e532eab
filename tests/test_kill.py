"""An encode that is killed again and again ends with the same bytes, and makes no stored latent twice."""

import os
import random
import time
from pathlib import Path

import pytest
from fresh import started

LENGTH = 60


def encode(folder: Path, said) -> None:
    """Write the frames that are not yet written, one file, as a resumed encode does; say each window and frame."""
    import numpy as np
    import vapoursynth as vs
    from clips import clip_of, pixels, restored
    from fakes import Fake

    from vsuav.disk import Disk
    from vsuav.settings import Settings

    class Slow(Fake):
        """Takes its time, so that kills meet it everywhere, and tells what it does."""

        def window(self, step, frames, *rest):
            said.send(("window", step, frames[0]))
            time.sleep(0.002)
            return super().window(step, frames, *rest)

    put = Disk.put

    def told(self, name, value):
        said.send(("storing",))
        put(self, name, value)
        said.send(("stored", name.hex()))

    Disk.put = told
    vs.core.num_threads = 4
    settings = Settings(steps=4, propagation_steps=(2,), propagation_radius=4)
    clip, _ = restored(clip_of(pixels(LENGTH, 24, 16)), Slow(settings), cache_dir=folder / "cache")
    size = clip.width * clip.height * 12
    with open(folder / "encode.raw", "ab") as file:
        start = file.tell() // size
        file.truncate(start * size)
        if start < LENGTH:
            for n, frame in enumerate(clip[start:].frames(prefetch=4), start):
                said.send(("writing", n))
                for plane in range(3):
                    file.write(np.asarray(frame[plane]).tobytes())
                file.flush()
                os.fsync(file.fileno())
                said.send(("frame", n))
    said.send(("done",))


PHASES = ("window", "storing", "writing")
"""What is under way when a kill comes: denoising, a write to the store, or the encoding of a frame."""


def run(folder: Path, phase: str | None = None, times: int = 0, delay: float = 0) -> list[tuple]:
    """What an encode said until it was done, or killed: `delay` seconds into the `times`-th `phase`."""
    process, heard = started(encode, folder)
    words = []
    while True:
        try:
            words.append(heard.recv())
        except EOFError:
            process.join()
            return words
        if words[-1][0] == phase:
            times -= 1
            if not times:
                time.sleep(delay)
                process.kill()


def ends_well(folder: Path, kills: int, seed: int, whole: bytes) -> dict[str, int]:
    """Kill an encode `kills` times and let it end; how many kills fell into each phase, and what was made in all."""
    generator, words = random.Random(seed), []
    for turn in range(kills):
        phase = PHASES[turn % 3]
        words += run(folder, phase, generator.randint(1, 4), generator.uniform(0, 0.004))
        assert words[-1] != ("done",)
    words += run(folder)
    assert words[-1] == ("done",)
    stored = [word[1] for word in words if word[0] == "stored"]
    assert (folder / "encode.raw").read_bytes() == whole
    assert len(stored) == len(set(stored)), "a stored latent was made again"
    fell = {f"kills while {phase}": len(range(i, kills, 3)) for i, phase in enumerate(PHASES)}
    return {**fell, "latents stored": len(stored), "windows": sum(word[0] == "window" for word in words)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(folder)[-1] == ("done",)
    return (folder / "encode.raw").read_bytes()


def test_three_kills(tmp_path, unbroken):
    ends_well(tmp_path, 3, 0, unbroken)


@pytest.mark.long
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_twenty_kills(tmp_path, unbroken, turn, record_property):
    for name, number in ends_well(tmp_path, 20, turn, unbroken).items():
        record_property(name, number)
