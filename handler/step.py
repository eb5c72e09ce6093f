"""What one engine step is asked to do, and what came of it.

Owns the plain data that travels from the scheduler to a model runner and back, and the protocol
that a runner keeps. Knows nothing of queues, blocks or devices, and imports no torch.
"""

import dataclasses
from typing import Any, Protocol

import msgspec

from pagetier.handler.messages import TokenLogprobs
from pagetier.handler.sequence import Sequence

# Positions of prompts, at most, for which a step works out log-probabilities: each needs a row of
# logits, and the memory for them is set aside.
MAX_PROMPT_LOGPROBS_PER_STEP = 256


# A struct, since a step has one for each sequence, and a frozen dataclass takes ten times as long.
# Nothing that it holds refers back to it, so the garbage collector need not look at it.
class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """A sequence's share of a step: tokens ``[start, start + num_tokens)``.

    The last of these may be a token that an earlier launched step samples and that the host does
    not know yet (``start + num_tokens > sequence.num_tokens``): the runner then takes it from its
    own buffer, row ``sequence.row``. ``samples`` says whether a token is sampled after this share.
    ``prompt_logprobs`` are the positions ``[first, end)`` of the share for whose successors, tokens
    of the prompt, log-probabilities are to be reported.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    prompt_logprobs: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: who runs, and which GPU blocks are copied (source, destination) before it."""

    step_id: int
    scheduled: list[ScheduledSequence]
    block_copies: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(s.num_tokens for s in self.scheduled)


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens of a collected step, one for each scheduled sequence with ``samples``, in order.

    ``prompt_logprobs`` has a list for each scheduled sequence that wants any of this step, in
    order.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs]] = dataclasses.field(default_factory=list)


class StepHandle(Protocol):
    """A launched step."""

    event: Any
    """Passes when the step's device work has ended: a CUDA event, or a future on the CPU. Copies
    between tiers are ordered after it."""

    def collect(self) -> StepResult:
        """Wait for the step and return its tokens; raises what the step raised."""
        ...


class Runner(Protocol):
    """Whatever can run steps: the real model, or a fake one in tests."""

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once.

        Everything needed from the sequences (tokens, block tables, sampling settings) is read
        before this returns: they change afterwards. Steps run in the order of their launches.
        """
        ...

    def close(self) -> None:
        """Wait for launched steps and give the device memory back."""
        ...
