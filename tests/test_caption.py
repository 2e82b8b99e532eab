"""Captions by shot: with tiny random models made here, and with answers of our own."""

import caption
import numpy as np
import pytest
import torch
import toy
import vapoursynth as vs

from vsuav import upscale
from vsuav.commands import read_prompts

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<image>",
    *["a", "grey", "street", "with", "two", "red", "cars", "in", "the", "rain"],
]
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tokenizer():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def talkative(network):
    """Random weights may end a caption at once: forbid it."""
    network.generation_config.suppress_tokens = list(range(6))
    return network


def blip(folder):
    """Captions without being asked; encoder and decoder."""
    folder.mkdir()
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    words = dict(vocab_size=len(WORDS), encoder_hidden_size=16, bos_token_id=2, pad_token_id=0, sep_token_id=3)
    config = transformers.BlipConfig(
        text_config={**small, **words, "eos_token_id": 3}, vision_config={**small, "image_size": 32, "patch_size": 16}
    )
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer()).save_pretrained(folder)
    talkative(transformers.BlipForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def llava(folder):
    """Chats; repeats the question in front of its answer, as decoders do."""
    folder.mkdir()
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=8),
        text_config=transformers.LlamaConfig(**small, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=3),
        image_token_id=WORDS.index("<image>"),
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        images, tokenizer(), patch_size=16, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    talkative(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


MAKERS = {"blip": blip, "llava": llava}


@pytest.fixture(scope="module", params=MAKERS)
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    return MAKERS[request.param](tmp_path_factory.mktemp("captioner") / request.param)


def scenes(*levels: float, length: int = 6) -> vs.VideoNode:
    """Shots of `length` grey frames each, one level a shot."""
    blank = vs.core.std.BlankClip(format=vs.RGBS, width=40, height=32, length=length)
    return vs.core.std.Splice([blank.std.Expr(str(level)) for level in levels])


def test_shots_are_those_of_the_filter(tmp_path):
    from vsuav import frames
    from vsuav.networks import Networks, choose
    from vsuav.plugin import Restorer

    clip = scenes(0.1, 0.7, 0.3)
    marked = vs.core.std.Splice([clip[:4], clip[4].std.SetFrameProps(_SceneChangePrev=1), clip[5:]])
    for source, expected in ((clip, [0, 6, 12, 18]), (marked, [0, 4, 6, 12, 18])):
        models, settings = choose({"model": toy.write(tmp_path / str(len(expected)))}, 40, 32)
        restorer = Restorer(source, Networks(models, settings), 1 << 20, None, 0)
        restorer.clip(frames.inspect(source))
        list(restorer._evidence.frames())
        found = restorer.shots(1)
        ours = caption.shots(source)
        assert [ours[0].start, *(shot.stop for shot in ours)] == expected
        assert [n for n in range(19) if found.cut(n)] == expected


def test_the_middle_of_a_shot_is_captioned():
    seen = []

    def ask(picture):
        seen.append(np.asarray(picture).mean())
        return f" shot {len(seen)}. "

    clip = vs.core.std.Splice([scenes(0.2), scenes(0.4, length=1), scenes(0.8)])
    clip = clip.std.SetFrameProps(_SceneChangePrev=0)
    marked = [clip[n].std.SetFrameProps(_SceneChangePrev=int(n in (6, 7))) for n in range(13)]
    said = list(caption.captions(vs.core.std.Splice(marked), ask, suffix="sharp"))
    assert said == [(range(6), " shot 1, sharp"), (range(6, 7), " shot 2, sharp"), (range(7, 13), " shot 3, sharp")]
    assert np.allclose(seen, [0.2 * 255, 0.4 * 255, 0.8 * 255], atol=1)


def test_any_image_to_text_model_writes_the_file_that_restore_reads(model, tmp_path, capfd):
    script, target = tmp_path / "clip.vpy", tmp_path / "shots.txt"
    script.write_text(
        "import vapoursynth as vs\n"
        "blank = vs.core.std.BlankClip(format=vs.RGBS, width=40, height=32, length=6)\n"
        "(blank + blank.std.Expr('0.8')).set_output()\n"
    )
    arguments = [str(script), str(target), "--model", str(model), "--tokens", "5", "--device", "cpu"]
    assert caption.main(arguments) == 0, capfd.readouterr().err
    prompts = read_prompts(target)
    assert [first for first, _ in prompts] == [0, 6]
    assert all(text and set(text.split()) <= set(WORDS) for _, text in prompts)
    question = ["--question", "two red cars"]
    assert caption.main([*arguments, *question]) == 0
    assert ("two red cars" in read_prompts(target)[0][1]) == (model.name == "blip")  # BLIP goes on from these words
    assert capfd.readouterr().out == f"{target}\n" * 2


def test_captions_are_prompts_of_the_filter(tmp_path):
    model = toy.write(tmp_path / "toy")
    clip = scenes(0.1, 0.7)
    prompts = [(shot.start, text) for shot, text in caption.captions(clip, lambda _: "rain")]
    shown, other = upscale(clip, model, prompt=prompts), upscale(clip, model, prompt="blur")
    assert not np.array_equal(np.asarray(shown.get_frame(3)[0]), np.asarray(other.get_frame(3)[0]))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.mkv", "no such file"),
        ("absent.vpy", "no such file"),
        ("empty.vpy", "sets no output 0"),
        ("clip.vpy", "cannot be loaded as an image-to-text model"),
    ],
)
def test_errors_are_one_line(tmp_path, capfd, name, says):
    (tmp_path / "empty.vpy").write_text("")
    (tmp_path / "clip.vpy").write_text("import vapoursynth as vs\nvs.core.std.BlankClip().set_output()\n")
    (tmp_path / "model").mkdir()
    vs.clear_outputs()
    target = tmp_path / "out.txt"
    assert caption.main([str(tmp_path / name), str(target), "--model", str(tmp_path / "model")]) == 1
    said = capfd.readouterr()
    assert said.err.startswith("caption: ") and says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not target.exists()
