"""However OpenMP is told to save threads, a frame is the same, or one line says what will not do."""

import os
import subprocess
import sys

import pytest

from vsuav import openmp

PROGRAM = """
import hashlib, sys
import numpy as np, torch, vapoursynth as vs
from vsuav import upscale
from vsuav.settings import auto_threads
threads = eval(sys.argv[1])
clip = vs.core.std.BlankClip(format=vs.RGBS, width=64, height=48, length=2, color=[0.2, 0.5, 0.7])
try:
    frame = upscale(clip, preset="preview", dtype="float32", threads=threads).get_frame(0)
except vs.Error as error:
    print(str(error))
else:
    print(auto_threads("auto"), hashlib.blake2b(b"".join(np.asarray(plane).tobytes() for plane in frame)).hexdigest())
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    def run(threads, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, "-c", PROGRAM, repr(threads)]
        done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
        return done.stdout.split(maxsplit=1)

    return run


@pytest.fixture(scope="module")
def plain(told):
    """Cores, and the frame by each number of threads."""
    return {threads: told(threads) for threads in (1, 2)}


@pytest.mark.parametrize("variables", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_MAX_ACTIVE_LEVELS": "0"}], ids=str)
def test_auto_keeps_to_the_limit_and_more_is_refused(told, plain, variables):
    assert told("auto", **variables) == ["1", plain[1][1]]
    said = " ".join(told(2, **variables))
    assert said.startswith("upscale: threads must be at most 1, which OMP_THREAD_LIMIT or OMP_MAX_ACTIVE_LEVELS allows")


@pytest.mark.parametrize("variables", [{"OMP_DYNAMIC": "true"}, {"OMP_PROC_BIND": "true"}], ids=str)
def test_threads_and_pixels_are_those_without(told, plain, variables):
    assert told(2, **variables) == plain[2]


def test_a_thread_gets_what_it_asks_for_once_that_is_fixed():
    program = (
        "import torch; from vsuav import openmp; found = openmp._libraries()\n"
        "print(*(each.omp_get_dynamic() for each in found)); openmp.fix()\n"
        "print(*(each.omp_get_dynamic() for each in found))"
    )
    environment = os.environ | {"OMP_DYNAMIC": "true"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert set(before.split()) == {"1"} and set(after.split()) == {"0"}


def test_cores_and_limits_without_a_limit():
    assert openmp.cores() == len(os.sched_getaffinity(0)) and openmp.most_threads() >= openmp.cores()
