"""A frame has one value, whatever the script, or another filter of it, tells torch; and torch is left as it was."""

import contextlib
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from clips import ask, clip_of, pixels
from torch import backends
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsuav import operators, upscale
from vsuav.arithmetic import ATTENTIONS, CUDA_PRECISIONS, CUDA_SWITCHES, all_held, exact_arithmetic, held, precision

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")


@contextlib.contextmanager
def turned(read, write, value):
    found = read()
    write(value)
    try:
        yield
    finally:
        write(found)


def attribute(owner, name, value):
    return turned(lambda: getattr(owner, name), lambda to: setattr(owner, name, to), value)


@contextlib.contextmanager
def reduced_precision(value):
    """All that torch says of float32's precision said anew, as a script would at its top, and then as it was."""
    if not hasattr(backends.mkldnn, "matmul"):
        pytest.skip("this torch knows one precision of float32 on a CPU")
    owners = [backends, backends.mkldnn.matmul, backends.mkldnn.conv]
    owners += [] if value == "bf16" else [backends.cuda.matmul]
    for owner in owners:
        owner.fp32_precision = value
    try:
        yield
    finally:
        for owner in reversed(owners):
            owner.fp32_precision = "none"


SCRIPTS = {
    "attention by products": lambda: sdpa_kernel(SDPBackend.MATH),
    "no fast attention": lambda: turned(backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, False),
    "no oneDNN": lambda: backends.mkldnn.flags(enabled=False),
    "deterministic oneDNN": lambda: backends.mkldnn.flags(enabled=True, deterministic=True),
    "bfloat16 for float32": lambda: reduced_precision("bf16"),
    "tf32 for float32": lambda: reduced_precision("tf32"),
    "medium products": lambda: turned(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "TF32 by the older name": lambda: attribute(backends.cuda.matmul, "allow_tf32", True),
}


def frames() -> list[str]:
    """Of the bundled model: its attention and convolutions on a small clip are partly torch's."""
    return ask(upscale(clip_of(pixels(3, 48, 32), ()), preset="fast", threads=2, dtype="float32"), "linear")


@pytest.fixture(scope="module")
def wanted():
    return frames()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_tells_torch_changes_no_bit(wanted, name):
    with SCRIPTS[name]():
        assert frames() == wanted


@pytest.mark.parametrize("name", ["attention by products", "no oneDNN"])
def test_nor_does_another_filter_that_turns_switches_meanwhile(wanted, name):
    stop = threading.Event()

    def other():
        while not stop.is_set():
            with SCRIPTS[name]():
                time.sleep(0.003)
            time.sleep(0.003)

    before = switches()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert [frames() for _ in range(2)] == [wanted] * 2
    finally:
        stop.set()
        thread.join()
    assert switches() == before  # it was not turned back by us after the other had put it right


def switches() -> list[bool]:
    """Of torch for the whole process, those that other filters turn around calls of their own."""
    return [torch._C._get_mkldnn_enabled(), *(read() for read, _, _ in ATTENTIONS)]


@pytest.mark.parametrize("group", ["a GPU's", "attention's"])
def test_every_switch_is_right_inside_and_as_it_was_afterwards(group):
    context, all_of = {
        "a GPU's": (lambda: exact_arithmetic("cuda"), CUDA_SWITCHES),
        "attention's": (lambda: all_held(ATTENTIONS), ATTENTIONS),
    }[group]
    flipped = []
    for read, write, right in all_of:
        with contextlib.suppress(AttributeError):  # not in every torch
            flipped += [(read, write, right[0])] if isinstance(read(), bool) else []
    assert len(flipped) > 1
    with contextlib.ExitStack() as stack:
        for read, write, right in flipped:
            stack.enter_context(turned(read, write, not right))
        with context():
            assert [read() for read, _, _ in flipped] == [right for _, _, right in flipped]
        assert [read() for read, _, _ in flipped] == [not right for _, _, right in flipped]


def test_a_switch_that_stands_right_is_not_touched():
    calls = []
    with held((lambda: True, calls.append, (True,))):
        pass
    assert calls == []
    with pytest.raises(KeyError), held((lambda: 3, calls.append, (1, 2))):
        assert calls == [1]
        raise KeyError
    assert calls == [1, 3]


@pytest.mark.parametrize("names", CUDA_PRECISIONS)
def test_a_precision_said_of_all_is_still_said_of_all_afterwards(names):
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch knows one precision of float32")
    owner = getattr(getattr(backends, names[0]), names[1])
    with reduced_precision("none"):
        owner.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        with held(precision(*names)):
            assert owner.fp32_precision == "ieee"
        assert owner.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert owner.fp32_precision == "ieee"


SHAPES = [
    ((2, 3, 40, 16), 1, 1, 3, 1), ((4, 8, 12, 16), 8, 1, 3, 2), ((1, 8, 5, 7), 4, 0, 1, 1),
    ((2, 4, 3, 6, 5), 4, 1, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "out", "padding", "side", "stride"), SHAPES)
def test_a_convolution_is_torchs(shape, out, padding, side, stride):
    torch.manual_seed(0)
    dimensions = len(shape) - 2
    x, weight, bias = torch.randn(shape), torch.randn(out, shape[1], *[side] * dimensions), torch.randn(out)
    convolve = F.conv2d if dimensions == 2 else F.conv3d
    exact = convolve(x.double(), weight.double(), bias.double(), stride, padding)
    with torch.inference_mode():
        got = operators.convolve(x, weight, bias, (padding,) * dimensions, (stride,) * dimensions)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    operators.convolve(x, weight, bias, (padding,) * dimensions, (stride,) * dimensions).sum().backward()
    wanted = torch.autograd.grad(convolve(x, weight, bias, stride, padding).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 300, 48), (4, 2, 8, 33)])
def test_attention_is_the_formula(shape, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for _ in range(3))
    bias = torch.randn(1, shape[2], shape[2], shape[1]).permute(0, 3, 2, 1) if masked else None
    scores = q.double() @ k.double().transpose(-1, -2) / shape[-1] ** 0.5 + (0 if bias is None else bias.double())
    exact = scores.softmax(-1) @ v.double()
    with torch.inference_mode():
        got = operators.softmax_attention(q, k, v, bias)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    got = operators.softmax_attention(q.requires_grad_(), k, v, bias)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
