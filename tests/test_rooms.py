"""The house: imports only from the rooms above in CONTRIBUTING's table, few doors to the outside, nothing on stdout.

The table of rooms in CONTRIBUTING.md is the law; this file reads it and holds the code against it. Each check is a
plain function of source text, and is itself shown a file that breaks the rule.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vsuav"
FILES = sorted(PACKAGE.glob("*.py"))

COMMAND_LINE = {"__main__", "commands", "compare", "info", "video"}
"""The rooms of the command line: the only ones that may write to stdout, and only where the user asked for text."""

DOORS = {
    "vapoursynth": {"frames", "life", "shots", "plugin", "cluster"} | COMMAND_LINE,
    "vsutil": {"frames", "plugin"},
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "transformers": {"text"},
    "tokenizers": {"text"},
    "cv2": {"flow", "networks"},
    "torchvision": {"flow"},
    "typer": COMMAND_LINE,
    "click": COMMAND_LINE,
    "rich": COMMAND_LINE,
    "av": COMMAND_LINE,
    "imageio_ffmpeg": COMMAND_LINE,
    "PIL": COMMAND_LINE,
    "pickle": {"weights"},
    "scripts": set(),
    "tests": set(),
}
"""Library -> the rooms that may import it; a library without a row may be imported anywhere."""


def rooms_of(markdown: str) -> dict[str, tuple[int, int]]:
    """Room -> (floor, row), from table rows such as ``| 0 | `noise.py` | the noise of frame n |``."""
    rows = re.findall(r"^\| (\d) \| ((?:`\w+\.py`(?:, )?)+) \|", markdown, re.MULTILINE)
    names = [(int(floor), name) for floor, cell in rows for name in re.findall(r"`(\w+)\.py`", cell)]
    return {name: (floor, row) for row, (floor, name) in enumerate(names)}


ROOMS = rooms_of((ROOT / "CONTRIBUTING.md").read_text())


def imports(source: str) -> set[str]:
    """Absolute dotted names of everything that the file imports, inside functions too; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "vsuav" + (f".{node.module}" if node.module else "") if node.level else node.module
            found |= {f"{base}.{name.name}" for name in node.names}
    return found


def climbing(room: str, source: str) -> list[str]:
    """Rooms that this room imports although they do not stand above it in the table."""
    used = {name.split(".")[1] for name in imports(source) if name.startswith("vsuav.")}
    return sorted(other for other in used & ROOMS.keys() if ROOMS[other] >= ROOMS[room])


def forced_doors(room: str, source: str) -> list[str]:
    """Libraries that this room imports although their door is elsewhere."""
    used = {name.split(".")[0] for name in imports(source)}
    return sorted(library for library in used & DOORS.keys() if room not in DOORS[library])


def written_to_stdout(source: str) -> list[int]:
    """Lines that print to, or name, standard output."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if not any(keyword.arg == "file" for keyword in node.keywords):
                lines.append(node.lineno)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.__stdout__"):
            lines.append(node.lineno)
    return lines


def dangerous(source: str) -> list[int]:
    """Lines that could run code from a file or a string: unpickling, eval, a shell."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        name = ast.unparse(node.func)
        if (
            name in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads")
            or keywords.get("shell")
            or keywords.get("allow_pickle")
            or keywords.get("trust_remote_code")
            or (name == "torch.load" and keywords.get("weights_only") is not True)
        ):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_keeps_the_house_rules(path):
    room, source = path.stem, path.read_text()
    if room != "__init__":
        assert room in ROOMS, f"{path.name} has no row in CONTRIBUTING.md's table of rooms"
        assert climbing(room, source) == []
        assert forced_doors(room, source) == []
    if room not in COMMAND_LINE:
        assert written_to_stdout(source) == []
    assert dangerous(source) == []


def test_every_row_is_a_file():
    assert ROOMS.keys() == {path.stem for path in FILES} - {"__init__"}


def test_planning_is_pure():
    outside = {name.split(".")[0] for name in imports((PACKAGE / "plan.py").read_text())}
    assert not outside & {"torch", "numpy", "vapoursynth", "time", "os", "random", "threading"}


def test_the_rules_notice_what_they_forbid():
    assert climbing("noise", "def f():\n    from vsuav.plugin import upscale") == ["plugin"]
    assert climbing("noise", "from . import engine") == ["engine"]
    assert climbing("noise", "from .engine import restore") == ["engine"]
    assert climbing("plugin", "import vsuav.engine\nfrom vsuav import noise") == []
    assert forced_doors("noise", "import vapoursynth as vs") == ["vapoursynth"]
    assert forced_doors("plugin", "from dask.distributed import Client") == ["dask"]
    assert forced_doors("plugin", "from scripts import train") == ["scripts"]
    assert written_to_stdout("import sys\nprint(1)\nsys.stdout.write('x')\nprint(2, file=sys.stderr)") == [2, 3]
    assert dangerous("torch.load(f)\ntorch.load(f, weights_only=True)\nsubprocess.run('ls', shell=True)") == [1, 3]


def test_files_stay_readable():
    """One sitting."""
    long = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 450}
    assert not long
