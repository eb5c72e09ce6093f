"""Mends the one fault of TorchServe's frontend that nothing outside of it can be built around.

A description with ``customized=true`` is a job in the model's queue. ``Model.pollInferJob`` of
TorchServe 0.12.0 takes it, enters it among the jobs of the worker, asks whether that map is empty,
to guard against mixing it with others, and, since it never is by then, puts the job back in front
of the queue. So it is described for ever, and nothing else is taken out of that queue again: not
after its client has left, nor when the worker is started anew. Turning that one question round
makes the method return with the job, as was meant.

Owns the corrected class, which is made from the installed one when the frontend starts and stands
before it on the class path. Knows nothing of processes. Any other version is left as it is.
"""

import hashlib
import zipfile
from pathlib import Path

_JAR = Path("ts", "frontend", "model-server.jar")
_CLASS = "org/pytorch/serve/wlm/Model.class"
_SHA256 = "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff"
_OFFSET = 15989
_IFEQ, _IFNE = 0x99, 0x9A


def write_mended_class(packages: Path, folder: Path) -> bool:
    """Write the corrected class into ``folder``, which is to stand first on the class path.

    Args:
        packages: where the package ``ts`` is installed.
        folder: an existing folder.

    Returns:
        Whether it was written: not if the frontend is another one than the one known to be wrong.
    """
    try:
        with zipfile.ZipFile(packages / _JAR) as jar:
            code = bytearray(jar.read(_CLASS))
    except (OSError, KeyError, zipfile.BadZipFile):
        return False
    if hashlib.sha256(code).hexdigest() != _SHA256:
        return False
    assert code[_OFFSET] == _IFEQ, code[_OFFSET]
    code[_OFFSET] = _IFNE
    target = folder / _CLASS
    target.parent.mkdir(parents=True)
    target.write_bytes(code)
    return True
