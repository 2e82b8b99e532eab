"""The documentation says what the program does: parameters, links, error messages, examples."""

import ast
import functools
import gc
import inspect
import json
import re
import sys
from pathlib import Path

import make_api_docs
import pytest
import toy
import vapoursynth as vs
from safetensors.torch import load_file, save_file

from vsuav import upscale

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/*.md")])


def anchor(heading: str) -> str:
    """The anchor a heading gets on a rendered page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere, to a missing file or a missing heading."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, part = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if part and path.is_file() else []
        if not path.exists() or (part and part not in map(anchor, headings)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_broken_links_are_noticed():
    text = "[a](nowhere.md) [b](docs/random-access.md#nothing) [c](CONTRIBUTING.md#the-law) [d](https://example.org)"
    assert broken_links(ROOT / "README.md", text) == ["nowhere.md", "docs/random-access.md#nothing"]


def test_the_readme_lists_every_parameter_with_its_default():
    table = re.findall(r"^\| (`.*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = {}
    for names, defaults in table:
        names = re.findall(r"`(\w+)`", names)
        values = defaults.split(", ") if len(defaults.split(", ")) == len(names) else [defaults] * len(names)
        listed |= dict(zip(names, values, strict=True))
    parameters = inspect.signature(upscale).parameters
    assert listed.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if parameter.default not in (None, inspect.Parameter.empty) and not name.startswith("scale"):
            assert listed[name].strip("`") == str(parameter.default), name


def test_the_api_page_is_what_the_docstrings_say():
    said = make_api_docs.TARGET.read_text()
    assert said == make_api_docs.render(), "run scripts/make_api_docs.py"
    assert "propagation_radius" in said


def test_python_examples_are_python():
    examples = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert examples
    for example in examples:
        ast.parse(example)


HEADINGS = re.findall(r"^### `(upscale: .*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
NOT_AT_CALL_TIME = ("came out not finite", "has too little memory", "which OMP_THREAD_LIMIT")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def mistakes(model, tmp_path_factory):
    """Calls that go wrong, one for each message of the troubleshooting page that is raised at call time."""
    gc.collect()  # clips of other tests that are still there would be waited for
    core, folder = vs.core, tmp_path_factory.mktemp("mistakes")
    rgb = core.std.BlankClip(format=vs.RGBS, width=32, height=32, length=2)
    yuv = core.std.BlankClip(format=vs.YUV420P8, width=32, height=32, length=2)
    tagged = core.std.SetFrameProps(yuv, _Matrix=1)
    truncated = toy.write(folder / "truncated")
    weights = truncated / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    evil = toy.write(folder / "evil")
    (evil / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (evil / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    stand_ins = []
    for text in (b"version https://git-lfs.github.com/spec/v1", b"<!DOCTYPE html><html></html>"):
        stand_ins.append(toy.write(folder / f"stand-in-{len(stand_ins)}"))
        (stand_ins[-1] / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(text)
    odd = toy.write(folder / "odd")
    (odd / "unet" / "config.json").write_text(json.dumps(toy.UNET | {"norm_num_groups": 0}))
    endless = toy.write(folder / "endless")
    path = endless / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value / 0 for name, value in load_file(path).items()}, path)
    one_decoder = toy.write(folder / "one-decoder")
    (one_decoder / "vae" / "config.json").rename(folder / "config.json")
    (one_decoder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "empty").mkdir()
    return [
        *(functools.partial(upscale, rgb, spoilt) for spoilt in (*stand_ins, odd, endless)),
        lambda: upscale(core.std.SetFieldBased(tagged, 2), model),
        lambda: upscale(yuv, model),
        lambda: upscale(core.std.SetFrameProps(tagged, _Transfer=16), model),
        lambda: upscale(core.std.Splice([rgb, tagged], mismatch=True), model),
        lambda: upscale(core.std.Splice([rgb, core.std.AddBorders(rgb, 2)], mismatch=True), model),
        lambda: upscale(core.std.SetFrameProps(rgb, _Matrix=1), model),
        lambda: upscale(core.std.SetFrameProps(yuv, _Matrix="709"), model),
        lambda: upscale(core.std.Loop(rgb), model),
        lambda: upscale((rgb, rgb), model),
        lambda: upscale(rgb, model, noise_level=400),
        lambda: upscale(rgb, model, propagation_steps=[3]),
        lambda: upscale(rgb, model, guidance_scale=3.0, guidance_interval=(0.0, 0.5), reuse_steps=[1, 2]),
        lambda: upscale(rgb, model, max_shot=25),
        lambda: upscale(rgb, model, device="cuda:9"),
        lambda: upscale(rgb, one_decoder, video_vae=False),
        lambda: upscale(rgb, model, tiny_vae=True),
        lambda: upscale(rgb, model, device="cpu", compile="graphs"),
        lambda: upscale(rgb, folder / "empty"),
        lambda: upscale(rgb, folder / "absent"),
        lambda: upscale(rgb, truncated),
        lambda: upscale(rgb, evil),
        lambda: upscale(rgb, model, prompt="a prompt nobody has stored"),
    ]


def test_the_troubleshooting_page_quotes_the_real_messages(mistakes):
    headings = [heading for heading in HEADINGS if not any(words in heading for words in NOT_AT_CALL_TIME)]
    patterns = [re.compile(".*".join(map(re.escape, heading.split("…")))) for heading in headings]
    unmatched = dict(enumerate(headings))
    unknown = []
    for number, mistake in enumerate(mistakes):
        try:
            mistake()
            said = "no error"
        except vs.Error as error:
            said = str(error)
        found = [i for i, pattern in enumerate(patterns) if pattern.fullmatch(said)]
        if not found:
            unknown.append((number, said))
        for i in found:
            unmatched.pop(i, None)
    assert (unknown, unmatched) == ([], {})


@pytest.mark.parametrize("words", NOT_AT_CALL_TIME)
def test_messages_that_come_later_are_in_the_source(words):
    assert any(words in heading for heading in HEADINGS)
    assert any(words in path.read_text() for path in (ROOT / "vsuav").glob("*.py"))


def strings() -> list[str]:
    """Every string of the package and the scripts as it is shown, with … for what differs."""
    found = [path.read_text() for path in ROOT.glob("scripts/*.sh")]
    for path in [*ROOT.glob("vsuav/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
    return found


def test_the_other_messages_of_the_troubleshooting_page_are_in_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = set(re.findall(r"^### `(.*)`$", page, re.MULTILINE)) - set(HEADINGS)
    foreign = {heading for heading in headings if heading.startswith(("Failed to initialize VSScript", "No attribute"))}
    assert len(foreign) == 2 and len(headings) > 8
    known = strings()
    for heading in headings - foreign:
        pattern = re.compile(re.escape(heading.removeprefix("left out: ")).replace("…", ".*"))
        assert any(pattern.search(text) for text in known), heading


def test_the_messages_of_others_are_theirs():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    with pytest.raises(AttributeError) as raised:
        vs.core.bs_that_is_not_there  # noqa: B018
    said = str(raised.value).replace("bs_that_is_not_there", "bs")
    assert f"### `{said}`" in page
    tool = Path(sys.executable).with_name("vspipe")
    real = tool if tool.read_bytes()[:4] == b"\x7fELF" else Path(vs.__file__).parent / "vspipe"
    assert b"Failed to initialize VSScript" in real.read_bytes()


def test_nothing_speaks_of_the_machine_it_was_written_on():
    named = re.compile(r"/(root|home|work|tmp)/\w")
    files = [*PAGES, *ROOT.glob("scripts/*"), *ROOT.glob("vsuav/*.py"), *ROOT.glob(".ci/*")]
    for path in files:
        if path.is_file():
            assert not named.search(path.read_text()), path
    assert named.search("see /home/me/notes")
