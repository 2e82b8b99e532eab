#!/usr/bin/env python
"""Compare every module with reference numbers of the original program: scripts/parity.py FOLDER

A parity file is a pair NAME.json, NAME.safetensors. The JSON describes the cases; `noise` in it says for most outputs
how far the reference itself is from a float64 run. Tensors: `in.*` inputs, `out.*` expected outputs, `w.*` weights
(an int8 one times the scalar `ws.*`). Sizes, configurations, names and numbers of cases are the files' affair.

Everything runs in float32 on the CPU. An output passes if its largest absolute error is at most
min(2e-4 m, max(50 noise, 1e-5 m)), m being the largest absolute value of the expected output; integers, masks, time
steps and buckets must be equal. One row a case is printed, about the output nearest to (or farthest beyond) its
tolerance. The exit status is 1 if anything differs or was not compared: a case that cannot be run, an output that no
case claims, an input that none reads, a noise without output, a file without its other half or of an unknown kind.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:  # another Python than the environment's that scripts/test makes: go on with that one
    environment = Path(__file__).resolve().parents[1] / ".venv"
    if not (environment / "bin/python").exists() or Path(sys.prefix) == environment:
        raise
    os.execv(environment / "bin/python", [environment / "bin/python", *sys.argv])
from parity_cases import KINDS
from parity_files import Compared, Comparison, Folder, Mismatch, ParityFile, expect
from safetensors.torch import load_file


@dataclass(frozen=True)
class Row:
    """What is printed of a case."""

    file: str
    case: str
    outputs: tuple[Compared, ...] = ()
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and all(output.passed for output in self.outputs)

    def lines(self, every: bool) -> Iterator[str]:
        """The row; below it the outputs that failed, or `every` one."""
        name = f"{self.file:11} {self.case or '-':48}"
        verdict = "pass" if self.passed else "FAIL"
        if self.problem:
            yield f"{name} {'-':>9} {'-':>9} {'-':>9}  {verdict}  {self.problem}"
            return
        worst = max(self.outputs, key=lambda output: output.severity)
        which = f"  {worst.output}, worst of {len(self.outputs)}" if len(self.outputs) > 1 else ""
        yield f"{name} {self.numbers(worst)}  {verdict}{which}"
        for output in self.outputs if every else [output for output in self.outputs if not output.passed][:10]:
            if len(self.outputs) > 1:
                yield f"{'':14}{output.output:46} {self.numbers(output)}  {'pass' if output.passed else 'FAIL'}"

    @staticmethod
    def numbers(output: Compared) -> str:
        noise = "-" if output.noise is None else f"{output.noise:.2e}"
        return f"{output.error:9.2e} {noise:>9} {output.tolerance:9.2e}"


def read(path: Path) -> tuple[Folder, list[Row]]:
    """The parity files of a folder, and a row for every one that cannot be read or does not know what it is."""
    folder, rows = Folder(), []
    for name in sorted({file.stem for file in path.iterdir() if file.suffix in (".json", ".safetensors")}):
        about_path, tensors_path = path / f"{name}.json", path / f"{name}.safetensors"
        try:
            about = json.loads(about_path.read_text(encoding="utf-8")) if about_path.is_file() else None
            described = isinstance(about, dict) and "cases" in about
            if name not in KINDS and not described and not tensors_path.is_file():
                continue  # a manifest: it describes checkpoints and has no cases
            expect(name in KINDS, f"unknown kind of parity file; known: {', '.join(KINDS)}")
            expect(about is not None and tensors_path.is_file(), f"{name}.json and {name}.safetensors go together")
            expect(described, f"{name}.json has no cases")
            folder.files[name] = ParityFile(name, folder, about, load_file(tensors_path))
        except Exception as error:
            rows.append(Row(name, "", problem=one_line(error)))
    return folder, rows


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, Mismatch) else f"{type(error).__name__}: {text}"


def check(path: Path) -> Iterator[Row]:
    """Run every case of every parity file in a folder."""
    folder, rows = read(path)
    yield from rows
    if not folder.files and not rows:
        yield Row("", "", problem=f"no parity file in {path}")
    for name, file in folder.files.items():
        for case, run in KINDS[name](file):
            compare = Comparison(file)
            try:
                with torch.inference_mode():
                    run(compare)
                expect(bool(compare.done), "nothing was compared")
                yield Row(name, case, tuple(compare.done))
            except Exception as error:  # whatever the module under test raises is this case's result
                yield Row(name, case, problem=one_line(error))
    for name, file in folder.files.items():
        yield from (Row(name, "", problem=message) for message in file.unused())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of parity files")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every output, not only the worst")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    print(f"{'file':11} {'case':48} {'max error':>9} {'noise':>9} {'tolerance':>9}  result")
    cases = failed = 0
    for row in check(options.folder):
        cases, failed = cases + 1, failed + (not row.passed)
        for line in row.lines(options.verbose):
            print(line, flush=True)
    print(f"{cases} cases, {failed} failed" if failed else f"{cases} cases, all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
