"""The engine: one step after another, each launched before the one before it is collected.

Owns the loop and what is in flight between two calls of ``step``. Knows nothing of how a step is
planned (``Scheduler``), run (``Runner``) or of how bytes move (``Link``), nor of processes,
tokenisers and texts. An ordinary object: the engine process and the offline ``LLM`` both drive it.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from pagetier.handler.errors import InvalidRequest, PromptTooLong
from pagetier.handler.kv_cache_manager import Direction
from pagetier.handler.messages import AddRequest, RequestOutput
from pagetier.handler.scheduler import Scheduler
from pagetier.handler.step import Runner, StepHandle, StepPlan
from pagetier.handler.structured_output import Grammars
from pagetier.offload.transfer import Link

logger = logging.getLogger(__name__)

# How long an idle step waits for a copy to end before it looks again.
_LINK_WAIT_SECONDS = 0.01


class EngineCore:
    """Serves requests with one model on one device.

    Args:
        scheduler: decides each step; holds the requests.
        runner: runs steps.
        link: moves blocks between the tiers.
        grammars: compiles what outputs are to keep to; None refuses such requests.
        vocab_size: token ids are below this.
        eos_token_ids: the model's own end-of-sequence tokens.
        info: limits and sizes found at start, for ``stats`` and the log.
        close_last: called by ``close`` when the runner has ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        link: Link,
        *,
        grammars: Grammars | None = None,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        info: dict[str, Any] | None = None,
        close_last: Callable[[], object] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.max_model_len = scheduler.max_model_len
        self.info = info or {}
        self._runner = runner
        self._link = link
        self._grammars = grammars
        self._close_last = close_last
        self._in_flight: tuple[StepPlan, StepHandle] | None = None
        self._last_event: Any = None

    def add_request(self, request: AddRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it names token ids the model does not have, or holds none.
            PromptTooLong: it cannot fit, however long it waits.
            QueueFull: as many wait as may.
        """
        self.check_request(request)
        params, constraint = request.params.structured_outputs, None
        # A request that is refused anyway must not cost the compiling of its grammar.
        if params is not None and self._grammars is not None and self.scheduler.has_queue_room:
            constraint = self._grammars.constrain(params)
        self.scheduler.add(request, constraint)

    def prepare_grammars(self) -> None:
        """Make now what the first grammar needs, which takes a second with a large vocabulary."""
        if self._grammars is not None:
            self._grammars.prepare()

    def check_grammar(self, request: AddRequest) -> None:
        """Wait until a request's grammar, if it has one, is compiled.

        Raises:
            InvalidRequest: it is wrong or too complex.
        """
        params = request.params.structured_outputs
        if params is not None and self._grammars is not None:
            self._grammars.check(params)

    def check_request(self, request: AddRequest) -> None:
        """Raise what ``add_request`` would raise of a request that can never be served."""
        token_ids = request.prompt_token_ids
        if not token_ids:
            raise InvalidRequest("The prompt is empty; give at least one token.", param="prompt")
        worst = max(token_ids) if min(token_ids) >= 0 else min(token_ids)
        if not 0 <= worst < self.vocab_size:
            raise InvalidRequest(
                f"The prompt holds token id {worst}, but the model's ids are 0 to "
                f"{self.vocab_size - 1}.",
                param="prompt",
            )
        if len(token_ids) >= self.max_model_len:
            raise PromptTooLong(
                f"The prompt has {len(token_ids)} tokens, but the model takes "
                f"{self.max_model_len} including at least one generated; shorten it.",
                param="prompt",
            )
        request.params.check_tokens(self.vocab_size, request.eos_token_ids)
        self.scheduler.check_beams(request)
        if request.params.structured_outputs is not None and self._grammars is None:
            raise InvalidRequest(
                "This engine has no grammars; leave structured output out.",
                param="structured_outputs",
            )

    def abort(self, request_ids: list[str], outputs: Iterable[tuple[str, int]] = ()) -> None:
        """End these requests, and single ``outputs`` (request id, index), and free what they hold.

        Unknown ones are fine.
        """
        self.scheduler.abort(request_ids, outputs)

    def has_work(self) -> bool:
        """Whether ``step`` would do anything: requests, a launched step, or copies under way."""
        busy = self.scheduler.has_work or self._in_flight is not None
        return busy or self.scheduler.manager.num_transfers_in_flight > 0

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then collect the one before it and return what came of it."""
        self._poll_link()
        if self._grammars is not None:
            self._grammars.begin_step()
        plan = self.scheduler.schedule()
        notices = self.scheduler.take_notices()
        self._submit_transfers()
        launched = (plan, self._runner.launch(plan)) if plan.scheduled else None
        if launched is not None:
            self._last_event = launched[1].event
        collected, self._in_flight = self._in_flight, launched
        if collected is not None:
            return notices + self.scheduler.update(collected[0], collected[1].collect())
        if launched is None and not notices:
            self._wait()
        return notices

    def _wait(self) -> None:
        """Wait for a mask or a copy, whichever there is to wait for; nothing can run before."""
        if self._grammars is None or not self._grammars.wait(_LINK_WAIT_SECONDS):
            self._link.wait(_LINK_WAIT_SECONDS)

    def _poll_link(self) -> None:
        for done in self._link.poll():
            self.scheduler.complete_transfer(
                done.transfer_id, error=done.error, seconds=done.seconds
            )

    def _submit_transfers(self) -> None:
        # Every launched step may read what a copy overwrites or write what it reads: the latest
        # launch is the event to wait for, in either direction.
        for transfer in self.scheduler.manager.take_transfers():
            self._link.submit(
                transfer.transfer_id,
                transfer.block_ids,
                to_cpu=transfer.direction is Direction.OUT,
                after=self._last_event,
            )

    def stats(self) -> dict[str, Any]:
        """Gauges and totals under the stems of the metrics' names, and what start-up found."""
        return {**self.scheduler.stats(), **self.info}

    def trace(self) -> list[dict[str, Any]]:
        """The last steps' decisions, oldest first; empty unless ``decision_trace`` is set."""
        return list(self.scheduler.trace)

    def close(self) -> None:
        """Finish what is launched and give the device back. Requests still open are dropped."""
        if self._grammars is not None:
            self._grammars.close()
        self._link.close()
        self._runner.close()
        if self._close_last is not None:
            self._close_last()
