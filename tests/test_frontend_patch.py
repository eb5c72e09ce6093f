import hashlib
import zipfile
from pathlib import Path

import ts

from pagetier.handler import frontend_patch

PACKAGES = Path(ts.__file__).parent.parent
JAR = PACKAGES / "ts" / "frontend" / "model-server.jar"
CLASS = "org/pytorch/serve/wlm/Model.class"


def test_installed_frontend_is_mended_in_one_place(tmp_path):
    assert frontend_patch.write_mended_class(PACKAGES, tmp_path)
    mended = (tmp_path / CLASS).read_bytes()
    with zipfile.ZipFile(JAR) as jar:
        original = jar.read(CLASS)
    different = [i for i, pair in enumerate(zip(original, mended, strict=True)) if len({*pair}) > 1]
    assert len(different) == 1
    # "if_acmpne; aload_1; Map.isEmpty(); ifeq": after the comparison with DESCRIBE.
    [at] = different
    assert original[at - 9] == 0xA6
    assert (original[at - 6], original[at - 5]) == (0x2B, 0xB9)
    assert (original[at], mended[at]) == (0x99, 0x9A)


def test_unknown_frontend_is_left_as_it_is(tmp_path):
    packages, classes = tmp_path / "packages", tmp_path / "classes"
    jar = packages / "ts" / "frontend" / "model-server.jar"
    jar.parent.mkdir(parents=True)
    classes.mkdir()
    assert not frontend_patch.write_mended_class(packages, classes)
    with zipfile.ZipFile(jar, "w") as file:
        file.writestr(CLASS, b"another version")
    assert hashlib.sha256(b"another version").hexdigest() != frontend_patch._SHA256
    assert not frontend_patch.write_mended_class(packages, classes)
    assert not list(classes.iterdir())
