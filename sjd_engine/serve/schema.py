"""What goes over the wire: requests, checked before anything is allocated, and replies.

Source: https://platform.openai.com/docs/api-reference/images/create
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from sjd_engine.outputs import ImageStats
from sjd_engine.serve.settings import MAX_IMAGES, MAX_PREVIEWS, MAX_PROMPT_CHARS

Text = Annotated[StrictStr, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LARGEST = 1 << 20  # of small whole numbers; the engine says what each of them may be
Positive = Annotated[StrictInt, Field(ge=1, le=LARGEST)]


class ImageRequest(BaseModel):
    """The body of POST /v1/images/generations. Fields from `seed` on are this engine's; see `Engine.generate`.

    Whatever is not named here is refused, as are values that this server would have to ignore.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    model: StrictStr | None = Field(None, max_length=256)
    n: StrictInt | None = Field(1, ge=1, le=MAX_IMAGES, description="Images of the prompt; image i has seed + i.")
    size: StrictStr | None = Field(None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: StrictStr | None = Field(None, max_length=256, description="Accepted, and neither stored nor used.")
    stream: StrictBool | None = Field(False, description="Server-sent events: previews, then the images.")
    partial_images: StrictInt | None = Field(
        None, ge=0, le=MAX_PREVIEWS, description="Previews of an image at most, spread evenly over its tokens."
    )

    seed: StrictInt | None = Field(
        None, ge=-(1 << 63), le=(1 << 64) - MAX_IMAGES, description="None: a random one, which the reply tells."
    )
    method: StrictStr | None = Field(None, max_length=32)
    window_size: Positive | Literal["auto"] | None = None
    negative_prompt: Text | None = None
    guidance_scale: Number | None = None
    temperature: Number | None = None
    top_k: StrictInt | None = Field(None, ge=0, le=LARGEST)
    top_p: Number | None = None
    init: StrictStr | None = Field(None, max_length=32)
    reuse_threshold: Number | None = None
    tree: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    steps: Positive | None = None
    verify: StrictStr | None = Field(None, max_length=32)


ENGINE_FIELDS = (
    "negative_prompt",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "init",
    "reuse_threshold",
    "steps",
    "verify",
)  # that `Engine.submit` takes as they are


class Stats(BaseModel):
    """How one image was decoded; see `sjd_engine.ImageStats`."""

    seed: int
    method: str
    nfe: int
    num_tokens: int
    step_compression: float
    seconds: float
    acceptance_map: list[list[int]]

    @staticmethod
    def of(stats: ImageStats, seed: int, method: str) -> "Stats":
        return Stats(
            seed=seed,
            method=method,
            nfe=stats.nfe,
            num_tokens=stats.num_tokens,
            step_compression=stats.step_compression,
            seconds=stats.seconds,
            acceptance_map=stats.acceptance_map.tolist(),
        )


class ImageData(BaseModel):
    b64_json: str
    stats: Stats


class Look(BaseModel):
    """What the images of a reply have in common, in the words of the images API."""

    size: str
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class ImagesReply(Look):
    created: int
    data: list[ImageData]


class PartialImage(Look):
    """A preview: committed tokens, the drafts behind them, grey beyond.

    grid: rows and columns of tokens; the first committed_cells of them, row by row, are final, and those up to
    drafted_cells are drafts. num_tokens and the counts beside it include tokens that no cell shows.
    """

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    created_at: int
    b64_json: str
    partial_image_index: int
    image_index: int
    num_committed: int
    num_drafted: int
    num_tokens: int
    grid: tuple[int, int]
    committed_cells: int
    drafted_cells: int
    nfe: int


class CompletedImage(Look):
    type: Literal["image_generation.completed"] = "image_generation.completed"
    created_at: int
    b64_json: str
    image_index: int
    stats: Stats


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class MethodInfo(BaseModel):
    """A decoding method that the model has everything for.

    takes_window: window_size matters; chains of trained drafters have a length of their own, and `ar` is one token.
    """

    name: str
    summary: str
    lossless: bool
    takes_window: bool


class ModelInfo(BaseModel):
    """A model, and what a client needs to know to ask it for images."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sjd_engine"
    methods: list[MethodInfo]
    default_method: str
    default_window_size: int
    max_window_size: int
    sizes: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]
