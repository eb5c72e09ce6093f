"""A whole engine on plain Python lists: real scheduler and manager, fake device and link.

The fake KV cache keeps, in each slot, the token and position that were written there. The fake
model reads a sequence's whole context *from the cache*, through the block table it was launched
with, and derives the next token from what it reads; ``expected_tokens`` derives the same from the
tokens alone. So any block that is reused, moved or shared wrongly changes the output.

Nothing happens when it is asked for: launched steps run late (in order), copies complete after a
random number of polls, out of order, and some fail.
"""

import random
from collections.abc import Callable

from pagetier.handler.beam_search import BeamSearch, Candidate
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine import EngineCore
from pagetier.handler.kv_cache_manager import KVCacheManager
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.scheduler import Scheduler
from pagetier.handler.step import StepPlan, StepResult
from pagetier.offload.cost_model import CostModel
from pagetier.offload.transfer import Completion

Slot = tuple[int, int] | None  # (token, position)
Tier = list[list[Slot]]
POISON: Slot = (-1, -1)
VOCAB_SIZE = 40
EOS = 0


def next_token(context: list[int]) -> int:
    """The fake model: any change anywhere in the context changes the result."""
    value = 17
    for token in context:
        value = (value * 1000003 + token + 1) % 2147483647
    return value % VOCAB_SIZE


def expected_tokens(prompt: list[int], max_tokens: int, *, ignore_eos: bool) -> list[int]:
    """What the request must generate, whoever it shared the engine with."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


def top_logprobs(context: list[int], count: int) -> TokenLogprobs:
    """The fake model's most likely next tokens; no two are equally likely."""
    ranked = sorted(
        (-(next_token([*context, token]) * VOCAB_SIZE + token) / 100.0, token)
        for token in range(VOCAB_SIZE)
    )[::-1][:count]
    return TokenLogprobs(next_token(context), 0.0, [t for _, t in ranked], [p for p, _ in ranked])


def prompt_logprobs(context: list[int], targets: list[int], first: int = 0) -> list[TokenLogprobs]:
    """Made-up log-probabilities of ``targets``, which follow the positions from ``first`` on."""
    return [
        TokenLogprobs(target, -float(next_token(context[: first + i + 1])), [], [])
        for i, target in enumerate(targets)
    ]


def expected_beams(prompt: list[int], width: int, max_tokens: int) -> list[list[int]]:
    """What a search must give, computed on the tokens alone."""
    search = BeamSearch(width, max_tokens, (EOS,))
    beams = [list(prompt)]
    while True:
        tops = [top_logprobs(beam, search.num_candidates) for beam in beams]
        continuations = search.advance(
            [
                [Candidate(t, p) for t, p in zip(x.top_token_ids, x.top_logprobs, strict=True)]
                for x in tops
            ]
        )
        if continuations is None:
            return [h.token_ids for h in search.hypotheses]
        beams = [[*beams[c.parent], c.token_id] for c in continuations]


class FakeHandle:
    """A launched step; runs when somebody needs it, after all earlier ones."""

    def __init__(self, runner: "FakeRunner", work: Callable[[], StepResult]) -> None:
        self._runner = runner
        self._work = work
        self._result: StepResult | None = None
        self.event = self

    def run(self) -> None:
        """Make this step and all before it happen."""
        queue = self._runner.queue
        if self in queue:
            while queue:
                step = queue.pop(0)
                step._result = step._work()
                if step is self:
                    break

    def collect(self) -> StepResult:
        self.run()
        assert self._result is not None
        return self._result


