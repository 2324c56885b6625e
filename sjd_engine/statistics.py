"""Statistics of images as JSON lines: written by `sjd generate --stats` and `sjd eval generate`, read by `sjd plot`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sjd_engine.outputs import ImageStats


def as_record(stats: ImageStats, token_ids: Tensor) -> dict[str, Any]:
    """JSON values of one image: its passes, and its codes [rows * cols]."""
    return {
        "nfe": stats.nfe,
        "num_tokens": stats.num_tokens,
        "seconds": round(stats.seconds, 4),
        "committed_per_pass": stats.committed_per_pass,
        "window_sizes": stats.window_sizes,
        "acceptance_map": stats.acceptance_map.tolist(),
        "token_ids": token_ids.tolist(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was torn off is left out.

    Raises: ValueError naming the first line that is none.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number == len(lines):  # the writer was stopped within it
                break
            raise ValueError(f"{path}: line {number} is no JSON: {error}") from None
        if record is not None:
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number}: expected an object, got {line[:40]!r}")
            records.append(record)
    return records


def read_statistics(path: Path) -> list[dict[str, Any]]:
    """The records of images that were drawn, of a file or of the manifest in a folder.

    Raises: ValueError where there is none.
    """
    records = [record for record in read_lines(path) if "committed_per_pass" in record]
    if not records:
        raise ValueError(f"{path}: holds no statistics; `sjd generate --stats` and `sjd eval generate` write them")
    return records
