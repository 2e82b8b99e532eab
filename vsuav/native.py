"""The project's own machine code for CPUs, where it was built: 3x3 convolutions with a quarter or a fifth of the
multiplications, convolutions over time, linear layers, group normalisation, attention, and propagation.

`native*.cpp` are compiled when vsuav is installed, once for every kind of CPU. Without a compiler, or on another CPU,
there is no `KIND`, and the layers do without. What is bfloat16 is read and written so, and computed in float32; where
the CPU multiplies pairs of bfloat16 numbers, products of matrices are made of these and summed up in float32.

The convolutions are F(4x4, 3x3), as in winograd.py, or F(6x6, 3x3) or F(2x2, 3x3) of Lavin and Gray (CVPR 2016, arXiv
1509.09308), with everything that surrounds them: what is normalised, activated, enlarged and summed up is computed on
the way, so that it never lies in memory. Pieces of work do not depend on the number of threads, so neither do results.
"""

import contextlib
import ctypes
import itertools
import math
from collections.abc import Iterator
from ctypes import c_double, c_float, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav import buffers

_UNITS = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported, "amx": torch.cpu._is_amx_tile_supported}
BFLOAT16 = tuple(name for name, there in _UNITS.items() if there())
"""What this CPU multiplies bfloat16 numbers with."""
LEAST, MULTIPLE, MANY, FEW = 32, 16, 2048, 512
"""Least channels, in and out, of convolutions that are computed here; what channels must be a multiple of, unless fewer
come out; least pixels of all frames together, or rows of a linear layer, and pixels of wide convolutions by pairs."""
BLOCK, WIDE, MOST = 12, 256, 96
"""Tiles computed together are a multiple of BLOCK, which is also the least number of pixels of a frame over time. Of
inputs with WIDE channels or more, at most MOST are computed together."""
FRAMES = 16
"""Most frames that attend to each other here."""


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "scale", "shift", "weight", "bias", "add", "weights", "rooms", "y")),
        *((name, c_int64) for name in ("clips", "frames", "height", "width", "inputs", "outputs", "taps", "enlarge")),
        *((name, c_int64) for name in ("tile", "block", "by_out", "by_in", "by_tap", "by_row", "by_column")),
        *((name, c_int64) for name in ("activate", "brief", "threads")),
    ]  # fmt: skip


class _Affine(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "scale", "shift", "weight", "bias", "add", "rooms", "y")),
        *((name, c_int64) for name in ("clips", "frames", "pixels", "inputs", "outputs", "taps", "gated", "block")),
        *((name, c_int64) for name in ("by_out", "by_in", "by_tap", "brief", "threads")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "scale", "shift")),
        *((name, c_int64) for name in ("clips", "pixels", "channels", "groups", "brief", "threads")),
        ("eps", c_double),
    ]


class _Line(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "scale", "shift", "y")),
        *((name, c_int64) for name in ("clips", "pixels", "channels", "activate", "brief", "threads")),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "rooms", "y")),
        *((name, c_int64) for name in ("clips", "queries", "keys", "heads", "size", "brief", "threads")),
    ]


class _Timeline(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "turns", "bias", "rooms", "y")),
        *((name, c_int64) for name in ("clips", "frames", "pixels", "heads", "size", "brief", "threads")),
    ]


def opened(file: Path) -> ctypes.CDLL:
    """The functions of the compiled code; torch is loaded by now, and so is the OpenMP that both share.

    Raises:
        OSError: it was built for another system, or from other source.
    """
    library = ctypes.CDLL(str(file))
    kinds = _Convolution, _Affine, _Norm, _Line, _Attention, _Timeline
    sizes = sum(ctypes.sizeof(kind) << 10 * i for i, kind in enumerate(kinds))
    if hasattr(library, "sizes"):
        library.sizes.restype = c_int64
    if not hasattr(library, "beside") or library.sizes() != sizes:
        raise OSError(f"{file} was built from other source")
    library.origins.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_void_p)
    library.blend.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p)
    library.beside.argtypes = (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_void_p, c_void_p)
    for name in ("room", "weights_room", "affine_room", "attend_room", "over_time_room"):
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p,), c_int64
    return library


