"""`sjd plot`: figures of statistics, as PNG files and one HTML page that needs nothing else."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjd_engine.errors import require
from sjd_engine.files import written_whole
from sjd_engine.statistics import read_statistics
from sjd_engine.trajectory import BEFORE, COMMITTED, KEPT, NEW, OUTSIDE, REDRAWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
LETTERS = {  # of a trajectory: (name, colour)
    OUTSIDE: ("outside the window", "#FFFFFF"),
    BEFORE: ("committed before", "#D9D9D9"),
    COMMITTED: ("committed", "#0072B2"),
    KEPT: ("draft kept", "#56B4E9"),
    REDRAWN: ("draft drawn again", "#E69F00"),
    NEW: ("draft entered", "#F0E442"),
}
DPI = 150

Records = list[dict[str, Any]]


def read(files: list[Path]) -> dict[str, Records]:
    """Statistics by series: a file's stem, or the folder's name of a manifest. Raises: ValueError for two of a name."""
    series: dict[str, Records] = {}
    for file in files:
        name = file.parent.name if file.stem == "manifest" else file.stem
        if name in series:
            raise ValueError(f"plot: two files are called {name!r}; rename one")
        series[name] = read_statistics(file)
    return series


def plot(files: list[Path], folder: Path) -> list[Path]:
    """Draw statistics into `folder`: a PNG for each figure, and report.html with all of them inside.

    Args:
        files: JSON lines of `sjd generate --stats`, or manifests of `sjd eval generate`; each is a series.
    Raises: MissingExtraError; ValueError for files without statistics.
    """
    require("plot", "matplotlib")
    series = read(files)
    folder.mkdir(parents=True, exist_ok=True)
    written, pictures = [], {}
    for name, (draw, caption) in FIGURES.items():
        figure = draw(series)
        if figure is not None:
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=DPI)
            pictures[caption] = content.getvalue()
            written.append(save(folder / f"{name}.png", content.getvalue()))
    return [*written, save(folder / "report.html", page(series, pictures).encode())]


def save(path: Path, content: bytes) -> Path:
    with written_whole(path) as file:
        file.write(content)
    return path


# ------------------------------------------------------------------------------------------------------------ figures


def panels(count: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def acceleration_map(series: dict[str, Records]) -> "Figure":
    """Tokens a pass by place: every pass is shared equally by the tokens that it committed."""
    maps = {}
    for name, records in series.items():
        shares = [1 / np.array(r["committed_per_pass"], dtype=float)[np.array(r["acceptance_map"])] for r in records]
        if len({share.shape for share in shares}) > 1:
            raise ValueError(f"plot: {name!r} holds images of several sizes; give each size a file")
        maps[name] = 1 / np.mean(shares, axis=0)
    top = max(float(picture.max()) for picture in maps.values())
    figure, axes = panels(len(maps), 3.0, 3.0)
    for axis, (name, picture) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(picture, cmap="cividis", vmin=1, vmax=max(top, 1.01))
        axis.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="tokens a pass", shrink=0.8)
    return figure


def acceptance(series: dict[str, Records]) -> "Figure":
    """How many tokens a pass commits: shares, and the share that commits at least as many."""
    figure, (left, right) = panels(2, 4.6, 3.4)
    for place, (name, records) in enumerate(series.items()):
        counts = np.bincount([count for record in records for count in record["committed_per_pass"]])
        shares, style = counts / counts.sum(), {"color": COLOURS[place % len(COLOURS)], "label": name, "lw": 1.4}
        left.step(np.arange(len(shares)), np.where(shares > 0, shares, np.nan), where="mid", **style)
        right.plot(np.arange(len(shares)), shares[::-1].cumsum()[::-1], **style)
    left.set(xlabel="tokens committed by a pass", ylabel="share of passes", yscale="log")
    right.set(xlabel="tokens committed by a pass, at least", ylabel="share of passes", yscale="log")
    right.legend(frameon=False)
    return figure


def offset_acceptance(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """(share of drafts at offset 1, 2, ... that were accepted with all before them, share of those that were reached).

    An offset counts where the window had a draft there; NaN where none had.
    """
    most = max(max(record["window_sizes"]) for record in records)
    drafted, reached, accepted = (np.zeros(most) for _ in range(3))
    for record in records:
        left = record["num_tokens"]
        for window, committed in zip(record["window_sizes"], record["committed_per_pass"], strict=True):
            drafts = min(window, left) - 1
            drafted[:drafts] += 1
            reached[: min(committed, drafts)] += 1
            accepted[: min(committed - 1, drafts)] += 1
            left -= committed
    with np.errstate(invalid="ignore"):
        return accepted / np.where(drafted, drafted, np.nan), accepted / np.where(reached, reached, np.nan)


def offsets(series: dict[str, Records]) -> "Figure":
    """Acceptance by the draft's place in the window."""
    figure, (left, right) = panels(2, 4.6, 3.4)
    for place, (name, records) in enumerate(series.items()):
        of_all, of_reached = offset_acceptance(records)
        style = {"color": COLOURS[place % len(COLOURS)], "label": name, "lw": 1.4}
        across = 1 + np.arange(len(of_all))
        left.plot(across, of_all, **style)
        right.plot(across, of_reached, **style)
    left.set(xlabel="offset of the draft", ylabel="accepted, of those drafted", ylim=(0, 1))
    right.set(xlabel="offset of the draft", ylabel="accepted, of those judged", ylim=(0, 1))
    right.legend(frameon=False)
    return figure


