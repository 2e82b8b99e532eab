"""An encode that is killed again and again ends with the same bytes, and makes no stored latent twice."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

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
                for plane in range(3):
                    file.write(np.asarray(frame[plane]).tobytes())
                file.flush()
                os.fsync(file.fileno())
                said.send(("frame", n))
    said.send(("done",))


def run(folder: Path, kill_after: float | None) -> list[tuple]:
    """What an encode said until it was done or killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clips", "fakes", "vsuav.plugin", "vsuav.disk"])
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=encode, args=(folder, said))
    process.start()
    said.close()
    words, deadline = [], None
    while True:
        try:
            if deadline is not None and not heard.poll(max(0, deadline - time.monotonic())):
                process.kill()
                deadline = None
            words.append(heard.recv())
        except EOFError:
            process.join()
            return words
        if kill_after is not None and len(words) == 1:
            deadline = time.monotonic() + kill_after
        if deadline is not None and time.monotonic() >= deadline:
            process.kill()
            deadline = None


def ends_well(folder: Path, kills: int, whole: bytes, seconds: float) -> None:
    generator, stored, happened = random.Random(kills), [], []
    for _ in range(kills):
        words = run(folder, generator.uniform(0, seconds / kills * 2))
        stored += [word[1] for word in words if word[0] == "stored"]
        happened.append(words[-1][0])
    words = run(folder, None)
    assert words[-1] == ("done",)
    stored += [word[1] for word in words if word[0] == "stored"]
    assert (folder / "encode.raw").read_bytes() == whole
    assert len(stored) == len(set(stored)), "a stored latent was made again"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[bytes, float]:
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.monotonic()
    assert run(folder, None)[-1] == ("done",)
    return (folder / "encode.raw").read_bytes(), time.monotonic() - began


def test_three_kills(tmp_path, unbroken):
    ends_well(tmp_path, 3, *unbroken)


@pytest.mark.long
@pytest.mark.parametrize("turn", range(3))
def test_twenty_kills(tmp_path, unbroken, turn):
    ends_well(tmp_path, 20, *unbroken)
