"""Restores and upscales video 4x by temporal diffusion, in VapourSynth, any frame at any time."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vsuav.networks import unload
    from vsuav.plugin import upscale

# How long threads that wait for each other hold on to their core, which torch's OpenMP reads when it is loaded: some
# ten microseconds instead of milliseconds. Beside another busy program it is twice as fast or more, alone no slower.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["unload", "upscale"]

_HOMES = {"upscale": "vsuav.plugin", "unload": "vsuav.networks"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the parts that need no VapourSynth load without it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vsuav' has no attribute {name!r}")
