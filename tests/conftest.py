"""What every test shares: fixed seeds, one torch thread, Hypothesis without clock or chance, no network."""

import os

# before any library that reads them is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as vsuav sets it where it is imported before torch

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # float32 results on a CPU depend on the number of threads

settings.register_profile(
    "vsuav", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vsuav")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads_restored():
    """VapourSynth's threads are for the whole process: a test that sets them puts them back."""
    import vapoursynth as vs

    before = vs.core.num_threads
    yield
    vs.core.num_threads = before
