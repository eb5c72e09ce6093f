"""The sequences of a request that has several: samples of one prompt, or the beams of a search.

Owns what such a request is as a whole: how many sequences are still to be forked, which results are
withheld until all are there, and which of them the client gets. Knows nothing of blocks, queues or
steps: ``Scheduler`` forks and ends sequences as the group says.

``n`` samples stream independently. With ``best_of > n``, results are withheld, and the ``n`` with
the highest log-probability per token are given out. The beams of a search advance together, one
token at a time.
"""

import dataclasses

import msgspec

from pagetier.handler.beam_search import BeamSearch, Candidate, Continuation
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.sampling_params import SamplingParams, with_logprobs
from pagetier.handler.sequence import Sequence


@dataclasses.dataclass
class _Withheld:
    """What a sequence has gained that the client does not see yet."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    last: RequestOutput | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(entry.logprob for entry in self.logprobs) / len(self.logprobs)


class SequenceGroup:
    """All sequences of one request.

    Args:
        request: what the client asked for.
        max_tokens: most output tokens of each sequence.

    Attributes:
        num_unborn: sequences still to be forked from the first, once its prompt is computed.
        beams: the sequences of a search, in its order; empty without one.
    """

    def __init__(self, request: AddRequest, max_tokens: int) -> None:
        self._params = request.params
        self._stop_token_ids = tuple(self._params.stop_token_ids or ())
        self._num_born = 1
        self._withheld: dict[int, _Withheld] = {}
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._ready: dict[int, list[Candidate]] = {}
        self._search: BeamSearch | None = None
        self.beams: list[Sequence] = []
        self.num_unborn = self._params.num_sequences - 1
        if self._params.use_beam_search:
            self.num_unborn = 0
            eos = () if self._params.ignore_eos else request.eos_token_ids
            self._search = BeamSearch(
                self._params.num_sequences,
                max_tokens,
                (*eos, *self._stop_token_ids),
                length_penalty=self._params.length_penalty,
                early_stopping=self._params.early_stopping,
            )

    @property
    def sequence_params(self) -> SamplingParams:
        """Settings of each sequence: those of the request, and the log-probabilities needed."""
        if self._search is not None:
            return with_logprobs(self._params, self._search.num_candidates)
        if self._withholds:
            return with_logprobs(self._params, self._params.logprobs or 0)
        return self._params

    @property
    def is_search(self) -> bool:
        """Whether the sequences are beams."""
        return self._search is not None

    @property
    def _withholds(self) -> bool:
        return self._params.num_sequences > self._params.n

    def adopt(self, sequence: Sequence) -> None:
        """Make ``sequence`` the request's first."""
        sequence.group = self
        sequence.params = self.sequence_params
        if self._search is not None:
            sequence.is_lockstep = True
            self.beams = [sequence]

    def fork(self, parent: Sequence) -> Sequence:
        """Another sequence with the parent's tokens, and neither blocks nor a row."""
        child = parent.fork(self._num_born)
        self._num_born += 1
        self.num_unborn = max(self.num_unborn - 1, 0)
        return child

    # --- samples ---

    def pass_on(self, output: RequestOutput) -> list[RequestOutput]:
        """What the client may see now that a sequence reports ``output``."""
        if not self._withholds:
            return [output]
        held = self._withheld.setdefault(output.index, _Withheld())
        held.token_ids += output.new_token_ids
        held.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            held.last = output
        num_ended = sum(h.last is not None for h in self._withheld.values())
        if num_ended < self._params.num_sequences:
            return []
        best = sorted(self._withheld.values(), key=lambda h: -h.mean_logprob)[: self._params.n]
        outputs = []
        for index, held in enumerate(best):
            assert held.last is not None
            outputs.append(
                msgspec.structs.replace(
                    held.last,
                    new_token_ids=held.token_ids,
                    logprobs=self._trim(held.logprobs),
                    prompt_logprobs=self._prompt_logprobs if index == 0 else None,
                    index=index,
                )
            )
        return outputs

    def _trim(self, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs] | None:
        return None if self._params.logprobs is None else logprobs

    # --- beams ---

    def collect(self, beam: Sequence, logprobs: TokenLogprobs) -> bool:
        """Take a beam's candidates; whether all beams have told theirs."""
        pairs = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        self._ready[beam.index] = [Candidate(token_id, logprob) for token_id, logprob in pairs]
        return len(self._ready) == len(self.beams)

    def is_ready(self, beam: Sequence) -> bool:
        """Whether the beam has told its candidates and waits for the others."""
        return beam.index in self._ready

    def advance(self) -> list[Continuation] | None:
        """The next round's beams; None when the search has ended."""
        assert self._search is not None
        candidates = [self._ready[beam.index] for beam in self.beams]
        self._ready.clear()
        return self._search.advance(candidates)

    def results(self, beam: Sequence) -> list[RequestOutput]:
        """The outputs of a search that has ended, best first; ``beam`` is any of it."""
        assert self._search is not None
        outputs = []
        for index, hypothesis in enumerate(self._search.hypotheses[: self._params.n]):
            last = hypothesis.token_ids[-1]
            is_stop = last in beam.eos_token_ids or last in self._stop_token_ids
            outputs.append(
                RequestOutput(
                    request_id=beam.request_id,
                    new_token_ids=hypothesis.token_ids,
                    finish_reason="stop" if is_stop else "length",
                    stop_reason=last if last in self._stop_token_ids else None,
                    num_cached_tokens=beam.num_cached_tokens,
                    num_preemptions=beam.num_preemptions,
                    index=index,
                )
            )
        return outputs
