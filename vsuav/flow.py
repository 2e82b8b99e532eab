"""Optical flow between neighbouring frames, warping along it, and where it can be trusted.

A flow "2 h w" holds displacements in pixels of its own grid, channel 0 horizontal, channel 1 vertical: the forward
flow of (a, b) at (x, y) says where the pixel (x, y) of a is found in b, relative to (x, y).
"""

import functools
import re
from collections.abc import Mapping

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav import native
from vsuav.weights import bare

SMALLEST = 128  # shortest side both estimators see: below, RAFT's coarsest correlation level is a single cell
BORDER = 2  # zeros around what is sampled: a centre outside and its neighbours are all among them

LIBRARY = f"opencv {cv2.__version__}"
"""What DIS flow comes from: its last bits may differ between versions."""


def warp(x: Tensor, flow: Tensor, mode: str = "nearest") -> Tensor:
    """Sample x "b c h w" at (X + flow_x, Y + flow_y); flow "b 2 h w"; zeros outside.

    Pixel centres lie at integers. "nearest" rounds to the nearest centre, ties to even; "bilinear" weighs the four
    centres around, those outside counting as zero. Coordinates are float32 whatever the dtypes; the result has x's.
    Non-finite displacements lead outside.
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"warp: mode must be nearest or bilinear, got {mode!r}")
    height, width = flow.shape[-2:]
    row, column = _landing(flow)
    if mode == "nearest":
        row, column = row.round(), column.round()
    top, left = row.floor(), column.floor()
    length = width + 2 * BORDER
    down, right = (row - top)[:, None], (column - left)[:, None]
    place = (top + BORDER).clamp_(0, height + 2).int() * length + (left + BORDER).clamp_(0, width + 2).int()
    padded = F.pad(x, (BORDER,) * 4).flatten(2)
    if mode == "nearest":
        return _picked(padded, place)
    terms = (  # summed in place, one at a time: fresh memory costs more than the sums
        _picked(padded, place + (dy * length + dx)).float().mul_(weight_y * weight_x)
        for dy, weight_y in ((0, 1 - down), (1, down))
        for dx, weight_x in ((0, 1 - right), (1, right))
    )
    return functools.reduce(Tensor.add_, terms).to(x.dtype)


def _landing(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns "b h w" (float32, finite) where a flow leads; what is not finite leads outside."""
    height, width = flow.shape[-2:]
    column = torch.arange(width, dtype=torch.float32, device=flow.device) + flow[:, 0].float()
    row = torch.arange(height, dtype=torch.float32, device=flow.device)[:, None] + flow[:, 1].float()
    far = -2.0 * BORDER
    lost = {"nan": far, "posinf": far, "neginf": far}
    return torch.nan_to_num_(row, **lost), torch.nan_to_num_(column, **lost)


def _picked(x: Tensor, place: Tensor) -> Tensor:
    """x "b c n" at the places "b h w" on its last axis: "b c h w"."""
    clips = [clip.index_select(1, at.flatten()).unflatten(1, at.shape) for clip, at in zip(x, place, strict=True)]
    return clips[0][None] if len(clips) == 1 else torch.stack(clips)


def valid(flow: Tensor, back_flow: Tensor, alpha1: float = 0.001, alpha2: float = 0.05) -> Tensor:
    """1 where following `flow` and then `back_flow` (both "b 2 h w") leads home, else 0; float32 "b 1 h w".

    With f the flow and g the back flow sampled (bilinear) where f leads: |f + g|^2 < alpha1 (|f|^2 + |g|^2) + alpha2,
    squared lengths in pixels, the consistency test of Sundaram et al. 2010. Non-finite flows are invalid.
    """
    flow = flow.float()
    returned = warp(back_flow.float(), flow, "bilinear")
    error = (flow + returned).square().sum(dim=1, keepdim=True)
    length = flow.square().sum(dim=1, keepdim=True) + returned.square().sum(dim=1, keepdim=True)
    return (error < alpha1 * length + alpha2).float()


UNTRUSTED, OUTSIDE = -1, -2


def origins(flow: Tensor, back_flow: Tensor) -> Tensor:
    """Where in the neighbour every pixel comes from, given both flows "2 h w": int32 "h w".

    The place row * w + column of the centre nearest to where `flow` leads; `UNTRUSTED` where `valid` says no, `OUTSIDE`
    where it says yes to a centre outside the frame.
    """
    if native.follows(flow, back_flow):
        return native.origins(flow, back_flow)
    height, width = flow.shape[-2:]
    row, column = (x[0].round_().int() for x in _landing(flow[None]))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = torch.where(inside, row * width + column, OUTSIDE)
    return torch.where(valid(flow[None], back_flow[None])[0, 0].bool(), place, UNTRUSTED)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Flow "n 2 h w" on another grid, by area averaging. Both channels are multiplied by the ratio of the WIDTHS."""
    if flow.shape[-2:] == (height, width):
        return flow
    return F.adaptive_avg_pool2d(flow, (height, width)) * (width / flow.shape[-1])


def _enlarged(length: int, multiple: int) -> int:
    return max(SMALLEST, -(-length // multiple) * multiple)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, "n c h w"."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _resize_back(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Flow "n 2 h w" of an enlarged frame on the frame's own grid and in its pixels."""
    height, width = flow.shape[-2:]
    scale = torch.tensor([size[1] / width, size[0] / height], device=flow.device)
    return _resize(flow, size) * scale[:, None, None]


