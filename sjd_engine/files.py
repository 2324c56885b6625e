"""Files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends, and vanishes where the block raises.

    Raises: OSError where the folder cannot be written.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """`content` as a file; its folder is made where it is missing. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(content)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """`value` as a JSON file, see `write_whole`."""
    write_whole(path, json.dumps(value, indent=indent).encode() + b"\n")
