"""Restores and upscales video 4x by temporal diffusion, in VapourSynth, any frame at any time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vsuav.networks import unload
    from vsuav.plugin import upscale

__all__ = ["unload", "upscale"]

_HOMES = {"upscale": "vsuav.plugin", "unload": "vsuav.networks"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the parts that need no VapourSynth load without it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vsuav' has no attribute {name!r}")
