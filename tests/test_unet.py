"""The U-Net: its layers against the formulas written out plainly, the whole against its own other ways of computing.

Numbers of the reference, every key and shape, and the image network it is inflated from are tested with the parity
files and the checkpoints.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vsuav import operators
from vsuav.attention import (
    QUERIES,
    Rotary,
    SelfAttention,
    TemporalAttention,
    TextAttention,
    attend,
    relative_bucket,
)
from vsuav.layers import (
    JointNorm,
    PlusResBlock,
    ResBlock,
    TimeConv,
    TimeResBlock,
    Up,
    frames,
    lay_out,
    timeline,
    tokens,
)
from vsuav.unet import UNetConfig, UNetVideo, set_temporal, temporal_parameters

SMALL = {
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
    "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"],
    "only_cross_attention": [True, True, False],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "temporal_norm_num_groups": 16,
    "down_temporal_idx": [1, 2],
    "up_temporal_idx": [0, 1, 2],
}


def alive[M: nn.Module](module: M) -> M:
    """The same module without a zero parameter: as after training."""
    for p in module.parameters():
        if not p.detach().any():
            nn.init.normal_(p, std=0.05)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> UNetVideo:
    torch.manual_seed(1)
    return alive(UNetVideo(UNetConfig.from_dict(SMALL)))


def arguments(b: int = 1, t: int = 3, h: int = 10, w: int = 14):
    return (
        torch.randn(b, 4, t, h, w),
        torch.tensor([700, 20, 400][:b]),
        torch.randn(b, 3, t, h, w),
        torch.randn(b, 5, 24),
        torch.tensor([0, 120, 350][:b]),
    )


def close(a, b, rtol=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


# -- layers, written out plainly


def video(b, c, t, h, w):
    return torch.randn(b, c, t, h, w).contiguous(memory_format=torch.channels_last_3d)


def test_views_share_memory_and_copy_other_layouts():
    x = video(1, 6, 3, 4, 5)
    for view in (frames, timeline, tokens):
        assert view(x).data_ptr() == x.data_ptr()
        assert torch.equal(view(x.contiguous()), view(x))
    assert tokens(x).is_contiguous() and frames(x).is_contiguous(memory_format=torch.channels_last)
    assert timeline(x)[0, 1, 2, 7] == x[0, 1, 2, 1, 2] and tokens(x)[2, 7, 1] == x[0, 1, 2, 1, 2]
    assert frames(x)[2, 1, 3, 4] == x[0, 1, 2, 3, 4]


@pytest.mark.parametrize("act", [False, True])
def test_norm_is_joint_over_frames(act):
    norm = JointNorm(2, 6, eps=0.3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 2 * video(2, 6, 3, 4, 5) + 1
    got = norm(x, act=act).detach().numpy()
    for b in range(2):
        for c in range(6):
            group = x[b, 3 * (c // 3) : 3 * (c // 3) + 3].double().numpy()
            y = (x[b, c].double().numpy() - group.mean()) / np.sqrt(group.var() + 0.3)
            y = y * norm.weight[c].item() + norm.bias[c].item()
            np.testing.assert_allclose(got[b, c], y / (1 + np.exp(-y)) if act else y, atol=1e-5)


@pytest.mark.parametrize("act", [False, True])
def test_norm_of_large_frames_is_exact(act):
    """Against float64, where summing a quarter of a million numbers in float32 would be seen."""
    norm = JointNorm(2, 4, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 2 + video(2, 4, 2, 300, 301)
    exact = F.group_norm(x.double().contiguous(), 2, norm.weight.double(), norm.bias.double(), 1e-6)
    with torch.no_grad():
        got = norm(x, act=act)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got.double(), F.silu(exact) if act else exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("k", "t"), [(3, 1), (3, 5), (5, 2), (5, 7)])
def test_time_convolution(k, t):
    conv, x = TimeConv(6, 4, k).requires_grad_(False), video(2, 6, t, 3, 4)
    close(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=(k // 2, 0, 0)))


@pytest.mark.parametrize("b", [1, 2])
def test_residual_blocks(b):
    """Every kind against its formula, with an embedding for the whole batch and one for each clip."""
    x, e = video(b, 8, 3, 5, 4), torch.randn(b, 12)
    act = lambda norm, x: F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))  # noqa: E731

    def formula(block, conv1, conv2, skip):
        shift = (F.silu(e) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[:, :, None, None, None]
        return skip + conv2(act(block.norm2, conv1(act(block.norm1, x)) + shift))

    def plane(conv, pad):
        return lambda x: F.conv3d(x, conv.weight[:, :, None], conv.bias, padding=(0, pad, pad))

    def line(conv, pad):
        return lambda x: F.conv3d(x, conv.weight, conv.bias, padding=(pad, 0, 0))

    block = alive(ResBlock(8, 6, eps=1e-5, groups=2, groups_in=4, emb=12))
    for e in (e, e[:1]):  # noqa: B020
        skip = plane(block.conv_shortcut, 0)(x)
        close(block(x, e), formula(block, plane(block.conv1, 1), plane(block.conv2, 1), skip))
    block = alive(TimeResBlock(8, 5, groups=4, emb=12))
    close(block(x, e), formula(block, line(block.conv1, 2), line(block.conv2, 1), x))

    fresh, plain = PlusResBlock(8, 8, eps=1e-6, groups=4).requires_grad_(False), ResBlock(8, 8, eps=1e-6, groups=4)
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if "3d" not in k})
    y = plain.requires_grad_(False)(x)
    assert torch.equal(fresh(x), y)
    alive(fresh.conv_3d)
    close(fresh(x), y + F.conv3d(act(fresh.norm_3d, y), fresh.conv_3d.weight, fresh.conv_3d.bias, padding=1))


@pytest.mark.parametrize("size", [None, (16, 24), (15, 23)])
@pytest.mark.parametrize("t", [1, 3])
def test_enlarging(size, t):
    """Nearest neighbour to the size asked for, then the convolution; large frames are computed by phases."""
    up, x = Up(6).requires_grad_(False), video(2, 6, t, 8, 12)
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size or (16, 24), (8, 12), strict=True))
    large = x[:, :, :, rows][..., columns]
    expected = F.conv3d(large, up.conv.weight[:, :, None], up.conv.bias, padding=(0, 1, 1))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(up(x, size), expected)


def attention(q, k, v, scores=0.0):
    """Softmax attention of one head, "i d" and "j d"."""
    s = q @ k.T / math.sqrt(q.shape[1]) + scores
    s = torch.exp(s - s.amax(1, keepdim=True))
    return s / s.sum(1, keepdim=True) @ v


@pytest.mark.parametrize(("b", "t"), [(1, 3), (2, 2)])
def test_attention_to_text_and_pixels(b, t):
    z, context = torch.randn(b * t, 6, 8), torch.randn(b, 5, 7)
    text, pixels = (alive(m) for m in (TextAttention(8, 2, 7, 0), SelfAttention(8, 2)))
    for layer in (text, pixels):
        got = layer(z, context)
        for i in range(b * t):
            source = context[i // t] if layer is text else z[i]
            q, k, v = (x @ w.weight.T for x, w in ((z[i], layer.to_q), (source, layer.to_k), (source, layer.to_v)))
            heads = [attention(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 4), slice(4, 8))]
            close(got[i], torch.cat(heads, 1) @ layer.to_out[0].weight.T + layer.to_out[0].bias)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("t", "n"), [(1, 2), (5, 4), (8, 3), (12, 2)])
def test_attention_over_time(t, n, grad):
    """Each pixel by itself: pairs of channels turned by position times frequency, a bias by head and bucket."""
    rotary = Rotary().requires_grad_(False)
    rotary.freqs += 0.1 * torch.rand(16)
    layer = alive(TemporalAttention(80, 2, rotary))
    nn.init.normal_(layer.time_rel_pos_bias.relative_attention_bias.weight)
    z = torch.randn(2, t, n, 80)
    bucket = relative_bucket(t)

    def turned(x):
        """x "t 40": the first 32 channels are 16 points in the plane."""
        x = x.clone()
        for p in range(t):
            for k in range(16):
                angle = p * float(rotary.freqs[k])
                turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
                x[p, 2 * k : 2 * k + 2] = turn @ x[p, 2 * k : 2 * k + 2]
        return x

    with torch.set_grad_enabled(grad):
        got = layer(z)
    assert got.shape == (2, n, t, 80)
    for b in range(2):
        for i in range(n):
            q, k, v = (z[b, :, i] @ w.weight.T for w in (layer.to_q, layer.to_k, layer.to_v))
            heads = []
            for h, s in enumerate((slice(0, 40), slice(40, 80))):
                bias = layer.time_rel_pos_bias.relative_attention_bias.weight[bucket, h]
                heads.append(attention(turned(q[:, s]), turned(k[:, s]), v[:, s], bias))
            close(got[b, i], torch.cat(heads, 1) @ layer.to_out[0].weight.T + layer.to_out[0].bias)


def test_buckets():
    """Exact below eight frames, then logarithmic to 32; keys later than the query have their own half."""
    table = relative_bucket(40)
    assert table.diagonal().unique().tolist() == [0]
    assert table[39].flip(0)[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert torch.equal(table.T.triu(1) + 16 * torch.ones(40, 40, dtype=torch.long).triu(1), table.triu(1))
    assert table.max() == 31 and (table[0].diff()[1:] >= 0).all()
    assert relative_bucket(80)[0, 32:].unique().tolist() == [31]
    assert relative_bucket(80)[32:, 0].unique().tolist() == [15]


# -- the whole network


def test_a_batch_is_its_clips_one_by_one(unet):
    sample, t, low_res, context, level = arguments(b=3)
    with torch.no_grad():
        together = unet(sample, t, low_res, context, level)
        for i in range(3):
            s = slice(i, i + 1)
            close(together[s], unet(sample[s], int(t[i]), low_res[s], context[s], level[s]))
        same = unet(sample, t[0], low_res, context, level[:1])
        close(same[2:], unet(sample[2:], t[0], low_res[2:], context[2:], level[0]))


def test_a_prepared_prompt_is_the_prompt(unet):
    sample, t, low_res, context, level = arguments(b=2)
    with torch.no_grad():
        assert torch.equal(
            unet(sample, t, low_res, unet.prepare(context), level), unet(sample, t, low_res, context, level)
        )


def test_every_frame_and_input_counts(unet):
    """Changing one frame, the prompt, the level or the time step changes the prediction of another frame."""
    args = list(arguments(t=4))
    with torch.no_grad():
        before = unet(*args)
        assert torch.equal(unet(*args), before)
        for i, other in enumerate((args[0].roll(1, 2), 701, args[2] * 1.1, args[3] * 1.1, torch.tensor([1]))):
            changed = [*args[:i], other, *args[i + 1 :]]
            assert not torch.allclose(unet(*changed)[:, :, 3], before[:, :, 3], atol=1e-4)


def test_frames_have_an_order(unet):
    """The temporal layers tell frames apart by position: reversing the clip is not reversing the result."""
    sample, t, low_res, context, level = arguments(t=4)
    with torch.no_grad():
        forward = unet(sample, t, low_res, context, level)
        backward = unet(sample.flip(2), t, low_res.flip(2), context, level).flip(2)
        assert not torch.allclose(forward, backward, atol=1e-3)
        set_temporal(unet, False)
        forward = unet(sample, t, low_res, context, level)
        backward = unet(sample.flip(2), t, low_res.flip(2), context, level).flip(2)
        set_temporal(unet, True)
        close(backward, forward)


@settings(max_examples=20)
@given(t=st.integers(1, 40), h=st.integers(1, 13), w=st.integers(1, 13))
def test_any_size(unet, t, h, w):
    with torch.no_grad():
        args = arguments(t=t, h=h, w=w)
        y = unet(*args)
    assert y.shape == args[0].shape and y.isfinite().all()


def test_inference_equals_training(unet):
    """The layers used without gradients are others (sums and gates built in, enlarging by phases): same result."""
    args = arguments(t=5, h=12, w=16)
    with torch.no_grad():
        fast = unet(*args)
    with torch.enable_grad():
        slow = unet(*args)
    close(fast, slow)


def test_without_the_fused_layers(unet, monkeypatch):
    args = arguments(t=2)
    with torch.no_grad():
        fast = unet(*args)
        monkeypatch.setattr(operators, "FUSED_DTYPES", set())
        close(unet(*args), fast)


def test_double_precision_agrees(unet):
    args = arguments(t=5, h=12, w=16)
    with torch.no_grad():
        single = unet(*args)
        wide = UNetVideo(unet.config).double()
        wide.load_state_dict(unet.state_dict())
        double = wide(args[0].double(), args[1], args[2].double(), args[3].double(), args[4])
    close(single.double(), double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("i", "j"), [(5, 7), (QUERIES, QUERIES), (2 * QUERIES + 3, QUERIES + 90)])
def test_attention_is_its_definition(i, j, dtype):
    """Few and many rows, in float64 by hand; bfloat16 errs by a few of its last bits (2^-8)."""
    q, k, v = (torch.randn(2, length, 12, dtype=dtype) for length in (i, j, j))
    with torch.no_grad():
        ours = attend(q, k, v, heads=3)
    heads = [x.double().unflatten(-1, (3, 4)) for x in (q, k, v)]
    weights = torch.einsum("nihd,njhd->nhij", *heads[:2]).div(2).softmax(-1)
    expected = torch.einsum("nhij,njhd->nihd", weights, heads[2]).flatten(2)
    error = 2e-6 if dtype is torch.float32 else 4 * 2**-8
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "decibel"), [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_is_near(unet, dtype, decibel):
    args = arguments(t=4, h=12, w=16)
    with torch.no_grad():
        exact = unet(*args)
        half = UNetVideo(unet.config).to(dtype)
        half.load_state_dict(unet.state_dict())
        near = lay_out(half)(*args)
    assert near.dtype == dtype
    assert 10 * torch.log10(exact.square().mean() / (near - exact).square().mean()) > decibel


def test_memory_layout_of_inputs_and_weights_is_free(unet):
    args = list(arguments(t=4, h=12, w=16))
    with torch.no_grad():
        before = unet(*args)
        args[0] = args[0].contiguous(memory_format=torch.channels_last_3d)
        args[2] = args[2].transpose(3, 4).contiguous().transpose(3, 4)
        twin = UNetVideo(unet.config)
        twin.load_state_dict(unet.state_dict())
        close(lay_out(twin)(*args), before)
        assert twin(*args).is_contiguous(memory_format=torch.channels_last_3d)
    assert twin.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_can_be_trained(unet):
    """A gradient reaches every parameter of a live network, and follows the loss it was taken from."""
    network = UNetVideo(unet.config)
    network.load_state_dict(unet.state_dict())
    args = arguments(b=2, t=3, h=8, w=8)
    loss = network(*args).square().mean()
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    slope = sum(float(p.grad.square().sum()) for p in network.parameters())
    with torch.no_grad():
        step = 1e-3 * float(loss) / slope
        for p in network.parameters():
            p -= step * p.grad
        fall = float(loss) - float(network(*args).square().mean())
    assert fall == pytest.approx(step * slope, rel=0.05)


def test_temporal_parameters_are_what_an_image_network_lacks():
    from diffusers import UNet2DConditionModel

    image = {k: v for k, v in SMALL.items() if "temporal" not in k} | {"in_channels": 7, "num_class_embeds": 1000}
    for key in ("down_block_types", "up_block_types"):
        image[key] = [kind.replace("3D", "2D") for kind in image[key]]
    theirs = UNet2DConditionModel(**image, use_linear_projection=True)
    ours = UNetVideo(UNetConfig.from_dict(dict(theirs.config) | {"down_temporal_idx": [1], "mid_temporal": False}))
    names = {name for name, _ in ours.named_parameters()}
    assert set(temporal_parameters(ours)) == names - {name for name, _ in theirs.named_parameters()}
    assert {n.split(".")[1] for n in names if n.startswith("down_temp")} == {"1"} and "mid_temp" not in str(names)
    assert {n.split(".")[1] for n in names if n.startswith("up_temp")} == {"0", "1", "2"}


@pytest.mark.parametrize("level", [-1, 351, torch.tensor([3, 400])])
def test_levels_out_of_range_are_refused(unet, level):
    sample, t, low_res, context, _ = arguments(b=2)
    with pytest.raises(ValueError, match=r"UNetVideo: noise_level must be between 0 and 350, got \["):
        unet(sample, t, low_res, context, level)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu', got 'gelu'"),
        ({"dual_cross_attention": True}, "unknown setting dual_cross_attention"),
        ({"flux": {"a": 1}}, "unknown setting flux"),
        ({"temporal_module_config": {"attention_block_types": ["Temporal_Self", ""]}}, "temporal_module_config"),
        ({"down_block_types": ["DownBlock3D"] * 2}, "one entry for each of the 3"),
        ({"up_block_types": ["UpBlock3D"] * 3}, "must mirror"),
        ({"down_block_types": ["AttnDownBlock3D"] * 3}, "unknown block type 'AttnDownBlock3D'; known: DownBlock2D"),
        ({"attention_head_dim": 4}, "4 heads at 64 channels"),
        ({"in_channels": 8}, "in_channels must be out_channels \\+ 3 .*, got 8 for out_channels 4"),
    ],
)
def test_configurations_it_would_not_compute_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(SMALL | change)


def test_empty_and_descriptive_settings_are_ignored():
    extra = {"_class_name": "X", "sample_size": 128, "dual_cross_attention": False, "freq_shift": 0, "some_new": None}
    assert UNetConfig.from_dict(SMALL | extra) == UNetConfig.from_dict(SMALL)
