"""What an operator decides about a server."""

from dataclasses import dataclass

from sjd_engine.models import ImageModel
from sjd_engine.request import at_least

# Of one request; checked before anything is allocated for it.
MAX_IMAGES = 10
MAX_PROMPT_CHARS = 4000
MAX_BODY_BYTES = 1 << 20
MAX_DROPPED_BYTES = 1 << 23  # of a body that is too large
MAX_PREVIEWS = 256
BODY_TIMEOUT = 30.0  # seconds that a client may take to send its body


@dataclass(frozen=True)
class Settings:
    """How requests are served.

    model_name: by which clients ask for the model, and which recipes in images tell; None for its own.
    api_key: asked for on every route but /health, as a bearer token or as the password of a browser's dialogue; None
        lets everybody in.
    max_waiting: images that may wait beside those under way, at least those of one request; more get status 429.
    request_timeout: seconds from a request's arrival to its last image, > 0.
    method: of requests that name none.
    window_size: of requests that name none; None takes the model's default. It is a number, so that a seed gives one
        image whatever the server is busy with; a request may ask for "auto".

    Raises: ValueError, TypeError naming the argument.
    """

    model_name: str | None = None
    api_key: str | None = None
    max_waiting: int = 64
    request_timeout: float = 300.0
    method: str = "maximal"
    window_size: int | None = None

    def __post_init__(self) -> None:
        at_least("max_waiting", self.max_waiting, MAX_IMAGES)
        if not self.request_timeout > 0:
            raise ValueError(f"request_timeout: expected seconds > 0, got {self.request_timeout}")
        if self.api_key == "":
            raise ValueError("api_key: expected a secret, got an empty text; leave it out to let everybody in")

    def window_of(self, model: ImageModel) -> int:
        """Of requests that name none. Raises: ValueError where it is larger than the model's largest."""
        window = model.defaults.window_size if self.window_size is None else self.window_size
        if at_least("window_size", window, 1) > model.defaults.max_window_size:
            raise ValueError(f"window_size: expected at most {model.defaults.max_window_size}, got {window}")
        return window
