"""Who runs in the next step: one token budget a step, admission, preemption and resumption.

Owns the decisions of a step. Asks ``KVCacheManager`` for blocks and ``CostModel`` for prices; the
queues it decides over are ``SequenceBook``'s. Knows nothing of tensors, devices or how a step is
run, and imports no torch.

A step is scheduled while the one before it still runs: the running sequences are planned ahead
without the tokens that it samples. Room is taken from the end of the queues' order only, so the
first running sequence is never preempted and always finishes.
"""

import logging
import time
from collections import deque
from typing import Any

from pagetier.handler.config import EngineConfig
from pagetier.handler.kv_cache_manager import Direction, KVCacheManager, PrefixMatch
from pagetier.handler.sequence import Sequence, SequenceStatus
from pagetier.handler.sequence_book import SequenceBook
from pagetier.handler.step import (
    MAX_PROMPT_LOGPROBS_PER_STEP,
    ScheduledSequence,
    StepPlan,
)
from pagetier.offload.cost_model import CostModel

logger = logging.getLogger(__name__)

_TRACE_STEPS = 4096
# A prompt of this length has the rate that prompts beside decodes are measured by.
_RATED_TOKENS = 512
# Tokens of prompts that a step takes at any rate: fewer are hardly sooner done.
_MIN_PROMPT_TOKENS = 128
# Waiting sequences looked at in one step that turn out not to fit: bounds the work of a step.
_MAX_MISFITS = 16


