"""The Emu3-Gen family: images of many shapes and one area, whose tokens say where a line ends.

Prompt:         <bos> {prompt} masterpiece, film grained, best quality. <|image start|> {rows}*{cols} <|image token|>
Unconditional:  <bos> {negative prompt} <|image start|> {rows}*{cols} <|image token|>, by default the authors' negative
                prompt
Image:          rows of codes, each closed by eol; then eof, <|image end|>, eos
Checkpoint:     the authors' or Hugging Face's layout; tokenizer.json, which the authors' lacks: take that of
                BAAI/Emu3-Gen-hf. The detokenizer is in Hugging Face's weights (vqmodel.*), or in the folder
                vision_tokenizer: BAAI/Emu3-VisionTokenizer
Source: Wang et al., "Emu3", 2024 (arXiv 2409.18869).
"""

import torch

from sjd_engine.errors import CheckpointError
from sjd_engine.models.base import Context, Defaults, ImageModel, Prompt
from sjd_engine.models.checkpoint import Checkpoint
from sjd_engine.models.detokenizers.movq import MoVQDecoder
from sjd_engine.models.vocabulary import Vocabulary
from sjd_engine.models.weights import Piece, block_config, hf_layout, load_transformer, rows
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "emu3"
CONFIG = {  # what Hugging Face's Emu3TextConfig has where config.json is silent
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
}
LAYOUTS = (  # (prefix, head, detokenizer): the authors', Hugging Face's as stored, Hugging Face's in memory since 5.0
    ("model", "lm_head", None),
    ("text_model.model", "text_model.lm_head", "vqmodel."),
    ("model.text_model", "lm_head", "model.vqmodel."),
)
SIDE = 720  # of the square image; the others have its area, about
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (21, 9), (9, 21))
POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
BEGINNING, LINE_END, FRAME_END, END = "<|extra_203|>", "<|extra_200|>", "<|extra_201|>", "<|extra_204|>"


class Emu3Model(ImageModel):
    """See the module."""

    defaults = Defaults(16, SamplingParams(guidance_scale=3.0, top_k=2048))

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.name = checkpoint.name
        self.vocabulary = Vocabulary(checkpoint, "tokenizer.json", remedy="put that of BAAI/Emu3-Gen-hf there")
        self.first_code, self.num_codes = self.vocabulary.codes(lambda code: f"<|visual token {code:06d}|>")
        self._beginning, self._image_start, self._image_token = (
            self.vocabulary.token(name) for name in (BEGINNING, "<|image start|>", "<|image token|>")
        )
        self._line_end, *self._end = (
            self.vocabulary.token(name) for name in (LINE_END, FRAME_END, "<|image end|>", END)
        )
        found = [names for names in LAYOUTS if f"{names[0]}.embed_tokens.weight" in checkpoint.shapes]
        prefix, head, detokenizer = found[0] if found else LAYOUTS[0]
        self.detokenizer = self._load_detokenizer(checkpoint, detokenizer).to(device)
        self.check_codes(checkpoint)
        config = {**CONFIG, **checkpoint.config.get("text_config", checkpoint.config)}
        block = block_config(config, checkpoint, theta=1e6)
        self.vocabulary.check_fits(config["vocab_size"])
        self.transformer = load_transformer(
            checkpoint,
            block,
            lambda block: {
                "embedding": [Piece.of(f"{prefix}.embed_tokens.weight")],
                "head": [Piece.of(f"{head}.weight", rows(self.first_code, self.num_codes))],
                **hf_layout(block, prefix),
            },
            vocab_size=config["vocab_size"],
            num_codes=self.num_codes,
            device=device,
            dtype=dtype,
            ignored=() if detokenizer is None else (detokenizer,),
        )
        self.sizes = shapes(SIDE, self.detokenizer.patch_size)
        self.image_size = self.sizes[0]

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        return str(checkpoint.config.get("model_type")).lower() == FAMILY

    def _load_detokenizer(self, checkpoint: Checkpoint, prefix: str | None) -> MoVQDecoder:
        if prefix is not None:
            return MoVQDecoder.from_tensors(checkpoint.part(prefix), checkpoint.path)
        folder = checkpoint.folder / "vision_tokenizer"
        if not folder.is_dir():
            raise CheckpointError(f"{checkpoint}: no vision_tokenizer; put BAAI/Emu3-VisionTokenizer there")
        return MoVQDecoder.from_tensors(Checkpoint(folder).part(""), folder)

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        schedule = self.schedule(height, width)
        return Prompt(
            self._context("prompt", prompt + POSITIVE, schedule),
            self._context("negative_prompt", NEGATIVE if negative_prompt is None else negative_prompt, schedule),
        )

    def _context(self, argument: str, text: str, schedule: Schedule) -> Context:
        size = self.vocabulary.encode(f"{schedule.rows}*{schedule.cols}")
        image = [self._image_start, *size, self._image_token]
        return self.token_context(argument, [self._beginning, *self.vocabulary.encode(text), *image], schedule)

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        patch = self.detokenizer.patch_size
        line_end, *end = (self.num_codes + token for token in (self._line_end, *self._end))
        return Schedule.with_line_breaks(height // patch, width // patch, line_end, end)


def shapes(side: int, patch: int) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of an image with the area of a square, for each of `RATIOS` of width to height."""

    def scaled(pixels: int, other: int) -> int:
        return round(pixels * side / (pixels * other) ** 0.5 / patch) * patch

    return tuple((scaled(high, wide), scaled(wide, high)) for wide, high in RATIOS)
