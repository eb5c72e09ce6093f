"""Who may import whom, what stays free of torch, and the names that users import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pagetier

ROOT = Path(__file__).parent.parent
# As modules of `pagetier`. They are tested on their own, with exact block ids, in milliseconds.
WITHOUT_TORCH = [
    "handler.archive",
    "handler.beam_search",
    "handler.block_pool",
    "handler.chat",
    "handler.cli",
    "handler.client",
    "handler.config",
    "handler.demo",
    "handler.errors",
    "handler.gpu_memory",
    "handler.frontend_patch",
    "handler.kv_cache_manager",
    "handler.metrics",
    "handler.metrics_export",
    "handler.messages",
    "handler.sampling_params",
    "handler.sequence",
    "handler.sequence_book",
    "handler.sequence_group",
    "handler.request_log",
    "handler.scheduler",
    "handler.step",
    "handler.tier_sizes",
    "handler.top",
    "handler.torchserve",
    "handler.units",
    "offload.cost_model",
    "offload.weight_plan",
]


def _modules_after_importing(names):
    code = (
        f"import json, sys\nfor name in {names!r}: __import__(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_module_imports_without_torch(name):
    modules = _modules_after_importing([f"pagetier.{name}"])
    heavy = {"torch", "transformers", "triton", "numpy"} & modules
    assert not heavy, f"pagetier.{name} imports {heavy}"


def test_package_imports_without_torch():
    modules = _modules_after_importing(["pagetier"])
    assert "torch" not in modules
    assert "pagetier.handler.llm" not in modules


def _imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _sources(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"no sources in {folder}"
    return paths


@pytest.mark.parametrize("folder", ["kernels", "offload"])
def test_lower_rooms_never_import_the_handler(folder):
    for path in _sources(folder):
        names = [name for name in _imported_names(path) if name.startswith("pagetier.handler")]
        assert not names, f"{path} imports {names}"


@pytest.mark.parametrize("folder", ["handler", "kernels", "offload"])
def test_own_modules_are_imported_by_their_full_name(folder):
    for path in _sources(folder):
        bare = {name.split(".")[0] for name in _imported_names(path)}
        assert not bare & {"handler", "kernels", "offload", "src"}, path


def test_only_the_service_and_the_launcher_know_torchserve():
    for path in _sources("handler"):
        names = {name.split(".")[0] for name in _imported_names(path)}
        assert "ts" not in names or path.name == "service.py", path


def test_public_names():
    assert pagetier.__all__ == [
        "LLM",
        "SamplingParams",
        "StructuredOutputsParams",
        "__version__",
    ]
    for name in pagetier.__all__:
        assert getattr(pagetier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = pagetier.Llm


def test_declared_packages_are_those_that_exist():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    existing = {"pagetier"} | {
        f"pagetier.{path.parent.relative_to(ROOT)}".replace("/", ".")
        for folder in ("handler", "kernels", "offload")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(declared["packages"]) == existing
