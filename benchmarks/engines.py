"""The engines that are compared, behind one interface: pagetier and its peers.

Owns how each engine is built and called. Every engine gets prompts as token ids, generates greedily
and ignores ends of sequence, so that all of them make the same number of tokens.
"""

import contextlib
import gc
import pathlib
import statistics
import time
from typing import Any, Protocol

import msgspec

from benchmarks.workloads import Request

NAMES = ("pagetier", "hf-generate", "hf-continuous", "vllm")


class MissingEngine(Exception):
    """An engine that is not installed here; the message says so in a sentence."""


class Result(msgspec.Struct, frozen=True):
    """One run: whole seconds, each request's tokens, and what the engine counted meanwhile."""

    seconds: float
    token_ids: list[list[int]]
    stats: dict[str, Any] = {}

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(map(len, self.token_ids))

    @property
    def output_tokens_per_second(self) -> float:
        """The rate of the whole run, prompts included in its time."""
        return self.num_output_tokens / self.seconds


class Engine(Protocol):
    """A loaded engine."""

    def run(self, requests: list[Request]) -> Result:
        """Generate for all requests, handed over at once, and return when the last has ended."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def build(name: str, model: pathlib.Path, options: dict[str, Any]) -> Engine:
    """Load ``model`` with random weights in the engine ``name``.

    Args:
        name: one of ``NAMES``.
        model: a folder with a ``config.json``.
        options: ``dtype``, ``max_model_len``, and what the engine alone understands.

    Raises:
        MissingEngine: it is not installed.
    """
    makers = {
        "pagetier": _Pagetier,
        "hf-generate": _HfGenerate,
        "hf-continuous": _HfContinuous,
        "vllm": _Vllm,
    }
    maker: Any = makers[name]
    engine: Engine = maker(model, **options)
    return engine


class _Pagetier:
    def __init__(self, model: pathlib.Path, **settings: Any) -> None:
        from pagetier import LLM

        self._llm = LLM(model=str(model), load_format="dummy", **settings)
        self._forward = _ForwardTimes(self._llm._core._runner)

    def run(self, requests: list[Request]) -> Result:
        from pagetier import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=r.num_new, ignore_eos=True) for r in requests
        ]
        before = self._llm.stats()
        self._forward.clear()
        start = time.perf_counter()
        outputs = self._llm.generate([r.prompt for r in requests], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = _difference(before, self._llm.stats())
        stats["outside_forward"] = self._forward.share_outside()
        return Result(seconds, [list(o.outputs[0].token_ids) for o in outputs], stats)

    def close(self) -> None:
        self._llm.close()


class _ForwardTimes:
    """When a runner's forward passes began and ended, on a CPU."""

    def __init__(self, runner: Any) -> None:
        self._begun: list[float] = []
        self._ended: list[float] = []
        forward = runner._forward_pass

        def timed(*inputs: Any) -> Any:
            self._begun.append(time.perf_counter())
            logits = forward(*inputs)
            self._ended.append(time.perf_counter())
            return logits

        runner._forward_pass = timed

    def clear(self) -> None:
        self._begun.clear()
        self._ended.clear()

    def share_outside(self) -> float:
        """The median share of a step, from one forward pass's beginning to the next, outside it."""
        shares = [
            1 - (ended - begun) / (following - begun)
            for begun, ended, following in zip(
                self._begun, self._ended, self._begun[1:], strict=False
            )
        ]
        return statistics.median(shares) if shares else 0.0


