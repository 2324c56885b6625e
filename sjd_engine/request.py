"""The arguments of `generate`, checked before anything runs."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sjd_engine.decoder import check_seed, check_seeds, check_tree
from sjd_engine.images import OUTPUT_TYPES
from sjd_engine.methods import DRAFTED_INITS, INITS, NEIGHBOURS, Method, check_init, check_relaxation, get_method
from sjd_engine.models.base import ImageModel, Prompt
from sjd_engine.models.draft_head import FILE
from sjd_engine.models.fine_tuned import WEIGHTS
from sjd_engine.models.neighbours import FILE as NEIGHBOURS_FILE
from sjd_engine.ops import Tree
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule
from sjd_engine.sjd2 import VERIFIED
from sjd_engine.zipar import ZipDecoder

AUTO = "auto"
EAGLE_WINDOW = 6  # longer chains are seldom accepted whole
SJD2_WINDOW = 32


@dataclass(frozen=True)
class Request:
    """Everything a call needs, with the family's defaults filled in. One prompt and one seed for each image.

    window_size: tokens of a forward pass; the most of them where auto_window lets every pass have its own.
    arguments: of `generate` with every default filled in, those left out that the method has no use for: plain values,
        that draw these images again with the prompts and seeds.
    """

    prompts: list[Prompt]
    seeds: list[int]
    method: Method
    window_size: int
    auto_window: bool
    params: SamplingParams
    schedule: Schedule
    init: str
    reuse_threshold: float
    tree: Tree | None
    relaxation: float | None
    zipar_window: int | None
    steps: int | None
    verify: str | None
    output_type: str
    arguments: dict[str, Any]
    group: Hashable  # images of requests with equal groups can be decoded in one batch

    @property
    def num_slots(self) -> int:
        """Slots of the cache that an image takes behind its prompt. Those of a tree lie behind its chain's, to the
        image's very end; a chain's past the image's end need none."""
        return self.schedule.num_tokens + (0 if self.tree is None else self.window_size)


def make_request(
    model: ImageModel,
    prompt: str | Sequence[str],
    *,
    method: str = "maximal",
    window_size: int | str | None = AUTO,
    seed: int | Sequence[int] = 0,
    num_images_per_prompt: int = 1,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    init: str | None = None,
    reuse_threshold: float = 0.5,
    tree: tuple[int, int] | None = None,
    relaxation: float | None = None,
    zipar_window: int | None = None,
    steps: int | None = None,
    verify: str | None = None,
    output_type: str = "pil",
) -> Request:
    """Check the arguments of `Engine.generate` against `model`.

    Raises: ValueError, TypeError naming the argument, what was expected, what it got and what to do.
    """
    texts = text_list("prompt", prompt)
    if not texts:
        raise ValueError("prompt: expected at least one prompt, got an empty list")
    at_least("num_images_per_prompt", num_images_per_prompt, 1)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt] * len(texts)
    else:
        negatives = list(text_list("negative_prompt", negative_prompt))
        if len(negatives) != len(texts):
            raise ValueError(f"negative_prompt: expected one text or {len(texts)}, got {len(negatives)}")
    chosen: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    params = replace(model.defaults.params, **{name: value for name, value in chosen.items() if value is not None})
    if negative_prompt is not None and params.guidance_scale == 1:
        raise ValueError("negative_prompt: needs guidance_scale > 1, got 1")
    size = (model.image_size[0] if height is None else height, model.image_size[1] if width is None else width)
    schedule = model.schedule(*size)
    decoding = get_method(method)
    if decoding.denoises and model.denoiser is None:
        raise ValueError(
            f"method: {method} reads noise, which {model.name} was not fine-tuned for: load a model that was (with "
            f"{WEIGHTS} in its folder; examples/sjd2/train.py makes one), or take another method"
        )
    if decoding.trained and not decoding.denoises and model.draft_head is None:
        raise ValueError(
            f"method: {method} drafts with a trained head, which {model.name} has none of: put {FILE} beside its "
            "weights (examples/emoji/train_eagle.py makes one), or take another method"
        )
    if window_size is None and decoding.trained:
        window_size = AUTO  # its own default, below
    elif window_size is None or (tree is not None and window_size == AUTO):  # AUTO weighs chains of drafts alone
        window_size = model.defaults.window_size
    auto_window = window_size == AUTO and not decoding.one_token and not decoding.trained
    largest = model.defaults.max_window_size
    if decoding.trained:
        largest = SJD2_WINDOW if decoding.denoises else EAGLE_WINDOW
    window_size = min(check_window(window_size, largest), schedule.num_tokens)
    window_size = 1 if decoding.one_token else window_size
    chosen_tree = check_tree(tree, decoding, window_size)
    if not reuse_threshold > 0:
        raise ValueError(f"reuse_threshold: expected > 0, got {reuse_threshold}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    prompts = [model.build_prompt(text, negative, *size) for text, negative in zip(texts, negatives, strict=True)]
    relaxation = check_relaxation(decoding, relaxation)
    zipar_window = check_zipar_window(decoding, zipar_window, schedule)
    if zipar_window is not None:
        window_size, auto_window = ZipDecoder.window_size_of(schedule, zipar_window), False
    init = check_init(model.defaults.init if init is None else init)
    if init == NEIGHBOURS and model.neighbour_tables is None:
        raise ValueError(
            f"init: {init} draws from tables, which {model.name} has none of: put {NEIGHBOURS_FILE} beside its weights "
            "(`sjd fit-drafts` makes it), or take another init"
        )
    if decoding.trained and init in DRAFTED_INITS:
        raise ValueError(f"init: {method} has a drafter already, got {init!r}; choose one of {', '.join(INITS)}")
    steps, verify = check_denoising(decoding, steps, verify)
    grid = (schedule.rows, schedule.cols, *sorted(schedule.forced.items()))
    resolved: dict[str, Any] = {
        "method": method,
        "window_size": AUTO if auto_window else window_size,
        **asdict(params),
        "negative_prompt": negative_prompt,
        "height": size[0],
        "width": size[1],
        "init": init,
        "reuse_threshold": reuse_threshold if decoding.refresh == "reuse" else None,
        "tree": tree,
        "relaxation": relaxation,
        "zipar_window": zipar_window,
        "steps": steps,
        "verify": verify,
    }
    return Request(
        prompts=[prompt for prompt in prompts for _ in range(num_images_per_prompt)],
        seeds=seed_list(seed, len(prompts) * num_images_per_prompt),
        method=decoding,
        window_size=window_size,
        auto_window=auto_window,
        params=params,
        schedule=schedule,
        init=init,
        reuse_threshold=reuse_threshold,
        tree=chosen_tree,
        relaxation=relaxation,
        zipar_window=zipar_window,
        steps=steps,
        verify=verify,
        output_type=output_type,
        arguments={name: value for name, value in resolved.items() if value is not None},
        group=(
            method,
            window_size,
            auto_window,
            chosen_tree,
            init,
            relaxation,
            zipar_window,
            steps,
            verify,
            grid,
            params.in_use(model.num_codes),
        ),
    )


def check_window(value: int | str, largest: int) -> int:
    """`value`, or `largest` where it is "auto"."""
    if value == AUTO:
        return largest
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"window_size: expected an int or {AUTO!r}, got {value!r}")
    return at_least("window_size", value, 1)


