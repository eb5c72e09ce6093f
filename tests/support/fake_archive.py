"""Archives with a small handler of their own, to test launching without an engine."""

import zipfile
from pathlib import Path

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils

ECHO = """
class EchoHandler:
    def initialize(self, context):
        print("pagetier.somewhere: for the log", flush=True)
        print("warming up", flush=True)

    def handle(self, data, context):
        return ["hello"] * len(data)
"""

UNREADABLE_MODEL = """
import logging
import sys


class BrokenHandler:
    def initialize(self, context):
        logging.error("pagetier cannot start: The model is broken as only loading shows.")
        sys.exit(1)

    def handle(self, data, context):
        return [""] * len(data)
"""

FAULTY_HANDLER = """
class FaultyHandler:
    def initialize(self, context):
        raise ZeroDivisionError("a bug")

    def handle(self, data, context):
        return [""] * len(data)
"""


def write_fake_archive(path: Path, handler_source: str) -> Path:
    """Write an archive whose handler is ``handler_source``, which needs no model."""
    config = {"minWorkers": 1, "maxWorkers": 1, "handler": {"model": "some/model"}}
    manifest = ModelExportUtils.generate_manifest_json(
        ModelArchiverConfig(
            model_name=path.stem,
            version="1.0",
            handler="fake_handler.py",
            config_file="model-config.yaml",
        )
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("fake_handler.py", handler_source)
        file.writestr("model-config.yaml", yaml.safe_dump(config))
        file.writestr("MAR-INF/MANIFEST.json", manifest)
    return path
