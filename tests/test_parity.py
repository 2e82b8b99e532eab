"""The reference numbers of tests/parity, and the tool that compares with them: it passes, and it notices everything."""

import json
import shutil
from pathlib import Path

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "parity"
NETWORKS = ("unet", "vae-video")
TABLES = ("color", "propagation", "scheduler")


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.json"))])
def test_every_case_of_the_reference_passes(name, tmp_path):
    copied(tmp_path, name, *(NETWORKS if name == "pipeline" else ()))
    rows = list(parity.check(tmp_path))
    assert [line for row in rows for line in row.lines(every=False) if not row.passed] == []
    assert {row.case for row in rows if row.file == name} >= set(
        json.loads((FOLDER / f"{name}.json").read_text())["cases"]
    )
    assert {output.output for row in rows if row.file == name for output in row.outputs} == expected_outputs(name)


def test_the_command_prints_a_row_a_case_and_says_how_it_went(tmp_path, capsys):
    copied(tmp_path, "color")
    assert parity.main([str(tmp_path)]) == 0
    header, *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["color", "b"], ["color", "uint8"]]
    assert all(row.split()[5] == "pass" for row in rows) and summary == "2 cases, all passed"
    (tmp_path / "color.safetensors").unlink()
    assert parity.main([str(tmp_path)]) == 1
    assert "1 cases, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_a_case_removed_from_the_description_is_noticed(name, tmp_path):
    about = json.loads((FOLDER / f"{name}.json").read_text())
    for group in ("cases", "noise"):
        for case in about[group]:
            changed(tmp_path, name, about=lambda about, group=group, case=case: about[group].pop(case))
            assert failures(tmp_path), f"{group}.{case} was removed"


@pytest.mark.parametrize("name", TABLES)
def test_a_case_added_to_the_description_is_noticed(name, tmp_path):
    for group in ("cases", "noise"):
        changed(tmp_path, name, about=lambda about, group=group: about[group].update(another={}))
        assert any("another" in row.case + row.problem for row in failures(tmp_path))


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_or_spoiled_tensor_is_noticed(name, tmp_path):
    for tensor in load_file(FOLDER / f"{name}.safetensors"):
        if not tensor.startswith("out.add_noise."):  # these are listed nowhere: as many as there are
            changed(tmp_path, name, tensors=lambda tensors, tensor=tensor: tensors.pop(tensor))
            assert failures(tmp_path), f"{tensor} was removed"
        changed(tmp_path, name, tensors=lambda tensors, tensor=tensor: spoil(tensors, tensor))
        assert failures(tmp_path), f"{tensor} was spoiled"


@pytest.mark.parametrize(
    "weight",
    [
        "decoder.conv_in.weight",
        "decoder.condition_in.0.norm1.weight",
        "decoder.up_blocks.1.resnets.2.conv_3d.weight",
        "decoder.mid_block.attentions.0.value.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "quant_conv.bias",
    ],
)
def test_a_spoiled_or_missing_weight_is_noticed(weight, tmp_path):
    changed(tmp_path, "vae-video", tensors=lambda tensors: spoil(tensors, f"w.{weight}"))
    assert {row.case for row in failures(tmp_path)} & {"dec1", "enc"}
    changed(tmp_path, "vae-video", tensors=lambda tensors: tensors.pop(f"w.{weight}"))
    assert all(weight in row.problem for row in failures(tmp_path) if row.case == "dec1") and failures(tmp_path)


def test_rotary_frequencies_that_differ_are_noticed(tmp_path):
    name = "w.up_blocks.1.attentions.0.transformer_blocks.0.attn_temporal.rotary_emb.freqs"
    changed(tmp_path, "unet", tensors=lambda tensors: spoil(tensors, name))
    assert any("copies of one tensor" in row.problem for row in failures(tmp_path))


def test_what_is_not_a_number_never_passes(tmp_path):
    for side in ("in.b.content", "out.b.wavelet"):
        changed(tmp_path, "color", tensors=lambda tensors, side=side: tensors[side].view(-1)[:1].fill_(float("nan")))
        assert any(row.case == "b" for row in failures(tmp_path))


def test_a_folder_must_hold_something_and_nothing_unknown(tmp_path):
    assert [row.problem for row in parity.check(tmp_path)] == [f"no parity file in {tmp_path}"]
    copied(tmp_path, "color")
    (tmp_path / "manifest-unet.json").write_text('{"tensors": {}}')
    assert failures(tmp_path) == []  # a manifest is not a case
    (tmp_path / "sound.json").write_text('{"cases": {"a": {}}}')
    assert [(row.file, "unknown kind" in row.problem) for row in failures(tmp_path)] == [("sound", True)]
    (tmp_path / "sound.json").unlink()
    shutil.copy(tmp_path / "color.safetensors", tmp_path / "extra.safetensors")
    assert [row.file for row in failures(tmp_path)] == ["extra"]


def test_the_pipeline_needs_its_networks(tmp_path):
    copied(tmp_path, "pipeline")
    problems = {row.case: row.problem for row in failures(tmp_path)}
    assert "unet.json and unet.safetensors are missing" in problems["noprop13"]


def copied(folder: Path, *names: str) -> None:
    for name in names:
        for suffix in ("json", "safetensors"):
            shutil.copy(FOLDER / f"{name}.{suffix}", folder)


def changed(folder: Path, name: str, about=lambda about: None, tensors=lambda tensors: None) -> None:
    """A copy of one parity file with `about` and `tensors` applied to its description and tensors."""
    description = json.loads((FOLDER / f"{name}.json").read_text())
    values = load_file(FOLDER / f"{name}.safetensors")
    about(description)
    tensors(values)
    (folder / f"{name}.json").write_text(json.dumps(description))
    save_file(values, folder / f"{name}.safetensors")


def spoil(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Change one tensor a little, everywhere."""
    value = tensors[name]
    tensors[name] = (value + 1 if not value.is_floating_point() else value * 1.01 + 0.01).to(value.dtype)


def failures(folder: Path) -> list[parity.Row]:
    return [row for row in parity.check(folder) if not row.passed]


def expected_outputs(name: str) -> set[str]:
    return {key[4:] for key in load_file(FOLDER / f"{name}.safetensors") if key.startswith("out.")}
