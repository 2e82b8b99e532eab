"""Opens a script in vsview or vspreview as a user does, and says what happened and how much memory it took.

    python scripts/previewers.py PREVIEWER [--script SCRIPT] [--out FOLDER]

PREVIEWER is the path or name of the program, in an environment that has vsuav and BestSource too. It runs on a display
of its own (needs Xvfb, xdotool and ImageMagick's `import`). Five places of the timeline are clicked, then the script
is edited and reloaded three times; after each of these, once the program rests, there is a screenshot in FOLDER and a
line of the table on stdout: resident memory, and whether the picture is another one.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("Xvfb", "xdotool", "import")
SCREEN = 1600, 1000
PLACES = (0.5, 0.97, 0.1, 0.75, 0.3)
"""Where the timeline is clicked, as parts of its width: forwards and back."""
EDITS = ("seed=1", "seed=2, max_shot=24", "seed=3, scene_detect=False")
"""What is added to the script's call of `upscale`, one before each reload."""
CALL = re.compile(r'(preset="preview"|\*\*settings)(, seed=[^\n)]*?)?(?=,\n|\))')
"""The place in the bundled scripts where an edit goes, and the edit before it."""
LIMIT = 1800
"""Seconds that loading, or one frame, may take on a slow machine before the previewer counts as frozen."""


@dataclass(frozen=True)
class Timeline:
    """Where a window of the previewer has its timeline: left and right end, height, as parts of the window."""

    left: float
    right: float
    height: float


TIMELINES = {"vspreview": Timeline(0.0085, 0.9915, 0.842), "vsview": Timeline(0.372, 0.999, 0.955)}


@dataclass(frozen=True)
class Look:
    """What was seen after something was done."""

    done: str
    resident: int  # bytes
    picture: str  # digest of the window's upper part, where the video is
    seconds: float


class Failed(RuntimeError):
    """The previewer ended, froze, or said that something went wrong."""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in NEEDED if shutil.which(name) is None]


@contextmanager
def display() -> Iterator[str]:
    """The name of a display of our own."""
    read, write = os.pipe()
    size = "{}x{}x24".format(*SCREEN)
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", size], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    try:
        with os.fdopen(read) as said:
            yield ":" + said.readline().strip()
    finally:
        server.terminate()
        server.wait()