# What a run adds to; everything else in pagetier's statistics is a state.
_TOTALS = (
    "num_steps", "num_scheduled_sequences", "num_preemptions", "num_preemptions_swap",
    "num_preemptions_recompute", "num_recomputed_tokens", "num_resumes_loaded",
    "prefix_cache_queries", "prefix_cache_hits", "kv_offload_store_bytes", "kv_offload_load_bytes",
    "num_failed_transfers", "slot_steps_allocated", "slot_steps_filled", "slot_steps_preallocated",
)  # fmt: skip


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What one run adds to the totals, and the shares that follow from it."""
    stats = {key: after[key] - before[key] for key in _TOTALS}
    filled = stats.pop("slot_steps_filled")
    for key, name in (
        ("slot_steps_allocated", "kv_waste"),
        ("slot_steps_preallocated", "kv_waste_preallocated"),
    ):
        stats[name] = 1 - filled / max(1, stats.pop(key))
    stats["mean_running_batch"] = stats["num_scheduled_sequences"] / max(1, stats["num_steps"])
    keys = (
        "num_gpu_blocks", "num_cpu_blocks", "link_bytes_per_second", "prefill_flops_per_second",
        "streamed_bytes_per_step",
    )  # fmt: skip
    return {**stats, **{key: after[key] for key in keys}}


class _HuggingFace:
    """A transformers model with random weights; both Hugging Face engines run it."""

    def __init__(self, model: pathlib.Path, dtype: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.from_pretrained(model)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        self.model.eval()

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class _HfGenerate:
    """``generate`` on static batches, each padded to its longest prompt and longest output."""

    def __init__(
        self, model: pathlib.Path, *, dtype: str, batch_size: int = 8, max_model_len: int = 0
    ) -> None:
        from transformers import GenerationConfig

        self._hf = _HuggingFace(model, dtype)
        self._batch_size = batch_size
        self._hf.model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None
        )

    def run(self, requests: list[Request]) -> Result:
        outputs: list[list[int]] = []
        allocated = filled = 0
        self._hf.synchronize()
        start = time.perf_counter()
        for first in range(0, len(requests), self._batch_size):
            batch = requests[first : first + self._batch_size]
            outputs += self._generate(batch)
            slots = _static_slots(batch)
            allocated, filled = allocated + slots[0], filled + slots[1]
        self._hf.synchronize()
        seconds = time.perf_counter() - start
        return Result(seconds, outputs, {"kv_waste": 1 - filled / allocated})

    def _generate(self, batch: list[Request]) -> list[list[int]]:
        torch = self._hf.torch
        longest = max(len(r.prompt) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        with torch.inference_mode():
            generated = self._hf.model.generate(
                input_ids=ids.to(self._hf.device),
                attention_mask=mask.to(self._hf.device),
                max_new_tokens=max(r.num_new for r in batch),
                do_sample=False,
            )
        rows = generated[:, longest:].tolist()
        return [row[: r.num_new] for row, r in zip(rows, batch, strict=True)]

    def close(self) -> None:
        del self._hf
        gc.collect()


def _static_slots(batch: list[Request]) -> tuple[int, int]:
    """KV slots that a static batch holds and those of them with a wanted token, over its steps."""
    longest = max(len(r.prompt) for r in batch)
    num_steps = max(r.num_new for r in batch)
    allocated = sum(len(batch) * (longest + step) for step in range(num_steps))
    filled = sum(len(r.prompt) + step for r in batch for step in range(r.num_new))
    return allocated, filled


class _HfContinuous:
    """transformers' continuous batching, with the sizes that it chooses itself."""

    def __init__(
        self, model: pathlib.Path, *, dtype: str, max_model_len: int, max_num_seqs: int = 256
    ) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.initialization import WorkloadHints
        from transformers.utils import logging

        logging.set_verbosity_error()
        self._hf = _HuggingFace(model, dtype)
        self._stack = contextlib.ExitStack()
        self._manager = self._stack.enter_context(
            self._hf.model.continuous_batching_context_manager(
                generation_config=GenerationConfig(
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=-1,
                    max_new_tokens=max_model_len,
                ),
                continuous_batching_config=ContinuousBatchingConfig(),
                workload_hints=WorkloadHints(
                    max_prompt_length=max_model_len // 2,
                    max_generated_length=max_model_len // 2,
                    num_requests=max_num_seqs,
                ),
                block=True,
                timeout=5,
                warmup=True,
            )
        )

    def run(self, requests: list[Request]) -> Result:
        start = time.perf_counter()
        order = [
            self._manager.add_request(r.prompt, max_new_tokens=r.num_new, eos_token_id=-1)
            for r in requests
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(requests):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                done[result.request_id] = list(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise RuntimeError(f"it stopped with {len(requests) - len(done)} requests open")
        return Result(time.perf_counter() - start, [done[request_id] for request_id in order])

    def close(self) -> None:
        self._stack.close()


class _Vllm:
    """vLLM, where it is installed."""

    def __init__(self, model: pathlib.Path, *, dtype: str, max_model_len: int, **settings: Any):
        try:
            import vllm
        except ImportError:
            raise MissingEngine(
                "vLLM is not installed here; install it beside pagetier ('pip install vllm'), on a "
                "machine with a GPU, or leave '--engine vllm' out."
            ) from None
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=0,
            **settings,
        )

    def run(self, requests: list[Request]) -> Result:
        params = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=r.num_new, ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt} for r in requests]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Result(seconds, [list(o.outputs[0].token_ids) for o in outputs])

    def close(self) -> None:
        del self._llm
        gc.collect()
