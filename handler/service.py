"""The TorchServe handler: carries the frontend's calls to the pump and its replies back.

Owns the worker process's life: it starts the engine, watches frontend and engine, and ends when
either of them does. The only module that knows how ``ts`` calls a handler; the books of requests
are kept by ``pump``, the shapes of bodies by ``openai_api``.
"""

import atexit
import fcntl
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, TextIO

from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_client import EngineClient
from pagetier.handler.engine_process import DEFAULT_BUILDER
from pagetier.handler.errors import ConfigError, EngineError, LaunchError
from pagetier.handler.exchange import Inbox, Incoming, Reply
from pagetier.handler.frame_reader import FrameReader
from pagetier.handler.messages import RequestOutput
from pagetier.handler.metrics import Histogram
from pagetier.handler.metrics_export import MetricsExporter, start_exporting
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.pump import TICK_SECONDS, WAIT_SECONDS, Pump
from pagetier.handler.request_log import RequestLog
from pagetier.handler.tokenizer import Tokenizer, check_tokenizer_files

logger = logging.getLogger(__name__)

# After the engine's death: how long open requests have to be told of it, and how long the last
# replies take to leave.
_TELL_SECONDS = 0.8
_FLUSH_SECONDS = 0.1
# Held by the worker of a model, in its archive's folder; how long one that was killed may still
# hold it.
_PLACE_NAME = ".worker"
_PLACE_SECONDS = 5.0
# Between the answers to a description that the frontend asks for again and again.
_REPEATED_DESCRIPTION_SECONDS = 10.0
# How long after its connections a dying frontend may still be seen.
_PARENT_SECONDS = 0.5
# Where archives may name files outside themselves; the operator's, since archives come from others.
MODEL_PATHS_VARIABLE = "PAGETIER_MODEL_PATHS"
# What ``ts`` asks, for each reply, whether it is the last; see ``Reply.last``.
_CRITERIA = {last: lambda _, last=last: last for last in (True, False, None)}
# Settings that may name files.
_PATH_SETTINGS = ("model", "tokenizer", "chat_template")


