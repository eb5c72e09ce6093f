"""Engines that compute nothing: what the rest costs, from the scheduler to the client.

Owns ``step_milliseconds``, which drives the real scheduler and block manager with a model and a
link that do nothing, and ``build``, an engine of 5 ms a step for a served archive.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pagetier.handler.config import EngineConfig
from pagetier.handler.engine import EngineCore
from pagetier.handler.kv_cache_manager import KVCacheManager
from pagetier.handler.logit_rules import LogitRules
from pagetier.handler.messages import AddRequest, RequestOutput
from pagetier.handler.model_runner import Sampling
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.scheduler import Scheduler
from pagetier.handler.step import StepPlan, StepResult
from pagetier.handler.step_inputs import StepReader
from pagetier.offload.cost_model import CostModel
from pagetier.offload.transfer import Completion

STEP_SECONDS = 0.005
_VOCAB_SIZE = 512
_TOKEN = 100


class _NullHandle:
    event = None

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def collect(self) -> StepResult:
        return StepResult([_TOKEN] * self._num_samples, [None] * self._num_samples)


class _NullRunner:
    """Reads plans as the real one does, and runs nothing."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._reader = StepReader(max_num_seqs, max_blocks, block_size)
        self._rules = LogitRules(max_num_seqs, _VOCAB_SIZE, torch.device("cpu"))

    def launch(self, plan: StepPlan) -> _NullHandle:
        self._reader.read(plan)
        samples = [share for share in plan.scheduled if share.samples]
        Sampling.of(samples, self._rules.read(samples))
        return _NullHandle(len(samples))

    def close(self) -> None:
        pass


class _NullLink:
    def submit(self, *_: Any, **__: Any) -> None:
        raise AssertionError("there is no CPU tier")

    def poll(self) -> list[Completion]:
        return []

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


def step_milliseconds(num_sequences: int, num_steps: int = 300) -> list[float]:
    """Duration of each step of ``num_sequences`` decoding sequences, everything but the device."""
    block_size, prompt_len = 16, 64
    config = EngineConfig.create({
        "model": "none",
        "max_num_seqs": num_sequences,
        "max_num_batched_tokens": num_sequences * prompt_len,
        "block_size": block_size,
    })  # fmt: skip
    per_sequence = (prompt_len + num_steps + 64) // block_size + 1
    num_blocks = num_sequences * per_sequence
    cost = CostModel(
        token_bytes=1,
        block_bytes=block_size,
        link_bytes_per_second=1e9,
        flops_per_second=1e9,
        num_parameters=1,
        attention_dim=1,
    )
    manager = KVCacheManager(num_blocks, 0, block_size)
    scheduler = Scheduler(config, manager, cost, per_sequence * block_size)
    runner = _NullRunner(num_sequences, per_sequence, block_size)
    core = EngineCore(scheduler, runner, _NullLink(), vocab_size=_VOCAB_SIZE)
    params = SamplingParams(temperature=0, max_tokens=num_steps + 32, ignore_eos=True)
    for index in range(num_sequences):
        prompt = [(index * 7 + i) % _VOCAB_SIZE for i in range(prompt_len)]
        core.add_request(AddRequest(str(index), prompt, params))
    for _ in range(8):  # prompts, and the first decodes
        core.step()
    durations = []
    for _ in range(num_steps):
        start = time.perf_counter()
        num_outputs = len(core.step())
        durations.append((time.perf_counter() - start) * 1e3)
        assert num_outputs == num_sequences, (num_outputs, num_sequences)
    return durations


class NullCore:
    """Gives every request one token each ``STEP_SECONDS``; see ``engine_process.Core``."""

    def __init__(self, config: EngineConfig) -> None:
        self.max_model_len = config.max_model_len or 4096
        self.vocab_size = _VOCAB_SIZE
        self.eos_token_ids: tuple[int, ...] = ()
        self.info: dict[str, Any] = {"device": "none"}
        self._left: dict[str, int] = {}
        self._next_step = 0.0

    def add_request(self, request: AddRequest) -> None:
        """Take a request; there is always room."""
        self._left[request.request_id] = request.params.max_tokens or 16

    def abort(self, request_ids: list[str], outputs: Iterable[tuple[str, int]] = ()) -> None:
        """Forget these requests."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        """Sleep until the step's time is over, then give everybody a token."""
        now = time.perf_counter()
        time.sleep(max(0.0, self._next_step - now))
        self._next_step = max(self._next_step, now) + STEP_SECONDS
        outputs = []
        for request_id, left in list(self._left.items()):
            reason = "length" if left == 1 else None
            outputs.append(RequestOutput(request_id, [_TOKEN], finish_reason=reason))
            if reason is None:
                self._left[request_id] = left - 1
            else:
                del self._left[request_id]
        return outputs

    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._left)

    def stats(self) -> dict[str, Any]:
        """How many requests are open."""
        return {"num_requests_running": len(self._left)}

    def trace(self) -> list[dict[str, Any]]:
        """Nothing is recorded."""
        return []

    def close(self) -> None:
        """Nothing is held."""


def build(config: EngineConfig, progress: Callable[[str], None] | None = None) -> NullCore:
    """The builder that ``engine_process`` calls."""
    return NullCore(config)
