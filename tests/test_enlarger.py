"""The enlarger: what it adds, how it is mixed with the decoder's picture, what it does not depend on."""

import pytest
import torch
import torch.nn.functional as F
from test_vae import VIDEO, build, close, differs

from vsuav.enlarger import Enlarger
from vsuav.layers import FrameConv

MIXED = VIDEO | {"bicubic_skip": True, "num_class_embeds": 30, "enlarger_channels": 6, "enlarger_layers": 2}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def enlarger(layers: int = 2, meeting: int | None = None, beside: bool = False) -> Enlarger:
    torch.manual_seed(4)
    made = Enlarger(6, layers, 30, meeting, beside)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def test_the_network_pixel_by_pixel():
    """Against convolutions of single frames, and the pixels of a block put in their places by hand."""
    net, low = enlarger(), torch.rand(2, 3, 3, 5, 6)
    detail, trust = net(low)
    for b in range(2):
        for t in range(3):
            x = first = F.conv2d(low[b, :, t], net.conv_in.weight, net.conv_in.bias, padding=1)
            for block in net.blocks:
                h = F.silu(F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1))
                x = x + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
            y = F.conv2d(x + first, net.conv_out.weight, net.conv_out.bias, padding=1)
            for i in range(4):
                for j in range(4):
                    close(detail[b, :, t, i::4, j::4], y[4 * i + j : 48 : 16])
                    close(trust[b, 0, t, i::4, j::4], y[48 + 4 * i + j])


def test_what_it_is_told_of_the_frames_beside_enters_with_the_frame():
    """As by one convolution of both together; told nothing is told that nothing changes."""
    net, low, beside = enlarger(beside=True), torch.rand(2, 3, 3, 5, 6), torch.randn(2, 6, 3, 5, 6)
    joint = enlarger()
    joint.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("beside_in.")})
    joint.conv_in = FrameConv(9, 6, 3, padding=1)
    joint.conv_in.weight.copy_(torch.cat([net.conv_in.weight, net.beside_in.weight], dim=1))
    joint.conv_in.bias.copy_(net.conv_in.bias + net.beside_in.bias)
    for told, given in ((beside, beside), (None, 0 * beside)):
        for ours, expected in zip(net(low, told), joint(torch.cat([low, given], dim=1)), strict=True):
            close(ours, expected)
    assert differs(net(low, beside)[0], net(low)[0])


def test_a_fresh_one_makes_nothing_of_what_it_is_told():
    fresh, low, beside = Enlarger(6, 2, 30, beside=True), torch.rand(1, 3, 2, 5, 6), torch.randn(1, 6, 2, 5, 6)
    torch.nn.init.normal_(fresh.conv_out.weight)
    for told, alone in zip(fresh(low, beside), fresh(low), strict=True):
        assert alone.any() and torch.equal(told, alone)


def test_the_decoders_picture_and_its_own_are_mixed_by_trust_and_level():
    net, low, drawn = enlarger(), torch.rand(3, 3, 2, 5, 6), torch.rand(3, 3, 2, 20, 24)
    detail, trust = net(low)
    levels = torch.tensor([0, 7, 29])
    net.class_embedding.weight[levels] = torch.tensor([[0.0], [60.0], [-60.0]])
    got = net.mixed(drawn, low, levels)
    share = torch.sigmoid(trust[0])
    close(got[0], (1 - share) * drawn[0] + share * detail[0])
    close(got[1], detail[1])
    close(got[2], drawn[2])


def test_a_vae_with_one_mixes_it_in_under_the_bicubic_enlargement():
    mixed = build(MIXED)
    plain = build(VIDEO | {"bicubic_skip": True, "num_class_embeds": 30})
    plain.load_state_dict({k: v for k, v in mixed.state_dict().items() if not k.startswith("enlarger.")})
    z, low, level = torch.randn(2, 4, 2, 5, 6), torch.randn(2, 3, 2, 5, 6), torch.tensor([0, 20])
    large = torch.stack([F.interpolate(low[:, :, i], scale_factor=4, mode="bicubic") for i in range(2)], dim=2)
    drawn = plain.decode(z, low, level) - large
    close(mixed.decode(z, low, level), mixed.enlarger.mixed(drawn, low, level) + large)
    assert differs(mixed.decode(z, low, level), plain.decode(z, low, level))


