"""The benchmark: its plain networks against ours, what it counts against counts by hand, and the command itself."""

import json

import bench
import bench_clips
import pytest
import torch
import torch.nn.functional as F
import toy
from bench_networks import Product, Roofline, largest, products, race, ways
from plain import PlainDecoder, PlainUNet
from torch.utils.flop_counter import FlopCounterMode

from vsuav.layers import lay_out
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig

LEVELS = {
    **toy.UNET, "block_out_channels": [32, 32, 64], "cross_attention_dim": 64,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"], "down_temporal_idx": [2],
    "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"],
    "only_cross_attention": [True, True, False], "layers_per_block": 2,
}  # fmt: skip
ATTENDING = {**toy.VAE_VIDEO, "mid_block_add_attention": True, "bicubic_skip": False}
TOLD = toy.VAE_VIDEO | {"num_class_embeds": 30, "fading": True, "mid_block_layers": 4}
MIXED = TOLD | {"enlarger_channels": 6, "enlarger_layers": 3, "enlarger_meeting": 4, "enlarger_beside": True}
UNSHUFFLED = {
    **toy.VAE_VIDEO, "block_out_channels": [8, 16], "unshuffle": 2, "down_block_types": ["DownEncoderBlock3D"] * 2,
    "up_block_types": ["UpDecoderBlock3D_plus", "UpDecoderBlock3D"],
}  # fmt: skip


def alive[M: torch.nn.Module](network: M) -> M:
    """The network as after training: no parameter is zero."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.detach().any() else None
    return lay_out(network.requires_grad_(False))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=5e-5 * float(b.abs().max()))


@pytest.mark.parametrize("config", [toy.UNET, LEVELS], ids=["toy", "levels"])
@torch.inference_mode()
def test_the_plain_unet_is_ours(config):
    unet = alive(UNetVideo(UNetConfig.from_dict(config)))
    plain = PlainUNet(unet.config, unet.state_dict())
    sample, low_res = torch.randn(2, 4, 5, 10, 14), torch.randn(2, 3, 5, 10, 14)
    text = torch.randn(2, 6, config["cross_attention_dim"])
    timestep, level = torch.tensor([700, 20]), torch.tensor([0, 350])
    close(unet(sample, timestep, low_res, text, level), plain(sample, timestep, low_res, text, level))


@pytest.mark.parametrize(
    "config",
    [toy.VAE_IMAGE, toy.VAE_VIDEO, ATTENDING, UNSHUFFLED, TOLD, MIXED],
    ids=["image", "video", "attention", "unshuffled", "level and fading", "enlarger"],
)
@torch.inference_mode()
def test_the_plain_decoder_is_ours(config):
    vae = alive(VAE(VAEConfig.from_dict(config)))
    plain = PlainDecoder(vae.config, vae.state_dict())
    z, low_res, level = torch.randn(2, 4, 3, 6, 5), torch.rand(2, 3, 3, 6, 5) * 2 - 1, torch.tensor([0, 20])
    close(vae.decode(z, low_res, level), plain(z, low_res, level))
    if vae.config.enlarger_beside:
        beside = torch.randn(len(z), 6, *z.shape[2:])
        close(vae.decode(z, low_res, level, beside), plain(z, low_res, level, beside))


# -- what is counted and measured


def test_products_are_counted():
    """Multiplications and additions of each kind, by hand; and all of a network by torch's own counter."""
    x = torch.empty(2, 3, 8, 10, device="meta")
    image, clip, matrix = (torch.empty(s, device="meta") for s in ((5, 3, 3, 3), (4, 2, 3, 1, 1), (6, 7)))

    def call():
        F.conv2d(x, image, padding=1, stride=2)
        for _ in range(2):
            F.conv3d(x.view(1, 2, 3, 8, 10), clip, padding=(1, 0, 0))
        F.linear(torch.empty(9, 7, device="meta"), matrix, torch.empty(6, device="meta"))
        torch.empty(4, 5, 6, device="meta") @ torch.empty(4, 6, 3, device="meta")

    flops = {(p.kind, p.left): (n, p.flops) for p, n in products(call).items()}
    assert flops == {
        ("convolution", (2, 3, 8, 10)): (1, 2 * 2 * 5 * 4 * 5 * 3 * 9),
        ("convolution", (1, 2, 3, 8, 10)): (2, 2 * 4 * 3 * 8 * 10 * 2 * 3),
        ("product", (9, 7)): (1, 2 * 9 * 7 * 6),
        ("batched product", (4, 5, 6)): (1, 2 * 4 * 5 * 6 * 3),
    }
    with torch.device("meta"):
        unet = UNetVideo(UNetConfig.from_dict(LEVELS))
        plain = PlainUNet(unet.config, bench.on_meta(unet.state_dict()))
        sample, low_res, text = torch.empty(1, 4, 8, 9, 12), torch.empty(1, 3, 8, 9, 12), torch.empty(1, 6, 64)
        inputs = sample, torch.empty(1), low_res, text, torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(*inputs)
    counted = products(lambda: plain(*inputs))
    assert sum(n * product.flops for product, n in counted.items()) == counter.get_total_flops()


