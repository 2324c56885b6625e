"""The command line: `sjd generate`, `redraw`, `eval`, `plot`, `serve`, `fit-drafts`, `convert` and `doctor`.

Exit status 0, 2 (bad arguments) or 1 (failure, nothing written).
"""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sjd_engine import options
from sjd_engine.evaluate.cli import app as evaluate

if TYPE_CHECKING:
    from sjd_engine.outputs import ImageStats

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
convert = typer.Typer(no_args_is_help=True, help="Rewrite a checkpoint in a form that loads safely.")
app.add_typer(convert, name="convert")
app.add_typer(evaluate, name="eval")


@app.command()
@options.with_sampling
def generate(
    arguments: dict[str, Any],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG file; -N is added before .png where n > 1.")
    ] = Path("out.png"),
    model: options.Model = "emoji",
    window: Annotated[str, typer.Option(help="Tokens of a forward pass, or 'auto': the fastest.")] = "auto",
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    n: Annotated[int, typer.Option("--num-images", "-n", help="Images to draw.")] = 1,
    stats: Annotated[Path | None, typer.Option(help="JSON lines of every pass, for `sjd plot`.")] = None,
    device: options.Device = None,
) -> None:
    """Draw a prompt and write PNG files, with the recipe inside."""
    from sjd_engine.engine import Engine
    from sjd_engine.images import save_png
    from sjd_engine.recipe import recipe_of
    from sjd_engine.trajectory import watch, write_statistics

    paths = [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(n)]
    check_writable(output)
    arguments |= {"window_size": options.window_size(window), "seed": seed, "num_images_per_prompt": n}
    engine = Engine(model, device=device)
    if stats is None:
        out = engine.generate(prompt, **arguments)
    else:
        out, trajectories = watch(engine, prompt, **arguments)
        write_statistics(stats, prompt, out, trajectories)
    output.parent.mkdir(parents=True, exist_ok=True)
    for i, (path, image) in enumerate(zip(paths, out.images, strict=True)):
        save_png(image, path, recipe_of(engine, model, prompt, out, i))
        typer.echo(f"{path}: {arguments['method']}, {told(out.stats[i])}")


@app.command("redraw")
def redraw_image(
    image: Annotated[Path, typer.Argument(help="PNG that this package wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")],
    device: options.Device = None,
) -> None:
    """Draw an image again from the recipe inside it, and tell whether the pixels are the same."""
    from sjd_engine.recipe import redraw

    check_writable(output)
    same, stats = redraw(image, output, device)
    typer.echo(f"{output}: {'the same pixels' if same else 'other pixels'}; {told(stats)}")


@app.command()
def plot(
    statistics: Annotated[
        list[Path], typer.Argument(help="Files of `generate --stats`, manifests of `eval generate`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the figures.")],
) -> None:
    """Draw statistics: acceleration map, acceptance, the window's way; PNG files and one HTML page."""
    from sjd_engine import plot as drawing

    for path in drawing.plot(statistics, output):
        typer.echo(path)


@app.command()
def serve(
    model: options.Model = "emoji",
    host: Annotated[str, typer.Option(help="Address to listen at; the default is reached from this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SJD_API_KEY", help="Asked for on every route but /health."),
    ] = None,
    method: Annotated[str, typer.Option(help="Of requests that name none.")] = "maximal",
    window: Annotated[int | None, typer.Option(help="Of requests that name none; default: the model's.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Images decoded together.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Images that may wait beside them; more get status 429.")] = 64,
    request_timeout: Annotated[float, typer.Option(help="Seconds of a request, waiting included.")] = 300.0,
    batch_invariant: Annotated[
        bool | None, typer.Option(help="Images bit for bit those of their seeds alone; default: in float32.")
    ] = None,
    device: options.Device = None,
) -> None:
    """Serve images over HTTP: OpenAI's images API, and a page to watch them appear."""
    from sjd_engine.engine import Engine
    from sjd_engine.serve import Settings, run

    settings = Settings(
        model_name=model,
        api_key=api_key,
        max_waiting=max_waiting,
        request_timeout=request_timeout,
        method=method,
        window_size=window,
    )
    engine = Engine(model, device=device, max_batch_size=max_batch_size, batch_invariant=batch_invariant)
    run(engine, settings, host=host, port=port)


@app.command("fit-drafts")
def fit_drafts(
    prompts: Annotated[Path, typer.Argument(help="Text file, a prompt a line.")],
    model: Annotated[str, typer.Option(help="'emoji' or a checkpoint folder.")] = "emoji",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: beside the model's weights.")] = None,
    n: Annotated[int, typer.Option("--num-images", "-n", help="Images of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: CUDA where there is one.")] = None,
) -> None:
    """Draw images and count which codes stand side by side: the tables of `--init neighbours`."""
    from sjd_engine.engine import Engine
    from sjd_engine.models import checkpoint_folder
    from sjd_engine.models.neighbours import FILE
    from sjd_engine.neighbours import NeighbourTables

    path = checkpoint_folder(model) / FILE if output is None else output
    check_writable(path, ".safetensors")
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    engine = Engine(model, device=device)
    out = engine.generate(
        [line for line in lines if line], seed=seed, num_images_per_prompt=n, output_type="codes", window_size=16
    )
    grid = engine.model.schedule(*engine.model.image_size)
    NeighbourTables.fit(out.token_ids.cpu().unflatten(1, (grid.rows, grid.cols)), engine.model.num_codes).save(path)
    typer.echo(f"{path}: {len(out.token_ids):,} images of {grid.rows}x{grid.cols} codes")


