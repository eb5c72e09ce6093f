import json
import subprocess
import sys

import pytest

from pagetier.handler.archive import read_handler_settings
from pagetier.handler.cli import main, parse_settings
from pagetier.handler.errors import ConfigError


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_settings_are_read_as_yaml():
    pairs = ["swap_space=0.5", "dtype=float32", "trust_remote_code=true", "max_model_len=null"]
    assert parse_settings(pairs) == {
        "swap_space": 0.5,
        "dtype": "float32",
        "trust_remote_code": True,
        "max_model_len": None,
    }


@pytest.mark.parametrize("pairs", [["swap_space"], ["=1"], ["a=[1"], ["a=1", "a=2"]])
def test_settings_of_another_form_are_refused(pairs):
    with pytest.raises(ConfigError):
        parse_settings(pairs)


def test_archive_goes_to_the_model_store_by_default(model_folder, tmp_path, capsys):
    assert main(["archive", "tiny", "--set", "block_size=8", "--set", "swap_space=0"]) == 0
    path = tmp_path / "model_store" / "tiny.mar"
    assert read_handler_settings(path) == {
        "model": str(model_folder),
        "block_size": 8,
        "swap_space": 0,
    }
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["archive", "tiny", "--set", "blok_size=8"], "Did you mean 'block_size'?"),
        (["archive", "./nowhere"], "There is no model folder './nowhere'"),
        (["archive", "tiny", "-o", "x.zip"], "must be called NAME.mar"),
        (["serve", "nowhere.mar"], "There is no archive 'nowhere.mar'"),
        (["serve", "tiny/model.safetensors"], "is not an archive of pagetier"),
        (["demo", "org/name"], "needs a local model folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_exit(model_folder, capsys, arguments, says):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("pagetier: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


def test_serving_an_archive_whose_model_is_gone_says_so(model_folder, capsys):
    assert main(["archive", "tiny", "-o", "m.mar"]) == 0
    (model_folder / "config.json").unlink()
    assert main(["serve", "m.mar"]) == 1
    assert f"names the model folder '{model_folder}'" in capsys.readouterr().err


def test_no_command_prints_the_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_package_can_be_run_as_a_module():
    command = [sys.executable, "-m", "pagetier", "archive", "no/such/folder"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("pagetier: ")
