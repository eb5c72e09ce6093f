"""The shell scripts, as far as they can be run without installing anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["script/setup", "script/test", "script/serve", "script/demo", ".ci/run"]


@pytest.fixture
def tree(tmp_path):
    """A copy of what script/setup reads."""
    for name in ["pyproject.toml", "constraints.txt", *SCRIPTS]:
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "tree"


@pytest.fixture
def bare_path(tmp_path):
    """A folder for PATH with the plain tools and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def _setup(tree, path):
    environment = {"PATH": str(path), "HOME": str(tree)}
    return subprocess.run(
        [path / "bash", tree / "script" / "setup"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_executable_and_stops_at_errors(name):
    assert os.access(ROOT / name, os.X_OK)
    assert "set -euo pipefail" in (ROOT / name).read_text().splitlines()
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_setup_without_python_says_so_and_fails(tree, bare_path):
    done = _setup(tree, bare_path)
    assert done.returncode == 1
    assert done.stderr == (
        "script/setup: no Python 3.11 or later was found; install one, or name it with PYTHON=.\n"
    )


def test_setup_passes_over_an_old_python(tree, bare_path):
    old = bare_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert "no Python 3.11 or later" in _setup(tree, bare_path).stderr


def test_setup_installs_once_and_again_only_when_the_versions_change(tree, bare_path):
    # A python that makes an environment and installs by writing down that it was asked to.
    fake = bare_path / "python3.12"
    fake.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >> {tree}/calls\n'
        'if [[ "$1 $2" == "-m venv" ]]; then\n'
        f"    {shutil.which('mkdir')} -p .venv/bin && {shutil.which('cp')} $0 .venv/bin/python\n"
        "fi\n"
    )
    fake.chmod(0o755)

    def installs():
        assert _setup(tree, bare_path).returncode == 0
        calls = (tree / "calls").read_text().splitlines()
        return [call for call in calls if call.startswith("-m pip")]

    first = installs()
    assert len(first) == 1
    assert "-c constraints.txt -e .[dev]" in first[0]
    assert len(installs()) == 1
    with (tree / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert len(installs()) == 2


def test_nothing_names_a_registry():
    for name in [*SCRIPTS, "pyproject.toml", "constraints.txt", ".pre-commit-config.yaml"]:
        text = (ROOT / name).read_text()
        assert "http://" not in text, name
        assert "https://" not in text, name
        assert "index-url" not in text, name