class PagetierHandler:
    """What TorchServe loads and calls; ``handle`` is one exchange of the pump."""

    # ``module:function`` that builds the engine; tests have others.
    engine_builder = DEFAULT_BUILDER

    def __init__(self) -> None:
        """Do nothing: TorchServe calls ``initialize`` next."""
        self._pump: Pump | None = None
        self._engine: EngineClient | None = None
        self._inbox = Inbox()
        self._place: TextIO | None = None
        self._log = RequestLog()
        self._last_described = ""

    def initialize(self, context: Any) -> None:
        """Start the engine, as the ``handler:`` section of the archive's configuration says.

        If it cannot start, the reason is logged in one line and the worker ends.
        """
        # At its own level TorchServe writes several lines for each call of ``handle``.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("pagetier").setLevel(logging.INFO)
        _watch_parent()
        _read_through_a_buffer()
        try:
            self._start(context)
        except EngineError as exc:
            logger.error("pagetier cannot start: %s", exc.message)
            self.close()
            # TorchServe would log any other exception with a stack of its own frames.
            sys.exit(1)

    def _start(self, context: Any) -> None:
        model_dir = context.system_properties["model_dir"]
        self._place = _take_place(Path(model_dir))
        config = read_config(context.model_yaml_config, model_dir)
        check_paths(config, model_dir, os.environ.get(MODEL_PATHS_VARIABLE))
        if Path(config.model, "config.json").is_file():
            check_tokenizer_files(config)
        # Both take seconds, so one beside the other. If both fail, the engine's reason is told: it
        # is the clearer one when there is no model at all.
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(Tokenizer.load, config)
            self._engine = EngineClient(
                config,
                on_outputs=self._take_outputs,
                on_stats=self._inbox.put,
                on_death=self._inbox.put_death,
                builder=self.engine_builder,
            )
            tokenizer = loading.result()
        ready = self._engine.ready
        api = OpenAIApi(
            tokenizer,
            model_name=config.served_model_name or context.model_name,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=ready.eos_token_ids,
            tool_call_parser=config.tool_call_parser,
        )
        self._pump = Pump(
            self._engine,
            api,
            self._inbox,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
            enable_drain=config.enable_drain,
            log=self._log,
        )
        engine = self._engine
        start_exporting(MetricsExporter(api.model_name), self._read_metrics, lambda: engine.alive)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        logger.info("pagetier serves %s: %s", api.model_name, ready.info)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer one call of the frontend; never raises.

        ``data`` and the context's lists are cut down to the requests that are answered: the
        others stay open.
        """
        assert self._pump is not None, "handle is called after initialize"
        processors = context.request_processor
        if len(data) == 1 and processors[0].get_request_property("describe") == "True":
            context.stopping_criteria = None
            self._note_description(context.request_ids[0])
            return [self._pump.describe()]
        ids = [context.request_ids[index] for index in range(len(data))]

        def fetch(index: int) -> Incoming:
            return _incoming(data[index], processors[index])

        try:
            replies = self._pump.exchange(ids, fetch)
        except Exception:
            # Raised from here, it would fail every request in flight.
            logger.exception("an exchange broke")
            replies = []
            # The frontend calls again at once.
            time.sleep(WAIT_SECONDS)
        _apply(replies, ids, data, context)
        return [reply.body for reply in replies]

    def close(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.close()
        if self._place is not None:
            self._place.close()

    def _note_description(self, request_id: str) -> None:
        """Say why nothing else comes, where the frontend asks for the same description for ever.

        See ``frontend_patch``; a frontend that ``pagetier serve`` has started does not do so.
        """
        if request_id == self._last_described:
            logger.error(
                "TorchServe's frontend repeats a description with customized=true for ever and "
                "takes no more requests to this model; restart TorchServe, with 'pagetier serve'"
            )
            # It would fill the log and a processor.
            time.sleep(_REPEATED_DESCRIPTION_SECONDS)
        self._last_described = request_id

    def _take_outputs(self, outputs: list[RequestOutput]) -> None:
        self._log.take(outputs)
        self._inbox.put(outputs)

    def _read_metrics(self) -> tuple[dict[str, Any], dict[str, Histogram]]:
        """What is exported; raises ``EngineDead`` if the engine does not answer."""
        assert self._engine is not None
        stats = {**self._engine.stats().stats, **self._log.stats()}
        return stats, self._log.histograms()

    def _watch(self) -> None:
        """Notice clients that left together, and the engine's death."""
        assert self._pump is not None
        pump, never = self._pump, threading.Event()
        while self._inbox.death is None:
            never.wait(TICK_SECONDS)
            pump.tick()
        for _ in range(int(_TELL_SECONDS / TICK_SECONDS)):
            if pump.num_untold == 0:
                break
            never.wait(TICK_SECONDS)
        never.wait(_FLUSH_SECONDS)
        logger.error("the worker ends, since its engine is dead; TorchServe starts another")
        os._exit(1)


def read_config(model_yaml_config: Mapping[str, Any], model_dir: str) -> EngineConfig:
    """The settings of the ``handler:`` section; relative paths start at the archive's folder.

    Raises:
        ConfigError: a setting is wrong, or there is no such section.
    """
    section = (model_yaml_config or {}).get("handler")
    if not isinstance(section, dict):
        raise ConfigError(
            "model-config.yaml has no 'handler:' section with the settings of the engine; make "
            "the archive with 'pagetier archive'.",
            param="handler",
        )
    settings = dict(section)
    for key in _PATH_SETTINGS:
        value = settings.get(key)
        # A hub id looks like a relative path, too, but is no file of the archive.
        if isinstance(value, str) and value and (bundled := Path(model_dir, value)).exists():
            settings[key] = str(bundled)
    return EngineConfig.create(settings)


