"""Runs the evidence that takes minutes, and keeps what it showed in docs/evidence.md, one section a file of tests.

    python scripts/long.py [tests/test_memory.py …] [arguments of pytest]

Without files: all that have tests marked `long`. A section is written anew when its file has been run.
"""

import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence.md"
HEAD = """\
# Evidence that takes minutes

What `scripts/test --long` adds to the tests, as `scripts/long.py` last ran it. Numbers that a test noted stand under
the table. Seconds are of a busy machine and say nothing about speed.
"""


def machine() -> str:
    """The kind of machine and the versions that matter, in one line."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    versions = (f"{name} {version(name)}" for name in ("torch", "vapoursynth", "opencv-python-headless"))
    name = cpu.group(1) if cpu else platform.machine()
    return f"{name}, {cores} core{'s' * (cores > 1)}, Python {platform.python_version()}, {', '.join(versions)}"


def run(path: Path, arguments: list[str]) -> ET.Element:
    """The report of the long tests of one file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(path), "-m", "long", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1", *arguments]
        subprocess.run(command, cwd=ROOT, check=False)
        return ET.parse(report).getroot()


def section(path: Path, report: ET.Element) -> str:
    """What a file's tests showed, as Markdown."""
    cases = defaultdict(list)
    for case in report.iter("testcase"):
        cases[case.get("name", "").split("[")[0]].append(case)
    lines = [
        f"## {path.name}", "", f"{datetime.date.today()}, {machine()}.", "",
        "| test | cases | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    noted = []
    for name, several in cases.items():
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in several)
        skipped = sum(case.find("skipped") is not None for case in several)
        seconds = sum(float(case.get("time", 0)) for case in several)
        passed = len(several) - failed - skipped
        lines.append(f"| {name.removeprefix('test_').replace('_', ' ')} | {len(several)} | {passed} | {failed} "
                     f"| {skipped} | {seconds:.0f} |")  # fmt: skip
        for case in several:
            which = "".join(re.findall(r"\[.*\]", case.get("name", "")))
            notes = (f"{each.get('name')}: {each.get('value')}" for each in case.iter("property"))
            noted += [f"* {name.removeprefix('test_').replace('_', ' ')}{which}: {note}" for note in notes]
    return "\n".join([*lines, *([""] + noted if noted else []), ""])


def written(page: str, path: Path, text: str) -> str:
    """`page` with the section of a file of tests replaced, in the order of their names."""
    head, *sections = re.split(r"(?m)^(?=## )", page)
    by_name = {part.split("\n")[0].removeprefix("## "): part.rstrip() + "\n" for part in sections}
    by_name[path.name] = text.rstrip() + "\n"
    return head.rstrip() + "\n\n" + "\n".join(by_name[name] for name in sorted(by_name))


def main(arguments: list[str]) -> int:
    files = [Path(word) for word in arguments if word.endswith(".py")]
    others = [word for word in arguments if not word.endswith(".py")]
    if not files:
        files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.long" in path.read_text()]
    bad = 0
    for path in files:
        report = run(path, others)
        bad += sum(int(suite.get(kind, 0)) for suite in report.iter("testsuite") for kind in ("failures", "errors"))
        PAGE.write_text(written(PAGE.read_text() if PAGE.exists() else HEAD, path, section(path, report)))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
