"""`sglang serve MODEL --model-type sjd`: SGLang's command, this project's server.

Interface: serve backends, version 1 (sglang/cli/serve_backends.py), found by the entry point `sglang.serve_backends`.
"""

from typing import Any


def create_backend() -> Any:
    """The backend that SGLang asks for. It is taken where --model-type names it, never by itself: what a checkpoint is
    decoded with is the user's choice."""
    from sglang.cli.serve_backends import ServeBackend

    return ServeBackend(api_version=1, run=run, requires_model_path=False)


def run(request: Any) -> None:
    """`sjd serve` with the arguments behind `sglang serve`, until it is stopped.

    Args:
        request: its `argv` has the options of `sjd serve`; --model-path is --model.
    """
    from sjd_engine.cli import main

    names = {"--model-path": "--model"}
    parts = [argument.partition("=") for argument in request.argv]
    main(["serve", *(names.get(name, name) + sign + value for name, sign, value in parts)])
