"""Flow of known motion, warping against grid_sample and by hand, and RAFT against torchvision's own weights."""

import threading

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.optical_flow import raft_large

from vsuav import flow
from vsuav.flow import DIS, RAFT, raft_names, raft_network, resize_flow, valid, warp

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture "3 h w" in [-1, 1] without repeats, and larger than asked for by 16 on every side."""
    coarse = torch.randn(1, 3, height // 4 + 8, width // 4 + 8, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, size=(height + 32, width + 32), mode="bicubic")[0]
    return fine / fine.abs().max()


def shifted(picture: torch.Tensor, x: int, y: int) -> torch.Tensor:
    """The picture without its margin, its contents moved right by x and down by y."""
    height, width = picture.shape[-2] - 32, picture.shape[-1] - 32
    return picture[..., 16 - y : 16 - y + height, 16 - x : 16 - x + width]


@pytest.mark.parametrize("size", [(144, 176), (131, 150), (60, 80), (40, 130)])
def test_dis_finds_a_shift(size):
    picture = texture(*size)
    forward, backward = DIS()(shifted(picture, 0, 0), shifted(picture, 3, -2))
    assert forward.shape == backward.shape == (2, *size) and forward.dtype == torch.float32
    for found, x, y in ((forward, 3, -2), (backward, -3, 2)):
        inner = found[:, 8:-8, 8:-8]
        assert (inner - torch.tensor([x, y]).view(2, 1, 1)).abs().mean() < 0.15


def strong_motion(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two frames that a search through them finds hard: noise, and a motion that is not one shift."""
    picture = texture(height, width)
    moved = shifted(picture, 5, 4) + 0.2 * torch.randn(3, height, width)
    moved[:, : height // 2] = shifted(picture, -9, 7)[:, : height // 2]
    return shifted(picture, 0, 0), moved


@pytest.fixture
def opencv_threads():
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


def test_the_thread_count_of_opencv_changes_nothing_and_is_left_alone(opencv_threads):
    pairs, results = [strong_motion(160, 240), strong_motion(271, 402)], []
    for threads in (1, 2, 3, 8, 16):
        cv2.setNumThreads(threads)
        results.append([DIS()(*pair) for pair in pairs])
        assert cv2.getNumThreads() == threads
    for result in results[1:]:
        for flows, first in zip(result, results[0], strict=True):
            assert torch.equal(flows[0], first[0]) and torch.equal(flows[1], first[1])


def test_another_thread_that_changes_the_count_during_flows_changes_nothing(opencv_threads):
    pair, stop, changes = strong_motion(160, 240), threading.Event(), 0
    cv2.setNumThreads(1)
    quiet = DIS()(*pair)

    def disturb() -> None:
        nonlocal changes
        while not stop.is_set():
            cv2.setNumThreads(1 + changes % 9)
            changes += 1
            stop.wait(0.0003)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        disturbed = [DIS()(*pair) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert changes > 20
    assert all(torch.equal(flow, first) for flows in disturbed for flow, first in zip(flows, quiet, strict=True))


def test_dis_from_many_threads_at_once_gives_the_same_bits():
    picture = texture(130, 140)
    pairs = [(shifted(picture, 0, 0), shifted(picture, x, 1)) for x in range(-3, 4)]
    alone = [DIS()(*pair) for pair in pairs]
    together = [None] * len(pairs)

    def work(i: int) -> None:
        together[i] = DIS()(*pairs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_luma_is_bt601_rounded_to_8_bits():
    frame = torch.rand(3, 6, 7) * 2.2 - 1.1  # a little beyond the range
    rgb = (frame.permute(1, 2, 0).double().numpy() + 1) * 127.5
    expected = np.clip(np.rint(rgb @ [0.299, 0.587, 0.114]), 0, 255)
    assert np.abs(DIS._luma(frame).astype(float) - expected).max() <= 1e-9
    assert DIS._luma(torch.full((3, 1, 1), float("nan"))) == 128


@given(sizes, st.sampled_from(["nearest", "bilinear"]), st.integers(0, 99))
def test_warp_equals_grid_sample(size, mode, seed):
    """Away from rounding ties, where the last bit of a normalised coordinate decides."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height, width, generator=generator)
    displacement = torch.randint(-40, 40, (2, 2, height, width), generator=generator) / 8 + 1 / 32
    row = torch.arange(height)[:, None] + displacement[:, 1]
    column = torch.arange(width) + displacement[:, 0]
    grid = torch.stack([2 * column / max(width - 1, 1) - 1, 2 * row / max(height - 1, 1) - 1], -1)
    if 1 in size:  # grid_sample cannot address a single line with corners aligned
        x, grid = F.pad(x, (0, 1, 0, 1)), torch.stack([2 * column / width - 1, 2 * row / height - 1], -1)
    expected = F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=True)
    ours = warp(x[..., :height, :width], displacement, mode)
    torch.testing.assert_close(ours, expected[..., :height, :width], atol=2e-5, rtol=0)


def test_warp_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).view(1, 1, 1, 4)

    def along(displacement: list[float], mode: str) -> list[float]:
        there = torch.zeros(1, 2, 1, 4)
        there[0, 0, 0] = torch.tensor(displacement)
        return warp(x, there, mode)[0, 0, 0].tolist()

    assert along([0, 0, 0, 0], "nearest") == [1, 2, 4, 8]
    assert along([1, 1, 1, 1], "nearest") == [2, 4, 8, 0]
    assert along([0.5, 0.5, 0.5, -0.5], "nearest") == [1, 4, 4, 4]  # ties to even
    assert along([-0.25, 0.25, 1.25, 0.75], "bilinear") == [0.75, 2.5, 6, 2]
    nan, inf = float("nan"), float("inf")
    for mode in ("nearest", "bilinear"):
        assert along([nan, inf, -inf, 1e30], mode) == [0, 0, 0, 0]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_warp_keeps_the_dtype_and_computes_coordinates_in_float32(mode):
    """Near x = 300 a float16 coordinate is a quarter of a pixel off."""
    x = torch.zeros(1, 1, 1, 400).half()
    x[..., 301] = 1
    there = torch.zeros(1, 2, 1, 400)
    there[:, 0] = 0.0625
    result = warp(x, there, mode)
    assert result.dtype == torch.float16
    assert result[0, 0, 0, 300:302].tolist() == ([0, 1] if mode == "nearest" else [0.0625, 0.9375])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be nearest or bilinear, got 'cubic'"):
        warp(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), "cubic")


def test_valid_by_hand():
    """A back flow that misses home by e pixels is valid while e^2 < 0.001 (4 + (2 - e)^2) + 0.05 (about 0.241)."""
    there = torch.zeros(1, 2, 3, 8)
    there[:, 0] = 2
    for miss, expected in ((0.0, 1), (0.23, 1), (0.25, 0), (1.0, 0)):
        mask = valid(there, -there * (2 - miss) / 2)
        assert mask.shape == (1, 1, 3, 8) and mask.unique().numel() <= 2
        assert mask[0, 0, :, :6].unique().tolist() == [expected]
        assert mask[0, 0, :, 6:].unique().tolist() == [0]  # leads outside, where the back flow counts as zero
    assert valid(torch.full((1, 2, 3, 3), float("nan")), torch.zeros(1, 2, 3, 3)).sum() == 0
    assert valid(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), float("nan"))).sum() == 0
    still = torch.zeros(1, 2, 3, 3)
    assert valid(still, still, alpha1=0.5, alpha2=0.0).sum() == 0  # strictly less


def test_resized_flow_by_hand():
    there = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    assert resize_flow(there, 4, 6) is there
    half = resize_flow(there, 2, 2)
    blocks = there.view(1, 2, 2, 2, 2, 3).mean(dim=(3, 5))
    torch.testing.assert_close(half, blocks * 2 / 6)  # both channels by the ratio of the widths


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return raft_large(weights=None).eval()


def released(network: torch.nn.Module, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """A state dict of torchvision's network under the names of the released file, by their meaning."""
    encoders = {"feature_encoder": "fnet", "context_encoder": "cnet"}
    conv = {"0": "conv", "1": "norm"}
    state = {}
    for name, value in network.state_dict().items():
        parts = name.split(".")
        if parts[0] in encoders:
            head, rest = encoders[parts[0]], parts[1:]
            if rest[0] == "convnormrelu":
                rest = [conv[rest[1]] + "1", *rest[2:]]
            elif rest[0] == "conv":
                rest = ["conv2", *rest[1:]]
            elif rest[2].startswith("convnormrelu"):
                rest = [*rest[:2], conv[rest[3]] + rest[2][-1], *rest[4:]]
            elif rest[2:4] == ["downsample", "1"]:
                state[f"{prefix}{head}.{rest[0]}.{rest[1]}.norm3.{rest[4]}"] = value
            new = [head, *rest]
        elif parts[0] == "mask_predictor":
            new = ["update_block", "mask", "0" if parts[1] == "convrelu" else "2", parts[-1]]
        elif parts[1] == "motion_encoder":
            kind = parts[2].replace("convcorr", "convc").replace("convflow", "convf")
            new = ["update_block", "encoder", kind, parts[-1]]
        elif parts[1] == "recurrent_block":
            new = ["update_block", "gru", parts[3] + parts[2][-1], parts[-1]]
        else:
            new = parts
        state[prefix + ".".join(new)] = value
    return state


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_raft_weights_find_their_place(network, prefix):
    state = released(network, prefix)
    rebuilt = raft_network(state)
    for name, value in network.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value), name
    assert len(set(raft_names(list(state)).values())) == len(network.state_dict())


def test_raft_weights_that_do_not_fit_are_refused(network):
    state = released(network)
    broken = state | {"module.fnet.extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 are unknown \(first \['feature_encoder.extra.weight'\]"):
        raft_network(broken)
    broken = {name: value for name, value in state.items() if name != "module.update_block.mask.2.bias"}
    with pytest.raises(ValueError, match=r"1 tensors .* missing \(first \['mask_predictor.conv.bias'\]"):
        raft_network(broken)
    with pytest.raises(ValueError, match="mask_predictor.conv.bias must have the shape"):
        raft_network(state | {"module.update_block.mask.2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="norm3.bias must be a copy of .*downsample.1.bias"):
        raft_network(state | {"module.cnet.layer2.0.norm3.bias": torch.ones(96)})


@pytest.mark.parametrize(
    ("size", "larger"), [((128, 136), (128, 136)), ((132, 129), (136, 136)), ((40, 140), (128, 144))]
)
def test_raft_enlarges_and_scales_back(network, size, larger):
    """Against torchvision's network called by hand on the enlarged frames."""
    picture = texture(*size)
    a, b = shifted(picture, 0, 0), shifted(picture, 2, 1)
    pair = F.interpolate(torch.stack([a, b]), size=larger, mode="bilinear")
    for slip in (False, True):
        forward, backward = RAFT(network, iterations=2, slip=slip)(a, b)
        for ours, first, second in ((forward, pair[:1], pair[1:]), (backward, pair[1:], pair[:1])):
            with torch.no_grad():
                expected = network(first, second, num_flow_updates=2)[-1]
            expected = F.interpolate(expected, size=size, mode="bilinear")[0]
            if slip:
                expected[:, 0] *= size[0] / larger[0]
                expected[:, 1] *= size[1] / larger[1]
            else:
                expected[0] *= size[1] / larger[1]
                expected[1] *= size[0] / larger[0]
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_flows_have_names():
    assert (flow.DIS.name, flow.RAFT.name) == ("dis", "raft")
