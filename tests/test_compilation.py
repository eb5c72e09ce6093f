"""Every served architecture as one graph for any batch, and what is kept of compiled graphs."""

import logging
import pathlib

import pytest
import torch
from support import tiny_models
from support.driver import load, logits

from pagetier.handler import compilation
from pagetier.handler.compilation import (
    NotTraceable,
    compile_forward,
    eager_forward,
)
from pagetier.handler.model_loader import LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

# Their experts are multiplied by an operator that takes bfloat16 only.
ONLY_IN_BFLOAT16 = {"deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"}
# New tokens of each sequence of a batch; the last one has a single token in all.
BATCHES = ([3, 5, 9], [2, 2], [1] * 5, [8, 3, 1, 1], [1])


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_every_architecture_is_one_graph_for_any_batch(name: str, tmp_path: pathlib.Path) -> None:
    dtype = "bfloat16" if name in ONLY_IN_BFLOAT16 else "float32"
    model = load(tmp_path, name, dtype=dtype)
    graph = compile_forward(model.model, "graph")
    for lens in BATCHES:
        expected = logits(model, eager_forward(model.model), lens)
        assert torch.equal(logits(model, graph, lens), expected), lens


@pytest.mark.parametrize("name", sorted(ONLY_IN_BFLOAT16))
def test_experts_in_float32_are_refused_and_said_so(name: str, tmp_path: pathlib.Path) -> None:
    model = load(tmp_path, name)
    with pytest.raises(NotTraceable, match="BF16"):
        compile_forward(model.model, "graph")


def test_a_model_that_asks_for_the_number_of_tokens_is_refused(tmp_path: pathlib.Path) -> None:
    model = load(tmp_path, "llama")
    forward = model.model.model.norm.forward

    def curious(hidden: torch.Tensor) -> torch.Tensor:
        return forward(hidden) if hidden.shape[1] > 200 else hidden

    model.model.model.norm.forward = curious
    with pytest.raises(NotTraceable, match="depends on the batch's size"):
        compile_forward(model.model, "graph")


def test_weights_are_read_anew_and_not_kept(tmp_path: pathlib.Path) -> None:
    model = load(tmp_path, "llama")
    graph = compile_forward(model.model, "graph")
    before = logits(model, graph, [3])
    with torch.no_grad():
        model.model.model.norm.weight *= 2
    assert not torch.equal(logits(model, graph, [3]), before)
    assert torch.equal(logits(model, graph, [3]), logits(model, eager_forward(model.model), [3]))


def test_a_compiled_graph_is_kept_and_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PAGETIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = load(tmp_path / "model", "llama")
    fresh = compile_forward(model.model)
    (kept,) = (tmp_path / "cache" / "compiled").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "_trace", None)  # neither traced nor compiled again
        loaded = compile_forward(model.model)
    for lens in BATCHES:
        expected = logits(model, eager_forward(model.model), lens)
        for forward in (fresh, loaded):
            torch.testing.assert_close(logits(model, forward, lens), expected, atol=1e-4, rtol=1e-4)
    # A damaged file is no reason not to start.
    kept.write_bytes(b"nonsense")
    compiled: list[None] = []
    monkeypatch.setattr(compilation, "_compile", lambda *_: compiled.append(None))
    with caplog.at_level(logging.WARNING):
        compile_forward(model.model)
    assert len(compiled) == 1
    assert "made anew" in caplog.text


def test_what_is_kept_depends_on_the_model(tmp_path: pathlib.Path) -> None:
    def path(model: LoadedModel) -> pathlib.Path:
        return compilation._cache_path(model.model, *compilation._weights(model.model))

    same = [path(load(tmp_path / name, "llama")) for name in ("a", "b")]
    other = path(load(tmp_path / "c", "qwen3"))
    sixteen = path(load(tmp_path / "a", "llama", dtype="bfloat16"))
    assert same[0] == same[1]
    assert len({same[0], other, sixteen}) == 3


def test_the_cache_folder_is_the_users(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGETIER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.cache_folder() == tmp_path / "pagetier"
    monkeypatch.setenv("PAGETIER_CACHE", str(tmp_path / "own"))
    assert compilation.cache_folder() == tmp_path / "own"
