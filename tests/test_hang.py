"""The hang gate: nested filters and large frames, hardly any memory, few and many threads, under a time limit.

A filter that waits for frames inside a callback, or holds a lock across a request, stands still here for ever.
"""

import multiprocessing

import pytest

LIMIT = 100
"""Seconds; a hundred times what it takes."""


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


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_it_never_hangs(threads):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clips", "fakes", "vsuav.plugin"])
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=nested, args=(threads, said))
    process.start()
    said.close()
    process.join(LIMIT)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive
    assert process.exitcode == 0
    assert heard.recv()