@convert.command("cosmos")
def convert_cosmos(
    archive: Annotated[Path, typer.Argument(help="decoder.jit of Cosmos-1.0-Tokenizer-DV8x16x16.")],
    output: Annotated[Path, typer.Argument(help=".safetensors file to write.")],
) -> None:
    """SimpleAR's detokenizer: TorchScript to safetensors, without running the archive."""
    from sjd_engine.models.detokenizers import cosmos

    num_weights = cosmos.convert(archive, output)
    typer.echo(f"{output}: {num_weights:,} weights")


@convert.command("anole")
def convert_anole(
    source: Annotated[Path, typer.Argument(help="Folder of GAIR/Anole-7b-v0.1: holds models/7b and tokenizer.")],
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
) -> None:
    """Meta's layout to Hugging Face's: a pickle to safetensors, without running it."""
    from sjd_engine.models import anole

    num_weights = anole.convert(source, output)
    typer.echo(f"{output}: {num_weights:,} weights")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Load 'emoji' or a checkpoint, and tell its memory too.")] = None,
) -> None:
    """Tell versions and what runs the decoding ops, and why."""
    import torch

    from sjd_engine import attention, native, ops
    from sjd_engine.kv_cache import PAGE_SIZE
    from sjd_engine.loading import default_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    typer.echo(f"python        {platform.python_version()} on {platform.machine()}")
    for package in ("sjd-engine", "torch", "numpy", "safetensors", "tokenizers", "transformers", "triton"):
        try:
            typer.echo(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package:<13} not installed")
    typer.echo(f"device        {device}, {torch.get_num_threads()} threads")
    typer.echo(f"dtype         {str(default_dtype(device)).removeprefix('torch.')} by default")
    runs = ops.backend(device)
    typer.echo(f"verify        {runs.name}: {runs.reason}")
    pages = ops.kv_ops(device)
    typer.echo(f"pages         {pages.name}, {PAGE_SIZE} tokens each by default: {pages.reason}")
    chosen = attention.backend(device, page_size=PAGE_SIZE, dtype=default_dtype(device), head_dim=64)
    typer.echo(f"attention     {chosen.name}: {chosen.reason}; {attention.OVERRIDE} may name another:")
    for name, spec in attention.ATTENTIONS.items():
        obstacle = attention.missing(name, device.type)
        typer.echo(f"  {name:<13} {'no: ' + obstacle if obstacle else 'yes'}; {spec}")
    if native.available():
        archs = ", ".join(native.cuda_archs()) or "none"
        typer.echo(f"compiled      CPU ops for {native.isa()}; CUDA for {archs}")
        try:
            for name, (major, minor), memory in native.cuda_devices():
                typer.echo(f"gpu           {name}, sm_{major}{minor}, {memory / 2**30:.0f} GiB")
        except RuntimeError as error:
            typer.echo(f"gpu           none: {error}")
    else:
        typer.echo(f"compiled      no: {native.why_not()}")
    if model is not None:
        tell_memory(model)


def tell_memory(name: str) -> None:
    """What a model takes: its weights, the keys and values of an image, and the most that loading it took."""
    import resource

    import torch

    from sjd_engine.loading import load
    from sjd_engine.models.linear import nbytes

    def peak() -> float:
        kilobyte = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e6

    before, model = peak(), load(name)
    transformer, schedule = model.transformer, model.schedule(*model.image_size)
    sequences = 2 if model.defaults.params.guidance_scale > 1 else 1
    weights = nbytes(transformer) / 1e6, nbytes(model.detokenizer) / 1e6
    kept = sequences * schedule.num_tokens * transformer.kv_bytes / 1e6
    typer.echo(f"model         {model.name}, {'x'.join(map(str, model.image_size))} pixels, {transformer.dtype}")
    typer.echo(f"weights       transformer {weights[0]:,.1f} MB, detokenizer {weights[1]:,.1f} MB")
    typer.echo(f"kv cache      {kept:,.1f} MB an image: {sequences} x {schedule.num_tokens} tokens, beside the prompts")
    typer.echo(f"peak memory   {peak():,.0f} MB of this process, {before:,.0f} MB of them before it was loaded")
    if model.device.type == "cuda":
        typer.echo(f"gpu memory    {torch.cuda.max_memory_allocated() / 1e6:,.0f} MB of the GPU")


def told(stats: "ImageStats") -> str:
    """An image's passes, for people."""
    return (
        f"{stats.num_tokens} tokens in {stats.nfe} passes (NFE), "
        f"{stats.step_compression:.2f} tokens a pass, {stats.seconds:.2f} s"
    )


def check_writable(output: Path, suffix: str = ".png") -> None:
    """Refuse an output that can't be written before any work, and make nothing. Raises: ValueError naming it."""
    if output.suffix.lower() != suffix:
        raise ValueError(f"output: expected a {suffix} file, got {str(output)!r}")
    if output.is_dir():
        raise ValueError(f"output: {str(output)!r} is a folder; name a {suffix} file in it")
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output: cannot write {str(output)!r}: {str(nearest)!r} is not a writable folder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `sjd`; None for the arguments of the process."""
    from sjd_engine.errors import SJDError

    try:
        app(arguments)
    except (ValueError, TypeError) as error:
        sys.exit(report(error, 2))
    except (SJDError, OSError, RuntimeError) as error:
        sys.exit(report(error, 1))


def report(error: BaseException, status: int) -> int:
    typer.echo(f"sjd: {error}", err=True)
    return status


if __name__ == "__main__":
    main()
