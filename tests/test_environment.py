"""scripts/environment.sh: finds a Python, makes .venv once, notices what is out of date or unfinished.

Python itself is played by a small script that writes down how it is called, so nothing is installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE_PYTHON = """#!/bin/bash
echo "${0##*/} $*" >> "$LOG"
case "$*" in
    "-c import sys, ensurepip"*) exit "${BROKEN:-0}" ;;
    --version) echo "Python 3.12.0 (played)" ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install"*) echo "Collecting torch>=2"; exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with what environment.sh reads, and a PATH on which the only Python is the played one."""
    (tmp_path / "vsuav").mkdir()
    for name in ("pyproject.toml", "setup.cfg", ".python-version", "vsuav/native.cpp", "vsuav/native.h"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "flock", "rm", "mkdir", "cp", "sed", "sha256sum", "tail", "tee", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    python = tools / "python3.12"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def source(checkout, command="make_environment", **variables):
    """Run `command` with environment.sh sourced; returns the finished process and the calls of Python it made."""
    log = checkout / "calls"
    log.unlink(missing_ok=True)
    environment = {"PATH": str(checkout / "tools"), "HOME": str(checkout), "LOG": str(log), **variables}
    script = f"set -euo pipefail; source {ROOT}/scripts/environment.sh; {command}"
    done = subprocess.run(
        [shutil.which("bash"), "-c", script], cwd=checkout, env=environment, capture_output=True, text=True
    )
    return done, log.read_text() if log.exists() else ""


def test_the_first_call_installs_and_the_second_does_nothing(checkout):
    done, calls = source(checkout)
    assert done.returncode == 0, done.stderr
    assert "python3.12 -m venv --clear .venv" in calls
    assert "--editable .[test]" in calls
    assert "Collecting torch" in done.stderr
    assert done.stdout == ""
    done, calls = source(checkout)
    assert done.returncode == 0
    assert calls.count("\n") <= 1  # whether .venv's Python runs
    assert done.stderr == ""


def test_other_requirements_bring_it_up_to_date_in_place(checkout):
    source(checkout)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# another\n")
    _, calls = source(checkout)
    assert "-m pip install" in calls
    assert "-m venv" not in calls


def test_an_unfinished_installation_begins_again(checkout):
    done, _ = source(checkout, PIP_FAILS="1")
    assert done.returncode != 0
    assert "the installation failed" in done.stderr
    assert not (checkout / ".venv" / "vsuav-stamp").exists()
    done, calls = source(checkout)
    assert done.returncode == 0
    assert "-m venv --clear" in calls
    assert "-m pip install" in calls


def test_a_python_that_does_not_run_is_passed_over(checkout):
    shutil.copy(checkout / "tools" / "python3.12", checkout / "tools" / "python3")
    (checkout / "tools" / "python3.12").write_text("#!/bin/bash\nexit 127\n")
    done, calls = source(checkout, "find_python", PYENV_ROOT=str(checkout / "none"))
    found = done.stdout.strip()
    assert done.returncode == 0
    assert found != "python3.12"
    assert found == "python3" or Path(found).is_absolute()  # a real one of this machine comes before python3


def test_a_python_of_pyenv_is_found(checkout):
    (checkout / "tools" / "python3.12").unlink()
    inside = checkout / ".pyenv" / "versions" / "3.12.9" / "bin"
    inside.mkdir(parents=True)
    (inside / "python").write_text(FAKE_PYTHON)
    (inside / "python").chmod(0o755)
    done, _ = source(checkout, "find_python")
    assert done.stdout.strip() == str(inside / "python")


def test_a_named_python_is_taken_or_refused(checkout):
    done, _ = source(checkout, "find_python", PYTHON=sys.executable)
    assert done.stdout.strip() == sys.executable
    done, _ = source(checkout, "find_python", PYTHON="/bin/false")
    assert done.returncode != 0
    assert "PYTHON=/bin/false is not a Python 3.12 or newer" in done.stderr


def test_no_python_is_a_clear_error(checkout):
    done, _ = source(checkout, "usable_python() { return 1; }; make_environment")
    assert done.returncode != 0
    assert "no usable Python 3.12 was found" in done.stderr
    assert "apt-get install python3.12" in done.stderr
    assert not (checkout / ".venv").exists()


def test_two_at_once_install_once(checkout):
    done, calls = source(checkout, "(make_environment) & (make_environment) & wait")
    assert done.returncode == 0, done.stderr
    assert calls.count("-m venv") == 1
    assert os.path.exists(checkout / ".venv" / "vsuav-stamp")
