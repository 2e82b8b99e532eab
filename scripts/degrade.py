"""What time and bad encoders do to video: a second-order degradation with real codecs, for training and for tests.

    python scripts/degrade.py INPUT OUTPUT [--seed 0] [--strength 1.0] [--scale 4] [--clean]

Two rounds of blur, resizing, noise and compression, as in Real-ESRGAN and RealBasicVSR, the last round ending at the
low resolution; compression is JPEG or a video codec (H.264 or MPEG-4 at a random rate, through PyAV). Within a clip
every parameter is constant or drifts slowly from one value to another. The same seed gives the same pixels, on any
x86-64 CPU: H.264 is encoded without the shortcuts that differ from one to the next, and now and then from run to run.
"""

import argparse
import io
import sys
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation

av.logging.set_level(av.logging.PANIC)
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
ENLARGE = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


@dataclass
class Drift:
    """A parameter over a clip: `start` at its first frame, `end` at its last."""

    start: float
    end: float

    def at(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


@dataclass
class Round:
    """One round: blur, resize, noise, JPEG. Ranges are given at full strength; see `draw`."""

    blur_x: Drift
    blur_y: Drift
    angle: float
    size: Drift
    filter: int
    noise: Drift
    poisson: bool
    gray: bool
    jpeg: Drift | None


@dataclass
class Recipe:
    """Everything random about the degradation of one clip but the noise itself."""

    rounds: list[Round] = field(default_factory=list)
    codec: str | None = None
    rate: int = 0
    """CRF of H.264, quantiser of MPEG-4."""


NONE = Drift(0, 0)
CLEAN = Recipe([Round(NONE, NONE, 0, Drift(1, 1), cv2.INTER_CUBIC, NONE, False, False, None)])
"""Only reduced, antialiased bicubic."""


def draw(rng: np.random.Generator, strength: float = 1.0) -> Recipe:
    """Draw a recipe. `strength` 0 … 1 scales how bad it may get; one clip in eight is only reduced."""

    def drift(low: float, high: float) -> Drift:
        start = rng.uniform(low, high)
        end = np.clip(start + rng.uniform(-0.25, 0.25) * (high - low), low, high) if rng.random() < 0.5 else start
        return Drift(start, float(end))

    s = strength
    if rng.random() < 0.125 or s == 0:
        kind = int(rng.choice((cv2.INTER_AREA, cv2.INTER_CUBIC)))
        return Recipe([replace(CLEAN.rounds[0], filter=kind)])
    rounds = []
    for last in (False, True):
        active = rng.random() < (0.85 if last else 0.5)
        sigma = 1.0 + 1.0 * s if last else 1.2 * s
        blur = drift(0.2, 0.2 + sigma) if active else NONE
        ratio = rng.uniform(0.6, 1.6) if rng.random() < 0.3 else 1.0
        level = drift(0, 9 * s) if rng.random() < (0.7 if last else 0.3) else NONE
        quality = drift(95 - 55 * s, 97) if rng.random() < (0.45 if last else 0.3) else None
        rounds.append(
            Round(
                blur, Drift(blur.start * ratio, blur.end * ratio), rng.uniform(0, 180),
                Drift(1, 1) if last or rng.random() < 0.6 else drift(0.6, 1.2), int(rng.choice(ENLARGE)),
                level, rng.random() < 0.3, rng.random() < 0.4, quality,
            )  # fmt: skip
        )
    recipe = Recipe(rounds)
    if rng.random() < 0.5:
        rounds[-1].jpeg = None
        recipe.codec = "libx264" if rng.random() < 0.75 else "mpeg4"
        low, high = (16, 17 + round(14 * s)) if recipe.codec == "libx264" else (2, 4 + round(5 * s))
        recipe.rate = int(rng.integers(low, high))
    return recipe


def blur(image: np.ndarray, sigma_x: float, sigma_y: float, angle: float) -> np.ndarray:
    """Gaussian blur of "h w 3" float32; sigma in pixels along and across the direction `angle` (degrees)."""
    if max(sigma_x, sigma_y) < 0.25:
        return image
    if sigma_x == sigma_y:
        return cv2.GaussianBlur(image, (0, 0), sigma_x)
    radius = int(np.ceil(3 * max(sigma_x, sigma_y)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    kernel = np.exp(-(((c * x + s * y) / max(sigma_x, 0.2)) ** 2 + ((c * y - s * x) / max(sigma_y, 0.2)) ** 2) / 2)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def noise(image: np.ndarray, rng: np.random.Generator, level: float, poisson: bool, gray: bool) -> np.ndarray:
    """Add Gaussian noise of standard deviation `level`, or shot noise that has it at mid-grey."""
    if level <= 0:
        return image
    shape = (*image.shape[:2], 1) if gray else image.shape
    grain = rng.standard_normal(shape, dtype=np.float32) * level
    if poisson:
        grain = grain * np.sqrt(np.clip(image, 0, 255) / 128)
    return image + grain


def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    _, data = cv2.imencode(".jpg", as_bytes(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(round(quality))])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)


def as_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).round().astype(np.uint8)


def as_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as RGB "h w 3" uint8, with interpolated chroma, and rounded.

    Without `EXACT` FFmpeg repeats chroma and rounds down: luma comes out a level too dark. From deep RGB and gray it
    always rounds down. (From deep 4:4:4 it does, too: half a level.)
    """
    parts = frame.format.components
    if parts[0].bits > 8 and not any(part.is_chroma for part in parts):
        return ((frame.to_ndarray(format="rgb48le").astype(np.uint32) + 128) // 257).astype(np.uint8)
    return frame.to_ndarray(format="rgb24", interpolation=EXACT)


def encode(frames: np.ndarray, codec: str, rate: int) -> np.ndarray:
    """Frames "t h w 3" uint8 through a lossy encoder and back. Odd sizes are padded for it and cropped again."""
    count, height, width = frames.shape[:3]
    frames = np.pad(frames, ((0, 0), (0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"crf": str(rate), "preset": "veryfast", "x264-params": "log-level=none:cpu-independent=1"}
        else:
            stream.options = {"qmin": str(rate), "qmax": str(rate), "bf": "0"}
        for image in frames:
            whole = av.VideoFrame.from_ndarray(image, format="rgb24")
            for packet in stream.encode(whole.reformat(format="yuv420p", interpolation=EXACT)):
                container.mux(packet)
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = [as_rgb(image) for image in container.decode(video=0)]
    if len(decoded) != count:
        raise RuntimeError(f"degrade: {codec} gave {len(decoded)} frames back for {count}")
    return np.stack(decoded)[:, :height, :width]


def degrade(
    frames: np.ndarray, rng: np.random.Generator, *, strength: float = 1.0, scale: int = 4, recipe: Recipe | None = None
) -> np.ndarray:
    """A low-resolution, degraded copy of a clip (or of a single picture, as a clip of one frame).

    Args:
        frames: "t h w 3" uint8, h and w multiples of `scale`.
        rng: where all chance comes from.
        recipe: what to do, instead of one drawn from `rng`.

    Returns:
        "t h/scale w/scale 3" uint8.
    """
    count, height, width = frames.shape[:3]
    if height % scale or width % scale:
        raise ValueError(f"degrade: frame sizes must be multiples of {scale}, got {width}x{height}")
    recipe = recipe or draw(rng, strength)
    target = (width // scale, height // scale)
    result = []
    for i, frame in enumerate(frames):
        part = i / max(1, count - 1)
        image = frame.astype(np.float32)
        for k, step in enumerate(recipe.rounds):
            image = blur(image, step.blur_x.at(part), step.blur_y.at(part), step.angle)
            size = step.size.at(part)
            if k == len(recipe.rounds) - 1:
                image = reduce(image, target, step.filter)
            elif size != 1:
                new = (max(8, round(width * size)), max(8, round(height * size)))
                image = cv2.resize(image, new, interpolation=step.filter)
            image = noise(image, rng, step.noise.at(part), step.poisson, step.gray)
            if step.jpeg is not None:
                image = jpeg(image, step.jpeg.at(part))
        result.append(as_bytes(image))
    low = np.stack(result)
    return encode(low, recipe.codec, recipe.rate) if recipe.codec else low


def reduce(image: np.ndarray, size: tuple[int, int], kind: int) -> np.ndarray:
    """Reduce to `size` (width, height); bicubic is antialiased, like Pillow's and MATLAB's."""
    if kind == cv2.INTER_CUBIC:
        from PIL import Image

        planes = [Image.fromarray(image[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
        return np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return cv2.resize(image, size, interpolation=kind)


def read_video(path: str | Path, limit: int | None = None) -> tuple[np.ndarray, Fraction]:
    """Frames "t h w 3" uint8 and the frame rate."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            frames.append(as_rgb(frame))
            if len(frames) == limit:
                break
        return np.stack(frames), stream.average_rate or Fraction(25)


def write_video(path: str | Path, frames: np.ndarray, rate: Fraction) -> None:
    """Lossless: FFV1 in RGB."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")):
                container.mux(packet)
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Degrade a clip and reduce it to a quarter of its size.")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path, help="an .mkv; written losslessly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0, help="0 … 1: how bad it may get")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--clean", action="store_true", help="only reduce (antialiased bicubic)")
    args = parser.parse_args()
    if not 0 <= args.strength <= 1:
        parser.error(f"--strength must be between 0 and 1, got {args.strength}")
    if args.scale < 1 or args.seed < 0:
        parser.error(f"--scale must be at least 1 and --seed at least 0, got {args.scale} and {args.seed}")
    if not args.output.parent.is_dir():
        parser.error(f"the folder of {args.output} does not exist")
    try:
        frames, rate = read_video(args.input)
    except (OSError, ValueError, IndexError, AttributeError, av.error.FFmpegError) as error:
        parser.error(f"{args.input} cannot be read as a video: {' '.join(str(error).split())}")
    whole, (height, width) = frames.shape[1:3], (side - side % args.scale for side in frames.shape[1:3])
    if min(height, width) == 0:
        parser.error(f"{args.input} must be at least {args.scale} pixels wide and high, got {whole[1]}x{whole[0]}")
    if (height, width) != whole:
        print(f"degrade: the upper left {width}x{height} of {whole[1]}x{whole[0]} is taken", file=sys.stderr)
    frames = frames[:, :height, :width]
    rng = np.random.default_rng(args.seed)
    recipe = CLEAN if args.clean else draw(rng, args.strength)
    write_video(args.output, degrade(frames, rng, scale=args.scale, recipe=recipe), rate)
    print(f"{args.output}: {recipe}")


if __name__ == "__main__":
    main()
