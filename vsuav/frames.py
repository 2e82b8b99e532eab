"""VapourSynth clips and frames ↔ tensors: formats, matrices, ranges, frame properties."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import vapoursynth as vs
from torch import Tensor

from vsuav.ensemble import Orientation

UNSPECIFIED = 2
BT709 = 1
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
FIELD_ORDERS = {1: "bottom field first", 2: "top field first"}


@dataclass(frozen=True)
class Look:
    """How the pixels of a clip are to be read: format, matrix code (None for RGB and GRAY), full or limited range.

    `unsaid` names the properties that the result states although the first frame leaves them open.
    """

    format: vs.VideoFormat
    matrix: int | None
    full_range: bool
    unsaid: tuple[str, ...] = ()

    @property
    def range(self) -> int:
        """The range as the resizers name it."""
        return int(vs.RANGE_FULL if self.full_range else vs.RANGE_LIMITED)


def inspect(clip: vs.VideoNode) -> Look:
    """Check that `clip` can be restored, from its description and its first frame.

    Raises:
        ValueError: one line with what is wrong and what would mend it.
    """
    check(clip)
    return look_of(clip)


def check(clip: vs.VideoNode) -> None:
    """Check the description of `clip`; asks for no frame. Raises as `inspect`."""
    if not isinstance(clip, vs.VideoNode):
        raise ValueError(f"clip must be a VapourSynth video clip, got {type(clip).__name__}")
    if not clip.format or clip.format.id == 0:
        raise ValueError("clip must have one constant format, got a variable one; convert it with resize first")
    if clip.width == 0 or clip.height == 0:
        raise ValueError("clip must have one constant size, got a variable one; resize or split it first")


def look_of(clip: vs.VideoNode) -> Look:
    """The look of a clip, from its first frame. Raises as `inspect`."""
    return look_from(clip.format, download(clip).get_frame(0).props)


def look_from(format: vs.VideoFormat, first: Mapping) -> Look:
    """The look of a clip whose first frame has the properties `first`. Raises as `inspect`."""
    field = int(first.get("_FieldBased", 0))
    if field in FIELD_ORDERS:
        raise ValueError(
            f"clip must be progressive, got _FieldBased={field} ({FIELD_ORDERS[field]}); deinterlace it first, "
            "or, if the flag is wrong, clip.std.SetFieldBased(0)"
        )
    transfer = int(first.get("_Transfer", UNSPECIFIED))
    if transfer in HDR_TRANSFERS:
        raise ValueError(
            f"clip must be standard dynamic range, got _Transfer={transfer} ({HDR_TRANSFERS[transfer]}); "
            "tone-map it to BT.709 first"
        )
    matrix = None
    if format.color_family == vs.YUV:
        matrix = int(first.get("_Matrix", UNSPECIFIED))
        if matrix in (0, UNSPECIFIED):
            raise ValueError(
                f"a YUV clip needs to say its matrix, got _Matrix={first.get('_Matrix')}; set it with "
                "clip.std.SetFrameProps(_Matrix=1) for BT.709 (HD) or _Matrix=6 for BT.601 (SD)"
            )
    named = first["_Range"] if "_Range" in first else first.get("_ColorRange")
    full_code = vs.RANGE_FULL if "_Range" in first else 0
    full = format.color_family == vs.RGB if named is None else int(named) == full_code
    unsaid = tuple(name for name in ("_Transfer", "_Primaries") if int(first.get(name, UNSPECIFIED)) == UNSPECIFIED)
    return Look(format, matrix, full, unsaid)


def download(clip: vs.VideoNode) -> vs.VideoNode:
    """`clip` with its frames in main memory."""
    return vs.core.std.GPUDownload(clip) if getattr(clip, "gpu_resident", False) else clip


def to_rgb(clip: vs.VideoNode, look: Look) -> vs.VideoNode:
    """`clip` as RGBS in full range, 0…1."""
    clip = download(clip)
    if clip.format.color_family == vs.GRAY:
        gray = clip.resize.Point(format=vs.GRAYS, range_in=look.range, range=int(vs.RANGE_FULL))
        return vs.core.std.ShufflePlanes(gray, [0, 0, 0], vs.RGB).std.SetFrameProps(_Matrix=0)
    matrix = {} if look.matrix is None else {"matrix_in": look.matrix}
    return clip.resize.Bicubic(format=vs.RGBS, range_in=look.range, range=int(vs.RANGE_FULL), **matrix)


def oriented(clip: vs.VideoNode, orientation: Orientation) -> vs.VideoNode:
    """`clip` as it lies in `orientation`; twice is not at all."""
    clip = clip.std.Transpose() if orientation.transposed else clip
    return clip.std.Turn180() if orientation.half else clip


def mean(clips: list[vs.VideoNode]) -> vs.VideoNode:
    """The mean of clips, with the frame properties of the first."""
    return vs.core.std.AverageFrames(clips, [1] * len(clips)) if len(clips) > 1 else clips[0]


def luma(rgb: vs.VideoNode) -> vs.VideoNode:
    """GRAYS luma of an RGBS clip."""
    return rgb.resize.Point(format=vs.GRAYS, matrix=BT709)


def differences(rgb: vs.VideoNode) -> vs.VideoNode:
    """The luma of an RGBS clip; each frame's `PlaneStatsDiff` is its mean difference to the frame before, 0…1."""
    gray = luma(rgb)
    return vs.core.std.PlaneStats(gray, gray[:1] + gray[:-1] if gray.num_frames > 1 else gray)