def _built() -> tuple[str | None, ctypes.CDLL | None]:
    """What the code for this CPU is called, and the code."""
    kind = torch.backends.cpu.get_cpu_capability().lower()
    kinds = f"{kind}_bf16", kind
    for kind, suffix in itertools.product(kinds if kinds[0] in BFLOAT16 else kinds[1:], EXTENSION_SUFFIXES):
        file = Path(__file__).with_name(f"_native_{kind}{suffix}")
        if file.is_file():
            with contextlib.suppress(OSError):  # built for another system, or from other source
                return kind, opened(file)
    return None, None


KIND, _library = _built()
"""Of CPU that the code is for, "avx2", "avx512" or "avx512_bf16"; None: there is no code for this one."""


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def reads(x: Tensor, channels: int) -> bool:
    """Can an activation with so many channels be normalised here, or attend, where no gradients are wanted?"""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return KIND is not None and known and x.device.type == "cpu" and channels % MULTIPLE == 0


def computes(x: Tensor, channels: int) -> bool:
    """Can it be multiplied by matrices here? (AMX multiplies bfloat16 so fast that torch's own way is faster there.)"""
    return reads(x, channels) and (x.dtype is torch.float32 or "amx" not in BFLOAT16)


def by_pairs(x: Tensor) -> bool:
    """Are products of it made of pairs of bfloat16 numbers?"""
    return x.dtype is torch.bfloat16 and KIND == "avx512_bf16"


def pays(x: Tensor, weight: Tensor) -> bool:
    """Is it here that a 3x3 or 3x3x3 convolution of x "b c t h w" with weight "o i … 3 3" is computed fastest?"""
    outputs, inputs = weight.shape[:2]
    few, many = outputs < MULTIPLE and inputs < WIDE, outputs >= LEAST and outputs % MULTIPLE == 0
    enough = FEW if inputs >= WIDE and by_pairs(x) else MANY
    return computes(x, inputs) and inputs >= LEAST and (few or many) and x[:, 0].numel() >= enough


def convolve(
    m: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None, enlarge: int = 1, activate: bool = False,
) -> Tensor:
    """conv(SiLU(scale m + shift)) + bias + add, zero padding 1, of a clip in memory order "b t h w i": "b t h w o".

    Args:
        m: contiguous, float32 or bfloat16, as is the result.
        weight: of the same type, "o i 3 3", or "o i 3 3 3", which sees the frames before and after; in any layout. i is
            a multiple of 16.
        bias: "o".
        add: "b t h w o", contiguous and of the same type, what is added to the result.
        norm: scale and shift "b i", float32, before which nothing is activated: without it the convolution is of m
            itself.
        enlarge: by how much m is enlarged, by nearest neighbour, before it is convolved; then h and w of the result are
            so many times as large.
        activate: the result is SiLU of all that.
    """
    b, t, h, w, inputs = m.shape
    outputs, taps = len(weight), weight.shape[2] if weight.dim() == 5 else 1
    strides = weight.stride() if weight.dim() == 5 else (*weight.stride()[:2], 0, *weight.stride()[2:])
    bias, (scale, shift) = bias.float().contiguous(), norm or (None, None)
    tile, block = _tiles(inputs, b * t, h * enlarge, w * enlarge, taps, by_pairs(m))
    y = buffers.empty((b, t, h * enlarge, w * enlarge, outputs), m.dtype)
    call = _Convolution(
        _at(m), _at(scale), _at(shift), _at(weight), _at(bias), _at(add), None, None, _at(y),
        b, t, h, w, inputs, outputs, taps, enlarge, tile, block, *strides,
        activate, m.dtype is torch.bfloat16, threads := torch.get_num_threads(),
    )  # fmt: skip
    shared, own = _library.weights_room(ctypes.byref(call)), _library.room(ctypes.byref(call))
    with _scratch(shared + threads * own) as room:
        call.weights, call.rooms = _at(room), _at(room[shared:])
        _library.convolve(ctypes.byref(call))
    return y