def test_a_vae_hands_on_what_it_is_told_of_the_frames_beside():
    told = build(MIXED | {"enlarger_beside": True})
    z, low, level = torch.randn(1, 4, 2, 5, 6), torch.randn(1, 3, 2, 5, 6), torch.tensor([20])
    drawn, beside = torch.randn(1, 3, 2, 20, 24), torch.randn(1, 6, 2, 5, 6)
    large = torch.stack([F.interpolate(low[:, :, i], scale_factor=4, mode="bicubic") for i in range(2)], dim=2)
    got = told.decode(z, low, level, beside, decoder=lambda *_: drawn.clone())
    close(got, told.enlarger.mixed(drawn.clone(), low, level, beside) + large)
    assert differs(got, told.decode(z, low, level, decoder=lambda *_: drawn.clone()))


def test_a_fresh_one_is_hardly_trusted():
    drawn, low = torch.rand(1, 3, 2, 20, 24), torch.rand(1, 3, 2, 5, 6)
    got = Enlarger(6, 2, 30).mixed(drawn, low, torch.tensor([20]))
    close(got, drawn * (1 - torch.sigmoid(torch.tensor(-4.0))))


def test_frames_do_not_meet():
    net, low = enlarger(), torch.rand(1, 3, 4, 5, 6)
    order = [2, 0, 3, 1]
    for together, apart in zip(net(low), net(low[:, :, order]), strict=True):
        close(together[:, :, order], apart)


@pytest.mark.parametrize("layers", [4, 5])
def test_frames_meet_after_every_second_block(layers):
    """Against convolutions of single frames; the second of a meeting sums three, one a frame, zeros beyond the ends."""
    net, low = enlarger(layers, meeting=5), torch.rand(2, 3, 3, 5, 6)
    frame = lambda x, w, b: F.conv2d(x, w, b, padding=1)  # noqa: E731
    x = first = [frame(low[:, :, t], net.conv_in.weight, net.conv_in.bias) for t in range(3)]
    for i, block in enumerate(net.blocks):
        h = [F.silu(frame(y, block.conv1.weight, block.conv1.bias)) for y in x]
        x = [y + frame(z, block.conv2.weight, block.conv2.bias) for y, z in zip(x, h, strict=True)]
        if i in (1, 3):
            conv1, conv2 = net.meetings[i // 2].conv1, net.meetings[i // 2].conv2
            h = [F.silu(frame(y, conv1.weight, conv1.bias)) for y in x]
            h = [torch.zeros_like(h[0]), *h, torch.zeros_like(h[0])]
            near = lambda t: sum(frame(h[t + k], conv2.weight[:, :, k], None) for k in range(3))  # noqa: B023, E731
            x = [y + near(t) + conv2.bias[:, None, None] for t, y in enumerate(x)]
    for t, got in enumerate(net(low)[0].unbind(2)):
        y = frame(x[t] + first[t], net.conv_out.weight, net.conv_out.bias)
        close(got, F.pixel_shuffle(y[:, :48], 4))


def test_fresh_meetings_change_nothing():
    net, low = Enlarger(6, 4, 30, 5), torch.rand(1, 3, 3, 5, 6)
    apart = Enlarger(6, 4, 30)
    apart.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("meetings.")})
    for module in (net, apart):
        torch.nn.init.constant_(module.conv_out.weight, 0.1)
    for a, b in zip(net(low), apart(low), strict=True):
        close(a, b)


@pytest.mark.parametrize("meeting", [None, 5])
def test_inference_equals_training(meeting):
    net, low = enlarger(meeting=meeting), torch.rand(1, 3, 2, 8, 9)
    fast = net(low)
    with torch.enable_grad():
        for a, b in zip(fast, net(low), strict=True):
            close(a, b)
            assert b.requires_grad