PRODUCTS = [
    Product((2, 4, 6, 5), (3, 4, 3, 3), (2, 1), (1, 1)),
    Product((2, 4, 6, 5), (3, 4, 1, 1), (1, 1), (0, 0)),
    Product((1, 4, 5, 3, 2), (6, 4, 3, 1, 1), (1, 1, 1), (1, 0, 0)),
    Product((1, 4, 5, 3, 2), (6, 4, 3, 3, 3), (1, 1, 1), (1, 1, 1)),
    Product((5, 4), (4, 3)),
    Product((2, 5, 4), (2, 4, 3)),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: f"{product.kind} {product.right}")
@torch.inference_mode()
def test_all_ways_compute_the_same(product):
    left, right = product.operands(torch.float32)
    results = {name: way() for name, way in ways(product, left, right)}
    assert len(results) >= 2
    if product.stride:
        convolve = F.conv3d if left.ndim == 5 else F.conv2d
        expected = convolve(left, right, stride=product.stride, padding=product.padding)
    else:
        expected = torch.einsum("...mk,...kn->...mn", left, right)
    for result in results.values():
        torch.testing.assert_close(result, expected)


def test_the_roofline_adds_the_best_ways(monkeypatch):
    """Every product counts as often as it occurs, at the time of its fastest way."""
    slow = iter([3.0, 2.0, 5.0, 7.0])
    monkeypatch.setattr(Roofline, "_time", lambda self, way: next(slow))
    roofline = Roofline(0)
    a, b = PRODUCTS[5], Product((3, 5, 4), (3, 4, 3))
    assert roofline.seconds({a: 10, b: 1}, torch.float32) == 10 * 2.0 + 5.0
    assert roofline.best(a, torch.float32) == (2.0, "columns")
    assert [row["count"] for row in roofline.list({b: 1, a: 10})] == [10, 1]


def test_a_race_is_run_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert race(calls, repeat=3, budget=60.0).keys() == {"a", "b"}
    assert order == ["a", "b"] * 4
    order.clear()
    race(calls, repeat=3, budget=0.0)
    assert order == ["a", "b"] * 2


def test_the_most_memory_is_that_of_what_is_held_at_once():
    weight = torch.nn.Parameter(torch.empty(1000, device="meta"))
    x = torch.empty(1000, device="meta")

    def call():
        a = x + weight.view(10, 100).view(1000)
        b = a * 2  # x, a, b
        del a
        b.view(10, 100).add_(1)
        wide = torch.cat([b, b, b])  # x, b, and three times as much
        del b
        return wide[:10] + 1

    assert largest(call) == 5 * 4000
    heads = torch.empty(1, 2, 100, 8, device="meta")
    assert largest(lambda: F.scaled_dot_product_attention(heads, heads, heads)) < 100 * 100 * 2 * 4


