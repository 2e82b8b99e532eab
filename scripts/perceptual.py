"""stLPIPS, the shift-tolerant perceptual distance (Ghildyal and Liu 2022): a loss (alex, or both) and a metric (vgg).

Only the weights come from the package `stlpips-pytorch` (0.0.2); they are read out of its wheel or its installed
folder, no code of it runs. Inputs are "n 3 h w" in [-1, 1], distances "n" (0 = the same).
"""

import io
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEMBER = "stlpips_pytorch/weights/vST0.0/{}_shift_tolerant.pth"
ALEX = "64:11:2 blur relu | max3 blur 192:5:2 relu | max3 blur 384:3:1 relu | 256:3:1 relu | 256:3:1 relu"
VGG = (
    "64:3:1 relu 64:3:1 relu | max2 blur 128:3:1 relu 128:3:1 relu | max2 blur 256:3:1 relu 256:3:1 relu 256:3:1 relu"
    " | max2 blur 512:3:1 relu 512:3:1 relu 512:3:1 relu | max2 blur 512:3:1 relu 512:3:1 relu 512:3:1 relu"
)
LAYOUTS = {"alex": ALEX, "vgg": VGG}


class Blur(nn.Module):
    """Binomial 3x3 blur and every second pixel, after two reflected pixels at every edge (what makes it tolerant)."""

    def forward(self, x: Tensor) -> Tensor:
        taps = x.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _slices(layout: str) -> nn.ModuleList:
    slices, width = nn.ModuleList(), 3
    for part in layout.split("|"):
        layers: list[nn.Module] = []
        for word in part.split():
            if word == "blur":
                layers.append(Blur())
            elif word == "relu":
                layers.append(nn.ReLU())
            elif word.startswith("max"):
                layers.append(nn.MaxPool2d(int(word[3:]), stride=1))
            else:
                out, kernel, padding = (int(number) for number in word.split(":"))
                layers.append(nn.Conv2d(width, out, kernel, padding=padding))
                width = out
        slices.append(nn.Sequential(*layers))
    return slices


def _read(source: Path, net: str) -> dict[str, Tensor]:
    name = MEMBER.format(net)
    if source.is_dir() and (source / name).is_file():
        return torch.load(source / name, map_location="cpu", weights_only=True)
    wheels = [source] if source.is_file() else sorted(source.glob("stlpips_pytorch-*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            return torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"STLPIPS: no stlpips_pytorch wheel or folder in {source}; scripts/make_data.py fetches it")


class STLPIPS(nn.Module):
    """Distance of two pictures: weighted squared differences of unit-length features of five layers.

    Args:
        source: the wheel, a folder that holds it, or the folder it was installed into.
        net: "alex" (fast) or "vgg" (what reports are measured with).

    Raises:
        ValueError: another net. FileNotFoundError: no weights there.
    """

    def __init__(self, source: str | Path, net: str = "alex"):
        super().__init__()
        if net not in LAYOUTS:
            raise ValueError(f"STLPIPS: net must be one of {', '.join(LAYOUTS)}, got {net!r}")
        self.slices = _slices(LAYOUTS[net])
        state = _read(Path(source), net)
        kernels = [k for k in state if k.startswith("net.") and k.endswith(".weight") and state[k].ndim == 4]
        kernels.sort(key=lambda key: [int(number) for number in key.replace("slice", "").split(".")[1:3]])
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        if len(kernels) != len(convolutions):
            raise ValueError(f"STLPIPS: the {net} weights hold {len(kernels)} convolutions, not {len(convolutions)}")
        for convolution, key in zip(convolutions, kernels, strict=True):
            convolution.load_state_dict({n: state[key.replace("weight", n)] for n in ("weight", "bias")})
        for i in range(5):
            head = next(v for k, v in state.items() if k.startswith(f"lin{i}.") and k.endswith("weight"))
            self.register_buffer(f"head{i}", head.flatten())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> list[Tensor]:
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        found = []
        for part in self.slices:
            x = part(x)
            found.append(x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(truth)
        return self.distance(self.features(image), wanted)

    def distance(self, found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """The same of two lists of `features`."""
        total = 0
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            head = getattr(self, f"head{i}")
            total = total + ((a - b).square().mean(dim=(2, 3)) * head).sum(1)
        return total
