"""The wheel: what is in it, and that what it installs works away from the checkout without writing beside itself."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
from pathlib import Path
import vsuav, vsuav.checkpoint, vsuav.folders
folder = vsuav.folders.bundled()
assert Path(vsuav.__file__).is_relative_to(Path.cwd().parent / "site"), vsuav.__file__
assert folder == Path(vsuav.__file__).parent / "models" / "mini", folder
models = vsuav.checkpoint.load()
assert models.kind == "vsuav" and models.text.encode(models.defaults["prompt"]).ndim == 2
import vapoursynth as vs
clip = vs.core.std.BlankClip(format=vs.RGBS, width=16, height=16, length=1, color=[0.5, 0.4, 0.3])
frame = vsuav.upscale(clip, preset="preview").get_frame(0)
assert (frame.width, frame.height) == (64, 64)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git would have, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("vsuav", "models", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "parity"))
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    left = copy / "out" / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "vsuav"
    left.mkdir(parents=True)  # by an earlier build, when there was such a module
    (left / "gone.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_the_model_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"vsuav/__init__.py", "vsuav/py.typed", "vsuav/models/mini/model_index.json"} <= set(names)
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vsuav").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    weights = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "models").glob("*/*/*") if path.suffix == ".safetensors"
    }
    assert weights
    assert {name.removeprefix("vsuav/") for name in names if name.endswith(".safetensors")} >= weights
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vsuav"}


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as files:
        folder = next(name for name in files.namelist() if name.endswith("/METADATA")).removesuffix("METADATA")
        metadata = files.read(folder + "METADATA").decode()
        points = files.read(folder + "entry_points.txt").decode()
        assert folder + "licenses/LICENSE" in files.namelist()
    assert "Requires-Python: >=3.12" in metadata
    assert "License-Expression: MIT" in metadata
    assert "vsuav = vsuav.__main__:main" in points


def test_what_is_installed_works_elsewhere_and_writes_nothing(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before
    assert list(elsewhere.iterdir()) == []
