import json
import zipfile

import pytest
import yaml

from pagetier.handler import archive
from pagetier.handler.archive import (
    create_archive,
    frontend_settings,
    local_model_folder,
    read_handler_settings,
)
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, EngineError, ModelError


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    (folder / "extra").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "extra" / "template.jinja").write_text("{{ messages }}")
    (folder / ".cache" / "lock").write_text("")
    return folder


def _members(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def _config(path):
    return yaml.safe_load(_members(path)["model-config.yaml"])


def test_archive_names_the_folder_absolutely_and_holds_no_weights(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = create_archive("tiny", tmp_path / "store" / "m.mar", settings={"swap_space": 0.5})
    assert set(_members(path)) == {
        "pagetier_handler.py",
        "model-config.yaml",
        "MAR-INF/MANIFEST.json",
    }
    assert _config(path)["handler"] == {"model": str(model_folder), "swap_space": 0.5}
    manifest = json.loads(_members(path)["MAR-INF/MANIFEST.json"])["model"]
    assert manifest == {
        "modelName": "m",
        "handler": "pagetier_handler.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }
    assert list(path.parent.iterdir()) == [path], "nothing else is left beside the archive"


def test_archive_bundles_all_but_hidden_files(model_folder, tmp_path):
    path = create_archive(str(model_folder), tmp_path / "m.mar", bundle=True)
    members = _members(path)
    assert members["model/model.safetensors"] == b"weights" * 100
    assert members["model/extra/template.jinja"] == b"{{ messages }}"
    assert not [name for name in members if ".cache" in name]
    assert _config(path)["handler"]["model"] == "./model"
    assert (model_folder / "model.safetensors").is_file(), "the source is untouched"


def test_archive_leaves_a_folder_of_its_name_in_the_temporary_folder_alone(
    model_folder, tmp_path, monkeypatch
):
    # The archiver of TorchServe stages in $TMPDIR/NAME and deletes what it finds there.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    create_archive(str(model_folder), tmp_path / "store" / "tiny.mar")
    assert (model_folder / "model.safetensors").is_file()


def test_archive_keeps_a_hub_id_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = create_archive("some-org/some_model-1.5B", tmp_path / "m.mar")
    assert read_handler_settings(path) == {"model": "some-org/some_model-1.5B"}


def test_archive_makes_local_tokenizer_and_template_absolute(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"tokenizer": "tiny", "chat_template": "tiny/extra/template.jinja"}
    handler = read_handler_settings(create_archive("tiny", tmp_path / "m.mar", settings=settings))
    assert handler["tokenizer"] == str(model_folder)
    assert handler["chat_template"] == str(model_folder / "extra" / "template.jinja")


def test_archive_replaces_an_older_one(model_folder, tmp_path):
    output = tmp_path / "m.mar"
    create_archive(str(model_folder), output, settings={"block_size": 8})
    create_archive(str(model_folder), output, settings={"block_size": 32})
    assert read_handler_settings(output)["block_size"] == 32


def test_frontend_takes_more_requests_than_the_engine_admits():
    config = EngineConfig.create({"model": "m", "max_num_seqs": 4, "max_num_queued_reqs": 10})
    settings = frontend_settings(config)
    assert settings["batchSize"] > 14
    assert settings["jobQueueSize"] > settings["batchSize"]
    assert settings["continuousBatching"] is True
    assert (settings["minWorkers"], settings["maxWorkers"]) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"block_sise": 8}, "block_sise"),
        ({"block_size": 0}, "block_size"),
        ({"swap_space": "much"}, "swap_space"),
        ({"quantization": "int3"}, "quantization"),
        ({"chat_template": "nowhere.jinja"}, "chat_template"),
        ({"model": "other"}, "model"),
    ],
)
def test_archive_refuses_an_impossible_setting(model_folder, tmp_path, settings, key):
    with pytest.raises(ConfigError) as caught:
        create_archive(str(model_folder), tmp_path / "m.mar", settings=settings)
    assert caught.value.param == key
    assert not (tmp_path / "m.mar").exists()


@pytest.mark.parametrize("name", ["m.zip", "m", "sp ace.mar", ".mar", "-m.mar"])
def test_archive_refuses_an_impossible_name(model_folder, tmp_path, name):
    with pytest.raises(ConfigError):
        create_archive(str(model_folder), tmp_path / name)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "~nobody/x y"])
def test_local_model_folder_refuses_what_is_neither_folder_nor_hub_id(model):
    with pytest.raises(ModelError, match="no model folder"):
        local_model_folder(model)


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _list_config(folder):
    (folder / "config.json").write_text("[]")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_config, "holds no config.json"),
        (_broken_config, "not valid JSON"),
        (_list_config, "not a JSON object"),
        (_no_weights, "no .*safetensors weights"),
    ],
)
def test_archive_refuses_an_unreadable_model(model_folder, tmp_path, damage, says):
    damage(model_folder)
    with pytest.raises(ModelError, match=says):
        create_archive(str(model_folder), tmp_path / "m.mar")


def test_archive_wants_no_weights_for_dummy_ones(model_folder, tmp_path):
    _no_weights(model_folder)
    create_archive(str(model_folder), tmp_path / "m.mar", settings={"load_format": "dummy"})
    assert (tmp_path / "m.mar").is_file()


def test_archive_cannot_bundle_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="cannot be bundled"):
        create_archive("org/name", tmp_path / "m.mar", bundle=True)


def test_archive_on_a_full_disk_says_so_and_leaves_the_old_one(model_folder, tmp_path, monkeypatch):
    output = tmp_path / "m.mar"
    create_archive(str(model_folder), output, settings={"block_size": 8})

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.ModelExportUtils, "archive", full_disk)
    with pytest.raises(EngineError, match="disk is full"):
        create_archive(str(model_folder), output)
    assert read_handler_settings(output)["block_size"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.mar", "tiny"]


def test_archive_into_a_file_instead_of_a_folder_says_so(model_folder, tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(EngineError, match="could not be written"):
        create_archive(str(model_folder), tmp_path / "store" / "m.mar")


def test_reading_something_else_than_an_archive_says_so(tmp_path):
    with pytest.raises(ModelError, match="There is no archive"):
        read_handler_settings(tmp_path / "none.mar")
    (tmp_path / "text.mar").write_text("no zip")
    with pytest.raises(ModelError, match="not an archive of pagetier"):
        read_handler_settings(tmp_path / "text.mar")
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as file:
        file.writestr("model-config.yaml", "minWorkers: 1\n")
    with pytest.raises(ModelError, match="not an archive of pagetier"):
        read_handler_settings(tmp_path / "other.mar")
