"""Beam search: which continuations of the beams go on, and which are finished.

Owns scores, the beams' order and the finished hypotheses of one request. Knows nothing of
sequences, blocks or steps: whoever runs the beams hands in candidates and is told what to fork.

The rules are those of transformers' ``generate`` (``GenerationMixin._beam_search`` in
``generation/utils.py``, release 5.23), so that results are equal: of all continuations of all beams
the best ``num_candidates`` are looked at; those among the first ``width`` that end become
hypotheses, scored by ``log-probability / length ** length_penalty``; the best others go on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

EarlyStopping = bool | Literal["never"]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One token that could follow a beam, and its log-probability after that beam."""

    token_id: int
    logprob: float


@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next round: which beam of this round it continues, and with which token."""

    parent: int
    token_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output: its tokens, the ending one included, and its penalised score."""

    score: float
    token_ids: list[int]
    cumulative_logprob: float


class BeamSearch:
    """The search of one request.

    Args:
        width: how many beams go on, and how many hypotheses are kept.
        max_tokens: length at which every beam ends, in output tokens.
        eos_token_ids: tokens that end a beam.
        length_penalty: above 0 favours long outputs, below 0 short ones.
        early_stopping: True stops once ``width`` hypotheses exist; False once no beam is likely to
            beat them; ``never`` only once none can.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        eos_token_ids: Sequence[int] = (),
        *,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self.width = width
        self.num_candidates = max(2, 1 + len(eos_token_ids)) * width
        self._max_tokens = max_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._beams: list[tuple[list[int], float]] = [([], 0.0)]
        self._hypotheses: list[Hypothesis] = []

    @property
    def num_beams(self) -> int:
        """Beams that go on: one at first, then ``width``."""
        return len(self._beams)

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The finished outputs, best first; ``width`` of them once the search has ended."""
        return self._hypotheses

    def advance(self, candidates: Sequence[Sequence[Candidate]]) -> list[Continuation] | None:
        """Take each beam's most likely tokens and choose the next round; None ends the search.

        Args:
            candidates: for each beam, in order, its ``num_candidates`` most likely tokens (all of
                the vocabulary if that is less).
        """
        length = len(self._beams[0][0]) + 1
        ranked = sorted(
            (
                (self._beams[parent][1] + c.logprob, parent, c.token_id)
                for parent, of_beam in enumerate(candidates)
                for c in of_beam
            ),
            key=lambda entry: -entry[0],
        )[: self.num_candidates]
        ends = [t in self._eos_token_ids or length == self._max_tokens for _, _, t in ranked]

        is_full = len(self._hypotheses) == self.width and self._early_stopping is True
        if not is_full:
            for (score, parent, token_id), ended in list(zip(ranked, ends, strict=True))[
                : self.width
            ]:
                if ended:
                    token_ids = [*self._beams[parent][0], token_id]
                    penalised = score / length**self._length_penalty
                    self._hypotheses.append(Hypothesis(penalised, token_ids, score))
            self._hypotheses.sort(key=lambda h: -h.score)
            del self._hypotheses[self.width :]

        going_on = [r for r, ended in zip(ranked, ends, strict=True) if not ended][: self.width]
        if not going_on or self._is_done(best_score=going_on[0][0], length=length):
            return None
        self._beams = [([*self._beams[p][0], t], score) for score, p, t in going_on]
        return [Continuation(parent, token_id) for _, parent, token_id in going_on]

    def _is_done(self, best_score: float, length: int) -> bool:
        if len(self._hypotheses) < self.width:
            return False
        if self._early_stopping is True:
            return True
        if self._early_stopping == "never" and self._length_penalty > 0.0:
            length = self._max_tokens
        best_possible: float = best_score / length**self._length_penalty
        return best_possible <= self._hypotheses[-1].score
