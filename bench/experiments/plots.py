"""Figures of the experiments, from their documents. Colours are those of Okabe and Ito, and every line has a marker of
its own, so that neither colour blindness nor a grey printer loses one."""

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sjd_engine.files import written_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*<>"
MAP_METHODS = ("sjd", "sjd++", "maximal", "exact")
DRIFT_TICKS = (-2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 4)  # nats
MOST_SHOWN = 16  # tokens of a pass, in histograms

matplotlib.rcParams |= {
    "svg.hashsalt": "sjd_engine",  # the same figure is the same file
    "svg.fonttype": "none",  # letters as letters: a figure of outlines is five times as large
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}

Row = dict[str, Any]


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The figures of an experiment's document, as SVG files in `folder`."""
    rows, written = document["rows"], []
    for name, picture in PICTURES.get(document["setup"]["experiment"], {}).items():
        figure = picture(rows) if rows else None
        if figure is not None:
            written.append(save(figure, folder / f"{name}.svg"))
    return written


def save(figure: Figure, path: Path) -> Path:
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    with written_whole(path) as stream:
        stream.write(content.getvalue())
    return path


def panels(count: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4.5}


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows with equal values, in the order of their first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def lines(axis: Axes, series: dict[str, list[Row]], x: str, y: str) -> None:
    """A line for each entry, with the intervals of `y` where it has any."""
    for place, (label, rows) in enumerate(series.items()):
        points = sorted((row for row in rows if row[x] != "auto"), key=lambda row: row[x])
        across, up = [row[x] for row in points], [row[y] for row in points]
        if points and isinstance(up[0], list):
            middle, low, high = (np.array(column) for column in zip(*up, strict=True))
            axis.errorbar(across, middle, [middle - low, high - middle], label=label, capsize=2, lw=1.3, **style(place))
        else:
            axis.plot(across, up, label=label, lw=1.3, **style(place))


def logarithmic(axis: Axes, ticks: Iterable[float | str]) -> None:
    """The axis to the right; its ticks are what was measured."""
    axis.set_xscale("log")
    values = sorted({tick for tick in ticks if tick != "auto"})
    axis.set_xticks(values, [format(value, "g") for value in values])
    axis.set_xticks([], minor=True)


def of_widest(rows: Iterable[Row]) -> list[Row]:
    """The rows without top-k at the largest window, or all of them where none is fixed."""
    plain = [row for row in rows if row["top_k"] == 0 and row["method"] != "ar"]
    widest = max((row["window"] for row in plain if row["window"] != "auto"), default="auto")
    return [row for row in plain if row["window"] == widest]


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return {method: found for (method,), found in groups(rows, "method").items()}


# ------------------------------------------------------------------------------------------------------------- figures


def acceleration_map(rows: list[Row]) -> Figure | None:
    """Tokens a pass by place in the image: each pass is shared by the tokens that it commits."""
    chosen = [row for row in of_widest(rows) if row["method"] in MAP_METHODS and row["init"] == "random"]
    if not chosen:
        return None
    maps = [1 / np.array(row["pass_share_map"]) for row in chosen]
    top = max(float(picture.max()) for picture in maps)
    figure, axes = panels(len(chosen), 2.5, 2.7)
    for axis, row, picture in zip(axes, chosen, maps, strict=True):
        image = axis.imshow(picture, cmap="cividis", vmin=1, vmax=top)
        axis.set(title=f"{row['method']}, window {row['window']}", xticks=[], yticks=[])
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, label="tokens a pass", shrink=0.85)
    return figure


def histogram(rows: list[Row]) -> Figure:
    """How many tokens passes commit."""
    chosen = of_widest(rows)
    figure, (axis,) = panels(width=5.4)
    for place, row in enumerate(chosen):
        counts = np.pad(np.array(row["committed_histogram"][1:], dtype=float), (0, MOST_SHOWN))
        counts = np.append(counts[: MOST_SHOWN - 1], counts[MOST_SHOWN - 1 :].sum())
        axis.plot(np.arange(1, MOST_SHOWN + 1), counts / counts.sum(), label=row["method"], lw=1.2, **style(place))
    axis.set(
        title=f"window {chosen[0]['window']}",
        xlabel=f"tokens that a pass commits ({MOST_SHOWN}: or more)",
        ylabel="share of the passes",
        ylim=(0, None),
    )
    axis.set_xticks(range(1, MOST_SHOWN + 1, 2))
    axis.legend(fontsize=7.5, ncols=2)
    return figure


