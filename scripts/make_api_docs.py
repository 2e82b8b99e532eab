"""Writes docs/api.md from the docstrings of what a user may import. Run it after changing one; a test compares.

    .venv/bin/python scripts/make_api_docs.py
"""

import inspect
import re
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PUBLIC = {
    "vsuav": ["upscale", "unload"],
    "vsuav.engine": ["restore"],
    "vsuav.networks": ["Networks", "shared_models"],
    "vsuav.checkpoint": ["load", "convert", "Models"],
    "vsuav.settings": ["resolve", "Settings"],
    "vsuav.metrics": None,
}
"""Module -> names; None means all public functions."""
INTRODUCTION = """# API reference

Made from the docstrings by `scripts/make_api_docs.py`. Scripts need `vsuav.upscale` only; the rest is for programs that
use the engine without VapourSynth (training, evaluation, tests).
"""


def names_of(module) -> list[str]:
    """Public functions defined in a module, in the order of its source."""
    found = [name for name, member in vars(module).items() if inspect.isfunction(member) and name[0] != "_"]
    return [name for name in found if getattr(module, name).__module__ == module.__name__]


def signature(name: str, member) -> str:
    """The call as it is written, a parameter a line where it is long."""
    parameters = [
        str(parameter.replace(annotation=inspect.Parameter.empty))
        for parameter in inspect.signature(member).parameters.values()
        if parameter.name != "self"
    ]
    line = f"{name}({', '.join(parameters)})"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")"


def body(docstring: str) -> str:
    """A docstring as markdown: sections become bold lines, their entries bullets."""
    lines = []
    section = ""
    for line in inspect.cleandoc(docstring).replace("``", "`").splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = heading[1]
            lines += [f"**{ {'Args': 'Parameters'}.get(section, section) }**", ""]
        elif section and (entry := re.fullmatch(r"    ([\w., ]+): (.*)", line)) and section != "Returns":
            lines.append(f"* `{entry[1].replace(', ', '`, `')}`: {entry[2]}")
        elif section and line.startswith("    "):
            lines.append(("  " if section != "Returns" else "") + line.strip())
        else:
            section = "" if line.strip() else section
            lines.append(line)
    return "\n".join(lines)


def render() -> str:
    import importlib

    parts = [INTRODUCTION]
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        parts.append(f"## `{module_name}`\n")
        if names is None or module_name != "vsuav":
            parts.append(inspect.cleandoc(module.__doc__).split("\n\n")[0] + "\n")
        for name in names_of(module) if names is None else names:
            member = getattr(module, name)
            parts.append(f"### `{module_name}.{name}`\n")
            parts.append(f"```python\n{signature(name, member)}\n```\n")
            if member.__doc__:
                parts.append(body(member.__doc__) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render())
