"""The whole engine on real (tiny) models: output equals transformers' own, whatever happens inside.

Every architecture runs under forced preemption with one combination of block size, prefix caching
and preemption mode, such that all combinations occur; one architecture runs them all.
"""

import itertools
import pathlib
import random

import pytest
import torch
from support import tiny_models

from pagetier import LLM, SamplingParams
from pagetier.handler import engine_builder
from pagetier.handler.compilation import compile_forward
from pagetier.handler.cuda_graphs import DecodeGraphs
from pagetier.handler.errors import ConfigError, InvalidRequest, ModelError, PromptTooLong
from pagetier.handler.kv_cache_manager import Direction

NEW_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
COMBINATIONS = list(itertools.product((1, 4, 16, 32), (True, False), ("swap", "recompute", "auto")))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


def prompts_of(seed: int) -> list[list[int]]:
    """Prompts of 1 to 26 tokens, some with common prefixes."""
    rng = random.Random(seed)
    common = [rng.randrange(2, tiny_models.VOCABULARY) for _ in range(20)]
    prompts = []
    for _ in range(7):
        own = [rng.randrange(2, tiny_models.VOCABULARY) for _ in range(rng.randint(1, 6))]
        prompts.append(common[: rng.choice([0, 16, 20])] + own)
    return prompts


def expected_tokens(model, prompt: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def open_llm(folder: pathlib.Path, device: str = "cpu", **settings) -> LLM:
    settings = {
        "dtype": "float32",
        "max_model_len": 48,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 16,
        "swap_space": 0.01,
        **settings,
    }
    return LLM(model=str(folder), device=device, **settings)


def check_exactness(name, folder, device, block_size, enable_prefix_caching, mode) -> None:
    model = tiny_models.save(name, folder)
    # Room for two and a half of the longest sequences.
    with open_llm(
        folder,
        device,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        preemption_mode=mode,
        num_gpu_blocks_override=max(96 // block_size, 3),
    ) as llm:
        prompts = prompts_of(seed=13)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == expected_tokens(model, prompt)
        stats = llm.stats()
        assert stats["num_preemptions"] > 0
        if mode == "swap":
            assert stats["num_preemptions_swap"] == stats["num_preemptions"]
        if mode == "recompute":
            assert stats["num_preemptions_swap"] == stats["num_resumes_loaded"] == 0
        assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]
        assert stats["num_cpu_blocks_free"] == stats["num_cpu_blocks"]


@pytest.mark.parametrize(
    ("name", "combination"),
    [(n, COMBINATIONS[i % len(COMBINATIONS)]) for i, n in enumerate(sorted(tiny_models.EXACT))],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_tokens_equal_transformers_for_every_architecture_under_preemption(
    name, combination, tmp_path, device
):
    check_exactness(name, tmp_path, device, *combination)


@pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=lambda combination: "-".join(map(str, combination))
)
def test_tokens_equal_transformers_for_every_combination(combination, tmp_path, device):
    check_exactness("llama", tmp_path, device, *combination)


def in_graphs(monkeypatch, sizes=(1, 2, 4, 6)) -> list[int]:
    """Let engines on a CPU run decodes as a GPU's graphs do; the list gets their batch sizes."""
    batches: list[int] = []
    run = DecodeGraphs.run

    def choose(config, model, say):
        return engine_builder.Execution(compile_forward(model.model, "graph"), sizes)

    monkeypatch.setattr(engine_builder, "choose_execution", choose)
    monkeypatch.setattr(
        DecodeGraphs, "run", lambda g, rows: batches.append(len(rows)) or run(g, rows)
    )
    return batches


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
@pytest.mark.parametrize(("name", "block_size"), [("llama", 4), ("gemma2", 1), ("opt", 16)])
def test_graphs_survive_preemption_swaps_and_prefix_hits(
    name, block_size, mode, tmp_path, monkeypatch
):
    batches = in_graphs(monkeypatch)
    check_exactness(name, tmp_path, "cpu", block_size, True, mode)
    assert len(batches) > 20
    assert len(set(batches)) > 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", folder)
    return folder


def test_swap_changes_no_sampled_token(llama):
    """Seeded sampling: positions and random state survive a swap, or the tokens would differ."""
    params = [
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=i, max_tokens=14)
        for i in range(7)
    ]
    prompts = prompts_of(seed=5)
    with open_llm(llama, num_gpu_blocks_override=200) as llm:
        calm = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] == 0
    with open_llm(
        llama, num_gpu_blocks_override=6, preemption_mode="swap", enable_prefix_caching=False
    ) as llm:
        pressed = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.stats()
    assert stats["num_preemptions_swap"] > 0
    # Nothing was computed a second time: the keys and values that came back were used.
    assert stats["num_recomputed_tokens"] == 0
    assert [o.outputs[0].token_ids for o in calm] == [o.outputs[0].token_ids for o in pressed]