def pareto(rows: list[Row]) -> Figure:
    """How far the likelihood of the tokens drifts from that of `ar`, against speed. Lossy methods are hollow."""
    figure, axes = panels(2)
    pieces = by_method(row for row in rows if row["method"] != "ar" and row["top_k"] == 0)
    for axis, (key, title) in zip(axes, (("nfe_vs_ar", "passes"), ("seconds_vs_ar", "seconds")), strict=True):
        for place, (method, found) in enumerate(pieces.items()):
            lossless = found[0]["law"] == "exact"
            drift, faster = (np.array([row[name] for row in found]) for name in ("drift_vs_ar", key))
            errors = {
                "xerr": np.abs(drift[:, 1:] - drift[:, :1]).T,
                "yerr": np.abs(faster[:, 1:] - faster[:, :1]).T,
            }
            look = style(place) | {"markerfacecolor": COLOURS[place % len(COLOURS)] if lossless else "white"}
            label = method if lossless else f"{method} (lossy)"
            axis.errorbar(drift[:, 0], faster[:, 0], **errors, fmt="none", ecolor=look["color"], alpha=0.35, lw=1)
            axis.plot(drift[:, 0], faster[:, 0], linestyle="none", label=label, **look)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_xscale("symlog", linthresh=0.2)
        left, right = axis.get_xlim()
        shown = [tick for tick in DRIFT_TICKS if left <= tick <= right]
        axis.set_xticks(shown, [format(tick, "g") for tick in shown])
        axis.set_xlim(left, right)
        axis.set(xlabel="log p of a token, less that of ar [nats]", ylabel=f"times fewer {title} than ar")
    axes[1].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def against_window(rows: list[Row]) -> Figure:
    """Passes and seconds against the window; the level of "auto" is dashed."""
    figure, axes = panels(2)
    several = by_method(row for row in rows if row["method"] != "ar")
    for axis, key, title in zip(axes, ("nfe", "seconds"), ("passes an image", "seconds an image"), strict=True):
        lines(axis, several, "window", key)
        for place, found in enumerate(several.values()):
            for row in found:
                if row["window"] == "auto":
                    axis.axhline(row[key][0], color=COLOURS[place % len(COLOURS)], ls="--", lw=1)
        axis.set(xlabel="window (dashed: auto)", ylabel=title, ylim=(0, None))
        logarithmic(axis, (row["window"] for found in several.values() for row in found))
    axes[1].legend()
    return figure


def against_top_k(rows: list[Row]) -> Figure:
    """Passes against the number of tokens that are kept."""
    figure, (axis,) = panels(width=5)
    pieces = groups((row for row in rows if row["method"] != "ar"), "method", "window")
    series = {f"{method}, window {window}": found for (method, window), found in pieces.items()}
    kept = {label: [row for row in found if row["top_k"]] for label, found in series.items()}
    lines(axis, kept, "top_k", "nfe")
    for place, found in enumerate(series.values()):
        for row in found:
            if not row["top_k"]:
                axis.axhline(row["nfe"][0], color=COLOURS[place % len(COLOURS)], ls="--", lw=1)
    axis.set(xlabel="top-k (dashed: off)", ylabel="passes an image", ylim=(0, None))
    logarithmic(axis, (row["top_k"] for found in kept.values() for row in found))
    axis.legend()
    return figure


def by_init(rows: list[Row]) -> Figure:
    """Passes with every law of entering drafts."""
    figure, (axis,) = panels(width=5.4)
    pieces = groups((row for row in rows if row["method"] != "ar"), "method", "init")
    several = len({method for method, _ in pieces}) > 1
    series = {f"{method}, {init}" if several else init: found for (method, init), found in pieces.items()}
    lines(axis, series, "window", "nfe")
    axis.set(xlabel="window", ylabel="passes an image")
    logarithmic(axis, (row["window"] for found in series.values() for row in found))
    axis.legend(fontsize=7.5)
    return figure


