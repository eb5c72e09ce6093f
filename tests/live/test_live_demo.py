"""The demonstration, as a newcomer runs it, without a terminal."""

import re
import shutil
import subprocess
import sys
import time

import pytest
from support.live import MODEL_FOLDER

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]


def test_demo_streams_with_too_little_memory_and_tells_the_figures(tmp_path):
    folder = tmp_path / "model_store" / MODEL_FOLDER.name
    shutil.copytree(MODEL_FOLDER, folder)
    code = "import sys; from pagetier.handler.cli import main; sys.exit(main())"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert len(re.findall(r"^\[\d\] first text after ", done.stdout, re.MULTILINE)) == 8
    assert re.search(r"768 tokens in .* tokens/s", done.stdout), done.stdout
    preemptions = re.search(r"Preemptions: (\d+), of which (\d+) swapped", done.stdout)
    assert preemptions, done.stdout
    assert int(preemptions[1]) > 0
    assert int(preemptions[2]) > 0
    assert "GPU tier" in done.stdout
    assert "\x1b" not in done.stdout, "control characters where there is no terminal"
    assert seconds < 40
    assert [path.name for path in folder.parent.glob("*.mar")] == [f"{folder.name}-demo.mar"]
