"""Everything that touches the device in a step: inputs, forward pass, sampling, and their return.

Owns the flat batch, the buffer of last tokens, and the order of device work. Knows nothing of the
scheduler: it reads a ``StepPlan`` once, in ``launch``, and keeps no sequence.

Overlap. A step may be launched before the one before it was collected, so the host does not know
a sequence's last token yet. Sampled tokens therefore stay on the device as well, in one buffer with
a row for each sequence, and the next step's input is completed from there.

On a CUDA device, steps run on the current stream and tokens return by an asynchronous copy into
pinned memory. On the CPU one worker thread plays the device: it runs the steps in order, and
``launch`` returns at once.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagetier import kernels
from pagetier.handler.logit_rules import HostRules, LogitRules
from pagetier.handler.messages import AddRequest, TokenLogprobs
from pagetier.handler.model_loader import LoadedModel
from pagetier.handler.paged_model import ForwardContext, forward_context
from pagetier.handler.sampler import RowSettings, SamplerOutput, sample, score
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence
from pagetier.handler.step import (
    MAX_PROMPT_LOGPROBS_PER_STEP,
    ScheduledSequence,
    StepHandle,
    StepPlan,
    StepResult,
)
from pagetier.kernels.metadata import upload
from pagetier.offload.tiers import KVLayout

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class _HostBatch:
    """A step's inputs as the host knows them, read from the plan in ``launch``.

    Attributes:
        token_ids: of the new tokens, int64 ``(tokens,)``; 0 where the device knows better.
        positions: theirs, int64 ``(tokens,)``.
        slots: where their keys and values go, int64 ``(tokens,)``.
        unknown_tokens: which of them come from the buffer of last tokens, int64.
        unknown_rows: from which of its rows, int64.
        sampled_tokens: after which tokens one is sampled, int64 ``(samples,)``.
        sampled_rows: row of the buffer that each sample goes to, int64 ``(samples,)``.
        block_tables: int32 ``(sequences, max_blocks)``.
        seq_lens: new tokens included, int32 ``(sequences,)``.
        query_start_loc: int32 ``(sequences + 1,)``.
        block_copies: (source, destination) blocks, int64 ``(copies, 2)``.
        sampling: settings of each sample.
        num_logprobs: what each sample asked for.
        prompt_tokens: for whose successors log-probabilities are wanted, int64 ``(positions,)``.
        prompt_targets: these successors, int64 ``(positions,)``.
        prompt_wishes: for each sequence that wants such, how many positions and how many most
            likely tokens of each.
        masked_samples: which samples keep to a grammar, int64 ``(masks,)``.
        masks: tokens allowed to each of these, int32 ``(masks, words)``; see
            ``kernels.allow_tokens``.
    """

    token_ids: Int64Array
    positions: Int64Array
    slots: Int64Array
    unknown_tokens: Int64Array
    unknown_rows: Int64Array
    sampled_tokens: Int64Array
    sampled_rows: Int64Array
    block_tables: Int32Array
    seq_lens: Int32Array
    query_start_loc: Int32Array
    block_copies: Int64Array
    sampling: RowSettings
    num_logprobs: list[int | None]
    prompt_tokens: Int64Array
    prompt_targets: Int64Array
    prompt_wishes: list[tuple[int, int]]
    masked_samples: Int64Array
    masks: Int32Array

    @classmethod
    def of(cls, plan: StepPlan, block_size: int) -> "_HostBatch":
        """Read everything that the step needs from its sequences, which change afterwards."""
        scheduled = plan.scheduled
        assert scheduled, f"step {plan.step_id} has nothing to run"
        starts = np.array([s.start for s in scheduled], dtype=np.int64)
        lens = np.array([s.num_tokens for s in scheduled], dtype=np.int64)
        query_start_loc = np.concatenate([[0], np.cumsum(lens)])
        tables = [s.sequence.block_tables[0] for s in scheduled]
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        token_ids: list[int] = []
        unknown = []
        for index, (share, table) in enumerate(zip(scheduled, tables, strict=True)):
            block_tables[index, : len(table)] = table
            known = share.sequence.token_ids[share.start : share.start + share.num_tokens]
            token_ids += known
            if len(known) < share.num_tokens:
                assert len(known) == share.num_tokens - 1, (share.sequence.request_id, share)
                token_ids.append(0)
                unknown.append((query_start_loc[index + 1] - 1, share.sequence.row))
        owner = np.repeat(np.arange(len(scheduled)), lens)
        positions = np.arange(len(token_ids)) - query_start_loc[owner] + starts[owner]
        blocks = block_tables[owner, positions // block_size].astype(np.int64)
        unknown_pairs = np.array(unknown, dtype=np.int64).reshape(-1, 2)
        samples = [(index, s) for index, s in enumerate(scheduled) if s.samples]
        assert all(s.sequence.row >= 0 for _, s in samples), "a sampling sequence has no row"
        prompt_tokens: list[int] = []
        prompt_targets: list[int] = []
        prompt_wishes = []
        for index, share in enumerate(scheduled):
            first, end = share.prompt_logprobs
            if end == 0:
                continue
            offset = int(query_start_loc[index]) - share.start
            prompt_tokens += range(offset + first, offset + end)
            prompt_targets += share.sequence.token_ids[first + 1 : end + 1]
            prompt_wishes.append((end - first, share.sequence.params.prompt_logprobs or 0))
        masks = [
            (sample, s.sequence.constraint.mask)
            for sample, (_, s) in enumerate(samples)
            if s.sequence.constraint is not None
        ]
        return cls(
            token_ids=np.array(token_ids, dtype=np.int64),
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            unknown_tokens=unknown_pairs[:, 0],
            unknown_rows=unknown_pairs[:, 1],
            sampled_tokens=query_start_loc[[index + 1 for index, _ in samples]] - 1,
            sampled_rows=np.array([s.sequence.row for _, s in samples], dtype=np.int64),
            block_tables=block_tables,
            seq_lens=(starts + lens).astype(np.int32),
            query_start_loc=query_start_loc.astype(np.int32),
            block_copies=np.array(plan.block_copies, dtype=np.int64).reshape(-1, 2),
            sampling=RowSettings.of(
                [s.sequence.params for _, s in samples],
                [s.sequence.seed for _, s in samples],
                [s.start + s.num_tokens for _, s in samples],
            ),
            num_logprobs=[s.sequence.params.logprobs for _, s in samples],
            prompt_tokens=np.array(prompt_tokens, dtype=np.int64),
            prompt_targets=np.array(prompt_targets, dtype=np.int64),
            prompt_wishes=prompt_wishes,
            masked_samples=np.array([sample for sample, _ in masks], dtype=np.int64),
            masks=np.frombuffer(b"".join(mask for _, mask in masks), dtype=np.int32).reshape(
                len(masks), -1 if masks else 0
            ),
        )


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """What came of a step: of its samples, and of its positions of prompts if there were any."""

    sampled: SamplerOutput
    prompts: SamplerOutput | None

    def to_host(self) -> "_Outputs":
        """Start copies of all tensors into pinned memory."""
        return _Outputs(
            _to_pinned_output(self.sampled),
            None if self.prompts is None else _to_pinned_output(self.prompts),
        )


def _to_pinned_output(output: SamplerOutput) -> SamplerOutput:
    return SamplerOutput(
        _to_pinned(output.token_ids),
        *(
            None if tensor is None else _to_pinned(tensor)
            for tensor in (output.logprobs, output.top_token_ids, output.top_logprobs)
        ),
    )


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _to_result(outputs: _Outputs, batch: _HostBatch) -> StepResult:
    """Python numbers of what came of a step; the tensors are on the host and complete."""
    prompts = []
    if outputs.prompts is not None:
        wishes = [wanted for count, wanted in batch.prompt_wishes for _ in range(count)]
        entries = iter(_token_logprobs(outputs.prompts, wishes))
        prompts = [list(itertools.islice(entries, count)) for count, _ in batch.prompt_wishes]
    return StepResult(
        outputs.sampled.token_ids.tolist(),
        _token_logprobs(outputs.sampled, batch.num_logprobs),
        prompts,
    )


def _token_logprobs(output: SamplerOutput, wishes: Iterable[int | None]) -> list[Any]:
    """``TokenLogprobs`` for each row that wants any, None for the others."""
    if output.logprobs is None or output.top_token_ids is None or output.top_logprobs is None:
        return [None for _ in wishes]
    columns = (output.token_ids, output.logprobs, output.top_token_ids, output.top_logprobs)
    rows = zip(*(column.tolist() for column in columns), wishes, strict=True)
    return [
        None
        if wanted is None
        else TokenLogprobs(token_id, logprob, top_ids[:wanted], top_values[:wanted])
        for token_id, logprob, top_ids, top_values, wanted in rows
    ]


class _CpuHandle:
    """A step on the worker thread; ``event`` is its future."""

    def __init__(self, future: "concurrent.futures.Future[_Outputs]", batch: _HostBatch) -> None:
        self.event = future
        self._batch = batch

    def collect(self) -> StepResult:
        """See ``StepHandle``."""
        return _to_result(self.event.result(), self._batch)


class _CudaHandle:
    """A step on a CUDA stream; ``event`` passes once its tokens are in pinned memory."""

    def __init__(self, outputs: _Outputs, batch: _HostBatch) -> None:
        self._batch = batch
        self._outputs = outputs.to_host()
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record()

    def collect(self) -> StepResult:
        """See ``StepHandle``."""
        self.event.synchronize()
        return _to_result(self._outputs, self._batch)


class ModelRunner:
    """Runs steps of a loaded model on a tier of KV pages; see ``handler.step.Runner``.

    Args:
        model: what ``load_model`` returned.
        pages: the GPU tier, uint8 ``(blocks, block_bytes)``, on the model's device.
        layout: of the pages; its layers are the model's.
        max_num_seqs: rows of the buffer of last tokens; each sequence's ``row`` is below it.
        max_model_len: longest sequence, in tokens.
    """

    def __init__(
        self,
        model: LoadedModel,
        pages: torch.Tensor,
        layout: KVLayout,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        assert layout.layers == model.kv_layers, "the layout is another model's"
        self._model: Callable[..., Any] = model.model
        self._device = model.device
        self._vocab_size = model.vocab_size
        self._layout = layout
        self._pages = pages
        self._caches = layout.views(pages)
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._last_token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=model.device)
        self._rules = LogitRules(max_num_seqs, model.vocab_size, model.device)
        self._worker = (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pagetier-step")
            if model.device.type == "cpu"
            else None
        )

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once; see ``Runner``."""
        batch = _HostBatch.of(plan, self._layout.block_size)
        rules = self._rules.read([share for share in plan.scheduled if share.samples])
        if self._worker is not None:
            return _CpuHandle(self._worker.submit(self._run, batch, rules), batch)
        return _CudaHandle(self._run(batch, rules), batch)

    def close(self) -> None:
        """Wait for launched steps and let go of the pages; see ``Runner``."""
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self._device)
        self._caches = []
        self._pages = self._pages.new_empty(0)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Run a step's forward pass alone, wait, and return its logits.

        Keys and values are written as by ``launch``, and nothing is sampled: the same plan may be
        launched afterwards.

        Returns:
            The raw scores of each sequence with ``samples``, float32 on the CPU,
            ``(samples, vocabulary)``.
        """
        batch = _HostBatch.of(plan, self._layout.block_size)
        num_samples = len(batch.sampled_tokens)
        if self._worker is not None:
            logits = self._worker.submit(self._forward, batch, self._caches).result()
            return logits[:num_samples].float()
        return self._forward(batch, self._caches)[:num_samples].float().cpu()

    def profile_peak_bytes(self, num_tokens: int) -> int:
        """Run the largest batch once and return how much memory it needs beside what is held.

        The batch has ``max_num_seqs`` sequences of the greatest length. The first take as many new
        tokens as they can, the others decode, and each asks for the costliest sampling. All of
        their blocks are one scratch block.

        Args:
            num_tokens: new tokens of the batch.

        Returns:
            Bytes at torch's peak over what was allocated before; 0 on the CPU, where torch does
            not count.
        """
        if self._worker is not None:
            return 0
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        scratch = self._layout.views(self._layout.allocate(1, self._device))
        batch = _HostBatch.of(self._largest_plan(num_tokens), self._layout.block_size)
        self._run(batch, None, scratch)
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def _largest_plan(self, num_tokens: int) -> StepPlan:
        num_sequences = min(self._max_num_seqs, num_tokens)
        num_blocks = -(-self._max_model_len // self._layout.block_size)
        params = SamplingParams(
            top_k=self._vocab_size, top_p=0.5, min_p=0.1, logprobs=20, prompt_logprobs=20, seed=0
        )
        scheduled = []
        for row in range(num_sequences):
            request = AddRequest(f"profile-{row}", [0] * self._max_model_len, params)
            sequence = Sequence(request, arrival=row)
            sequence.block_tables = [[0] * num_blocks]
            sequence.row = row
            count = min(num_tokens - (num_sequences - row - 1), self._max_model_len)
            num_tokens -= count
            start = self._max_model_len - count
            end = start + min(count - 1, MAX_PROMPT_LOGPROBS_PER_STEP) if row == 0 else start
            positions = (start, end) if end > start else (0, 0)
            scheduled.append(ScheduledSequence(sequence, start, count, True, positions))
        return StepPlan(0, scheduled, [])

    @torch.inference_mode()
    def _run(
        self,
        batch: _HostBatch,
        rules: HostRules | None,
        caches: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> _Outputs:
        """A whole step on the device: copies, forward pass, sampling; never waits for a GPU."""
        logits = self._forward(batch, self._caches if caches is None else caches)
        num_samples = len(batch.sampled_tokens)
        prompts = None
        if batch.prompt_wishes:
            (targets,) = upload([batch.prompt_targets], self._device)
            num_top = max(wanted for _, wanted in batch.prompt_wishes)
            prompts = score(logits[num_samples:], targets, num_top)
            logits = logits[:num_samples]
        rows, settings = upload([batch.sampled_rows, batch.sampling.packed()], self._device)
        if rules is None and not len(batch.masks):
            sampled = sample(logits, batch.sampling, settings)
        else:
            # Log-probabilities are of what the model said, not of what was made of it.
            wants_raw = batch.sampling.num_logprobs is not None
            changed = logits.to(torch.float32, copy=wants_raw)
            on_device = None if rules is None else self._rules.upload(rules)
            if on_device is not None:
                self._rules.apply(changed, on_device, self._last_token_ids)
            if len(batch.masks):
                samples, masks = upload([batch.masked_samples, batch.masks], self._device)
                kernels.allow_tokens(changed, samples, masks)
            sampled = sample(changed, batch.sampling, settings, raw_logits=logits)
            if on_device is not None:
                self._rules.count(on_device, sampled.token_ids)
        self._last_token_ids.index_copy_(0, rows, sampled.token_ids)
        return _Outputs(sampled, prompts)

    @torch.inference_mode()
    def _forward(
        self, batch: _HostBatch, caches: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Logits of a batch, in the model's dtype, on the device: ``(rows, vocabulary)``.

        A row for each sample, then one for each position of ``prompt_tokens``.
        """
        (
            token_ids,
            positions,
            slots,
            unknown_tokens,
            unknown_rows,
            kept_tokens,
            block_copies,
            block_tables,
            seq_lens,
            query_start_loc,
        ) = upload(
            [
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.unknown_tokens,
                batch.unknown_rows,
                np.concatenate([batch.sampled_tokens, batch.prompt_tokens]),
                batch.block_copies,
                batch.block_tables,
                batch.seq_lens,
                batch.query_start_loc,
            ],
            self._device,
        )
        if len(batch.block_copies):
            kernels.copy_blocks(self._pages, block_copies)
        if len(batch.unknown_tokens):
            token_ids.index_copy_(
                0, unknown_tokens, self._last_token_ids.index_select(0, unknown_rows)
            )
        metadata = kernels.AttentionMetadata.build(
            block_tables,
            seq_lens,
            query_start_loc,
            host_seq_lens=batch.seq_lens,
            host_query_start_loc=batch.query_start_loc,
        )
        with forward_context(ForwardContext(caches, slots, metadata)):
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=kept_tokens,
            )
        logits: torch.Tensor = output.logits[0]
        return logits
