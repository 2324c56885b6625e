"""`sjd eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sjd_engine import options
from sjd_engine.files import write_json

app = typer.Typer(no_args_is_help=True, help="Draw the images of a benchmark, and score images.")


@app.command()
@options.with_sampling
def generate(
    arguments: dict[str, Any],
    prompts: Annotated[Path, typer.Argument(help="The benchmark's prompt file, or hpsv2's folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    layout: Annotated[
        str,
        typer.Option(help="Whose prompts and folders: plain, geneval, t2i-compbench, hpsv2, parti, coco, llamagen."),
    ] = "plain",
    images_per_prompt: Annotated[
        int | None, typer.Option("--images-per-prompt", "-n", help="Default: what the layout's protocol asks for.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts from the file's beginning.")] = None,
    seed: Annotated[int, typer.Option(help="Image i of the run has seed + i.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the images whose hashes are right.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images decoded together.")] = 8,
    ray: Annotated[bool, typer.Option("--ray", help="Draw on a Ray cluster, or on one started here.")] = False,
    workers: Annotated[int, typer.Option(help="With --ray: engines.")] = 2,
    gpus_per_worker: Annotated[float, typer.Option(help="With --ray: 0 decodes on CPUs.")] = 0,
    cpus_per_worker: Annotated[float, typer.Option(help="With --ray.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Of a cluster; default: RAY_ADDRESS, else one here.")] = None,
    batch_invariant: Annotated[
        bool | None, typer.Option(help="Images that do not depend on the batch; default: in float32.")
    ] = None,
    model: options.Model = "emoji",
    window: Annotated[str | None, typer.Option(help="Tokens of a forward pass; default: the model's.")] = None,
    device: options.Device = None,
) -> None:
    """Draw every image of a prompt file, where and how its evaluator reads them."""
    from sjd_engine.evaluate import generate as drawing
    from sjd_engine.evaluate.layouts import get_layout
    from sjd_engine.scale_out import RayPool

    if window is not None:
        arguments["window_size"] = options.window_size(window)
    chosen = get_layout(layout)
    kept = drawing.generate(
        prompts,
        output,
        chosen,
        drawing.Artist(model, arguments, device, batch_size, batch_invariant),
        seed=seed,
        images_per_prompt=images_per_prompt,
        limit=limit,
        resume=resume,
        source=RayPool(workers, gpus_per_worker, cpus_per_worker, ray_address) if ray else None,
    )
    typer.echo(f"{output / chosen.root}: complete, {kept} images were there; read by {chosen.source}")


@app.command()
def score(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `sjd eval generate` wrote.")],
    against: Annotated[Path | None, typer.Option(help="The run to compare them with.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="That method's run with other seeds: its distance is the unit.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for FID.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights of torch-fidelity's InceptionV3, for FID.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP in Hugging Face's layout.")] = None,
    hpsv2: Annotated[Path | None, typer.Option(help="HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the scores.")] = None,
) -> None:
    """Score images: by networks whose weights are here, and beside another run by tests that need none."""
    from sjd_engine.evaluate import score as scoring

    rows, notes = scoring.score(
        runs, against=against, calibration=calibration, real=real, inception=inception, clip=clip, hpsv2=hpsv2
    )
    typer.echo(scoring.table(rows))
    for note in notes:
        typer.echo(f"not computed: {note}")
    if output is not None:
        write_json(output, {"scores": rows, "not_computed": notes}, indent=1)
