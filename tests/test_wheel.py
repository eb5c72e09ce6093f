"""The built wheel holds everything that an installed pagetier needs, data files included."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "model_store" / "pydoc-llama"


def _run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # From a copy: a build leaves folders behind in the tree.
    ignored = {".git", ".venv", "model_store", "tests", "logs", "build", "dist"}

    def ignore(parent, names):
        top = Path(parent) == ROOT
        return [name for name in names if (top and name in ignored) or name == "__pycache__"]

    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    code = f"from setuptools import build_meta\nprint(build_meta.build_wheel({str(folder)!r}))"
    _run(sys.executable, "-c", code, cwd=source)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The python of a second environment: the wheel, and for all else this one's packages."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    _run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
        *("--no-deps", "--no-index", "--target", str(packages), str(wheel)),
    )
    # Behind the wheel's: an editable install in there comes after it.
    (packages / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _run(python, "-P", "-c", "import pagetier.handler.archive as m; print(m.__file__)")
    assert Path(where.strip()).is_relative_to(folder), where
    return python


def test_wheel_holds_code_and_data_as_files(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    packaged = {
        f"pagetier/{path.relative_to(ROOT)}"
        for folder in ("handler", "kernels", "offload")
        for pattern in ("*.py", "*.yaml", "*.xml", "*.properties", "*.json")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert packaged <= names, packaged - names
    assert "pagetier/py.typed" in names
    assert "pagetier/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests/", "pagetier/model_store"))]


def test_installed_wheel_archives_the_embedded_model(installed, tmp_path):
    output = tmp_path / "store" / "pydoc-llama.mar"
    code = "import sys; from pagetier.handler.cli import main; sys.exit(main())"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    _run(
        *(installed, "-P", "-c", code, "archive", MODEL, "-o", output, "--bundle"),
        cwd=tmp_path,
        env=environment,
    )
    with zipfile.ZipFile(output) as file:
        names = set(file.namelist())
        shim = file.read("pagetier_handler.py").decode()
        assert file.testzip() is None
    assert {"model/config.json", "model-config.yaml", "MAR-INF/MANIFEST.json"} <= names
    assert "from pagetier.handler.service import PagetierHandler" in shim


def test_installed_wheel_has_the_servers_configuration(installed):
    code = (
        "from pagetier.handler.torchserve import DEFAULT_CONFIG, LOG_CONFIG, read_properties\n"
        "assert not DEFAULT_CONFIG.is_symlink()\n"
        "assert LOG_CONFIG.is_file()\n"
        "print(read_properties(DEFAULT_CONFIG)['inference_address'])"
    )
    assert _run(installed, "-P", "-c", code).strip() == "http://127.0.0.1:8080"
