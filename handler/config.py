"""The engine's settings: one frozen object, checked once, from whatever the user wrote.

Owns names, types, defaults and limits of all settings, which are the same in the ``handler:``
section of ``model-config.yaml``, as keywords of ``LLM(...)`` and on the command line. Knows
nothing of models or devices beyond their names: what depends on them is resolved at start by
``engine_builder``. Imports no torch.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from pagetier.handler.errors import ConfigError

# Names that vLLM's users know and whose feature does not exist here yet: refused, never ignored.
NOT_SUPPORTED_YET = frozenset({
    "tensor_parallel_size", "skip_tokenizer_init",
})  # fmt: skip


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of an engine. Make it with ``EngineConfig.create``, which names wrong keys.

    Attributes:
        model: a local Hugging Face folder or a hub id.
        tokenizer: likewise; None takes the model's.
        dtype: of weights and activations; ``auto`` is the checkpoint's own, on a CPU float32.
        quantization: ``int8`` or ``int4`` rounds the weights of linear layers as they are read, to
            a half or a quarter of their bytes in 16 bits. None leaves them as they are; weights
            that are quantised already (``gptq``, ``awq``, ``compressed-tensors``) are recognised.
        quantization_group_size: neighbouring weights that share a scale: a power of two from 32 on,
            or 0 for all of an output's; None is 128 for ``int4`` and 0 for ``int8``.
        kv_cache_dtype: of keys and values in both tiers; ``auto`` is that of the activations,
            ``int8`` and ``fp8`` (of the kind ``fp8_e4m3``) take about half of 16 bits, and are
            rounded: what comes out is no longer exactly the model's.
        seed: of random weights (``load_format: dummy``).
        max_model_len: most tokens of prompt and output together; None takes the model's, or what
            the GPU tier holds if that is less.
        block_size: tokens in a KV block.
        gpu_memory_utilization: share of the GPU's memory used in all, in (0, 1].
        num_gpu_blocks_override: size of the GPU tier in blocks, instead of measuring.
        swap_space: size of the CPU tier in GiB; fractions are fine; 0 means none.
        cpu_offload_gb: GiB of weights that are kept in host memory, and of GPU memory so gained;
            rounded up to whole layers, which each step copies to the GPU in turn; 0 means none.
        preemption_mode: ``swap``, ``recompute``, or ``auto``: the cheaper one each time.
        enable_prefix_caching: share KV blocks of equal prefixes between requests.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; longer prompts go in chunks.
        max_prefill_ms: most milliseconds that prompts add to a step in which others decode, by the
            rate measured at start, so that long prompts do not hold up running streams; 0 is no
            limit but ``max_num_batched_tokens``. At least 128 tokens go into a step.
        scheduling_policy: ``fcfs``, or ``priority`` (lower numbers first, then arrival).
        max_num_queued_reqs: most requests waiting; one more is refused with 429.
        max_num_queued_tokens: most tokens of prompts waiting, likewise; one request alone may have
            more.
        enable_drain: serve the routes ``drain`` and ``resume``, to whoever has the key.
        served_model_name: what clients call the model; None takes the archive's name.
        chat_template: path of a Jinja template, instead of the tokenizer's own.
        tool_call_parser: how the model writes tool calls (``hermes``, ``llama3_json`` or
            ``mistral``); None finds it in the chat template.
        trust_remote_code: run code that comes with the model.
        device: ``auto`` takes a GPU where there is one.
        load_format: ``dummy`` makes random weights from ``config.json`` alone.
        enforce_eager: run the model operator by operator on a GPU too, without compiling it and
            without CUDA graphs: slow, but it starts sooner. A CPU always does, and then leaves
            weights in their own layout.
        cudagraph_capture_sizes: numbers of sequences whose decode steps get a CUDA graph; None
            chooses some up to ``max_num_seqs``. Larger batches than the largest run without.
        projection_kernels: ``triton`` multiplies by weights with our kernels where the tables of
            this GPU name one, in the CUDA graphs of decodes; the model is compiled twice for that.
            ``torch`` leaves all to torch.
        decision_trace: keep a record of every step's decisions, for ``trace``.
        max_overtaken: how often later requests may pass one that does not fit, before they wait.
    """

    model: str
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantization: Literal["int8", "int4", "gptq", "awq", "compressed-tensors"] | None = None
    quantization_group_size: int | None = None
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    swap_space: float = 4.0
    cpu_offload_gb: float = 0.0
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    enable_prefix_caching: bool = True
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_prefill_ms: float = 25.0
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1_000_000
    enable_drain: bool = True
    served_model_name: str | None = None
    chat_template: str | None = None
    tool_call_parser: Literal["hermes", "llama3_json", "mistral"] | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    enforce_eager: bool = False
    cudagraph_capture_sizes: list[int] | None = None
    projection_kernels: Literal["torch", "triton"] = "torch"
    decision_trace: bool = False
    max_overtaken: int = 16

    @classmethod
    def create(cls, settings: Mapping[str, Any]) -> "EngineConfig":
        """Check ``settings`` and return them as a config.

        Raises:
            ConfigError: a key is unknown, not supported yet, of the wrong type, or impossible;
                ``param`` names it.
        """
        for key in settings:
            if key in NOT_SUPPORTED_YET:
                raise ConfigError(
                    f"The setting '{key}' is not supported yet; remove it.", param=key
                )
            if key not in cls.__struct_fields__:
                close = difflib.get_close_matches(str(key), cls.__struct_fields__, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise ConfigError(f"Unknown setting '{key}'.{hint}", param=str(key))
        if not settings.get("model"):
            raise ConfigError(
                "The setting 'model' is missing: name a local Hugging Face folder or a hub id.",
                param="model",
            )
        for key, value in settings.items():
            try:
                msgspec.convert(value, _FIELD_TYPES[key])
            except msgspec.ValidationError as exc:
                raise ConfigError(
                    f"The setting '{key}' has the impossible value {value!r}: "
                    f"{_lower_first(str(exc))}.",
                    param=key,
                ) from None
        config = msgspec.convert(dict(settings), cls)
        config._check()
        return config

    def _check(self) -> None:
        def require(ok: bool, key: str, rule: str) -> None:
            if not ok:
                raise ConfigError(
                    f"The setting '{key}' must be {rule}, not {getattr(self, key)!r}.", param=key
                )

        require(1 <= self.block_size <= 1024, "block_size", "1 to 1024 tokens")
        require(
            0.0 < self.gpu_memory_utilization <= 1.0,
            "gpu_memory_utilization",
            "above 0 and at most 1",
        )
        require(0.0 <= self.max_prefill_ms < float("inf"), "max_prefill_ms", "0 ms or more")
        for key in ("swap_space", "cpu_offload_gb"):
            require(0.0 <= getattr(self, key) < float("inf"), key, "0 GiB or more")
        for key in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
        ):
            require(getattr(self, key) >= 1, key, "1 or more")
        require(self.max_overtaken >= 0, "max_overtaken", "0 or more")
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            "max_model_len",
            "2 tokens or more",
        )
        require(
            self.num_gpu_blocks_override is None or self.num_gpu_blocks_override >= 2,
            "num_gpu_blocks_override",
            "2 blocks or more",
        )
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs}), so that every running sequence "
            "gets a token each step",
        )
        size = self.quantization_group_size
        require(
            size is None or size == 0 or (size >= 32 and size.bit_count() == 1),
            "quantization_group_size",
            "a power of two of at least 32, or 0 for one scale an output",
        )
        require(
            size is None or self.quantization in ("int8", "int4"),
            "quantization_group_size",
            "left out unless quantization is int8 or int4",
        )
        sizes = self.cudagraph_capture_sizes
        require(
            sizes is None or (len(sizes) > 0 and min(sizes) >= 1),
            "cudagraph_capture_sizes",
            "a list of numbers of 1 or more (enforce_eager turns graphs off)",
        )


_FIELD_TYPES: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(EngineConfig)
}


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
