"""The corrector: what it computes, at which noise levels it counts, and that it is not computed where it does not."""

import pytest
import torch
import torch.nn.functional as F
from test_enlarger import MIXED
from test_vae import build, close, differs

from vsuav.corrector import Corrector
from vsuav.layers import shuffled, unshuffled

CORRECTED = MIXED | {"corrector_channels": 8, "corrector_layers": 2, "corrector_until": 20}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def corrector() -> Corrector:
    torch.manual_seed(7)
    made = Corrector(6, 8, 2, 20)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def test_the_network_frame_by_frame():
    """Against convolutions of single frames, and torch's own order of the pixels of a block."""
    net, found, picture = corrector(), torch.randn(2, 6, 3, 5, 7), torch.randn(2, 3, 3, 20, 28)
    got = net(found, picture)
    for b in range(2):
        for t in range(3):
            joint = torch.cat([found[b, :, t], F.pixel_unshuffle(picture[b, :, t], 4)])
            weight = torch.cat([net.features_in.weight, net.picture_in.weight], dim=1)
            x = first = F.conv2d(joint, weight, net.features_in.bias + net.picture_in.bias, padding=1)
            for block in net.blocks:
                h = F.silu(F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1))
                x = x + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
            y = F.conv2d(x + first, net.conv_out.weight, net.conv_out.bias, padding=1)
            close(got[b, :, t], F.pixel_shuffle(y, 4))


@pytest.mark.parametrize("side", [2, 4])
def test_blocks_become_channels_and_pixels_again(side):
    x = torch.randn(2, 3, 2, 4 * side, 5 * side)
    blocks = unshuffled(x, side)
    for t in range(2):
        assert torch.equal(blocks[:, :, t], F.pixel_unshuffle(x[:, :, t], side))
    assert blocks.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(shuffled(blocks, side), x)


def test_it_counts_fully_at_level_0_and_fades():
    net, found, picture = corrector(), torch.randn(4, 6, 2, 5, 6), torch.randn(4, 3, 2, 20, 24)
    change, levels = net(found, picture), torch.tensor([0, 5, 20, 29])
    got = net.corrected(picture.clone(), found, levels)
    for i, share in enumerate((1, 0.75, 0, 0)):
        close(got[i], picture[i] + share * change[i])


def test_a_fresh_one_changes_nothing():
    net, found, picture = Corrector(6, 8, 2, 20), torch.randn(1, 6, 2, 5, 6), torch.randn(1, 3, 2, 20, 24)
    assert torch.equal(net.corrected(picture.clone(), found, torch.tensor([0])), picture)


def test_a_vae_with_one_corrects_what_was_mixed():
    vae, mixed = build(CORRECTED), build(MIXED)
    mixed.load_state_dict({k: v for k, v in vae.state_dict().items() if not k.startswith("corrector.")})
    z, low, levels = torch.randn(2, 4, 2, 5, 6), torch.randn(2, 3, 2, 5, 6), torch.tensor([5, 20])
    large = torch.stack([F.interpolate(low[:, :, i], scale_factor=4, mode="bicubic") for i in range(2)], dim=2)
    got, without = vae.decode(z, low, levels), mixed.decode(z, low, levels)
    close(got[0], without[0] + 0.75 * vae.corrector(vae.enlarger.features(low), without - large)[0])
    close(got[1], without[1])
    assert differs(got[0], without[0])


def test_it_is_computed_only_where_it_counts(monkeypatch):
    """One level for all clips is the same as a list of it, but for the work."""
    vae, calls, compute = build(CORRECTED), [], Corrector.forward
    z, low = torch.randn(2, 4, 2, 5, 6), torch.randn(2, 3, 2, 5, 6)
    each = {level: vae.decode(z, low, torch.full((2,), level)) for level in (0, 19, 20, 29)}
    monkeypatch.setattr(Corrector, "forward", lambda *inputs: calls.append(1) or compute(*inputs))
    for level, expected in each.items():
        calls.clear()
        close(vae.decode(z, low, level), expected)
        assert len(calls) == (level < 20)


def test_inference_equals_training():
    net, found, picture = corrector(), torch.randn(1, 6, 2, 8, 9), torch.randn(1, 3, 2, 32, 36)
    fast = net.corrected(picture.clone(), found, torch.tensor([10]))
    with torch.enable_grad():
        slow = net.corrected(picture, found, torch.tensor([10]))
    close(fast, slow)
    assert slow.requires_grad