class Previewer:
    """A running previewer that shows `script`.

    Args:
        program: vsview or vspreview.
        script: a .vpy file; it is edited when it is to be reloaded.
        out: folder of the screenshots and of what the program says.
        shown: name of the display.
    """

    def __init__(self, program: Path, script: Path, out: Path, shown: str):
        self.name = program.name
        self.script = script
        self.out = out
        self.looks: list[Look] = []
        home = out / "home"
        (home / "run").mkdir(mode=0o700, parents=True)
        self._environment = {
            **os.environ, "DISPLAY": shown, "HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"),
            "QT_QPA_PLATFORM": "xcb", "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self._log = out / f"{self.name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [program, script], env=self._environment, stdout=log, stderr=log, cwd=script.parent
            )

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()

    def see(self, done: str, began: float) -> Look:
        """Wait until the program rests, and note what is there then."""
        self._rest(began)
        path = self.out / f"{self.name}-{len(self.looks)}.png"
        self._x("import", "-window", "root", str(path))
        left, top, width, height = self._window()
        area = f"{int(width * 0.55)}x{int(height * 0.5)}+{left + int(width * 0.1)}+{top + int(height * 0.12)}"
        raw = self._x("import", "-window", "root", "-crop", area, "-depth", "8", "rgb:-")
        look = Look(done, self._resident(), hashlib.blake2b(raw, digest_size=8).hexdigest(), time.monotonic() - began)
        self.looks.append(look)
        return look

    def load(self) -> Look:
        """The script as it was opened."""
        return self.see("opened", time.monotonic())

    def seek(self, place: float) -> Look:
        """Click the timeline at `place`, 0…1."""
        left, top, width, height = self._window()
        line = TIMELINES[self.name]
        x = left + width * (line.left + place * (line.right - line.left))
        began = time.monotonic()
        self._x("xdotool", "mousemove", str(int(x)), str(int(top + height * line.height)), "click", "1")
        return self.see(f"clicked at {place:.0%} of the timeline", began)

    def reload(self, edit: str) -> Look:
        """Put `edit` into the script's call of `upscale`, and press Ctrl+R."""
        text, count = CALL.subn(rf"\1, {edit}", self.script.read_text())
        if count != 1:
            raise Failed(f"{self.script} has {count} places for an edit, not one")
        self.script.write_text(text)
        began = time.monotonic()
        self._x("xdotool", "key", "ctrl+r")
        return self.see(f"reloaded with {edit}", began)

    def _x(self, *command: str) -> bytes:
        return subprocess.run(command, env=self._environment, check=True, capture_output=True).stdout

    def _window(self) -> tuple[int, int, int, int]:
        """Left, top, width, height of the program's largest window."""
        found = subprocess.run(
            ["xdotool", "search", "--onlyvisible", "--pid", str(self._process.pid)],
            env=self._environment, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        places = []
        for window in found:
            said = self._x("xdotool", "getwindowgeometry", "--shell", window).decode()
            values = dict(line.split("=") for line in said.split())
            places.append(tuple(int(values[name]) for name in ("X", "Y", "WIDTH", "HEIGHT")))
        return max(places, key=lambda place: place[2] * place[3], default=(0, 0, 0, 0))

    def _rest(self, began: float) -> None:
        """Wait until no thread of the program has run for a while and it shows a window."""
        quiet = 0
        while quiet < 12:
            if self._process.poll() is not None:
                raise Failed(f"{self.name} ended with {self._process.returncode}: {self._said()}")
            if time.monotonic() - began > LIMIT:
                raise Failed(f"{self.name} still works after {LIMIT} s: {self._said()}")
            time.sleep(0.25)
            quiet = 0 if self._running() or self._window()[2] < 400 else quiet + 1
        if wrong := re.findall(r"^.*(?:Error|ERROR|Traceback|CRITICAL).*$", self._log.read_text(), re.MULTILINE):
            raise Failed(f"{self.name}: {wrong[-1]}")

    def _running(self) -> bool:
        """Whether a thread of the program runs or waits for the processor or the disk."""
        for stat in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            try:
                if stat.read_text().rsplit(")", 1)[1].split()[0] in "RD":
                    return True
            except OSError:  # it has just ended
                continue
        return False

    def _resident(self) -> int:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def _said(self) -> str:
        return " ".join(self._log.read_text().split())[-300:]


def tried(program: Path, script: Path, out: Path) -> list[Look]:
    """Open a copy of `script`, click the five places, edit and reload three times.

    Raises:
        Failed: one line that says what went wrong.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy = out / script.name
    text = script.read_text().replace('"sample/', f'"{script.parent}/sample/')
    copy.write_text(text)
    with display() as shown:
        previewer = Previewer(program, copy, out, shown)
        try:
            previewer.load()
            for place in PLACES:
                previewer.seek(place)
            for edit in EDITS:
                previewer.reload(edit)
            return previewer.looks
        finally:
            previewer.close()


def table(looks: list[Look]) -> str:
    """The looks as Markdown."""
    lines = ["| done | resident MiB | seconds | the picture |", "|---|---|---|---|"]
    for before, look in zip([None, *looks], looks, strict=False):
        seen = "first" if before is None else "another" if before.picture != look.picture else "the same"
        lines.append(f"| {look.done} | {look.resident / 2**20:.0f} | {look.seconds:.0f} | {seen} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("previewer", help="vsview or vspreview, a name or a path")
    parser.add_argument("--script", type=Path, default=ROOT / "scripts" / "preview.vpy")
    parser.add_argument("--out", type=Path, help="folder of the screenshots (default: a new one)")
    given = parser.parse_args()
    program = shutil.which(given.previewer)
    if program is None or missing():
        print(f"previewers: not installed: {', '.join([given.previewer] if program is None else missing())}")
        return 1
    out = given.out or Path(tempfile.mkdtemp(prefix="previewers-"))
    try:
        print(table(tried(Path(program), given.script.resolve(), out.resolve())))
    except Failed as error:
        print(f"previewers: {error}")
        return 1
    print(f"\nscreenshots: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
