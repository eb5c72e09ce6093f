"""Everything that touches the device in a step: inputs, forward pass, sampling, and their return.

Owns the order of device work. Knows nothing of the scheduler: it reads a ``StepPlan`` once, in
``launch``, and keeps no sequence.

Overlap. A step may be launched before the one before it was collected, so the host does not know
a sequence's last token yet. Sampled tokens therefore stay on the device as well, in ``DeviceRows``,
and the next step's input is completed from there.

Two kinds of steps. In a decode each sequence has one new token; everything that the step reads is
on the device already, and if there are graphs, it is one replay (``cuda_graphs``). Any other step
brings a flat batch from the host. A greedy decode's tokens come with the replay; else the sampler
runs behind it.

On a CUDA device, steps run on the current stream and tokens return by an asynchronous copy into
pinned memory. On the CPU one worker thread plays the device: it runs the steps in order, and
``launch`` returns at once.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagetier import kernels
from pagetier.handler.compilation import Forward, eager_forward
from pagetier.handler.cuda_graphs import DecodeGraphs, DecodeOutputs
from pagetier.handler.device_rows import DeviceRows
from pagetier.handler.logit_rules import HostRules, LogitRules
from pagetier.handler.messages import AddRequest, TokenLogprobs
from pagetier.handler.model_loader import LoadedModel
from pagetier.handler.paged_model import ForwardContext, forward_context
from pagetier.handler.sampler import RowSettings, SamplerOutput, sample, score
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence as EngineSequence
from pagetier.handler.step import (
    MAX_PROMPT_LOGPROBS_PER_STEP,
    ScheduledSequence,
    StepHandle,
    StepPlan,
    StepResult,
)
from pagetier.handler.step_inputs import FlatBatch, StepInputs, StepReader, flat_of
from pagetier.kernels.metadata import upload
from pagetier.offload.tiers import KVLayout, LayerCaches


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a step's tokens are chosen, as the host knows it.

    Attributes:
        rows: of the sampling sequences, int64 ``(samples,)``.
        settings: of each sample; None if each is the most likely token, and no more is asked.
        num_logprobs: what each sample asked for.
        rules: changes of the logits.
        masked_samples: which samples keep to a grammar, int64 ``(masks,)``.
        masks: tokens allowed to each of these, int32 ``(masks, words)``; see
            ``kernels.allow_tokens``.
    """

    rows: npt.NDArray[np.int64]
    settings: RowSettings | None
    num_logprobs: list[int | None]
    rules: HostRules | None
    masked_samples: npt.NDArray[np.int64]
    masks: npt.NDArray[np.int32]

    @classmethod
    def of(cls, samples: Sequence[ScheduledSequence], rules: HostRules | None) -> "Sampling":
        """Read the settings of a step's sampling sequences."""
        rows = np.array([s.sequence.row for s in samples], dtype=np.int64)
        if rules is None and all(_is_plain(s.sequence) for s in samples):
            nothing = np.zeros((0, 0), dtype=np.int32)
            return cls(rows, None, [None] * len(samples), None, rows[:0], nothing)
        masks = [
            (index, s.sequence.constraint.mask)
            for index, s in enumerate(samples)
            if s.sequence.constraint is not None
        ]
        return cls(
            rows=rows,
            settings=RowSettings.of(
                [s.sequence.params for s in samples],
                [s.sequence.seed for s in samples],
                [s.start + s.num_tokens for s in samples],
            ),
            num_logprobs=[s.sequence.params.logprobs for s in samples],
            rules=rules,
            masked_samples=np.array([sample for sample, _ in masks], dtype=np.int64),
            masks=np.frombuffer(b"".join(mask for _, mask in masks), dtype=np.int32).reshape(
                len(masks), -1 if masks else 0
            ),
        )


