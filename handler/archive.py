"""Makes a ``.mar`` for TorchServe from a Hugging Face model and our settings.

Owns the layout of the archive (the handler shim, ``model-config.yaml``, the model's files where
they are bundled) and the frontend's settings that the handler's protocol depends on. Does not
load the model: whether its architecture is supported is found when the engine starts. Imports no
torch.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, EngineError, ModelError

MODEL_VERSION = "1.0"
BUNDLED_MODEL = "model"
"""Folder inside the archive that holds a bundled model's files."""

_SHIM = Path(__file__).with_name("shim") / "pagetier_handler.py"
_ARCHIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Requests that the frontend may hand over beyond those that the engine admits: they are there to
# be refused by us, with 429 and a reason, and not by the frontend's own full queue.
_SPARE_REQUESTS = 256
# Seconds. A pump answers within milliseconds: silence for a minute means that it hangs. Loading
# takes as long as it takes.
_RESPONSE_TIMEOUT_S = 60
_STARTUP_TIMEOUT_S = 3600


def create_archive(
    model: str,
    output: Path,
    *,
    bundle: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the archive ``output`` for ``model`` and return its absolute path.

    The file's stem becomes the model's name in TorchServe. An existing file is replaced at once,
    when the new one is complete.

    Args:
        model: a local Hugging Face folder, which the archive names by its absolute path, or a hub
            id, which it names as it is.
        output: where to write it; must end in ``.mar``.
        bundle: pack the model's files into the archive. TorchServe unpacks them at each load.
        settings: keys of the ``handler:`` section beside ``model``.

    Raises:
        ConfigError: a setting or the file's name is impossible.
        ModelError: the model cannot be read.
        EngineError: the archive cannot be written.
    """
    name = _archive_name(output)
    folder = local_model_folder(model)
    settings = settings or {}
    if "model" in settings:
        raise ConfigError("The model is named once, as the first argument.", param="model")
    if bundle and folder is None:
        raise ModelError(
            f"'{model}' is not a local folder, so it cannot be bundled; download it first, "
            "or leave out --bundle."
        )
    named = f"./{BUNDLED_MODEL}" if bundle else str(folder or model)
    settings = {"model": named, **_with_absolute_paths(settings)}
    config = EngineConfig.create(settings)
    if folder is not None:
        _check_model_folder(folder, needs_weights=config.load_format != "dummy")
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that the last step is a rename. The archiver's own staging folder
        # is not used: it is $TMPDIR/NAME, and whatever is there already is deleted.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{name}-") as temporary:
            return _write_archive(Path(temporary), output, settings, config, folder, bundle)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EngineError(
                f"The disk is full: '{output}' could not be written; free some space, or write "
                "it elsewhere with -o."
            ) from None
        raise EngineError(f"'{output}' could not be written: {exc.strerror or exc}.") from None


def local_model_folder(model: str) -> Path | None:
    """The absolute folder that ``model`` names, or None where it can only be a hub id.

    Raises:
        ModelError: it is neither a folder nor a possible hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"The model '{model}' is a file; name the folder that holds it.")
    if _HUB_ID.fullmatch(model) is None:
        raise ModelError(
            f"There is no model folder '{model}'; name a local Hugging Face folder or a hub id."
        )
    return None


