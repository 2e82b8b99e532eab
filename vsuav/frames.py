"""VapourSynth clips and frames ↔ tensors: formats, matrices, ranges, frame properties."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import vapoursynth as vs
from torch import Tensor

from vsuav.ensemble import Orientation

UNSPECIFIED = 2
BT709 = 1
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
FIELD_ORDERS = {1: "bottom field first", 2: "top field first"}
LONGEST = 2**31 - 2
"""Frames of the longest clip whose blocks VapourSynth can still count."""
WRITTEN = ["_Matrix", "_Range", "_ColorRange", "_ChromaLocation"]
"""What a resizer says of the pixels it writes."""


@dataclass(frozen=True)
class Look:
    """How the pixels of a clip are to be read, and those of the result written: format, matrix code (None for RGB and
    GRAY), full or limited range, chroma location (None without subsampling).

    They are the first frame's. A later frame that says something else is read as it says, and written like all.
    """

    format: vs.VideoFormat
    matrix: int | None
    full_range: bool
    chroma: int | None = None

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
    if clip.num_frames > LONGEST:
        raise ValueError(f"clip must have at most {LONGEST} frames, got {clip.num_frames}; std.Trim it first")
    with resized(clip.format):
        matrix = {"_Matrix": BT709} if clip.format.color_family == vs.YUV else {}
        blank = vs.core.std.BlankClip(format=clip.format.id, width=64, height=64, length=1).std.SetFrameProps(**matrix)
        to_rgb(blank, look_from(blank.format, matrix))


def look_of(clip: vs.VideoNode) -> Look:
    """The look of a clip, from its first frame, which is converted there and back. Raises as `inspect`."""
    first = download(clip)[0]
    look = look_from(clip.format, first.get_frame(0).props)
    with resized(clip.format):
        rgb = to_rgb(first, look)
        for node in (differences(rgb), give_back(rgb, first, look, clip.width, clip.height)):
            node.get_frame(0)
    return look


@contextlib.contextmanager
def resized(format: vs.VideoFormat) -> Iterator[None]:
    """Raise what VapourSynth's resizer says of a clip of `format` as `inspect` does."""
    try:
        yield
    except vs.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"clip must be what resize can read and write, got {format.name}: {reason}; convert it, or mend its "
            "frame properties with clip.std.SetFrameProps"
        ) from None


def unfit(props: Mapping) -> tuple[str, str] | None:
    """What a frame's properties say that no frame to be restored may say: ("_Transfer=16", "PQ"), say."""
    for name, kinds in (("_FieldBased", FIELD_ORDERS), ("_Transfer", HDR_TRANSFERS)):
        if (value := props.get(name)) in kinds:
            return f"{name}={int(value)}", kinds[value]
    return None


def look_from(format: vs.VideoFormat, first: Mapping) -> Look:
    """The look of a clip whose first frame has the properties `first`. Raises as `inspect`."""
    field, transfer = code(first, "_FieldBased", 0), code(first, "_Transfer", UNSPECIFIED)
    if field in FIELD_ORDERS:
        raise ValueError(
            f"clip must be progressive, got _FieldBased={field} ({FIELD_ORDERS[field]}); deinterlace it first, "
            "or, if the flag is wrong, clip.std.SetFieldBased(0)"
        )
    if transfer in HDR_TRANSFERS:
        raise ValueError(
            f"clip must be standard dynamic range, got _Transfer={transfer} ({HDR_TRANSFERS[transfer]}); "
            "tone-map it to BT.709 first"
        )
    matrix = None
    if format.color_family == vs.YUV:
        matrix = code(first, "_Matrix", UNSPECIFIED)
        if matrix in (0, UNSPECIFIED):
            raise ValueError(
                f"a YUV clip needs to say its matrix, got _Matrix={first.get('_Matrix')}; set it with "
                "clip.std.SetFrameProps(_Matrix=1) for BT.709 (HD) or _Matrix=6 for BT.601 (SD)"
            )
    unsaid = int(vs.RANGE_FULL if format.color_family == vs.RGB else vs.RANGE_LIMITED)
    if "_Range" in first or "_ColorRange" not in first:
        full = code(first, "_Range", unsaid) == vs.RANGE_FULL
    else:
        full = code(first, "_ColorRange", 1) == 0
    subsampled = format.subsampling_w or format.subsampling_h
    chroma = max(0, code(first, "_ChromaLocation", vs.CHROMA_LEFT)) if subsampled else None
    return Look(format, matrix, full, chroma)


