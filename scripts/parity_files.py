"""Parity files: what is in them, what of it has been used, and how a result is compared with it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vsuav import checkpoint, flow
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig


class Mismatch(Exception):
    """The files do not hold what they promise."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Mismatch(message)


@dataclass
class ParityFile:
    """One parity file, and what of it has been used."""

    name: str
    folder: "Folder"
    about: dict
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    @property
    def cases(self) -> dict:
        return self.about.get("cases", {})

    def entry(self, *path: str) -> dict:
        """Something the JSON must have, as entry("cases", "even")."""
        value = self.about
        for key in path:
            expect(isinstance(value, dict) and key in value, f"{self.name}.json has no {'.'.join(path)}")
            value = value[key]
        self.used.add("/".join(path))
        return value

    def take(self, name: str) -> Tensor:
        """A tensor the file must have."""
        expect(name in self.tensors, f"{self.name}.safetensors has no {name}")
        self.used.add(name)
        return self.tensors[name]

    def outputs(self, prefix: str) -> list[str]:
        """Outputs whose names (without `out.`) begin with `prefix`: those there, and those a noise is recorded for."""
        names = {name[4:] for name in self.tensors if name.startswith("out.")} | self.about.get("noise", {}).keys()
        return sorted(name for name in names if name.startswith(prefix))

    def weights(self) -> dict[str, Tensor]:
        """All weights under their names in a checkpoint."""
        weights = {}
        for name in [name[2:] for name in self.tensors if name.startswith("w.")]:
            value = self.take(f"w.{name}")
            weights[name] = value.float() * self.take(f"ws.{name}") if value.dtype is torch.int8 else value
        return weights

    def unused(self) -> Iterator[str]:
        """What no case asked for, one message for each sort of it."""
        sorts = {"no case uses": sorted(self.tensors.keys() - self.used)}
        for group in ("cases", "noise"):
            names = self.about.get(group, {})
            sorts[f"not run, though in {group}:"] = [name for name in names if f"{group}/{name}" not in self.used]
        for message, names in sorts.items():
            if names:
                yield f"{message} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass
class Folder:
    """The parity files of a folder; networks are built once."""

    files: dict[str, ParityFile] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)

    def network(self, name: str) -> nn.Module:
        """The network of a file, in float32; every tensor must fit."""
        expect(name in self.files, f"{name}.json and {name}.safetensors are missing or unreadable")
        if name not in self.networks:
            file = self.files[name]
            if name == "raft":
                weights = file.weights()
                counters = {value.item() for key, value in weights.items() if key.endswith("num_batches_tracked")}
                expect(len(counters) == 1, f"the normalisations of raft count different batches: {sorted(counters)}")
                network = flow.raft_network(weights)
            else:
                build, config = (UNetVideo, UNetConfig) if name == "unet" else (VAE, VAEConfig)
                network = build(config.from_dict(file.entry("config")))
                fitted = checkpoint.canonical(file.weights(), network, Path(f"{name}.safetensors"))
                network.load_state_dict(fitted, strict=False)  # `canonical` was strict; copies are left out
            self.networks[name] = network.eval().requires_grad_(False)
        return self.networks[name]


@dataclass(frozen=True)
class Compared:
    """One output: its name, largest error, recorded noise, tolerance."""

    output: str
    error: float
    noise: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error in units of the tolerance; infinite for errors that are not numbers."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else math.inf * self.error if self.error else 0.0


@dataclass
class Comparison:
    """Compares the outputs of one case."""

    file: ParityFile
    done: list[Compared] = field(default_factory=list)

    def __call__(self, name: str, result: Tensor, exact: bool = False, noise: bool = False) -> None:
        """Compare `result` with `out.name`; `noise` says that the file must have recorded one."""
        expected = self.file.take(f"out.{name}")
        shapes = f"{tuple(result.shape)}, should be {tuple(expected.shape)}"
        expect(result.shape == expected.shape, f"{name} is {shapes}")
        error = (result.double() - expected.double()).abs().max().item()
        largest, recorded, tolerance = expected.double().abs().max().item(), None, 0.0
        if not exact and expected.is_floating_point():
            if noise or name in self.file.about.get("noise", {}):
                recorded = float(self.file.entry("noise", name)["fp32_vs_fp64_max_abs"])
            tolerance = min(2e-4 * largest, max(50 * (recorded or 0.0), 1e-5 * largest))
        self.done.append(Compared(name, error, recorded, tolerance))