def read_handler_settings(archive: Path) -> dict[str, Any]:
    """The ``handler:`` section of an archive's ``model-config.yaml``.

    Raises:
        ModelError: the file is not an archive made by ``create_archive``.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            settings = yaml.safe_load(file.read("model-config.yaml"))["handler"]
    except FileNotFoundError:
        raise ModelError(
            f"There is no archive '{archive}'; make one with 'pagetier archive MODEL -o {archive}'."
        ) from None
    except OSError as exc:
        raise ModelError(
            f"The archive '{archive}' cannot be read: {exc.strerror or exc}."
        ) from None
    except (zipfile.BadZipFile, KeyError, TypeError, yaml.YAMLError):
        raise ModelError(
            f"'{archive}' is not an archive of pagetier; make one with 'pagetier archive'."
        ) from None
    return dict(settings)


def frontend_settings(config: EngineConfig) -> dict[str, Any]:
    """The keys of ``model-config.yaml`` that TorchServe's frontend reads."""
    batch_size = config.max_num_seqs + config.max_num_queued_reqs + _SPARE_REQUESTS
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "continuousBatching": True,
        "batchSize": batch_size,
        "maxBatchDelay": 1,
        "jobQueueSize": 2 * batch_size,
        "responseTimeout": _RESPONSE_TIMEOUT_S,
        "startupTimeout": _STARTUP_TIMEOUT_S,
    }


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The worker runs in a folder of its own, so local files are named absolutely."""
    resolved = dict(settings)
    tokenizer = resolved.get("tokenizer")
    if isinstance(tokenizer, str) and (folder := local_model_folder(tokenizer)) is not None:
        resolved["tokenizer"] = str(folder)
    template = resolved.get("chat_template")
    if isinstance(template, str):
        path = Path(template).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"There is no chat template '{template}'; name a Jinja file.", param="chat_template"
            )
        resolved["chat_template"] = str(path.resolve())
    return resolved


def _archive_name(output: Path) -> str:
    if output.suffix != ".mar":
        raise ConfigError(f"The archive '{output}' must be called NAME.mar.", param="output")
    if _ARCHIVE_NAME.fullmatch(output.stem) is None:
        raise ConfigError(
            f"The archive's name '{output.stem}' becomes part of addresses: use letters, digits, "
            "'_', '-' and '.' only, with a letter or digit in front.",
            param="output",
        )
    return output.stem


def _check_model_folder(folder: Path, *, needs_weights: bool) -> None:
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"'{folder}' holds no config.json: it is not a Hugging Face model folder."
        ) from None
    except OSError as exc:
        raise ModelError(f"'{folder}/config.json' cannot be read: {exc.strerror or exc}.") from None
    except ValueError as exc:
        raise ModelError(f"'{folder}/config.json' is not valid JSON: {exc}.") from None
    if not isinstance(architecture, dict):
        raise ModelError(f"'{folder}/config.json' is not a JSON object.")
    weights = list(folder.glob("*.safetensors"))
    if needs_weights and not weights:
        raise ModelError(
            f"'{folder}' holds no *.safetensors weights; convert the model to safetensors, or "
            "set load_format=dummy for random ones."
        )
    for path in weights:
        if not os.access(path, os.R_OK):
            raise ModelError(f"'{path}' cannot be read: check its permissions.")


def _write_archive(
    temporary: Path,
    output: Path,
    settings: Mapping[str, Any],
    config: EngineConfig,
    folder: Path | None,
    bundle: bool,
) -> Path:
    staging = temporary / "staging"
    staging.mkdir()
    shutil.copy(_SHIM, staging)
    model_config = {**frontend_settings(config), "handler": dict(settings)}
    (staging / "model-config.yaml").write_text(
        yaml.safe_dump(model_config, sort_keys=False), encoding="utf-8"
    )
    if bundle:
        assert folder is not None
        _link_files(folder, staging / BUNDLED_MODEL)
    manifest = ModelExportUtils.generate_manifest_json(
        ModelArchiverConfig(
            model_name=output.stem,
            version=MODEL_VERSION,
            handler=_SHIM.name,
            config_file="model-config.yaml",
        )
    )
    # Weights hardly compress: store them as they are.
    ModelExportUtils.archive(str(temporary), output.stem, str(staging), manifest, "zip-store")
    (temporary / output.name).replace(output)
    return output


def _link_files(source: Path, target: Path) -> None:
    """Mirror a folder by links to its files: the archiver reads through them, nothing is copied."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix == ".mar" or not path.is_file():
            continue
        link = target / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