def test_seams_are_seen():
    smooth = torch.linspace(0, 1, 160).expand(1, 3, 160, 160)
    stepped = smooth.clone()
    stepped[..., 128:] += 0.05  # where no tile begins or ends
    ratios = [bench_clips.seam(x, (40, 40), (24, 24), 4) for x in (smooth + smooth.mT, stepped + smooth.mT)]
    assert ratios[0] == pytest.approx(1, abs=1e-3)
    assert bench_clips.axis_tiles(40, 24, 4) == [(0, 24), (16, 40)]
    assert ratios[1] == pytest.approx(1, abs=0.05)
    stepped = smooth.clone()
    stepped[..., 96:] += 0.05
    assert bench_clips.seam(stepped + smooth.mT, (40, 40), (24, 24), 4) > 1.5


# -- the command


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run on the toy model at the smallest size: the page it wrote into, what it returned, its JSON file."""
    folder = tmp_path_factory.mktemp("bench")
    page = folder / "speed.md"
    page.write_text(f"# Speed\n\nBefore.\n\n{bench.BEGIN}\nold\n{bench.END}\n\nAfter.\n")
    threads = torch.get_num_threads()
    results = bench.main([
        "--quick", "--law", "--only", "bundled,parts,clips", "--size", "16x12", "--threads", "1", "--repeat", "1",
        "--budget", "0.1", "--model", str(toy.write(folder / "toy")), "--json", str(folder / "out" / "bench.json"),
        "--markdown", str(page),
    ])  # fmt: skip
    assert torch.get_num_threads() == threads
    return page.read_text(), results, json.loads((folder / "out" / "bench.json").read_text())


def test_the_command_measures_every_network_both_ways(results):
    rows = results[1]["tables"]["networks"]
    names = ["bundled U-Net, 8 frames", "bundled video decoder, 3 frames", "bundled image decoder, 3 frames"]
    assert [(row["network"], row["arithmetic"]) for row in rows] == [
        (name, arithmetic) for name in names for arithmetic in (*bench.DTYPES, "plain float32")
    ]
    for row in rows:
        assert 0 < row["ms"] <= row["ms_median"]
        assert row["gflops"] == pytest.approx(row["gflop"] / row["ms"] * 1e3)
        assert row["share"] > 0
    for plain in rows[len(bench.DTYPES) :: len(bench.DTYPES) + 1]:
        assert plain["times_plain"] == 1
        total = sum(product["count"] * product["gflop"] for product in plain["products"])
        assert total == pytest.approx(plain["gflop"])
        assert all(bench.DTYPES.keys() <= product.keys() for product in plain["products"])


def test_the_command_writes_what_it_measured(results):
    page, returned, written = results
    assert written == json.loads(json.dumps(returned))
    assert page.startswith(f"# Speed\n\nBefore.\n\n{bench.BEGIN}\n") and page.endswith(f"{bench.END}\n\nAfter.\n")
    assert "\nold\n" not in page and returned["machine"]["cpu"] in page
    assert returned["tables"].keys() == {"networks", "parts", "clips", "law", "quality"}
    for section, rows in returned["tables"].items():
        assert bench.plain_table(section, rows).count("\n") == len(rows) + 2
        for row in rows:
            assert f"| {row.get('what', row.get('network'))} |" in page
    assert bench.fill(page, bench.markdown(returned)) == page


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each and in this order"):
        bench.main(["--markdown", str(page)])
    for bad in (["--only", "parts,nothing"], ["--size", "160"]):
        with pytest.raises(SystemExit):
            bench.main(bad)
    assert "nothing" in capsys.readouterr().err


def test_gpu_memory_of_released_networks_grows_with_the_picture():
    """Weights by the number of parameters; activations, which hold no matrix of scores, at most as the pixels do.

    A little less, because kernels that are summed at every call do not grow with the picture.
    """
    sizes = {size: dict(bench.predicted(UNetConfig(), bench.RELEASED_DECODER, torch.float16, *size))
             for size in ((32, 32), (64, 64))}  # fmt: skip
    small, large = sizes[32, 32], sizes[64, 64]
    assert small["U-Net weights"] == large["U-Net weights"] == 2 * 691_036_436
    for what in ("U-Net activations, guided", "VAE activations, float32"):
        assert 3 < large[what] / small[what] <= 4.1
