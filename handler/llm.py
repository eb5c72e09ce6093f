"""Offline generation: the whole engine in one object, without a server.

Owns the loop that feeds prompts to an ``EngineCore`` and gathers what comes of them, in order.
Knows nothing of TorchServe or HTTP.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_builder import build_engine
from pagetier.handler.errors import InvalidRequest, ModelError
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.tokenizer import OutputAssembler, OutputDelta, Tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass
class CompletionOutput:
    """One completion of a prompt.

    ``finish_reason`` is ``stop`` or ``length``; ``stop_reason`` the stop string or token id that
    ended it, if one did. ``logprobs`` has an entry for each token, if asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclasses.dataclass
class GenerationOutput:
    """What came of one prompt.

    ``num_cached_tokens`` of the prompt were found in the KV cache; the request was preempted
    ``num_preemptions`` times. ``prompt_logprobs`` has an entry for each token of the prompt, if
    asked for; the first, which follows nothing, has None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class LLM:
    """A model, loaded, that generates for lists of prompts.

    Usage::

        llm = LLM(model="meta-llama/Llama-3.2-1B")
        params = SamplingParams(max_tokens=32)
        print(llm.generate(["Hello, my name is"], params)[0].outputs[0].text)

    Args:
        model: a local Hugging Face folder or a hub id.
        **settings: any of ``EngineConfig``'s.

    Raises:
        ConfigError: a setting is unknown or impossible; the message names it.
        ModelError: the model cannot be read or is not supported.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.config = EngineConfig.create({"model": model, **settings})
        self._core = build_engine(self.config)
        # Also when the object is dropped, or the program ends, without a ``close``.
        self._close = weakref.finalize(self, self._core.close)
        self._request_ids = map(str, itertools.count())
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_error: ModelError | None = None
        try:
            self._tokenizer = Tokenizer.load(self.config)
        except ModelError as error:
            # A model without a tokenizer serves token ids; whoever needs text is told then.
            self._tokenizer_error = error

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Complete each prompt; outputs are in the prompts' order.

        Args:
            prompts: texts or lists of token ids; a single one is taken too.
            sampling_params: for all prompts, or one for each; the defaults if None.
            use_tqdm: show a progress bar.

        Raises:
            InvalidRequest: a prompt or a setting is impossible; nothing was generated.
            ModelError: texts were given or stop strings asked for, but there is no tokenizer.
        """
        requests = self._requests(_as_list(prompts), sampling_params)
        unfinished = {r.request_id: run for r, run in requests}
        waiting = iter(requests)
        queued = next(waiting, None)
        progress = tqdm(total=len(requests), desc="Prompts", disable=not use_tqdm, unit="req")
        try:
            while unfinished:
                # The engine's queue is bounded; the rest waits here.
                while queued is not None and self._core.scheduler.has_queue_room:
                    self._core.add_request(queued[0])
                    queued = next(waiting, None)
                for output in self._core.step():
                    run = unfinished.get(output.request_id)
                    if run is None:
                        continue
                    if output.error is not None:
                        raise InvalidRequest(output.error)
                    if run.add(output):
                        self._core.abort([], [(output.request_id, output.index)])
                    if run.is_finished:
                        del unfinished[output.request_id]
                        progress.update()
        finally:
            progress.close()
            self._core.abort(list(unfinished))
            self._settle()
        return [run.result for _, run in requests]

    def stats(self) -> dict[str, Any]:
        """Gauges and totals of the engine, under the stems of the metrics' names."""
        return self._core.stats()

    def trace(self) -> list[dict[str, Any]]:
        """Each step's decisions, oldest first; needs ``decision_trace=True``."""
        return self._core.trace()

    def close(self) -> None:
        """Give the memory back; the object cannot be used afterwards."""
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _requests(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> "list[tuple[AddRequest, _Run]]":
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequest(
                f"There are {len(prompts)} prompts but {len(sampling_params)} sampling_params; "
                "give one for all, or one for each.",
                param="sampling_params",
            )
        requests = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            text = prompt if isinstance(prompt, str) else None
            token_ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
            if params.stop:
                self._require_tokenizer()
            if any(isinstance(word, str) for word in params.bad_words or ()):
                params = self._require_tokenizer().with_bad_word_tokens(params)
            request = AddRequest(
                next(self._request_ids),
                token_ids,
                params,
                eos_token_ids=self._core.eos_token_ids,
            )
            self._core.check_request(request)
            self._core.check_grammar(request)
            result = GenerationOutput(request.request_id, text, token_ids, [])
            requests.append((request, _Run(result, self._tokenizer, params)))
        return requests

    def _encode(self, text: str) -> list[int]:
        return self._require_tokenizer().encode(text, max_tokens=self._core.max_model_len)

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            assert self._tokenizer_error is not None
            raise self._tokenizer_error
        return self._tokenizer

    def _settle(self) -> None:
        """Run until nothing is in flight, so that the next call starts on an idle engine."""
        while self._core.has_work():
            self._core.step()


class _Output:
    """One output of a prompt under way."""

    def __init__(
        self, index: int, tokenizer: Tokenizer | None, prompt: list[int], params: SamplingParams
    ) -> None:
        logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.completion = CompletionOutput(index, "", [], "", logprobs=logprobs)
        self._assembler = None if tokenizer is None else OutputAssembler(tokenizer, prompt, params)

    def add(self, output: RequestOutput) -> tuple[bool, bool]:
        """Take what the engine reports.

        Returns whether the output has ended, and whether the engine must be told so.
        """
        completion = self.completion
        if self._assembler is None:
            delta = OutputDelta(
                "", output.new_token_ids, output.logprobs, output.finish_reason, output.stop_reason
            )
        else:
            delta = self._assembler.add(output)
        completion.token_ids += delta.token_ids
        completion.text += delta.text
        if completion.logprobs is not None:
            completion.logprobs += delta.logprobs or []
        if delta.finish_reason is not None:
            completion.finish_reason = delta.finish_reason
            completion.stop_reason = delta.stop_reason
        return delta.finish_reason is not None, delta.abort


class _Run:
    """One prompt under way."""

    def __init__(
        self, result: GenerationOutput, tokenizer: Tokenizer | None, params: SamplingParams
    ) -> None:
        self.result = result
        self._outputs = [
            _Output(index, tokenizer, result.prompt_token_ids, params) for index in range(params.n)
        ]
        self._unfinished = set(range(params.n))
        result.outputs = [output.completion for output in self._outputs]

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        return not self._unfinished

    def add(self, output: RequestOutput) -> bool:
        """Take what the engine reports; whether it must be told that this output has ended."""
        result = self.result
        result.num_cached_tokens = output.num_cached_tokens
        result.num_preemptions = max(result.num_preemptions, output.num_preemptions)
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = [None, *output.prompt_logprobs]
        if output.index not in self._unfinished:
            return False
        has_ended, abort = self._outputs[output.index].add(output)
        if has_ended:
            self._unfinished.remove(output.index)
        return abort


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
