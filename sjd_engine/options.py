"""Options of the command line that several commands have: the arguments of `Engine.generate`."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from sjd_engine.methods import ALL_INITS, METHODS

Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: CUDA where there is one.")]
Model = Annotated[str, typer.Option(help="'emoji' or a checkpoint folder.")]


def sampling(
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "maximal",
    guidance_scale: Annotated[float | None, typer.Option(help=">= 1; 1 turns guidance off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="> 0.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 keeps all tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; a size the model was trained for.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    init: Annotated[str | None, typer.Option(help=", ".join(ALL_INITS) + "; default: the model's.")] = None,
    reuse_threshold: Annotated[float | None, typer.Option(help="Of sjd++, > 0.")] = None,
    tree: Annotated[str | None, typer.Option(help="K,D: up to K candidates for each of D - 1 tokens.")] = None,
    relaxation: Annotated[float | None, typer.Option(help="Of gsd (ranks, >= 0) and lantern (a bound, >= 1).")] = None,
    zipar_window: Annotated[int | None, typer.Option(help="Of zipar: tokens of the row above to wait for.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of sjd2: passes from noise to a draft; default: the model's.")
    ] = None,
    verify: Annotated[str | None, typer.Option(help="Of sjd2: clean (exact, the default) or paper.")] = None,
) -> dict[str, Any]:
    """The arguments of `Engine.generate` that were given. Raises: ValueError naming one that is wrong."""
    given = dict(locals())
    given["tree"] = None if tree is None else pair_of_ints("tree", tree)
    given["relaxation"] = int(relaxation) if relaxation is not None and relaxation.is_integer() else relaxation
    return {name: value for name, value in given.items() if value is not None}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `sampling` behind its own; it gets what they say as `arguments`."""
    own, shared = (inspect.signature(function) for function in (command, sampling))
    parameters = [parameter for name, parameter in own.parameters.items() if name != "arguments"]

    @wraps(command)
    def run(**values: Any) -> None:
        arguments = sampling(**{name: values.pop(name) for name in shared.parameters})
        command(**values, arguments=arguments)

    # What typer reads: the signature and its types.
    every = [*parameters, *shared.parameters.values()]
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return run


def pair_of_ints(option: str, text: str) -> tuple[int, int]:
    """ "3,2" as (3, 2). Raises: ValueError naming the option."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option}: expected two numbers such as 3,3, got {text!r}")
    return int(parts[0]), int(parts[1])


def window_size(text: str) -> int | str:
    """A number, or the text itself, which the engine judges."""
    return int(text) if text.removeprefix("-").isdecimal() else text
