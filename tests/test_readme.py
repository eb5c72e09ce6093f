"""What the README says is so."""

import re
from pathlib import Path

import msgspec
import yaml

from pagetier.handler.config import EngineConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_named_scripts_exist():
    names = set(re.findall(r"\b(?:script/\w+|\.ci/run)", README))
    assert {"script/demo", "script/test", "script/serve"} <= names
    assert not [name for name in names if not (ROOT / name).is_file()]


def test_defaults_in_the_table_are_those_of_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    for name, shown in rows:
        default = defaults[name]
        if default is None:
            assert shown.strip() in ("the model's", "measured", "chosen"), name
        else:
            assert yaml.safe_load(shown.strip("` ")) == default, name


def test_code_without_a_server_runs(monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [code] = [block for block in blocks if "LLM(" in block]
    monkeypatch.chdir(ROOT)
    # The default tiers are gigabytes, which the smallest model does not need.
    code = code.replace("LLM(", "LLM(swap_space=0.01, num_gpu_blocks_override=64, ")
    names = {}
    exec(compile(code + "\nllm.close()\n", "README.md", "exec"), names)
    assert len(capsys.readouterr().out.split()) > 3
