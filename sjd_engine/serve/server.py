"""The process that listens."""

import math

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from sjd_engine.engine import Engine
from sjd_engine.serve.app import make_app
from sjd_engine.serve.settings import Settings

# uvicorn's, and what the engine's loop says.
LOGGING = {
    **LOGGING_CONFIG,
    "loggers": {**LOGGING_CONFIG["loggers"], "sjd_engine": {"handlers": ["default"], "level": "INFO"}},
}


def run(engine: Engine, settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT; the port opens once the engine is warm.

    A signal closes the port. What was accepted is decoded and answered before this returns, which takes at most the
    settings' request_timeout; a second SIGINT does not wait.

    Args:
        engine, settings: see `make_app`.
        host: the address to listen at; the default is reached from this machine alone.
        port: 0 takes a free one, which the log tells.
    """
    settings = Settings() if settings is None else settings
    patience = math.ceil(settings.request_timeout) + 1  # every request has ended by then
    app = make_app(engine, settings)
    uvicorn.run(app, host=host, port=port, log_config=LOGGING, server_header=False, timeout_graceful_shutdown=patience)
