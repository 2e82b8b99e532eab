"""Where a model is found, and which of its files count."""

import json
import shutil

import pytest
import toy

from vsuav.checkpoint import ModelError, load
from vsuav.folders import files, locate, read_json
from vsuav.networks import shared_models


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def network_off(monkeypatch):
    """Any connection is an error, and the hub's client believes it is online."""
    import socket

    import huggingface_hub.constants

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_local_paths_never_reach_for_the_hub(monkeypatch, tmp_path, toy_folder):
    monkeypatch.setattr("vsuav.folders.fetch", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/absent", "./owner/name", "/no/such/place", "~/nothing/here", "absent", "a/b/c", "C:\\x"):
        with pytest.raises(ModelError, match="does not exist"):
            locate(name)
    shutil.copytree(toy_folder, tmp_path / "owner" / "name")
    assert locate("owner/name") == tmp_path / "owner" / "name"  # whatever folder the program is in later


def test_hub_ids_work_offline_once_cached(monkeypatch, tmp_path, toy_folder, network_off):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="upscaler is no folder, not in the hub's cache, and cannot be fetched"):
        load("somebody/upscaler")
    repository = tmp_path / "models--somebody--upscaler"
    shutil.copytree(toy_folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load("somebody/upscaler").digest == load(toy_folder).digest


def test_a_home_that_is_not_there():
    with pytest.raises(ModelError, match="~nosuchuser/x does not exist"):
        locate("~nosuchuser/x")


def test_a_json_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ModelError, match="does not exist"):
        read_json(path)
    path.mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(path)
    path.rmdir()
    path.write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not JSON"):
        read_json(path)


def test_files_are_those_that_loading_opens(tmp_path, toy_folder, monkeypatch):
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    (folder / "unet" / "notes.txt").write_text("mine")
    named = set(files(folder))
    assert folder / "unet" / "notes.txt" not in named
    assert named == {path for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt"}


def test_a_change_behind_a_link_is_noticed(tmp_path, toy_folder):
    """Parts of a model may be links to folders elsewhere."""
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    (folder / "scheduler").rename(tmp_path / "elsewhere")
    (folder / "scheduler").symlink_to(tmp_path / "elsewhere")
    before = shared_models(folder, "cpu", "float32")
    assert shared_models(folder, "cpu", "float32") is before
    path = tmp_path / "elsewhere" / "scheduler_config.json"
    path.write_text(json.dumps(toy.SCHEDULER | {"beta_end": 0.0123}))
    assert shared_models(folder, "cpu", "float32").schedule.beta_end == 0.0123


def test_a_folder_of_other_things_is_not_searched(tmp_path):
    """However much lies in it, only names that a model has are looked for."""
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="is no model"):
        shared_models(tmp_path, "cpu", "float32")