def code(props: Mapping, name: str, unsaid: int) -> int:
    """A frame property that is one whole number, `unsaid` where it is not there.

    Raises:
        ValueError: it is something else.
    """
    value = props.get(name, unsaid)
    if not isinstance(value, int):
        raise ValueError(
            f"frame property {name} must be one whole number, got {value!r}; set it with clip.std.SetFrameProps"
        )
    return int(value)


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

    A change of size is a Spline36 downscale in RGB; integer formats are dithered by error diffusion. What the result
    says of matrix, range and chroma location is how it is written, whatever a frame of `source` says of itself.
    Pixels become wider or narrower where the size changes the picture's proportions by more than rounding.
    """
    proportions = Fraction(source.width * height, source.height * width)
    step = 1 << max(look.format.subsampling_w, look.format.subsampling_h)
    if abs(width - width * proportions) < step or abs(height - height / proportions) < step:
        proportions = Fraction(1)
    if (rgb.width, rgb.height) != (width, height):
        rgb = rgb.resize.Spline36(width=width, height=height)
    source = download(source)
    target = look.format
    dither = {"dither_type": "error_diffusion"} if target.sample_type == vs.INTEGER else {}
    if target.id == vs.RGBS and look.full_range:
        result = vs.core.std.CopyFrameProps(rgb, source).std.RemoveFrameProps(["_ColorRange", "_ChromaLocation"])
        result = result.std.SetFrameProps(_Matrix=0, _Range=look.range)
    else:
        said = WRITTEN
        places = {"matrix": look.matrix, "chromaloc": look.chroma}
        if target.color_family == vs.GRAY:
            rgb, said = luma(rgb), WRITTEN[1:]
        written = rgb.resize.Bicubic(
            format=target.id, range_in=int(vs.RANGE_FULL), range=look.range,
            **{name: value for name, value in places.items() if value is not None}, **dither,
        )  # fmt: skip
        result = vs.core.std.CopyFrameProps(vs.core.std.CopyFrameProps(written, source), written, props=said)
    result = result.std.SetFrameProps(_FieldBased=0)
    return result.std.ModifyFrame(result, partial(_tell, proportions))


def _tell(proportions: Fraction, n: int, f: vs.VideoFrame) -> vs.VideoFrame:
    """State BT.709 where a frame leaves transfer or primaries open, and the pixels' shape where it is another now."""
    open_ones = [name for name in ("_Transfer", "_Primaries") if f.props.get(name, UNSPECIFIED) == UNSPECIFIED]
    changes = dict.fromkeys(open_ones, BT709)
    wide, high = (f.props.get(name, 0) for name in ("_SARNum", "_SARDen"))
    if proportions != 1 and isinstance(wide, int) and isinstance(high, int) and wide > 0 and high > 0:
        shape = Fraction(wide, high) * proportions
        changes |= {"_SARNum": shape.numerator, "_SARDen": shape.denominator}
    if not changes:
        return f
    told = f.copy()
    told.props.update(changes)
    return told


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
    """A frame property as text, None if it is not there. Raises ValueError if it is something else."""
    value = props.get(name)
    if not isinstance(value, str | bytes | None):
        raise ValueError(f"frame property {name} must be one text, got {value!r}; set it with clip.std.SetFrameProps")
    return value.decode(errors="replace") if isinstance(value, bytes) else value