def laws_in_the_window(rows: list[Row]) -> Figure | None:
    """What limits how many drafts are accepted."""
    traced = [row for row in rows if row["trace"]]
    if not traced:
        return None
    figure, axes = panels(3)
    for axis, key, across, up in zip(
        axes,
        ("overlap_by_distance", "overlap_by_refreshes", "kept_by_distance"),
        ("distance from the frontier", "passes in the window before", "distance from the frontier"),
        ("1 − TV of successive laws", "1 − TV of successive laws", "drafts that a pass leaves as they are"),
        strict=True,
    ):
        for place, row in enumerate(traced):
            curve = [np.nan if value is None else value for value in row["trace"][key]]
            axis.plot(curve, label=f"{row['method']}, window {row['window']}", lw=1.2, markevery=4, **style(place))
        axis.set(xlabel=across, ylabel=up, ylim=(0, 1.02))
    axes[0].legend(fontsize=7.5)
    return figure


def against_tokens(rows: list[Row]) -> Figure:
    """Seconds and passes against the size of the image, with each method's fastest window."""
    figure, axes = panels(2)
    fastest = [min(found, key=lambda row: row["seconds"][0]) for found in groups(rows, "method", "num_tokens").values()]
    for axis, key, title in zip(axes, ("seconds", "nfe"), ("seconds an image", "passes an image"), strict=True):
        lines(axis, by_method(fastest), "num_tokens", key)
        logarithmic(axis, (row["num_tokens"] for row in fastest))
        axis.set_yscale("log")
        axis.set(xlabel="tokens of the image", ylabel=title)
    axes[0].legend()
    return figure


def against_batch(rows: list[Row]) -> Figure:
    """Seconds an image and latency against the images at once."""
    figure, axes = panels(2)
    titles = ("seconds an image, of all together", "seconds until an image is complete")
    pieces = groups(rows, "method", "window")
    series = {f"{method}, window {window}": found for (method, window), found in pieces.items()}
    for axis, key, title in zip(axes, ("seconds_per_image", "latency"), titles, strict=True):
        lines(axis, series, "batch", key)
        axis.set(xlabel="images at once", ylabel=title, ylim=(0, None))
        logarithmic(axis, (row["batch"] for row in rows))
    axes[0].legend()
    return figure


def engine_alone(rows: list[Row]) -> Figure:
    """Microseconds of a pass without a model."""
    figure, (axis,) = panels()
    series = {f"{batch} at once": found for (batch,), found in groups(rows, "batch").items()}
    lines(axis, series, "window", "us_per_pass")
    axis.set(xlabel="window", ylabel="µs a pass, without the transformer", ylim=(0, None))
    axis.legend()
    return figure


def on_text(rows: list[Row]) -> Figure:
    """Tokens a pass on text, where 1 is no gain."""
    figure, (axis,) = panels()
    shown = [row for row in rows if row["method"] != "ar"]
    names = [f"{row['method']}\nW {row['window']}" for row in shown]
    middle, low, high = (np.array(column) for column in zip(*(row["step_compression"] for row in shown), strict=True))
    axis.bar(names, middle, yerr=[middle - low, high - middle], capsize=3, color=COLOURS[0], width=0.6)
    axis.axhline(1, color="grey", lw=0.8)
    axis.tick_params(axis="x", labelsize=7)
    axis.set(ylabel="tokens a pass, text of SmolLM2-135M")
    return figure


PICTURES: dict[str, dict[str, Callable[[list[Row]], Figure | None]]] = {
    "methods": {"acceleration_map": acceleration_map, "committed_histogram": histogram, "pareto": pareto},
    "window": {"window": against_window},
    "topk": {"topk": against_top_k},
    "init": {"init": by_init},
    "refinement": {"refinement": laws_in_the_window},
    "resolution": {"resolution": against_tokens},
    "batch": {"batch": against_batch},
    "synthetic": {"synthetic": engine_alone},
    "control": {"control": on_text},
}
