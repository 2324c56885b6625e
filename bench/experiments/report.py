"""Tables for people, and documents on disk: JSON with everything, CSV with a line for each row."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sjd_engine.files import written_whole


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of the document's row, and how it is written.

    pattern: of a number; of the value of an interval, whose bounds follow in brackets where `bounds`.
    """

    title: str
    key: str
    pattern: str = ""
    bounds: bool = False

    def text(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None or value != value:
            return ""
        if isinstance(value, list):
            shown = format(value[0], self.pattern)
            return f"{shown} [{value[1]:{self.pattern}}, {value[2]:{self.pattern}}]" if self.bounds else shown
        return format(value, self.pattern) if self.pattern else str(value)


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    document: "setup", "rows" and perhaps "skipped", ready for JSON.
    columns: of its table.
    notes: lines above it.
    """

    document: dict[str, Any]
    columns: Sequence[Column]
    notes: Sequence[str] = ()

    def show(self, console: Console) -> None:
        for note in self.notes:
            console.print(note, highlight=False)
        table = Table(box=None, pad_edge=False)
        shown = [c for c in self.columns if any(c.text(row) for row in self.document["rows"])]
        for column in shown:
            table.add_column(column.title, justify="right" if column.pattern else "left")
        for row in self.document["rows"]:
            table.add_row(*(column.text(row) for column in shown))
        console.print(table)
        for skipped in self.document.get("skipped", ()):
            console.print(f"skipped {skipped['method']}, window {skipped['window']}: {skipped['reason']}")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers of a row; an interval becomes three of them."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list) and len(value) == 3 and all(isinstance(x, float) for x in value):
            out |= {key: value[0], f"{key}_low": value[1], f"{key}_high": value[2]}
        elif not isinstance(value, list | dict):
            out[key] = value
    return out


def as_json(document: dict[str, Any], indent: int | None = None) -> str:
    """Strict JSON: what is not a number is null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and value - value != 0 else value

    return json.dumps(strict(document), indent=indent, allow_nan=False)


def summary(document: dict[str, Any]) -> str:
    """One line: the document without histograms, maps and curves."""
    return as_json(document | {"rows": [flat(row) for row in document["rows"]]})


def write(result: Result, folder: Path, name: str) -> list[Path]:
    """`name`.json and `name`.csv in `folder`; both replace what stood there only when they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [flat(row) for row in result.document["rows"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), restval="")
    writer.writeheader()
    writer.writerows(lines)
    contents = {f"{name}.json": as_json(result.document, indent=1) + "\n", f"{name}.csv": text.getvalue()}
    for file, content in contents.items():
        with written_whole(folder / file) as stream:
            stream.write(content.encode())
    return [folder / file for file in contents]