class SwapWitness:
    """Notes the bytes of every sequence that is swapped out, and compares them when it is back.

    In between, the blocks it came from are overwritten and forgotten, so that only the copies in
    the other tier can bring the bytes back.
    """

    def __init__(self, llm: LLM) -> None:
        core = llm._core
        self.manager, self.runner, self.core = core.scheduler.manager, core._runner, core
        self.noted: dict[str, tuple[list[torch.Tensor], int, int]] = {}
        self.num_compared = 0
        self._swap_out, self._finish_load = self.manager.swap_out, self.manager.finish_load
        self._complete = self.manager.complete
        self.manager.swap_out = self.swap_out
        self.manager.finish_load = self.finish_load
        self.manager.complete = self.complete

    def _bytes(self, sequence, num_tokens: int) -> list[torch.Tensor]:
        """Keys, values and scales of the first tokens, layer by layer."""
        if self.core._last_event is not None:
            self.core._last_event.result()  # launched steps still write
        table = torch.tensor(sequence.block_tables[0])
        return [
            cache[table].transpose(1, 2).flatten(0, 1)[:num_tokens].clone()
            for layer in self.runner._caches
            for cache in (layer.k_cache, layer.v_cache, *layer.scales.values())
        ]

    def swap_out(self, sequence) -> bool:
        num_tokens = sequence.num_computed_tokens
        note = (self._bytes(sequence, num_tokens), num_tokens, sequence.seed)
        swapped = self._swap_out(sequence)
        if swapped:
            self.noted[sequence.request_id] = note
        return swapped

    def complete(self, transfer_id, *, ok):
        transfer = self._complete(transfer_id, ok=ok)
        if transfer.direction is Direction.OUT:
            for block_id, _ in transfer.block_ids:
                if self.manager.gpu.is_free(block_id):
                    self.manager.gpu.unpublish(block_id)
                    self.runner._pages[block_id] = 0xAB
        return transfer

    def finish_load(self, sequence) -> bool:
        loaded = self._finish_load(sequence)
        if loaded and sequence.request_id in self.noted:
            expected, num_tokens, seed = self.noted.pop(sequence.request_id)
            assert sequence.num_computed_tokens == num_tokens
            assert sequence.seed == seed
            for before, after in zip(expected, self._bytes(sequence, num_tokens), strict=True):
                assert torch.equal(before, after)
            self.num_compared += 1
        return loaded


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_swapped_keys_and_values_come_back_byte_for_byte(llama, block_size, kv_cache_dtype):
    settings = {
        "block_size": block_size,
        "kv_cache_dtype": kv_cache_dtype,
        "num_gpu_blocks_override": 96 // block_size,
        "preemption_mode": "swap",
        "enable_prefix_caching": False,
    }
    with open_llm(llama, **settings) as llm:
        witness = SwapWitness(llm)
        llm.generate(prompts_of(seed=13), GREEDY, use_tqdm=False)
        assert llm.stats()["num_recomputed_tokens"] == 0
    assert witness.num_compared >= 1


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype", "block_size"),
    [
        ("llama", "int8", 4),
        ("llama", "fp8", 16),
        ("gemma2", "int8", 16),
        ("gpt_oss", "int8", 1),
        ("deepseek_v3", "int8", 4),
    ],
)
def test_preemption_changes_no_token_of_a_quantised_cache(
    name, kv_cache_dtype, block_size, tmp_path, device
):
    if kv_cache_dtype == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9")
    tiny_models.save(name, tmp_path)
    settings = {"kv_cache_dtype": kv_cache_dtype, "block_size": block_size}
    prompts = prompts_of(seed=13)
    with open_llm(tmp_path, device, num_gpu_blocks_override=512 // block_size, **settings) as llm:
        calm = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.stats()["num_preemptions"] == 0
    for mode in ("swap", "recompute"):
        with open_llm(
            tmp_path,
            device,
            num_gpu_blocks_override=96 // block_size,
            preemption_mode=mode,
            enable_prefix_caching=mode == "recompute",
            **settings,
        ) as llm:
            pressed = llm.generate(prompts, GREEDY, use_tqdm=False)
            stats = llm.stats()
        assert stats["num_preemptions_swap" if mode == "swap" else "num_preemptions_recompute"] > 0
        for one, other in zip(calm, pressed, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_quantised_prefixes_are_found_and_copied_before_they_are_written(llama, monkeypatch):
    prompt = [2 + i for i in range(30)]
    copies = []
    settings = {"block_size": 4, "kv_cache_dtype": "int8"}
    with open_llm(llama, enable_prefix_caching=False, **settings) as llm:
        alone = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    with open_llm(llama, **settings) as llm:
        launch = llm._core._runner.launch
        monkeypatch.setattr(
            llm._core._runner, "launch", lambda p: copies.extend(p.block_copies) or launch(p)
        )
        assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
        again = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
        assert again.num_cached_tokens == 28
        assert copies == []
        # Three samples share a block with two of the prompt's tokens, and each goes on in its own.
        three = SamplingParams(temperature=0, max_tokens=NEW_TOKENS - 2, n=3)
        shared = llm.generate(prompt, three, use_tqdm=False)[0]
        assert len(copies) == 2
    assert again.outputs[0].token_ids == alone
    assert [o.token_ids for o in shared.outputs] == [alone[: NEW_TOKENS - 2]] * 3


def test_what_a_quantised_cache_takes_is_told_and_named_in_its_hashes(llama):
    told, salts = {}, set()
    for kv_cache_dtype in ("auto", "int8", "fp8", "fp8_e4m3"):
        with open_llm(llama, kv_cache_dtype=kv_cache_dtype) as llm:
            stats = llm.stats()
            told[kv_cache_dtype] = (stats["kv_cache_dtype"], stats["kv_token_bytes"])
            assert stats["kv_block_bytes"] == 16 * stats["kv_token_bytes"]
            salts.add(llm._core.scheduler.manager._salt)
    # Three layers of two heads with keys and values of eight numbers.
    assert told == {
        "auto": ("float32", 3 * 2 * 16 * 4),
        "int8": ("int8", 3 * 2 * (16 + 8)),
        "fp8": ("float8_e4m3fn", 3 * 2 * (16 + 8)),
        "fp8_e4m3": ("float8_e4m3fn", 3 * 2 * (16 + 8)),
    }
    assert len(salts) == 3


def test_seeded_tokens_do_not_depend_on_the_batch(llama):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=10)
    prompts = prompts_of(seed=1)
    with open_llm(llama) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate(p, params, use_tqdm=False)[0] for p in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert len({tuple(o.outputs[0].token_ids) for o in together}) > 1


def test_logprobs_are_those_of_transformers(llama):
    model = tiny_models.build("llama")
    prompt = prompts_of(seed=2)[0]
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    with open_llm(llama) as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    for i, entry in enumerate(output.outputs[0].logprobs):
        expected = logits[len(prompt) - 1 + i]
        assert entry.token_id == tokens[i]
        assert entry.logprob == pytest.approx(expected[tokens[i]].item(), abs=1e-4)
        assert entry.top_token_ids == expected.topk(3).indices.tolist()
        assert entry.top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_stop_token_ends_the_output_and_is_named(llama):
    prompt = prompts_of(seed=3)[1]
    with open_llm(llama) as llm:
        (free,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        stop = free.outputs[0].token_ids[3]
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop_token_ids=[stop])
        (output,) = llm.generate(prompt, params, use_tqdm=False)
    first = free.outputs[0].token_ids.index(stop)
    assert output.outputs[0].token_ids == free.outputs[0].token_ids[: first + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop


def test_outputs_keep_the_order_of_more_prompts_than_may_wait(llama):
    prompts = [[2 + i % 100, 5, 9] for i in range(30)]
    with open_llm(llama, max_num_queued_reqs=2) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert all(len(o.outputs[0].token_ids) == 2 for o in outputs)


def test_second_call_finds_the_prefix_cached(llama):
    prompt = prompts_of(seed=4)[0] * 30
    with open_llm(llama, block_size=4) as llm:
        first = llm.generate(prompt[:30], GREEDY, use_tqdm=False)[0]
        second = llm.generate(prompt[:30], GREEDY, use_tqdm=False)[0]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 28
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_wrong_calls_are_told_in_a_sentence_and_harm_nothing(llama):
    with open_llm(llama) as llm:
        with pytest.raises(PromptTooLong, match=r"50 tokens.* 48 "):
            llm.generate([[3], [2] * 50], GREEDY, use_tqdm=False)
        with pytest.raises(InvalidRequest, match="2 prompts but 1"):
            llm.generate([[3], [4]], [GREEDY], use_tqdm=False)
        with pytest.raises(ModelError, match="tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)
        with pytest.raises(InvalidRequest, match="temperature must be"):
            SamplingParams(temperature=-1)
        assert (
            len(llm.generate([[3]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == NEW_TOKENS
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 500}, "model was made for 128"),
        ({"num_gpu_blocks_override": 2, "block_size": 4}, "room for 8 tokens"),
        ({"blocksize": 4}, "Did you mean 'block_size'"),
    ],
)
def test_impossible_settings_are_refused_at_start(llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_llm(llama, **settings)


def test_dummy_weights_need_only_a_config(tmp_path):
    tiny_models.configuration("llama").save_pretrained(tmp_path)
    with open_llm(tmp_path, load_format="dummy") as llm:
        (output,) = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == NEW_TOKENS
