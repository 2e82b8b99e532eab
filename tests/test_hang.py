"""The hang gate: nested filters and large frames, hardly any memory, few and many threads, under a time limit.

A filter that waits for frames inside a callback, or holds a lock across a request, stands still here for ever.
"""

import os
import time
from pathlib import Path

import pytest
from fresh import started

LIMIT = 900
"""Seconds after which a process counts as hanging whatever it does; a hundred times what it takes."""
STILL = 30
"""Seconds in which a process that waits for nothing but itself would have used the processor."""


def nested(threads: int, said) -> None:
    """Upscale of upscale to 1080p, with filters before, between and after, more requests than threads."""
    import vapoursynth as vs
    from clips import ask, clip_of, pixels, restored
    from fakes import Fake, NoOp

    from vsuav.settings import Settings

    vs.core.num_threads = threads
    vs.core.max_cache_size = 60
    clip = clip_of(pixels(26, 120, 68), (5, 6, 13)).std.FlipVertical()
    inner, _ = restored(clip, Fake(Settings(steps=2, propagation_steps=(1,), propagation_radius=2)))
    outer, _ = restored(inner.std.Invert(), NoOp(Settings(steps=2)))
    result = vs.core.std.StackVertical([outer.std.Crop(bottom=8), outer.std.Crop(top=1080)])
    result = result.resize.Bicubic(format=vs.YUV420P8, matrix=1)
    said.send(sorted(ask(result, "linear").items()) == sorted(ask(result, "random").items()))


def waiting(threads: int, said) -> None:
    """What must not be done: filters that ask for frames inside their callbacks and wait for them."""
    import vapoursynth as vs
    from clips import ask

    vs.core.num_threads = threads
    vs.core.max_cache_size = 60
    clip = vs.core.std.BlankClip(format=vs.RGBS, width=1920, height=1080, length=26)
    for _ in range(2):
        source = clip.std.Invert()

        def wait(n, f, source=source):
            return source.get_frame(min(n + 3, 25))

        clip = source.std.ModifyFrame(source, wait)
    said.send(len(ask(clip, "linear")) == 26)


def processor_seconds(process: int) -> float:
    """What all threads of a process have used until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def outcome(target, threads: int) -> bool | str:
    """What `target` says in a fresh process, or ``"hangs"`` if it stands still or passes the limit."""
    process, heard = started(target, threads)
    began = moved = time.monotonic()
    used = 0.0
    while process.is_alive() and not heard.poll(1):
        now = time.monotonic()
        if processor_seconds(process.pid) > used + 0.05:
            moved, used = now, processor_seconds(process.pid)
        if now - moved > STILL or now - began > LIMIT:
            process.kill()
            process.join()
            return "hangs"
    result = heard.recv()
    process.join()
    assert process.exitcode == 0
    return result


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_it_never_hangs(threads):
    assert outcome(nested, threads) is True


def test_the_gate_catches_a_filter_that_waits_in_its_callback():
    assert outcome(waiting, 2) == "hangs"