def check_zipar_window(method: Method, value: int | None, schedule: Schedule) -> int | None:
    """`value`, a third of the columns where it is None; None for methods that decode drafts. Raises: ValueError,
    TypeError."""
    if not method.rows_at_once:
        if value is not None:
            raise ValueError(f"zipar_window: {method.name} has none, only zipar and zipar-adaptive; leave it out")
        return None
    return -(-schedule.cols // 3) if value is None else at_least("zipar_window", value, 1)


def check_denoising(method: Method, steps: int | None, verify: str | None) -> tuple[int | None, str | None]:
    """Both, with "clean" where `verify` is None; None for methods that do not denoise. Raises: ValueError,
    TypeError."""
    if not method.denoises:
        for name, value in (("steps", steps), ("verify", verify)):
            if value is not None:
                raise ValueError(f"{name}: {method.name} has none, only sjd2; leave it out")
        return None, None
    if verify not in (None, *VERIFIED):
        raise ValueError(f"verify: expected one of {', '.join(VERIFIED)}, got {verify!r}")
    return None if steps is None else at_least("steps", steps, 1), verify or VERIFIED[0]


def text_list(argument: str, value: str | Sequence[str]) -> list[str]:
    """One or more texts, each with something in it."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise TypeError(f"{argument}: expected str or a list of str, got {type(value).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{argument}: expected str or a list of str, got {text!r}")
        if not text.strip():
            raise ValueError(f"{argument}: expected words, got {text!r}")
    return list(texts)


def seed_list(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed for each of `count` images: seed + i for one int, or the given ones. Raises: ValueError, TypeError."""
    if not isinstance(seed, Sequence) and not getattr(seed, "ndim", 0):
        first = check_seed("seed", seed)
        return [check_seed("seed", first + i) for i in range(count)]
    seeds = check_seeds("seed", seed)
    if len(seeds) != count:
        raise ValueError(f"seed: expected one int or {count}, one for each image, got {len(seeds)}")
    return seeds


def at_least(argument: str, value: int, least: int) -> int:
    """`value`, an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected >= {least}, got {value}")
    return value
