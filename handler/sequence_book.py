"""Which sequences live, where each stands, and what collected steps tell of them.

Owns the queues (waiting, loading, running), the seats, and a sequence's life from arrival to end:
its tokens as they become known, the moment it stops, its forks. Knows nothing of how a step is
planned (``Scheduler`` builds on this), of tensors or devices, and imports no torch.

All queues are in the order of ``(priority, arrival)``, which under ``fcfs`` is arrival alone.
Sampled tokens arrive one step late (``update``): a sequence may have ended, or have lost its
blocks, by the time that its token comes.
"""

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Any

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import EngineError, InvalidRequest, QueueFull
from pagetier.handler.kv_cache_manager import KVCacheManager
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.metrics import EngineTotals
from pagetier.handler.sequence import Sequence, SequenceStatus, TokenConstraint
from pagetier.handler.sequence_group import SequenceGroup
from pagetier.handler.step import StepPlan, StepResult


class SequenceBook:
    """All sequences of an engine.

    Args:
        config: limits and policies.
        manager: both tiers' blocks.
        max_model_len: most tokens of a sequence.

    Attributes:
        waiting: new sequences and preempted ones.
        loading: those whose blocks are being copied in.
        running: those that hold blocks and may be scheduled.
        totals: what was counted since start.
    """

    def __init__(self, config: EngineConfig, manager: KVCacheManager, max_model_len: int) -> None:
        self.config = config
        self.manager = manager
        self.max_model_len = max_model_len
        self.totals = EngineTotals()
        self.waiting: list[Sequence] = []
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []
        self._sequences: dict[str, list[Sequence]] = {}  # of each request, all that live
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_arrived = 0
        self._awaiting_masks: list[Sequence] = []
        self._notices: list[RequestOutput] = []

    # --- arrival and departure ---

    def add(self, request: AddRequest, constraint: TokenConstraint | None = None) -> None:
        """Queue a request; the caller has checked that it can ever fit.

        Args:
            request: what the client asked for.
            constraint: what its output keeps to; it waits until that is settled.

        Raises:
            QueueFull: as many wait as may.
        """
        if not self.has_queue_room:
            raise QueueFull(
                f"{self.config.max_num_queued_reqs} requests are waiting already, the most "
                "that are allowed (max_num_queued_reqs); try again later."
            )
        assert request.request_id not in self._sequences, request.request_id
        sequence = Sequence(request, self._num_arrived, self.max_model_len)
        self._num_arrived += 1
        self._sequences[request.request_id] = [sequence]
        params = request.params
        if params.num_sequences > 1 or params.use_beam_search:
            num_new = sequence.max_num_tokens - sequence.num_prompt_tokens
            SequenceGroup(request, num_new).adopt(sequence)
        if constraint is not None:
            sequence.constraint = constraint
            sequence.is_lockstep = True
            self._await_mask(sequence)
        bisect.insort(self.waiting, sequence, key=self._order)

    def check_beams(self, request: AddRequest) -> None:
        """Raise if the beams of a search could never all be held at once.

        They advance together, so each may have to wait for all others with its blocks in hand.

        Raises:
            InvalidRequest: there are more beams than seats or blocks.
        """
        params = request.params
        if not params.use_beam_search:
            return
        width, seats = params.num_sequences, self.config.max_num_seqs
        longest = len(request.prompt_token_ids) + (params.max_tokens or self.max_model_len)
        longest = min(longest, self.max_model_len)
        # The last token of all is never computed.
        num_blocks = width * self.manager.num_blocks_for(longest - 1)
        if width > seats or num_blocks > self.manager.gpu.num_blocks:
            raise InvalidRequest(
                f"A search with {width} beams of up to {longest} tokens takes {width} seats "
                f"and {num_blocks} KV blocks, but there are {seats} and "
                f"{self.manager.gpu.num_blocks}; lower n, best_of or max_tokens.",
                param="best_of" if params.best_of else "n",
            )

    @property
    def has_queue_room(self) -> bool:
        """Whether one more request may wait; preempted ones are not counted."""
        num_new = sum(s.num_preemptions == 0 and s.index == 0 for s in self.waiting)
        return num_new < self.config.max_num_queued_reqs

    def abort(self, request_ids: Iterable[str], outputs: Iterable[tuple[str, int]] = ()) -> None:
        """End these requests in whatever state; unknown ids are fine.

        ``outputs`` ends single ones of their sequences: pairs of a request id and an index.
        """
        for request_id in request_ids:
            for sequence in list(self._sequences.get(request_id, ())):
                self._finish(sequence, "abort")
        for request_id, index in outputs:
            for sequence in list(self._sequences.get(request_id, ())):
                if sequence.index == index:
                    self._finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._sequences)

    # --- what steps bring ---

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in the tokens of a collected step; tokens of ended sequences are discarded."""
        outputs = []
        block_size = self.config.block_size
        scored = [share.sequence for share in plan.scheduled if share.prompt_logprobs[1]]
        for sequence, prompt_logprobs in zip(scored, result.prompt_logprobs, strict=True):
            sequence.prompt_logprobs += prompt_logprobs
        sampled = [share.sequence for share in plan.scheduled if share.samples]
        for sequence, token_id, logprobs in zip(
            sampled, result.token_ids, result.logprobs, strict=True
        ):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_in_flight -= 1
            if sequence.group is not None and sequence.group.is_search:
                assert logprobs is not None, sequence.request_id
                self.totals.generation_tokens += 1
                if sequence.group.collect(sequence, logprobs):
                    outputs += self._advance_beams(sequence.group)
                continue
            constraint = sequence.constraint
            if constraint is not None:
                constraint.accept(token_id)
                if constraint.error is not None:
                    outputs.append(self._fail(sequence, constraint.error))
                    continue
                if not constraint.is_complete:
                    self._await_mask(sequence)
            sequence.token_ids.append(token_id)
            self.totals.generation_tokens += 1
            finish_reason = self._finish_reason(sequence, token_id)
            output = RequestOutput(
                request_id=sequence.request_id,
                new_token_ids=[token_id],
                logprobs=None if logprobs is None else [logprobs],
                finish_reason=finish_reason,
                stop_reason=sequence.stop_reason,
                num_cached_tokens=sequence.num_cached_tokens,
                num_preemptions=sequence.num_preemptions,
                queue_seconds=sequence.queue_seconds,
                prompt_logprobs=None
                if sequence.params.prompt_logprobs is None
                else self._take_prompt_logprobs(sequence),
                index=sequence.index,
                has_stop_token=constraint is None
                or constraint.has_eos
                or sequence.stop_reason is not None,
            )
            if sequence.group is None:
                outputs.append(output)
            else:
                outputs += sequence.group.pass_on(output)
            if finish_reason is not None:
                self._finish(sequence, finish_reason)
            elif len(sequence.token_ids) >= block_size * (sequence.num_published_blocks + 1):
                self.manager.publish_computed(sequence)
        return outputs

    @staticmethod
    def _take_prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs] | None:
        """What goes out with a request's first output's first token, where it was asked for."""
        if sequence.index != 0 or sequence.num_output_tokens != 1:
            return None
        taken, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        return taken

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if token_id in sequence.eos_token_ids:
            return "stop"
        stop_token_ids = sequence.params.stop_token_ids
        if stop_token_ids and token_id in stop_token_ids:
            sequence.stop_reason = token_id
            return "stop"
        if sequence.constraint is not None and sequence.constraint.is_complete:
            return "stop"
        return "length" if sequence.num_tokens >= sequence.max_num_tokens else None

    def _advance_beams(self, group: SequenceGroup) -> list[RequestOutput]:
        """Go on with the best continuations of all beams, or end the search."""
        continuations = group.advance()
        beams = group.beams
        if continuations is None:
            outputs = group.results(beams[0])
            for beam in beams:
                self._remove(beam)
            for output in outputs:
                self.totals.request_success[str(output.finish_reason)] += 1
            return outputs
        # A beam with several continuations is forked before its own token is added to it.
        first_children: dict[int, int] = {}
        next_beams: list[Sequence] = []
        for position, continuation in enumerate(continuations):
            parent = beams[continuation.parent]
            if continuation.parent in first_children:
                next_beams.append(self._fork(parent))
            else:
                first_children[continuation.parent] = position
                next_beams.append(parent)
        for beam, continuation in zip(next_beams, continuations, strict=True):
            beam.token_ids.append(continuation.token_id)
        for position, beam in enumerate(beams):
            if position not in first_children:
                self._remove(beam)
            elif beam.block_tables:
                self.manager.publish_computed(beam)
        group.beams = next_beams
        return []

    # --- forks ---

    def _fork(self, parent: Sequence) -> Sequence:
        """A sequence beside its parent: running on its blocks if there is a seat, else waiting."""
        assert parent.group is not None
        child = parent.group.fork(parent)
        self._sequences[parent.request_id].append(child)
        if parent.status is SequenceStatus.RUNNING and self._free_rows:
            child.row = self._free_rows.pop()
            self.manager.fork(parent, child)
            self._start(child)
        else:
            bisect.insort(self.waiting, child, key=self._order)
        return child

    # --- constraints ---

    def _await_mask(self, sequence: Sequence) -> None:
        sequence.awaits_mask = True
        self._awaiting_masks.append(sequence)

    def _settle_constraints(self) -> None:
        """Note which masks have come, and fail requests whose grammar cannot be followed."""
        awaiting, self._awaiting_masks = self._awaiting_masks, []
        for sequence in awaiting:
            assert sequence.constraint is not None, sequence.sequence_id
            if sequence.is_finished:
                continue
            if not sequence.constraint.poll():
                self._awaiting_masks.append(sequence)
                continue
            sequence.awaits_mask = False
            if sequence.constraint.error is not None:
                self._notices.append(self._fail(sequence, sequence.constraint.error))
            elif not sequence.num_output_tokens:
                self._notices.append(RequestOutput(sequence.request_id, []))

    def take_notices(self) -> list[RequestOutput]:
        """What is to be told of requests beside what steps bring: grammars taken or refused."""
        notices, self._notices = self._notices, []
        return notices

    # --- moves between queues ---

    def _start(self, sequence: Sequence) -> None:
        sequence.move_to(SequenceStatus.RUNNING)
        bisect.insort(self.running, sequence, key=self._order)

    def _requeue(self, sequence: Sequence) -> None:
        self._free_rows.append(sequence.row)
        sequence.row = -1
        was_running = sequence.num_preemptions > 0
        sequence.move_to(SequenceStatus.PREEMPTED if was_running else SequenceStatus.WAITING)
        bisect.insort(self.waiting, sequence, key=self._order)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence of whose result the client is told."""
        self._remove(sequence)
        sequence.finish_reason = reason
        self.totals.request_success[reason] += 1

    def _fail(self, sequence: Sequence, error: EngineError) -> RequestOutput:
        """End a sequence's whole request because of an error of its own."""
        for sibling in list(self._sequences[sequence.request_id]):
            self._remove(sibling)
            sibling.finish_reason = "error"
        self.totals.request_success["error"] += 1
        return RequestOutput(
            sequence.request_id,
            [],
            finish_reason="error",
            error=error.message,
            error_status=error.status,
        )

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the engine, with all it holds."""
        for queue in (self.running, self.waiting, self.loading):
            if sequence in queue:
                queue.remove(sequence)
                break
        if sequence.block_tables:
            self.manager.publish_computed(sequence)
        self.manager.free(sequence)
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1
        sequence.move_to(SequenceStatus.FINISHED)
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]

    def _order(self, sequence: Sequence) -> tuple[int, int, int]:
        if self.config.scheduling_policy == "fcfs":
            return (0, sequence.arrival, sequence.index)
        return (sequence.priority, sequence.arrival, sequence.index)

    def stats(self) -> dict[str, Any]:
        """Gauges and totals under the stems of the metrics' names; shares are in [0, 1]."""
        gpu, cpu = self.manager.gpu, self.manager.cpu
        num_preempted = sum(s.status is SequenceStatus.PREEMPTED for s in self.waiting)
        totals = dataclasses.asdict(self.totals)
        totals["request_success"] = dict(self.totals.request_success)
        return {
            "num_requests_running": len(self.running),
            "num_requests_waiting": len(self.waiting) - num_preempted,
            "num_requests_swapped": sum(bool(s.swapped_blocks) for s in self.waiting),
            "num_requests_preempted": num_preempted,
            "num_requests_loading": len(self.loading),
            "kv_cache_usage_perc": gpu.num_referenced / gpu.num_blocks,
            "cpu_cache_usage_perc": cpu.num_cached / cpu.num_blocks if cpu.num_blocks else 0.0,
            "num_gpu_blocks": gpu.num_blocks,
            "num_gpu_blocks_free": gpu.num_free,
            "num_cpu_blocks": cpu.num_blocks,
            "num_cpu_blocks_free": cpu.num_free,
            "kv_waste_perc": self.totals.kv_waste_perc,
            "kv_waste_preallocated_perc": self.totals.kv_waste_preallocated_perc,
            "mean_running_batch": self.totals.mean_running_batch,
            **totals,
        }