class DIS:
    """Dense inverse search (Kroeger et al. 2016) by OpenCV, preset medium, on 8-bit luma. No weights.

    OpenCV's thread count is left alone: it is one for the whole process, so anybody may change it at any time. It
    decides no bit here, since OpenCV cuts this search into the same eight stripes whatever the count.
    """

    name = "dis"

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Flows a → b and b → a, float32 "2 h w" on the CPU, for frames "3 h w" in [-1, 1]."""
        size = tuple(a.shape[-2:])
        larger = (_enlarged(size[0], 1), _enlarged(size[1], 1))
        first, second = (self._luma(_resize(frame.cpu().float()[None], larger)[0]) for frame in (a, b))
        estimates = [self._estimate(first, second), self._estimate(second, first)]
        flows = torch.from_numpy(np.stack(estimates)).permute(0, 3, 1, 2)
        forward, backward = _resize_back(flows, size).contiguous()
        return forward, backward

    @staticmethod
    def _estimate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)

    @staticmethod
    def _luma(frame: Tensor) -> np.ndarray:
        """8-bit BT.601 luma "h w" of a frame "3 h w" in [-1, 1]."""
        red, green, blue = frame
        luma = torch.nan_to_num(0.299 * red + 0.587 * green + 0.114 * blue)
        return ((luma + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


class RAFT:
    """RAFT large (Teed and Deng 2020), torchvision's network with the released weights, in float32.

    network     from `raft_network`, on the device it is to run on
    iterations  refinements of the flow; the last one counts
    slip        rescale row 0 and row 1 of the flow instead of its x and y channels when the frame had to be enlarged,
                as the original program does. Only for comparing numbers with it.
    """

    name = "raft"

    def __init__(self, network: nn.Module, iterations: int = 20, slip: bool = False) -> None:
        self.network = network.eval()
        self.iterations = iterations
        self.slip = slip

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Flows a → b and b → a, float32 "2 h w" on a's device, for frames "3 h w" in [-1, 1].

        Frames whose sides are not multiples of 8, or below 128, are enlarged for the estimate.
        """
        device = next(self.network.parameters()).device
        size = tuple(a.shape[-2:])
        pair = _resize(torch.stack([a, b]).to(device, torch.float32), tuple(_enlarged(side, 8) for side in size))
        flow = self.network(pair, pair.flip(0), num_flow_updates=self.iterations)[-1]
        if self.slip:
            ratios = torch.tensor([size[0] / flow.shape[-2], size[1] / flow.shape[-1]], device=device)
            flow = _resize(flow, size).clone()
            flow[:, :, :2] *= ratios[:, None]
        else:
            flow = _resize_back(flow, size)
        forward, backward = flow.to(a.device)
        return forward, backward


_RAFT_NAMES = [  # released name → torchvision's, applied in order
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm([12])\.", r"\1.convnormrelu\2.1."),
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"^update_block\.encoder\.conv([cf])1\.", r"update_block.motion_encoder.conv\g<1>1.0."),
    (r"^update_block\.encoder\.conv([cf])2\.", r"update_block.motion_encoder.conv\g<1>2.0."),
    (r"motion_encoder\.convc", "motion_encoder.convcorr"),
    (r"motion_encoder\.convf", "motion_encoder.convflow"),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])([12])\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
]


def raft_names(names: list[str]) -> dict[str, str]:
    """Released RAFT names (with or without `module.`) → torchvision's, without the copies `layerN.0.norm3`."""
    renamed = {}
    for name in names:
        if ".norm3." in name:
            continue
        new = name
        for pattern, replacement in _RAFT_NAMES:
            new = re.sub(pattern, replacement, new)
        renamed[name] = new
    return renamed


def raft_network(state: Mapping[str, Tensor]) -> nn.Module:
    """torchvision's RAFT large holding the tensors of a released `raft-things.pth`; every name must fit."""
    from torchvision.models.optical_flow import raft_large  # takes seconds: only who uses RAFT waits for it

    with bare():
        network = raft_large(weights=None)
    renamed = {new: state[old] for old, new in raft_names(list(state)).items()}
    for copy in (name for name in state if ".norm3." in name):
        original = copy.replace(".norm3.", ".downsample.1.")
        if original not in state or not torch.equal(state[copy], state[original]):
            raise ValueError(f"raft_network: {copy} must be a copy of {original}, which it is not")
    wanted = network.state_dict()
    lost, strange = sorted(wanted.keys() - renamed.keys()), sorted(renamed.keys() - wanted.keys())
    if lost or strange:
        raise ValueError(
            f"raft_network: {len(lost)} tensors of RAFT large are missing (first {lost[:1]}), "
            f"{len(strange)} are unknown (first {strange[:1]})"
        )
    for name, tensor in renamed.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(wanted[name].shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"raft_network: {name} must have the shape {shapes}")
        renamed[name] = tensor.to(wanted[name].dtype)
    network.load_state_dict(renamed, assign=True)
    return network.requires_grad_(False).eval()
