"""The script in a host written in C, through VSScript, as editors are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import vapoursynth

HERE = Path(__file__).parent
HOME = Path(vapoursynth.__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from clips import clip_of, pixels
from vsuav import upscale
upscale(clip_of(pixels(20, 48, 32), (13,)), model={model!r}, steps=2, dtype="float32", threads=1).set_output()
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.skipif(not (HOME / "include" / "VSScript4.h").exists(), reason="vapoursynth brings no headers")
def test_frames_out_of_order_reloads_and_nothing_left_behind(tmp_path):
    """Eight loads of the script: every frame the same each time, and memory that does not grow.

    It swings from load to load by some 4 %, so the most of three is held against the most of three.
    """
    host = tmp_path / "host"
    build = [COMPILER, "-O1", "-Wall", "-Werror", f"-I{HOME / 'include'}", HERE / "host.c", HOME / "libvsscript.so"]
    subprocess.run([*build, f"-Wl,-rpath,{HOME}", "-o", host], check=True)
    script = tmp_path / "script.vpy"
    model = toy.write(tmp_path / "model")
    script.write_text(SCRIPT.format(tests=str(HERE), root=str(HERE.parent), model=str(model)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run([host, script, "8", "17", "3", "13", "3"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    loads = run.stdout.split("load")[:-1]
    frames = [[line for line in load.splitlines() if "rss" not in line] for load in loads]
    assert len(frames) == 8
    assert all(len(each) == 4 and each == frames[0] for each in frames)
    assert frames[0][1] == frames[0][3]
    assert len(set(frames[0])) == 3
    resident = [int(line.split()[-1]) for line in run.stdout.splitlines() if "rss" in line]
    assert max(resident[5:]) < 1.03 * max(resident[:3]), f"KiB after each load: {resident}"
    print("KiB after each load:", resident)


LOADED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from clips import clip_of, pixels
from vsuav import upscale
upscale(clip_of(pixels(2, 16, 16), ()), model={model!r}, steps=1, dtype="float32", threads=1).get_frame(0)
print(sorted({{"triton", "torch._dynamo", "torch._inductor"}} & sys.modules.keys()))
"""


def test_torchs_compiler_stays_out_of_the_host(tmp_path):
    """Its LLVM crashes a host that has another one, as previewers have on machines that draw with Mesa."""
    program = LOADED.format(tests=str(HERE), root=str(HERE.parent), model=str(toy.write(tmp_path / "model")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "[]"
