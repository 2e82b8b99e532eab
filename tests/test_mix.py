"""Mixtures of weights against sums written out, and what a mixture that means nothing says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mix import TRUST, mix, shares_of
from train import LEVELS

MIX = Path(__file__).resolve().parent.parent / "scripts" / "mix.py"


@pytest.fixture
def weights():
    names = ("unet.a.weight", "unet.a_3d.weight", "vae.b.bias")
    return {s: {n: torch.randn(2, 3) for n in names} | {TRUST: torch.randn(1000, 1)} for s in ("one", "two", "three")}


def test_a_mixture_is_the_sum_of_shares(weights):
    parts = [["", {"one": 1}], ["^unet", {"one": 0.25, "two": 0.75}], ["_3d", {"two": -0.5, "three": 1.5}]]
    result = mix({"parts": parts}, weights)
    one, two, three = weights.values()
    assert result.keys() == one.keys()
    assert torch.equal(result["vae.b.bias"], one["vae.b.bias"]) and torch.equal(result[TRUST], one[TRUST])
    torch.testing.assert_close(result["unet.a.weight"], (one["unet.a.weight"] + 3 * two["unet.a.weight"]) / 4)
    torch.testing.assert_close(
        result["unet.a_3d.weight"], (3 * three["unet.a_3d.weight"] - two["unet.a_3d.weight"]) / 2
    )


def test_trust_is_moved_at_the_trained_levels_and_between(weights):
    before = weights["one"][TRUST].clone()
    result = mix({"parts": [["", {"one": 1}]], "shares": [0, -0.25, 1, 0, 2]}, weights)[TRUST][:, 0]
    expected = before[list(LEVELS), 0] + torch.tensor([0, -0.25, 1, 0, 2])
    torch.testing.assert_close(result[list(LEVELS)], expected)
    torch.testing.assert_close(result[40], expected[1:3].mean())
    assert torch.equal(weights["one"][TRUST], before)


def test_every_parameter_needs_shares_of_sum_one():
    assert shares_of("unet.a", [["a", {"x": 2, "y": -1}]]) == {"x": 2, "y": -1}
    with pytest.raises(ValueError, match="got none for vae.b"):
        shares_of("vae.b", [["^unet", {"x": 1}]])
    with pytest.raises(ValueError, match=r"sum 1, got .*0.5.* for vae.b"):
        shares_of("vae.b", [["b", {"x": 0.5}]])


def test_the_command_writes_what_export_takes(weights, tmp_path):
    config = {"mixtures": {"both": {"parts": [["", {"one": 0.5, "two": 0.5}]]}}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    for stage, flat in weights.items():
        nested = {}
        for name, value in flat.items():
            key, _, rest = name.partition(".")
            nested.setdefault(key, {})[rest] = value
        torch.save({"weights": nested, "config": config}, tmp_path / f"{stage}.pt")
    command = [sys.executable, MIX, "both", "--config", tmp_path / "c.json", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    saved = torch.load(tmp_path / "both.pt", weights_only=True)
    assert saved["config"] == config
    expected = (weights["one"]["unet.a.weight"] + weights["two"]["unet.a.weight"]) / 2
    torch.testing.assert_close(saved["weights"]["unet"]["a.weight"], expected)
    wrong = subprocess.run([*command[:2], "neither", *command[3:]], capture_output=True, text=True)
    assert wrong.returncode == 2 and "NAME must be one of both, got 'neither'" in wrong.stderr