class FakeRunner:
    """Runs steps on a tier of lists."""

    def __init__(self, gpu: Tier, block_size: int, max_num_seqs: int) -> None:
        self.gpu = gpu
        self.block_size = block_size
        self.queue: list[FakeHandle] = []
        self.last_tokens = [-1] * max_num_seqs
        self.num_launched = 0

    def launch(self, plan: StepPlan) -> FakeHandle:
        self.num_launched += 1
        rows = []
        for share in plan.scheduled:
            seq = share.sequence
            known = seq.token_ids[share.start : share.start + share.num_tokens]
            assert share.num_tokens >= 1
            assert len(known) >= share.num_tokens - 1, "only the last token may be unknown"
            assert len(seq.block_tables[0]) * self.block_size >= share.start + share.num_tokens
            rows.append((list(known), share, list(seq.block_tables[0]), seq.row))
        scored = [
            (first, list(share.sequence.token_ids[first + 1 : end + 1]), index)
            for index, share in enumerate(plan.scheduled)
            for first, end in [share.prompt_logprobs]
            if end
        ]
        assert len({row for *_, row in rows}) == len(rows), "two sequences share a row"
        copies = list(plan.block_copies)

        def work() -> StepResult:
            for source, destination in copies:
                self.gpu[destination] = list(self.gpu[source])
            contexts = []
            # As on the device, all of the step's keys are written before any is read.
            for known, share, table, row in rows:
                tokens = known
                if len(known) < share.num_tokens:
                    tokens = [*known, self.last_tokens[row]]
                for offset, token in enumerate(tokens):
                    position = share.start + offset
                    block = self.gpu[table[position // self.block_size]]
                    block[position % self.block_size] = (token, position)
            for _, share, table, _ in rows:
                context = []
                for position in range(share.start + share.num_tokens):
                    slot = self.gpu[table[position // self.block_size]][position % self.block_size]
                    assert slot is not None, ("read of an unwritten slot", position)
                    assert slot[1] == position, ("foreign bytes", slot, position)
                    context.append(slot[0])
                contexts.append(context)
            sampled, logprobs = [], []
            for (_, share, _, row), context in zip(rows, contexts, strict=True):
                if share.samples:
                    self.last_tokens[row] = next_token(context)
                    sampled.append(self.last_tokens[row])
                    count = share.sequence.params.logprobs
                    logprobs.append(None if count is None else top_logprobs(context, count))
            prompts = [
                prompt_logprobs(contexts[index][: first + len(targets)], targets, first)
                for first, targets, index in scored
            ]
            return StepResult(sampled, logprobs, prompts)

        handle = FakeHandle(self, work)
        self.queue.append(handle)
        return handle

    def close(self) -> None:
        while self.queue:
            self.queue[-1].run()


class FakeLink:
    """Copies that end after 0 to ``max_delay`` polls, in any order; some fail."""

    def __init__(
        self, gpu: Tier, cpu: Tier, rng: random.Random, *, max_delay: int = 5, failure: float = 0.0
    ) -> None:
        self.gpu, self.cpu, self.rng = gpu, cpu, rng
        self.max_delay = max_delay
        self.fails = lambda to_cpu: rng.random() < failure
        self.under_way: list[list] = []
        self.num_submitted = 0

    def submit(self, transfer_id, block_ids, *, to_cpu, after) -> None:
        self.num_submitted += 1
        source, destination = (self.gpu, self.cpu) if to_cpu else (self.cpu, self.gpu)
        fails = self.fails(to_cpu)
        early = self.rng.random() < 0.5  # the bytes may move at any time before the end
        if after is not None:
            after.run()
        for _, d in block_ids:
            destination[d] = [POISON] * len(destination[d])
        job = [self.rng.randint(0, self.max_delay), transfer_id, block_ids, source, destination]
        if early and not fails:
            self._move(block_ids, source, destination)
            job[2] = []
        self.under_way.append([*job, fails])

    @staticmethod
    def _move(block_ids, source, destination) -> None:
        for s, d in block_ids:
            destination[d] = list(source[s])

    def poll(self) -> list[Completion]:
        done, rest = [], []
        for job in self.under_way:
            job[0] -= 1
            (done if job[0] < 0 else rest).append(job)
        self.under_way = rest
        self.rng.shuffle(done)
        completions = []
        for _, transfer_id, block_ids, source, destination, fails in done:
            if not fails:
                self._move(block_ids, source, destination)
            completions.append(Completion(transfer_id, "broken" if fails else None, 0.001))
        return completions

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        while self.under_way:
            self.poll()


def output_name(request_id: str, index: int) -> str:
    """How tests name one output of a request."""
    return f"{request_id}#{index}" if index else request_id


class FakeEngine:
    """An ``EngineCore`` on fakes, that collects each request's tokens."""

    def __init__(
        self,
        *,
        num_gpu_blocks: int,
        num_cpu_blocks: int = 0,
        block_size: int = 4,
        seed: int = 0,
        max_delay: int = 5,
        failure: float = 0.0,
        swap_is_cheaper: bool = True,
        **settings,
    ) -> None:
        settings.setdefault("max_num_seqs", 8)
        settings.setdefault("max_num_batched_tokens", 32)
        config = EngineConfig.create({"model": "fake", "block_size": block_size, **settings})
        self.gpu: Tier = [[None] * block_size for _ in range(num_gpu_blocks)]
        self.cpu: Tier = [[None] * block_size for _ in range(num_cpu_blocks)]
        self.manager = KVCacheManager(
            num_gpu_blocks,
            num_cpu_blocks,
            block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        cost = CostModel(
            token_bytes=1,
            block_bytes=block_size,
            link_bytes_per_second=1e9 if swap_is_cheaper else 1e-3,
            flops_per_second=1e6,
            num_parameters=100,
            attention_dim=1,
        )
        self.scheduler = Scheduler(config, self.manager, cost, num_gpu_blocks * block_size)
        self.runner = FakeRunner(self.gpu, block_size, config.max_num_seqs)
        self.link = FakeLink(
            self.gpu, self.cpu, random.Random(seed), max_delay=max_delay, failure=failure
        )
        self.core = EngineCore(
            self.scheduler, self.runner, self.link, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,)
        )
        self.tokens: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.finished: dict[str, RequestOutput] = {}

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 8, **kwargs) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=kwargs.pop("ignore_eos", True),
            n=kwargs.pop("n", 1),
            best_of=kwargs.pop("best_of", None),
            prompt_logprobs=kwargs.pop("prompt_logprobs", None),
            use_beam_search=kwargs.pop("use_beam_search", False),
        )
        self.core.add_request(
            AddRequest(request_id, list(prompt), params, eos_token_ids=(EOS,), **kwargs)
        )
        for index in range(params.n):
            self.tokens[output_name(request_id, index)] = []

    def step(self) -> list[RequestOutput]:
        outputs = self.core.step()
        for output in outputs:
            name = output_name(output.request_id, output.index)
            self.tokens[name] += output.new_token_ids
            if output.prompt_logprobs is not None:
                assert name not in self.prompt_logprobs, "told twice"
                self.prompt_logprobs[name] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.finished[name] = output
        self.check()
        return outputs

    def check(self) -> None:
        """Hold the invariants between pools, tables and queues."""
        scheduler = self.scheduler
        sequences = [*scheduler.waiting, *scheduler.loading, *scheduler.running]
        known = [s for siblings in scheduler._sequences.values() for s in siblings]
        assert sorted(map(id, sequences)) == sorted(map(id, known))
        self.manager.check(sequences)
        rows = [s.row for s in (*scheduler.running, *scheduler.loading)]
        assert sorted(rows + scheduler._free_rows) == list(range(scheduler.config.max_num_seqs))
        for pool in (self.manager.gpu, self.manager.cpu):
            assert pool.num_free + pool.num_draining + pool.num_referenced == pool.num_blocks

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.core.has_work():
                return
            self.step()
        raise AssertionError(f"no end after {max_steps} steps: {self.core.stats()}")
