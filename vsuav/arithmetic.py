"""Arithmetic that is the same in every run, whatever a script has told torch."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import backends

from vsuav.turns import working_threads

type Switch = tuple[Callable[[], Any], Callable[[Any], Any], tuple]
"""How to read one of torch's switches for the whole process, how to turn it, and the values that may stay."""


def attribute(owner: object, name: str, *right: Any) -> Switch:
    """A switch that is an attribute."""
    return partial(getattr, owner, name), partial(setattr, owner, name), right


# What this torch has not is left out when it is read.
CUDA_SWITCHES: tuple[Switch, ...] = (
    attribute(backends.cuda.matmul, "allow_tf32", False),
    attribute(backends.cuda.matmul, "allow_fp16_accumulation", False),
    attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    attribute(backends.cudnn, "enabled", True),
    attribute(backends.cudnn, "benchmark", False),
    attribute(backends.cudnn, "deterministic", True),
    attribute(backends.cudnn, "allow_tf32", False),
)
ATTENTIONS: tuple[Switch, ...] = (
    (backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, (True,)),
    (backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp, (True,)),
    (backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp, (True,)),
    (backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp, (True,)),
)
"""Which kinds of attention torch may choose from on a GPU. Other filters turn these around calls of their own, so they
are held for no longer than a call: put back later, they could be put back to what another filter has left since."""
CPU_PRECISIONS = ("mkldnn", "matmul"), ("mkldnn", "conv")
CUDA_PRECISIONS = ("cuda", "matmul"), ("cudnn", "conv")
"""Where torch 2.9 and later say what float32 numbers are multiplied as."""


@contextlib.contextmanager
def held(switch: Switch) -> Iterator[None]:
    """`switch` at a right value, and afterwards as it was found. One that stands right is not touched at all."""
    read, write, right = switch
    try:
        found = read()
    except (AttributeError, RuntimeError):  # not in this torch; or torch names it by two interfaces and refuses one
        found = right[0]
    if found in right:
        yield
        return
    write(right[0])
    try:
        yield
    finally:
        write(found)


def precision(backend: str, operation: str) -> Switch:
    """The switch for what float32 is multiplied as; "none" stands for what is said of the backend, or of all."""
    owner = getattr(getattr(backends, backend), operation, None)

    def turn(value: str) -> None:
        for each in ("none", value):
            if owner.fp32_precision != value:
                owner.fp32_precision = each

    return lambda: owner.fp32_precision, turn, ("ieee", "none")


@contextlib.contextmanager
def all_held(switches: Iterable[Switch]) -> Iterator[None]:
    """Every one of them `held`."""
    with contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(held(switch))
        yield


@contextlib.contextmanager
def exact_arithmetic(device: str | torch.device = "cpu") -> Iterator[None]:
    """Arithmetic on `device` that is the same in every run: no autotuning, no TF32, no gradients; one thread.

    One thread, because what the engine does between network calls is small: sharing it out takes longer than doing it.
    """
    on_cpu = torch.device(device).type == "cpu"
    precisions = (precision(*names) for names in (CPU_PRECISIONS if on_cpu else CUDA_PRECISIONS))
    with working_threads(1), all_held((*(() if on_cpu else CUDA_SWITCHES), *precisions)), torch.inference_mode():
        yield
