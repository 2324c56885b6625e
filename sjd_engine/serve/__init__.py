"""An HTTP server: the images API of OpenAI over one engine's continuous batching, and a page to watch it decode.

sjd serve --model emoji                                      # http://127.0.0.1:8000

app = sjd_engine.serve.make_app(engine)                      # an ASGI application, for servers of one's own
sjd_engine.serve.run(engine, port=8000)                      # until SIGTERM; what was accepted is answered first
"""

from sjd_engine.errors import require

require("serve", "fastapi", "prometheus_client", "uvicorn")

from sjd_engine.serve.app import make_app  # noqa: E402
from sjd_engine.serve.server import run  # noqa: E402
from sjd_engine.serve.settings import Settings  # noqa: E402

__all__ = ["Settings", "make_app", "run"]