def give_back(rgb: vs.VideoNode, source: vs.VideoNode, look: Look, width: int, height: int) -> vs.VideoNode:
    """A full-range RGBS clip in the format of `look`, in the size asked for, with the frame properties of `source`.

    A change of size is a Spline36 downscale in RGB; integer formats are dithered by error diffusion.
    """
    if (rgb.width, rgb.height) != (width, height):
        rgb = rgb.resize.Spline36(width=width, height=height)
    target = look.format
    dither = {"dither_type": "error_diffusion"} if target.sample_type == vs.INTEGER else {}
    if target.id == vs.RGBS and look.full_range:
        result = rgb
    elif target.color_family == vs.GRAY:
        full = luma(rgb)
        result = full.resize.Point(format=target.id, range_in=int(vs.RANGE_FULL), range=look.range, **dither)
    else:
        matrix = {} if look.matrix is None else {"matrix": look.matrix}
        result = rgb.resize.Bicubic(format=target.id, range_in=int(vs.RANGE_FULL), range=look.range, **matrix, **dither)
    return vs.core.std.CopyFrameProps(result, download(source)).std.SetFrameProps(**described(look))


def described(look: Look) -> dict[str, int]:
    """Properties the result states whatever the source says."""
    matrix = {"_Matrix": 0} if look.format.color_family == vs.RGB else {}
    return {"_FieldBased": 0, **matrix, **dict.fromkeys(look.unsaid, BT709)}


def to_tensor(frame: vs.VideoFrame) -> Tensor:
    """An RGBS frame as "3 h w", float32 in [-1, 1] (0…1 in the frame), owning its memory."""
    planes = np.empty((3, frame.height, frame.width), np.float32)
    for plane in range(3):
        np.subtract(np.asarray(frame[plane]), np.float32(0.5), out=planes[plane])
    planes *= np.float32(2)
    return torch.from_numpy(planes)


def to_frame(picture: Tensor) -> vs.VideoFrame:
    """A picture "3 h w", float32 in [0, 1], as an RGBS frame without properties."""
    height, width = picture.shape[1:]
    frame = vs.core.create_video_frame(vs.core.get_video_format(vs.RGBS), width, height)
    for plane in range(3):
        np.copyto(np.asarray(frame[plane]), picture[plane].numpy())
    return frame


def text_prop(props: Mapping, name: str) -> str | None:
    """A frame property as text, None if it is not there."""
    value = props.get(name)
    if value is None:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
