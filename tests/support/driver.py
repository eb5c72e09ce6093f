"""A model runner driven by the least that a scheduler does, and what its tokens must be."""

import pathlib
import random
from typing import Any

import torch

from pagetier import kernels
from pagetier.handler.compilation import Forward
from pagetier.handler.config import EngineConfig
from pagetier.handler.messages import AddRequest
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.handler.model_runner import ModelRunner
from pagetier.handler.paged_model import ForwardContext, forward_context
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence
from pagetier.handler.step import ScheduledSequence, StepHandle, StepPlan
from pagetier.offload.tiers import KVLayout
from support import tiny_models

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 64
NEW_TOKENS = 8
PROMPT_LENGTHS = (5, 13, 1, 22)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


def load(
    folder: pathlib.Path, name: str, device: str = "cpu", dtype: str = "float32", **settings: Any
) -> LoadedModel:
    """A tiny model, by way of its files."""
    tiny_models.save(name, folder)
    config = EngineConfig.create(
        {"model": str(folder), "device": device, "dtype": dtype, **settings}
    )
    return load_model(config)


class Driver:
    """The least that a scheduler does: shuffled blocks, chunks, and one step of overlap."""

    def __init__(
        self,
        model: LoadedModel,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
        **execution: Any,
    ) -> None:
        self.layout = KVLayout(model.kv_layers, BLOCK_SIZE, kv_dtype or model.dtype)
        self.pages = self.layout.allocate(NUM_BLOCKS, model.device)
        # Whatever is read before it was written makes the output NaN: so are these bytes in every
        # floating-point type, that of scales included.
        self.pages.fill_(0xFF)
        self.caches = self.layout.views(self.pages)
        self.runner = ModelRunner(
            model,
            self.pages,
            self.layout,
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=MAX_MODEL_LEN,
            **execution,
        )
        self.random = random.Random(seed)
        self.free = list(range(NUM_BLOCKS))
        self.random.shuffle(self.free)
        self.rows = list(range(MAX_NUM_SEQS))
        self.random.shuffle(self.rows)
        self.step_id = 0

    def add(self, prompt: list[int], params: SamplingParams = GREEDY) -> Sequence:
        sequence = Sequence(AddRequest(f"r{len(self.rows)}", list(prompt), params), arrival=0)
        sequence.row = self.rows.pop()
        sequence.block_tables = [[]]
        return sequence

    def share(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """The next tokens of a sequence, as the scheduler would note them when launching."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        table = sequence.block_tables[0]
        while len(table) * BLOCK_SIZE < end:
            table.append(self.free.pop())
        samples = end == sequence.num_tokens + sequence.num_in_flight
        sequence.num_computed_tokens = end
        return ScheduledSequence(sequence, start, num_tokens, samples)

    def plan(
        self, shares: list[ScheduledSequence], block_copies: list[tuple[int, int]] | None = None
    ) -> StepPlan:
        self.step_id += 1
        return StepPlan(self.step_id, shares, block_copies or [])

    def launch(self, plan: StepPlan) -> StepHandle:
        handle = self.runner.launch(plan)
        for share in plan.scheduled:
            share.sequence.num_in_flight += share.samples
        return handle

    def collect(self, plan: StepPlan, handle: StepHandle) -> None:
        result = handle.collect()
        sampled = [share.sequence for share in plan.scheduled if share.samples]
        assert len(sampled) == len(result.token_ids) == len(result.logprobs)
        for sequence, token in zip(sampled, result.token_ids, strict=True):
            assert isinstance(token, int)
            sequence.token_ids.append(token)
            sequence.num_in_flight -= 1

    def step(self, shares: list[ScheduledSequence]) -> None:
        plan = self.plan(shares)
        self.collect(plan, self.launch(plan))

    def finish(self, sequences: list[Sequence]) -> dict[int, list[torch.Tensor]]:
        """Run all to their ends in random batches; returns the logits behind each new token.

        Each step is launched before the one before it is collected.
        """
        logits: dict[int, list[torch.Tensor]] = {id(s): [] for s in sequences}
        previous: tuple[StepPlan, StepHandle] | None = None
        while True:
            active = [
                s
                for s in sequences
                if s.num_output_tokens + s.num_in_flight < (s.params.max_tokens or 0)
            ]
            some = [s for s in active if self.random.random() < 0.8] or active[:1]
            self.random.shuffle(some)
            plan = self.plan([self.share(s, min(7, s.num_uncomputed_tokens)) for s in some])
            current = None
            if some:
                rows = iter(self.runner.logits(plan))
                for share in plan.scheduled:
                    if share.samples:
                        logits[id(share.sequence)].append(next(rows))
                current = (plan, self.launch(plan))
            if previous is not None:
                self.collect(*previous)
            if current is None:
                return logits
            previous = current


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(2, tiny_models.VOCABULARY, (n,), generator=generator).tolist()
        for n in lengths
    ]


def generate(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers itself, and the raw logits behind them."""
    device = next(model.parameters()).device
    output = model.generate(
        torch.tensor([prompt], device=device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0].tolist(), torch.cat(output.logits).float().cpu()


def logits(model: LoadedModel, forward: Forward, lens: list[int]) -> torch.Tensor:
    """Of the last tokens of sequences with so many new tokens, on fresh blocks."""
    layout = KVLayout(model.kv_layers, 4, model.dtype)
    pages = layout.allocate(4 * len(lens), model.device)
    query_start_loc = torch.tensor([0, *lens]).cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    positions = torch.arange(sum(lens)) - query_start_loc[owner]
    tables = torch.randperm(4 * len(lens), generator=torch.Generator().manual_seed(1))
    tables = tables.view(-1, 4).int()
    slots = tables[owner, positions // 4].long() * 4 + positions % 4
    metadata = kernels.AttentionMetadata.build(
        tables, torch.tensor(lens, dtype=torch.int32), query_start_loc.int()
    )
    token_ids = torch.arange(sum(lens)) * 7 % tiny_models.VOCABULARY
    context = ForwardContext(layout.views(pages), slots, metadata)
    with torch.inference_mode(), forward_context(context):
        return forward(token_ids[None], positions[None], query_start_loc[1:] - 1)