def check_paths(config: EngineConfig, model_dir: str, allowed: str | None) -> None:
    """Log which files outside the archive's folder its settings name.

    Args:
        config: the settings.
        model_dir: the archive's folder.
        allowed: folders that they must be in, separated by ``os.pathsep``; None allows any.

    Raises:
        ConfigError: a file is outside all of them.
    """
    own = Path(model_dir).resolve()
    folders = [own, *(Path(p).resolve() for p in (allowed or "").split(os.pathsep) if p)]
    for key in _PATH_SETTINGS:
        value = getattr(config, key)
        # A hub id names no file.
        if value is None or not (path := Path(value).resolve()).exists():
            continue
        if not path.is_relative_to(own):
            logger.info("the archive's setting '%s' names '%s', outside the archive", key, path)
        if allowed is not None and not any(path.is_relative_to(f) for f in folders):
            raise ConfigError(
                f"The archive's setting '{key}' names '{path}', which is in none of the folders "
                f"of {MODEL_PATHS_VARIABLE} ('{allowed}'); add its folder there, or bundle it.",
                param=key,
            )


def _incoming(fields: Mapping[str, Any], processor: Any) -> Incoming:
    """A new request, from what TorchServe made of it."""
    name = "body" if "body" in fields else "data"
    part = processor.get_request_property(name)
    content_type = part.get("content-type") if isinstance(part, dict) else None
    return Incoming(
        route=processor.get_request_property("url_path") or "",
        body=fields.get(name),
        content_type=content_type or "",
        client_id=_header(processor, "x-request-id"),
    )


def _header(processor: Any, name: str) -> str:
    """A header of the request, empty if there is none; the frontend keeps names as they came."""
    headers = processor.get_request_properties().items()
    return next((v for k, v in headers if k.lower() == name and isinstance(v, str)), "")


def _apply(replies: list[Reply], ids: list[str], data: list[dict[str, Any]], context: Any) -> None:
    """Tell ``ts`` which requests are answered, and how.

    ``ts`` keeps its own references to ``data`` and ``request_ids``, hence "in place".
    """
    processors = context.request_processor
    data[:] = [data[reply.index] for reply in replies]
    context.request_processor = [processors[reply.index] for reply in replies]
    context.request_ids.clear()
    context.request_ids.update(
        {position: ids[reply.index] for position, reply in enumerate(replies)}
    )
    # The context lives on between calls, so this is set in each of them.
    context.stopping_criteria = [_CRITERIA[reply.last] for reply in replies]
    for position, reply in enumerate(replies):
        if reply.content_type is None:
            continue  # not the first reply to this request: its head has gone out
        context.set_response_status(reply.status, HTTPStatus(reply.status).phrase, position)
        context.set_response_content_type(position, reply.content_type)
        for name, value in reply.headers.items():
            context.set_response_header(position, name, value)


def _take_place(model_dir: Path) -> TextIO:
    """Make this the only worker of its model, for as long as the returned file is open.

    By TorchServe's source, an idle worker waits for requests under a lock that a busy one needs to
    go on, so that two would hold up each other's streams. It keeps starting the second one, but the
    log then says why nothing comes of it.

    Raises:
        LaunchError: there is another one.
    """
    place = (model_dir / _PLACE_NAME).open("w")
    deadline = time.monotonic() + _PLACE_SECONDS
    while True:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return place
        except BlockingIOError:
            if time.monotonic() > deadline:
                place.close()
                raise LaunchError(
                    "Another worker of this model runs already, and one serves all of its "
                    "requests; scale the model back with min_worker=1&max_worker=1."
                ) from None
            time.sleep(0.1)


def _read_through_a_buffer() -> None:
    """Let ``ts`` read so from now on; to be called between two messages, as ``initialize`` is."""
    from ts.protocol import otf_message_handler

    otf_message_handler._retrieve_buffer = FrameReader()


def _watch_parent() -> None:
    """End this process as soon as its parent, the frontend, has ended.

    At once and without farewell: the engine ends by itself when its connection does.
    """
    parent = os.pidfd_open(os.getppid())

    def end_with_parent(timeout: float | None = None) -> None:
        if select.select([parent], [], [], timeout)[0]:
            os._exit(0)

    threading.Thread(target=end_with_parent, name="watch-parent", daemon=True).start()
    # The main thread may be the first to see the frontend's end, and returns from ``ts``. Taking
    # the interpreter apart would then take seconds, in which the thread above does not run.
    atexit.register(end_with_parent, _PARENT_SECONDS)