def trajectories(series: dict[str, Records]) -> "Figure | None":
    """The way of the window over the first image of each series; None where no file has one."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    firsts = {name: next((r for r in records if r.get("trajectory")), None) for name, records in series.items()}
    shown = {name: record for name, record in firsts.items() if record is not None}
    if not shown:
        return None
    figure, axes = panels(len(shown), 5.2, 4.4)
    number = {letter: i for i, letter in enumerate(LETTERS)}
    colours = ListedColormap([colour for _, colour in LETTERS.values()])
    for axis, (name, record) in zip(axes, shown.items(), strict=True):
        raster = np.array([[number[letter] for letter in row] for row in record["trajectory"]])
        axis.imshow(raster, cmap=colours, vmin=0, vmax=len(LETTERS) - 1, aspect="auto", interpolation="nearest")
        axis.set(title=f"{name}: {record.get('prompt', '')}", xlabel="position of the token", ylabel="pass")
    handles = [Patch(facecolor=colour, edgecolor="#888888", label=label) for label, colour in LETTERS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


FIGURES: dict[str, tuple[Callable[[dict[str, Records]], "Figure | None"], str]] = {
    "acceleration_map": (acceleration_map, "Where images are committed many tokens a pass"),
    "acceptance": (acceptance, "Tokens that a pass commits"),
    "offsets": (offsets, "Acceptance by the place of a draft in the window"),
    "trajectory": (trajectories, "The window's way over an image, pass by pass"),
}


# --------------------------------------------------------------------------------------------------------------- page

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto } figure { margin: 2rem 0 }
figcaption { font-weight: 600 }"""


def page(series: dict[str, Records], pictures: dict[str, bytes]) -> str:
    """HTML with the figures, by caption, and a table inside."""
    rows = []
    for name, records in series.items():
        nfe, tokens, seconds = (np.array([r[key] for r in records]) for key in ("nfe", "num_tokens", "seconds"))
        cells = (f"{len(records)}", f"{nfe.mean():.1f}", f"{tokens.sum() / nfe.sum():.2f}", f"{seconds.mean():.2f}")
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    figures = [
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(content).decode()}"></figure>'
        for caption, content in pictures.items()
    ]
    heads = "".join(f"<th>{head}</th>" for head in ("series", "images", "NFE", "tokens a pass", "seconds"))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Decoding statistics</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>Decoding statistics</h1>\n"
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>\n"
        f"{chr(10).join(figures)}\n</body></html>\n"
    )
