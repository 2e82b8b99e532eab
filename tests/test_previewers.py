"""The bundled script in vsview and vspreview, driven by mouse and keys on a display of its own."""

import os
import shutil
import sys
from pathlib import Path

import previewers
import pytest


def program(name: str) -> Path | None:
    """The previewer that the variable VSVIEW or VSPREVIEW names, or the one on the PATH or beside this Python."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(os.environ.get(name.upper(), name), path=places)
    return found and Path(found)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vsview", "vspreview"])
def test_scrubbing_and_reloading_in_a_previewer(tmp_path, record_property, name):
    """Every click shows another picture, no reload leaves its memory behind, and nothing freezes or complains."""
    if lacking := previewers.missing():
        pytest.skip(f"needs {', '.join(lacking)}: apt-get install xvfb xdotool imagemagick")
    if (path := program(name)) is None:
        pytest.skip(f"needs {name} in an environment that has vsuav[source] too; {name.upper()} may name its program")
    looks = previewers.tried(path, previewers.ROOT / "scripts" / "preview.vpy", tmp_path / "out")
    record_property("resident MiB", {look.done: look.resident >> 20 for look in looks})
    opened, *seeks = looks[: 1 + len(previewers.PLACES)]
    reloads = looks[1 + len(previewers.PLACES) :]
    assert len({look.picture for look in (opened, *seeks)}) == 1 + len(previewers.PLACES)
    assert len({look.picture for look in (seeks[-1], *reloads)}) == 1 + len(reloads)
    assert max(look.resident for look in reloads) < 1.05 * max(look.resident for look in (opened, *seeks))


def test_edits_replace_each_other_in_the_bundled_scripts():
    for name in ("preview.vpy", "restore.vpy"):
        original = text = (previewers.ROOT / "scripts" / name).read_text()
        for edit in previewers.EDITS:
            text, count = previewers.CALL.subn(rf"\1, {edit}", text)
            assert count == 1
            compile(text, name, "exec")
        assert text == original.replace('preset="preview"', f'preset="preview", {edit}').replace(
            "**settings)", f"**settings, {edit})"
        )


def test_a_program_that_ends_is_said_so(tmp_path):
    script = tmp_path / "script.vpy"
    script.write_text("")
    if previewers.missing():
        pytest.skip("needs " + ", ".join(previewers.missing()))
    with pytest.raises(previewers.Failed, match="vsview ended with 3: no such frame"):
        broken = tmp_path / "vsview"
        broken.write_text("#!/bin/sh\necho no such frame\nexit 3\n")
        broken.chmod(0o755)
        previewers.tried(broken, script, tmp_path / "out")