def _tiles(inputs: int, frames: int, height: int, width: int, taps: int, pairs: bool) -> tuple[int, int]:
    """The side of a tile, and how many are computed together.

    Few channels: large tiles, as many as the second-level cache holds, of one frame or three. Many: there are more
    numbers in the weights than in the tiles, and larger tiles would have still more of them; so the tiles are large
    blocks of about the same size, an even number of them or nearly. Where pairs of bfloat16 numbers are multiplied,
    the sums are bfloat16, too: only those of the smallest tiles are as exact as their operands.
    """
    if inputs < WIDE:
        return 6, 2 * BLOCK if taps == 1 else BLOCK
    tile = 2 if pairs else 4
    tiles = -(-height // tile) * -(-width // tile) * (frames if taps == 1 else 1)
    blocks = 2 * -(-tiles // (2 * MOST))
    return tile, BLOCK * -(-tiles // (blocks * BLOCK))


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Is it here that a linear layer or a convolution over time of x, in any layout, is computed fastest?"""
    return computes(x, weight.shape[0]) and x.numel() >= MANY * weight.shape[1]


def affine(
    m: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """A linear layer of every pixel, or a convolution over time, zero padding (k - 1)/2, of m "b t … i": "b t … o".

    Args:
        m: contiguous, float32 or bfloat16, as is the result. A frame has `BLOCK` pixels or more.
        weight: of the same type, "o i", or "o i k", k odd, which sees (k - 1)/2 frames before and after; in any layout.
            o is a multiple of 16.
        bias: "o", or None where nothing is gated.
        add: "b t … o", contiguous and of the same type, what is added to the result.
        norm: scale and shift "b i", float32: what is multiplied is SiLU(scale m + shift) instead of m; i is a multiple
            of 16.
        gated: the result is a GELU(g), where a and g are the halves of what weight "2o i" and bias "2o" give.
    """
    b, t, inputs = m.shape[0], m.shape[1], m.shape[-1]
    pixels, taps = m[0, 0, ..., 0].numel(), weight.shape[2] if weight.dim() == 3 else 1
    outputs, block = len(weight) // (2 if gated else 1), min(4 * BLOCK, pixels)
    strides = weight.stride() if weight.dim() == 3 else (*weight.stride(), 0)
    bias, (scale, shift) = None if bias is None else bias.float().contiguous(), norm or (None, None)
    y = buffers.empty((*m.shape[:-1], outputs), m.dtype)
    call = _Affine(
        _at(m), _at(scale), _at(shift), _at(weight), _at(bias), _at(add), None, _at(y),
        b, t, pixels, inputs, outputs, taps, gated, block, *strides,
        m.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    with _scratch(_library.affine_room(ctypes.byref(call))) as room:
        call.rooms = _at(room)
        _library.affine(ctypes.byref(call))
    return y


_spare: list[Tensor] = []


@contextlib.contextmanager
def _scratch(numbers: int) -> Iterator[Tensor]:
    """Memory for the time of a call. It is kept for the next one: fresh memory costs as much as what is done in it."""
    try:
        room = _spare.pop()
    except IndexError:
        room = None
    if room is None or len(room) < numbers:
        room = None  # let go of before more is asked for
        room = torch.empty(numbers, dtype=torch.float32, device="cpu")
    try:
        yield room
    finally:
        _spare.append(room)


def unload() -> None:
    """Let go of the memory that is kept for calls and results."""
    _spare.clear()
    buffers.let_go()


def moments(m: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift "b c" that normalise a clip "b t h w c" by groups over all its frames and pixels together,
    float32; sums are joined in float64.

    m is contiguous, float32 or bfloat16, c a multiple of 16; weight and bias "c".
    """
    b, channels = len(m), m.shape[-1]
    scale, shift = torch.empty(2, b, channels, dtype=torch.float32, device="cpu")
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    _library.moments(ctypes.byref(_Norm(
        _at(m), _at(weight), _at(bias), _at(scale), _at(shift), b, m[0, ..., 0].numel(), channels, groups,
        m.dtype is torch.bfloat16, torch.get_num_threads(), eps,
    )))  # fmt: skip
    return scale, shift


def line(m: Tensor, scale: Tensor, shift: Tensor, act: bool) -> Tensor:
    """scale m + shift of "b t h w c", by clip and channel "b c", followed by SiLU where `act` says so.

    m is contiguous, float32 or bfloat16, as is the result; scale and shift float32.
    """
    y = buffers.empty(m.shape, m.dtype)
    _library.line(ctypes.byref(_Line(
        _at(m), _at(scale), _at(shift), _at(y), len(m), m[0, ..., 0].numel(), m.shape[-1], act,
        m.dtype is torch.bfloat16, torch.get_num_threads(),
    )))  # fmt: skip
    return y


def attends(q: Tensor, k: Tensor, heads: int) -> bool:
    """Is it here that attention of q "n i c" to k "n j c" is computed fastest?"""
    known = reads(q, q.shape[-1] // heads) and q.shape[-1] % heads == 0
    return known and len(q) == len(k) and k.shape[1] > 0 and q[..., 0].numel() >= MANY


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of q "n i c" to k and v "n j c" -> "n i c", in float32.

    They are float32 or bfloat16, as is the result; heads are contiguous slices of the channels, of a multiple of 16.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    n, queries, c = q.shape
    y = buffers.empty(q.shape, q.dtype)
    call = _Attention(
        _at(q), _at(k), _at(v), None, _at(y), n, queries, k.shape[1], heads, c // heads,
        q.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    with _scratch(_library.attend_room(ctypes.byref(call))) as room:
        call.rooms = _at(room)
        _library.attend(ctypes.byref(call))
    return y


def attends_over_time(q: Tensor, heads: int) -> bool:
    """Is it here that attention among the frames "b t n c" is computed fastest, in float32 or bfloat16?"""
    return reads(q, q.shape[-1] // heads) and q.shape[-1] % heads == 0 and q.shape[1] <= FRAMES


def attend_over_time(q: Tensor, k: Tensor, v: Tensor, heads: int, turns: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention among the frames of every pixel, "b t n c" -> "b t n c", in float32.

    Args:
        q, k, v: float32 or bfloat16, as is the result; their heads are contiguous slices of the channels, of a multiple
            of 16. Not more than `FRAMES` frames.
        turns: complex "t p", by which the first p pairs of channels of every head of q and k are multiplied.
        bias: "heads t t", what is added to the scores.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    b, t, n, c = q.shape
    size, pairs = c // heads, turns.shape[1]
    cosines = F.pad(turns.real.repeat_interleave(2, 1), (0, size - 2 * pairs), value=1)
    sines = F.pad(torch.stack([-turns.imag, turns.imag], -1).flatten(1), (0, size - 2 * pairs))
    table = torch.stack([cosines, sines], 1)
    bias = F.pad(bias.float().contiguous() / math.log(2), (0, FRAMES - t), value=-torch.inf)
    y, threads = buffers.empty(q.shape, q.dtype), torch.get_num_threads()
    call = _Timeline(
        _at(q), _at(k), _at(v), _at(table), _at(bias), None, _at(y), b, t, n, heads, size,
        q.dtype is torch.bfloat16, threads,
    )  # fmt: skip
    with _scratch(threads * _library.over_time_room(ctypes.byref(call))) as room:
        call.rooms = _at(room)
        _library.attend_over_time(ctypes.byref(call))
    return y


def follows(*x: Tensor) -> bool:
    """Is it here that pixels are followed along flows, or brought from where they come from?"""
    return KIND is not None and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in x)


def origins(flow: Tensor, back_flow: Tensor) -> Tensor:
    """`flow.origins` of float32 flows "2 h w" on the CPU, to the bit."""
    flow, back_flow = flow.contiguous(), back_flow.contiguous()
    height, width = flow.shape[-2:]
    place = torch.empty(height, width, dtype=torch.int32, device="cpu")
    _library.origins(_at(flow), _at(back_flow), height, width, _at(place))
    return place


def blend(current: Tensor, source: Tensor, origin: Tensor) -> Tensor:
    """`propagation.blend` of "c h w", float32 on the CPU, to the bit."""
    current, source, origin = current.contiguous(), source.contiguous(), origin.int().contiguous()
    result = buffers.empty(current.shape, current.dtype)
    _library.blend(_at(current), _at(source), _at(origin), len(current), origin.numel(), _at(result))
    return result


def beside(
    frame: Tensor, neighbour: Tensor, flow: Tensor, origin: Tensor, steep: float, change: Tensor, share: Tensor
) -> None:
    """What `degrain.beside` says of a neighbour, "3 h w" and "1 h w", contiguous; all float32 on the CPU."""
    frame, neighbour, flow, origin = (x.contiguous() for x in (frame, neighbour, flow, origin))
    _library.beside(
        _at(frame), _at(neighbour), _at(flow), _at(origin), *frame.shape[-2:], steep, _at(change), _at(share)
    )