def _is_plain(sequence: EngineSequence) -> bool:
    """Whether its next token is the model's most likely one, and no more is asked."""
    params = sequence.params
    return params.temperature == 0 and params.logprobs is None and sequence.constraint is None


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A step as the host read it."""

    inputs: StepInputs
    sampling: Sampling

    @property
    def prompt_wishes(self) -> list[tuple[int, int]]:
        """See ``FlatBatch``."""
        return [] if self.inputs.flat is None else self.inputs.flat.prompt_wishes


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


def _to_result(outputs: _Outputs, batch: _Batch) -> StepResult:
    """Python numbers of what came of a step; the tensors are on the host and complete."""
    prompts = []
    if outputs.prompts is not None:
        wishes = [wanted for count, wanted in batch.prompt_wishes for _ in range(count)]
        entries = iter(_token_logprobs(outputs.prompts, wishes))
        prompts = [list(itertools.islice(entries, count)) for count, _ in batch.prompt_wishes]
    return StepResult(
        outputs.sampled.token_ids.tolist(),
        _token_logprobs(outputs.sampled, batch.sampling.num_logprobs),
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

    def __init__(self, future: "concurrent.futures.Future[_Outputs]", batch: _Batch) -> None:
        self.event = future
        self._batch = batch

    def collect(self) -> StepResult:
        """See ``StepHandle``."""
        return _to_result(self.event.result(), self._batch)


class _CudaHandle:
    """A step on a CUDA stream; ``event`` passes once its tokens are in pinned memory."""

    def __init__(self, outputs: _Outputs, batch: _Batch) -> None:
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
        max_num_seqs: rows of the device's state; each sequence's ``row`` is below it.
        max_model_len: longest sequence, in tokens.
        forward: the model's forward pass; None runs it operator by operator.
        decode_forward: the forward pass of decodes in graphs; None takes ``forward``.
        graph_sizes: sizes of batches whose decodes run in graphs, after ``graphs.capture()``.

    Attributes:
        graphs: of decodes; None without sizes.
    """

    def __init__(
        self,
        model: LoadedModel,
        pages: torch.Tensor,
        layout: KVLayout,
        *,
        max_num_seqs: int,
        max_model_len: int,
        forward: Forward | None = None,
        decode_forward: Forward | None = None,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        assert layout.layers == model.kv_layers, "the layout is another model's"
        self._forward_pass = eager_forward(model.model) if forward is None else forward
        self._device = model.device
        self._vocab_size = model.vocab_size
        self._layout = layout
        self._pages = pages
        self._caches = layout.views(pages)
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        max_blocks = -(-max_model_len // layout.block_size)
        self._reader = StepReader(max_num_seqs, max_blocks, layout.block_size)
        self._rows = DeviceRows(max_num_seqs, max_blocks, layout.block_size, model.device)
        self.graphs = (
            DecodeGraphs(
                decode_forward or self._forward_pass, self._rows, self._caches, graph_sizes
            )
            if graph_sizes
            else None
        )
        self._rules = LogitRules(max_num_seqs, model.vocab_size, model.device)
        self._worker = (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pagetier-step")
            if model.device.type == "cpu"
            else None
        )

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once; see ``Runner``."""
        inputs = self._reader.read(plan)
        samples = [share for share in plan.scheduled if share.samples]
        batch = _Batch(inputs, Sampling.of(samples, self._rules.read(samples)))
        if not self._runs_in_graph(inputs) and inputs.flat is None:
            flat = self._reader.flat(plan, inputs)
            batch = dataclasses.replace(batch, inputs=dataclasses.replace(inputs, flat=flat))
        if self._worker is not None:
            return _CpuHandle(self._worker.submit(self._run, batch), batch)
        return _CudaHandle(self._run(batch), batch)

    def drop_graphs(self) -> None:
        """Run decodes without graphs from now on."""
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    def _runs_in_graph(self, inputs: StepInputs) -> bool:
        return inputs.is_decode and self.graphs is not None and self.graphs.fits(len(inputs.rows))

    def close(self) -> None:
        """Wait for launched steps and let go of the pages; see ``Runner``."""
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self._device)
        self.drop_graphs()
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
        # As the host sees it: nothing is noted, on either side.
        flat = flat_of(plan, self._layout.block_size)
        copies = np.array(plan.block_copies, dtype=np.int64).reshape(-1, 2)

        def run() -> torch.Tensor:
            self._copy_blocks(copies)
            return self._forward(flat, self._caches)[: len(flat.sampled_tokens)].float()

        return run().cpu() if self._worker is None else self._worker.submit(run).result()

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
        plan = self._largest_plan(num_tokens)
        samples = [share for share in plan.scheduled if share.samples]
        flat = flat_of(plan, self._layout.block_size)
        logits = self._forward(flat, scratch)
        self._choose(logits, flat, Sampling.of(samples, None))
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
            sequence = EngineSequence(request, arrival=row)
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
    def _run(self, batch: _Batch) -> _Outputs:
        """A whole step on the device: copies, forward pass, sampling; never waits for a GPU."""
        inputs, sampling = batch.inputs, batch.sampling
        self._rows.change(inputs.changes)
        self._copy_blocks(inputs.block_copies)
        if self._runs_in_graph(inputs):
            assert self.graphs is not None
            return self._sample_decode(self.graphs.run(inputs.rows), sampling)
        assert inputs.flat is not None
        logits = self._forward(inputs.flat, self._caches)
        outputs = self._choose(logits, inputs.flat, sampling)
        rows, ends, sampled_rows = upload([inputs.rows, inputs.ends, sampling.rows], self._device)
        self._rows.num_computed.index_copy_(0, rows, ends)
        self._rows.last_token_ids.index_copy_(0, sampled_rows, outputs.sampled.token_ids)
        return outputs

    def _sample_decode(self, decode: DecodeOutputs, sampling: Sampling) -> _Outputs:
        """The tokens of a decode in a graph: greedy ones are chosen already."""
        if sampling.settings is None:
            return _Outputs(SamplerOutput(decode.token_ids), None)
        (rows,) = upload([sampling.rows], self._device)
        # Rules look at the last tokens, in whose place the greedy ones are.
        self._rows.last_token_ids.index_copy_(0, rows, decode.previous_token_ids)
        sampled = self._sample(decode.logits, sampling)
        self._rows.last_token_ids.index_copy_(0, rows, sampled.token_ids)
        return _Outputs(sampled, None)

    def _choose(self, logits: torch.Tensor, flat: FlatBatch, sampling: Sampling) -> _Outputs:
        """Sample from the logits of a flat batch, and score its prompts."""
        num_samples = len(flat.sampled_tokens)
        prompts = None
        if flat.prompt_wishes:
            (targets,) = upload([flat.prompt_targets], self._device)
            num_top = max(wanted for _, wanted in flat.prompt_wishes)
            prompts = score(logits[num_samples:], targets, num_top)
        return _Outputs(self._sample(logits[:num_samples], sampling), prompts)

    def _sample(self, logits: torch.Tensor, sampling: Sampling) -> SamplerOutput:
        """Choose a token for each row of logits, as its request wants it."""
        if sampling.settings is None:
            return SamplerOutput(kernels.greedy_tokens(logits))
        (settings,) = upload([sampling.settings.packed()], self._device)
        if sampling.rules is None and not len(sampling.masks):
            return sample(logits, sampling.settings, settings)
        # Log-probabilities are of what the model said, not of what was made of it.
        wants_raw = sampling.settings.num_logprobs is not None
        changed = logits.to(torch.float32, copy=wants_raw)
        rules = None if sampling.rules is None else self._rules.upload(sampling.rules)
        if rules is not None:
            self._rules.apply(changed, rules, self._rows.last_token_ids)
        if len(sampling.masks):
            samples, masks = upload([sampling.masked_samples, sampling.masks], self._device)
            kernels.allow_tokens(changed, samples, masks)
        sampled = sample(changed, sampling.settings, settings, raw_logits=logits)
        if rules is not None:
            self._rules.count(rules, sampled.token_ids)
        return sampled

    def _copy_blocks(self, block_copies: npt.NDArray[np.int64]) -> None:
        if len(block_copies):
            kernels.copy_blocks(self._pages, upload([block_copies], self._device)[0])

    @torch.inference_mode()
    def _forward(self, flat: FlatBatch, caches: list[LayerCaches]) -> torch.Tensor:
        """Logits of a flat batch, in the model's dtype, on the device: ``(rows, vocabulary)``.

        A row for each sample, then one for each position of ``prompt_tokens``.
        """
        kept = np.concatenate([flat.sampled_tokens, flat.prompt_tokens])
        num_kept = len(kept)
        (
            token_ids,
            positions,
            slots,
            unknown_tokens,
            unknown_rows,
            kept_tokens,
            block_tables,
            seq_lens,
            query_start_loc,
        ) = upload(
            [
                flat.token_ids,
                flat.positions,
                flat.slots,
                flat.unknown_tokens,
                flat.unknown_rows,
                kept if num_kept else np.zeros(1, dtype=np.int64),  # compiled for one row or more
                flat.block_tables,
                flat.seq_lens,
                flat.query_start_loc,
            ],
            self._device,
        )
        if len(flat.unknown_tokens):
            token_ids.index_copy_(
                0, unknown_tokens, self._rows.last_token_ids.index_select(0, unknown_rows)
            )
        metadata = kernels.AttentionMetadata.build(
            block_tables,
            seq_lens,
            query_start_loc,
            host_seq_lens=flat.seq_lens,
            host_query_start_loc=flat.query_start_loc,
        )
        with forward_context(ForwardContext(caches, slots, metadata)):
            logits = self._forward_pass(token_ids[None], positions[None], kept_tokens)[0]
        return logits[:num_kept]