class Scheduler(SequenceBook):
    """Decides each step.

    Args:
        config: limits and policies.
        manager: both tiers' blocks.
        cost_model: what swapping and recomputing would cost.
        max_model_len: most tokens of a sequence.

    Attributes:
        trace: the last steps' decisions, oldest first, if ``decision_trace`` is set.
    """

    def __init__(
        self,
        config: EngineConfig,
        manager: KVCacheManager,
        cost_model: CostModel,
        max_model_len: int,
    ) -> None:
        super().__init__(config, manager, max_model_len)
        self.cost_model = cost_model
        self._max_prompt_tokens_beside_decodes = self._prompt_tokens_in(config.max_prefill_ms)
        self.trace: deque[dict[str, Any]] = deque(maxlen=_TRACE_STEPS)
        self._step_id = 0
        self._prompt_logprobs_room = 0  # positions that the step being planned may still take
        self._decisions: list[dict[str, Any]] = []

    def _prompt_tokens_in(self, milliseconds: float) -> int:
        """Tokens of prompts that are computed in that time; 0 ms is no limit."""
        most = self.config.max_num_batched_tokens
        if milliseconds == 0:
            return most
        in_time = milliseconds / 1e3 / self.cost_model.recompute_seconds(_RATED_TOKENS)
        return min(max(int(in_time * _RATED_TOKENS), _MIN_PROMPT_TOKENS), most)

    # --- planning a step ---

    def schedule(self) -> StepPlan:
        """Plan the next step; it may be empty when everything waits for copies."""
        self._decisions = []
        self._prompt_logprobs_room = MAX_PROMPT_LOGPROBS_PER_STEP
        self.manager.begin_step()
        self._settle_loads()
        self._settle_constraints()
        self._fork_computed_prompts()
        self._preempt_for_priority()
        num_preemptions = self.totals.num_preemptions
        scheduled, stalled = self._schedule_running()
        if not stalled and num_preemptions == self.totals.num_preemptions:
            self._admit_waiting(scheduled)
        if not scheduled:
            self._break_standstill()
        self.manager.plan_demotion()
        plan = StepPlan(self._step_id, scheduled, self.manager.take_block_copies())
        self._commit(plan)
        return plan

    def _schedule_running(self) -> tuple[list[ScheduledSequence], bool]:
        """Give running sequences their tokens, oldest first.

        Decodes never wait for prefills: their share of the budget is set aside. Also returns
        whether somebody stalled for want of blocks.
        """
        scheduled = []
        stalled = False
        wanted = [self._num_wanted(sequence) for sequence in self.running]
        prefill_budget = self._prompt_room(wanted.count(1))
        for sequence, num_tokens in zip(list(self.running), wanted, strict=True):
            if sequence.status is not SequenceStatus.RUNNING:
                break  # preempted since, as are all behind it
            if num_tokens > 1:
                num_tokens = min(num_tokens, prefill_budget)
                prefill_budget -= num_tokens
            if sequence.params.prompt_logprobs is not None:
                num_tokens = self._limit_logprobs(sequence, num_tokens)
            if num_tokens == 0:
                continue
            target = sequence.num_computed_tokens + num_tokens
            if target > sequence.num_writable_tokens:
                # After a stall, those behind may use slots they have, but take no block that the
                # stalled one waits for.
                if stalled:
                    has_room = self.manager.num_missing_for(sequence, target) == 0
                else:
                    has_room = self._make_room(sequence, target)
                    stalled = not has_room
                if not has_room:
                    continue
            scheduled.append(self._share(sequence, num_tokens))
        return scheduled, stalled

    def _prompt_room(self, num_decodes: int) -> int:
        """Tokens of prompts that a step has room for beside so many decodes."""
        room = self.config.max_num_batched_tokens - num_decodes
        return min(room, self._max_prompt_tokens_beside_decodes) if num_decodes else room

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow a running sequence, preempting later ones; False if it must wait for copies."""
        while not self.manager.grow(sequence, num_tokens):
            missing = self.manager.num_missing_for(sequence, num_tokens)
            pool = self.manager.gpu
            if pool.num_free + pool.num_draining >= missing:
                return False  # enough is on its way: nobody else has to go
            victim = self.running[-1]
            if victim is sequence and (len(self.running) == 1):
                return False  # the last one standing waits for loads and copies to end
            self._preempt(victim, f"{sequence.request_id} needs {missing} blocks")
            if victim is sequence:
                return False
        return True

    def _admit_waiting(self, scheduled: list[ScheduledSequence]) -> None:
        """Start or resume waiting sequences while tokens, seats and blocks last."""
        lens = [share.num_tokens for share in scheduled]
        num_decodes = lens.count(1)
        budget = self._prompt_room(num_decodes) - (sum(lens) - num_decodes)
        misfits: list[Sequence] = []
        for sequence in list(self.waiting):
            if budget <= 0 or not self._free_rows or len(misfits) >= _MAX_MISFITS:
                break
            if sequence.awaits_mask or _has_told(sequence):
                continue  # its next token is chosen once the other beams have told theirs
            match = self._match(sequence) if self._is_settled(sequence) else None
            if match is None or not self._fits(sequence, match, is_busy=bool(scheduled)):
                misfits.append(sequence)
                if sequence.num_overtaken >= self.config.max_overtaken:
                    break
                continue
            self._admit(sequence, match)
            for passed in misfits:
                passed.num_overtaken += 1
            if sequence.status is SequenceStatus.RUNNING:
                num_tokens = min(self._num_wanted(sequence), budget)
                num_tokens = self._limit_logprobs(sequence, num_tokens)
                if num_tokens and self.manager.grow(
                    sequence, sequence.num_computed_tokens + num_tokens
                ):
                    budget -= num_tokens
                    scheduled.append(self._share(sequence, num_tokens))
            if any(s.num_overtaken >= self.config.max_overtaken for s in misfits):
                break

    def _is_settled(self, sequence: Sequence) -> bool:
        """Whether all its tokens are known and all its copies out have ended."""
        return not sequence.num_in_flight and self.manager.is_swap_settled(sequence)

    def _match(self, sequence: Sequence) -> PrefixMatch:
        """The prefix to start from: loaded where that is cheaper than computing it.

        In the mode ``recompute`` a preempted sequence loads nothing; a new one may still find its
        prefix in the CPU tier.
        """
        mode = self.config.preemption_mode
        must_compute = mode == "recompute" and sequence.num_preemptions > 0
        match = self.manager.match(sequence, allow_loads=not must_compute)
        if match.num_loads and mode != "swap":
            without = self.manager.match(sequence, allow_loads=False)
            num_loaded_tokens = match.num_loads * self.config.block_size
            load = self.cost_model.load_seconds(num_loaded_tokens)
            if load > self.cost_model.recompute_seconds(match.num_tokens, without.num_tokens):
                return without
        return match

    def _fits(self, sequence: Sequence, match: PrefixMatch, *, is_busy: bool) -> bool:
        """Whether all known tokens and one more fit, and leave some room if others run."""
        missing = self.manager.num_missing_blocks(match, self._reservation(sequence))
        watermark = max(1, self.manager.gpu.num_blocks // 100) if is_busy or self.loading else 0
        return missing + watermark <= self.manager.gpu.num_free

    def _reservation(self, sequence: Sequence) -> int:
        """Tokens that a sequence needs room for before it starts: what it has, and one more."""
        return min(sequence.num_tokens + 1, sequence.max_num_tokens)

    def _admit(self, sequence: Sequence, match: PrefixMatch) -> None:
        self.waiting.remove(sequence)
        sequence.row = self._free_rows.pop()
        sequence.num_overtaken = 0
        num_swapped = sequence.num_swapped_tokens
        must_load = self.manager.admit(sequence, match, self._reservation(sequence))
        # A fork that had no seat starts anew too, but its prompt was counted with the first.
        is_new = sequence.num_preemptions == 0
        if is_new and sequence.index == 0:
            self.totals.prompt_tokens += sequence.num_prompt_tokens
            sequence.queue_seconds = time.monotonic() - sequence.arrived_at
            sequence.num_cached_tokens = match.num_tokens
            self.totals.prefix_cache_queries += sequence.num_tokens
            self.totals.prefix_cache_hits += match.num_tokens
        else:
            self.totals.num_recomputed_tokens += sequence.num_tokens - 1 - match.num_tokens
        if must_load:
            sequence.move_to(SequenceStatus.LOADING)
            self.loading.append(sequence)
            self.totals.num_resumes_loaded += not is_new
        else:
            self._start(sequence)
        self._decide(
            "start" if is_new else "resume",
            sequence,
            num_cached_tokens=match.num_tokens,
            num_loads=match.num_loads,
            num_swapped_tokens=num_swapped,
        )

    def _settle_loads(self) -> None:
        """Sequences whose blocks have all arrived run; those whose load failed wait again."""
        for sequence in [s for s in self.loading if self.manager.is_loaded(s)]:
            self.loading.remove(sequence)
            if self.manager.finish_load(sequence):
                self._start(sequence)
            else:
                self._decide("load failed", sequence)
                self._requeue(sequence)

    def _num_wanted(self, sequence: Sequence) -> int:
        """Tokens the sequence could compute now; 0 if its last one is already in flight."""
        if sequence.awaits_mask or (sequence.is_lockstep and sequence.num_in_flight):
            return 0
        if sequence.group is not None and sequence.group.num_unborn:
            # The others fork from it before the last token of the prompt, which each computes.
            return max(sequence.num_prompt_tokens - 1 - sequence.num_computed_tokens, 0)
        num_tokens = len(sequence.token_ids) + sequence.num_in_flight
        if num_tokens >= sequence.max_num_tokens:
            return 0
        return num_tokens - sequence.num_computed_tokens

    def _share(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        num_known = len(sequence.token_ids) + sequence.num_in_flight
        samples = start + num_tokens == num_known
        if sequence.params.prompt_logprobs is None:
            return ScheduledSequence(sequence, start, num_tokens, samples)
        first, end = self._prompt_logprobs(sequence, num_tokens)
        self._prompt_logprobs_room -= end - first
        return ScheduledSequence(sequence, start, num_tokens, samples, (first, end))

    def _limit_logprobs(self, sequence: Sequence, num_tokens: int) -> int:
        """``num_tokens``, or so many that the step has room for the prompt's log-probabilities."""
        first, end = self._prompt_logprobs(sequence, num_tokens)
        if end - first <= self._prompt_logprobs_room:
            return num_tokens
        return first + self._prompt_logprobs_room - sequence.num_computed_tokens

    @staticmethod
    def _prompt_logprobs(sequence: Sequence, num_tokens: int) -> tuple[int, int]:
        """Positions of the next ``num_tokens`` whose successors' log-probabilities are missing."""
        if sequence.params.prompt_logprobs is None:
            return (0, 0)
        start = sequence.num_computed_tokens
        first = max(start, sequence.num_prompt_logprobs)
        end = min(start + num_tokens, sequence.num_prompt_tokens - 1)
        return (first, end) if first < end else (0, 0)

    def _fork_computed_prompts(self) -> None:
        """Fork the samples of requests whose prompt is computed up to its last token."""
        for sequence in list(self.running):
            group = sequence.group
            if group is None or sequence.num_computed_tokens < sequence.num_prompt_tokens - 1:
                continue
            while group.num_unborn:
                self._fork(sequence)

    # --- preemption ---

    def _preempt(self, victim: Sequence, reason: str) -> None:
        """Take a running sequence's blocks, by the cheaper way or the only one."""
        manager, config = self.manager, self.config
        num_tokens = victim.num_computed_tokens
        num_blocks_out = manager.num_blocks_to_copy_out(victim)
        swap_seconds = self.cost_model.swap_seconds(num_tokens, num_blocks_out)
        recompute_seconds = self.cost_model.recompute_seconds(num_tokens)
        wants_swap = config.preemption_mode == "swap" or (
            config.preemption_mode == "auto" and swap_seconds <= recompute_seconds
        )
        swapped = wants_swap and manager.swap_out(victim)
        if not swapped:
            manager.drop(victim)
        mode = "swap" if swapped else "recompute"
        victim.num_preemptions += 1
        self.totals.num_preemptions += 1
        self.totals.num_preemptions_swap += swapped
        self.totals.num_preemptions_recompute += not swapped
        self.running.remove(victim)
        self._requeue(victim)
        if wants_swap and not swapped:
            reason += "; the CPU tier is full"
        logger.debug(
            "%s preempted (%s) with %d tokens: %s; swap %.2f ms, recompute %.2f ms",
            victim.request_id,
            mode,
            num_tokens,
            reason,
            swap_seconds * 1e3,
            recompute_seconds * 1e3,
        )
        self._decide(
            "preempt",
            victim,
            mode=mode,
            reason=reason,
            num_tokens=num_tokens,
            swap_seconds=swap_seconds,
            recompute_seconds=recompute_seconds,
        )

    def _preempt_for_priority(self) -> None:
        """Make room for a waiting sequence that comes before running ones of lower priority."""
        if self.config.scheduling_policy != "priority":
            return
        first = self.waiting[0] if self.waiting else None
        if first is None or first.awaits_mask or not self._is_settled(first):
            return
        pool = self.manager.gpu
        match = self._match(first)
        while self.running and self.running[-1].priority > first.priority:
            missing = self.manager.num_missing_blocks(match, self._reservation(first))
            if self._free_rows and pool.num_free + pool.num_draining > missing:
                return
            self._preempt(self.running[-1], f"{first.request_id} has priority")

    def _break_standstill(self) -> None:
        """Take the blocks of an idle beam whose search waits for a beam that has none.

        Beams advance together, so two searches could each hold what the other needs.
        """
        waiting = [s for s in self.waiting if self._is_settled(s) and not _has_told(s)]
        if not waiting or not self.running or self.manager.num_transfers_in_flight:
            return
        if any(s.num_in_flight or s.awaits_mask for s in self.running):
            return
        victim = self.running[-1]
        if victim.group is not waiting[0].group:
            self._preempt(victim, f"{waiting[0].sequence_id} and all others wait for blocks")

    # --- after planning ---

    def _commit(self, plan: StepPlan) -> None:
        """Count the planned tokens as computed: whatever is launched later runs later."""
        self._step_id += 1
        for share in plan.scheduled:
            sequence = share.sequence
            sequence.num_computed_tokens += share.num_tokens
            sequence.num_in_flight += share.samples
            if share.prompt_logprobs[1]:
                sequence.num_prompt_logprobs = share.prompt_logprobs[1]
            if share.num_tokens > 1:  # a decode's token is not known yet
                self.manager.publish_computed(sequence)
        if plan.scheduled:
            self._count(plan)
        if self.config.decision_trace and (plan.scheduled or self._decisions):
            ran = [(s.sequence.request_id, s.start, s.num_tokens) for s in plan.scheduled]
            self.trace.append(
                {"step": plan.step_id, "scheduled": ran, "decisions": self._decisions}
            )

    def _count(self, plan: StepPlan) -> None:
        self.totals.num_steps += 1
        self.totals.num_scheduled_sequences += len(plan.scheduled)
        holders = [*self.running, *self.loading]
        self.totals.count_slots(
            num_allocated=self.manager.gpu.num_referenced * self.config.block_size,
            num_filled=self._num_filled_slots(holders),
            num_preallocated=len(holders) * self.max_model_len,
        )

    def _num_filled_slots(self, holders: list[Sequence]) -> int:
        """Slots with a token in them; blocks shared by several sequences are counted once."""
        num_filled = sum([s.num_computed_tokens for s in holders])
        num_held = sum([len(s.block_tables[0]) for s in holders])
        # Only full blocks are shared for longer than a step.
        num_shared = num_held - self.manager.gpu.num_referenced
        return num_filled - max(num_shared, 0) * self.config.block_size

    def complete_transfer(self, transfer_id: int, *, error: str | None, seconds: float) -> None:
        """A copy between the tiers has ended after ``seconds``, or failed with ``error``."""
        transfer = self.manager.complete(transfer_id, ok=error is None)
        num_bytes = len(transfer.block_ids) * self.cost_model.block_bytes
        if error is not None:
            self.totals.num_failed_transfers += 1
            logger.warning("A copy of %d KV blocks failed: %s", len(transfer.block_ids), error)
        elif transfer.direction is Direction.OUT:
            self.totals.kv_offload_store_bytes += num_bytes
            self.totals.kv_offload_store_time += seconds
        else:
            self.totals.kv_offload_load_bytes += num_bytes
            self.totals.kv_offload_load_time += seconds

    def _decide(self, action: str, sequence: Sequence, **details: Any) -> None:
        if self.config.decision_trace:
            decision = {"action": action, "request_id": sequence.request_id, **details}
            self._decisions.append(decision)


def _has_told(sequence: Sequence) -> bool:
    """Whether it is a beam that waits for the others of its search."""
    return sequence.group is not None and sequence.group.is_ready(sequence)
