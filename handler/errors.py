"""Every exception pagetier raises on purpose, and the HTTP status each one answers with.

::

    EngineError                 500  something of ours broke
    ├── ConfigError             500  a setting is unknown or impossible (at start)
    ├── ModelError              500  the model cannot be read or is not supported (at start)
    ├── LaunchError             500  the server cannot be started (at start)
    ├── InvalidRequest          400  the request itself is wrong
    │   ├── PromptTooLong       400  it cannot fit, however long it waits
    │   └── NotFound            404  unknown route or model
    ├── QueueFull               429  try again later
    ├── DeadlineExceeded        504  the request's own timeout passed
    ├── Draining                503  no requests are taken any more; another server may
    └── EngineDead              503  the engine process is gone; the server restarts it

Messages are one clear sentence: what is wrong, with the value, and what to do. They reach users
as they stand, so they hold no paths of the server. This module knows nothing of HTTP beyond the
numbers.
"""

from typing import ClassVar


class EngineError(Exception):
    """Base of all errors that pagetier raises on purpose."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    # Seconds after which the same request may succeed, where that can be said.
    retry_after: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(EngineError):
    """A setting is unknown, of the wrong type, or impossible; ``param`` names it."""


class ModelError(EngineError):
    """The model cannot be read, or its architecture is not supported."""


class LaunchError(EngineError):
    """TorchServe cannot be started, or its worker does not become ready."""


class InvalidRequest(EngineError):
    """The request is wrong; ``param`` names the field where one can be named."""

    status = 400
    type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt and requested tokens exceed what the engine can ever hold."""

    code = "context_length_exceeded"


class NotFound(InvalidRequest):
    """No such route or model."""

    status = 404


class QueueFull(EngineError):
    """As many requests are queued as are allowed; ``retry_after`` is in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The request's own timeout passed before it was done."""

    status = 504
    type = "timeout_error"


class Draining(EngineError):
    """The server takes no new requests, since it is about to be stopped."""

    status = 503
    type = "service_unavailable_error"
    code = "draining"
    retry_after = 5


class EngineDead(EngineError):
    """The engine process is gone."""

    status = 503
    type = "service_unavailable_error"
