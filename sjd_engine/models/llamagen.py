"""The LlamaGen family: classes of ImageNet, or texts through a T5 encoder, to images; a Llama with rotations in 2-D.

Prompt:         c2i: a class of ImageNet, by its name or its number. t2i: a text, at most 120 vectors of flan-t5-xl
Unconditional:  c2i: the class that training put in place of all others. t2i: as many of the trained empty vectors as
                the text has
Image:          codes, nothing forced
Positions:      image token i stands at row i behind all conditioning positions, 1 or 120, whose rows of the table are
                zero. The authors pad texts on the left and let nothing see the padding: here it is not computed, and a
                text of N vectors begins at position 120 - N
Checkpoint:     one file of the authors' (c2i_B_256.pt, t2i_XL_stage2_512.pt, ...), whose name ends in the size of its
                images and whose sizes are read from the tensors; beside it vq_ds16_c2i.pt or vq_ds16_t2i.pt and, for
                t2i, a folder flan-t5-xl, fetched where it is missing
Source: Sun et al., "Autoregressive Model Beats Diffusion: LlamaGen", 2024 (arXiv 2406.06525).
"""

import re
from functools import cache
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models import hub
from sjd_engine.models.base import Context, Defaults, ImageModel, Prompt
from sjd_engine.models.block import BlockConfig
from sjd_engine.models.checkpoint import Checkpoint, read_tensors
from sjd_engine.models.detokenizers.vqgan import VQGANDecoder
from sjd_engine.models.rope import grid_rope_table
from sjd_engine.models.text_encoder import TextEncoder
from sjd_engine.models.weights import (
    Layout,
    Piece,
    load,
    load_transformer,
    pad_head_columns,
    pad_heads,
    pair_halves,
    rows,
)
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "llamagen"
SIDE_IN_NAME = r"_(\d{2,4})\.pth?$"
PATCH = 16
HEAD_DIMS = {3200: 100, 4096: 128}  # width of the transformer -> of a head, where it isn't HEAD_DIM; files don't say
HEAD_DIM = 64
CLASSES, TEXT = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
TEXT_PREFIXES = ("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")
ENCODER = "google/flan-t5-xl"


class TextProjection(nn.Module):
    """Vectors of the text encoder to the transformer's width: two layers, GELU between.

    Args:
        hidden_size: of the transformer.
        width: of the encoder.
        max_tokens: vectors of a text.
    """

    def __init__(self, hidden_size: int, width: int, max_tokens: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(hidden_size, width))
        self.w_out = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.unconditional = nn.Parameter(torch.empty(max_tokens, width))

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, width] -> [N, hidden]."""
        return F.linear(F.gelu(F.linear(vectors.to(self.w_in.dtype), self.w_in), approximate="tanh"), self.w_out)


class LlamaGenModel(ImageModel):
    """See the module."""

    first_code = 0

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        found = re.search(SIDE_IN_NAME, checkpoint.path.name)
        if found is None:
            raise CheckpointError(f"{checkpoint}: expected the size of its images in its name, as in c2i_B_256.pt")
        side = int(found[1])
        self.name, self.image_size, self.sizes = checkpoint.name, (side, side), ((side, side),)
        shapes = checkpoint.shapes
        self.text_conditional = TEXT in shapes
        table = TEXT_PREFIXES[1] if self.text_conditional else CLASSES
        if table not in shapes:
            raise CheckpointError(f"{checkpoint}: missing {table}")
        num_conditioning = shapes[TEXT_PREFIXES[1]][0] if self.text_conditional else 1
        self.num_codes, hidden_size = shapes["tok_embeddings.weight"]
        block = read_block(shapes, num_conditioning + (side // PATCH) ** 2)
        vq = checkpoint.folder / f"vq_ds{PATCH}_{'t2i' if self.text_conditional else 'c2i'}.pt"
        self.detokenizer = VQGANDecoder.from_tensors(read_tensors(vq), vq, l2_norm=True).to(device)
        self.check_codes(checkpoint)
        embedding = [Piece.of("tok_embeddings.weight")]
        self._num_classes = 0
        if not self.text_conditional:
            embedding.append(Piece.of(CLASSES))
            self._num_classes = shapes[CLASSES][0] - 1
        self.transformer = load_transformer(
            checkpoint,
            block,
            lambda block: {"embedding": embedding, "head": [Piece.of("output.weight")], **layout(block)},
            vocab_size=self.num_codes + (shapes[CLASSES][0] if self._num_classes else 0),
            num_codes=self.num_codes,
            rope=grid_rope_table(num_conditioning, side // PATCH, block.unpadded_head_dim, block.rope_theta),
            device=device,
            dtype=dtype,
            ignored=("freqs_cis", *(TEXT_PREFIXES if self.text_conditional else ())),
        )
        self.defaults = Defaults(16, SamplingParams(guidance_scale=4.0, top_k=2000))
        if self.text_conditional:
            self.defaults = Defaults(16, SamplingParams(guidance_scale=7.5, top_k=1000))
            with torch.device("meta"):
                self.projection = TextProjection(hidden_size, shapes[TEXT][1], num_conditioning).to(dtype)
            pieces = {"w_in": TEXT, "w_out": "cls_embedding.cap_proj.fc2.weight", "unconditional": TEXT_PREFIXES[1]}
            load(
                self.projection,
                {name: [Piece.of(key)] for name, key in pieces.items()},
                checkpoint,
                device,
                ignored=tuple(key for key in shapes if not key.startswith(TEXT_PREFIXES)),
            )
            folder = checkpoint.folder / ENCODER.rpartition("/")[2]
            self.encoder = TextEncoder(
                folder if folder.is_dir() else hub.fetch(ENCODER), num_conditioning, device, dtype
            )

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        keys = {"tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight"}
        return checkpoint.path.is_file() and keys <= checkpoint.shapes.keys()

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        self.refuse_negative(negative_prompt)
        self.check_size(height, width)
        if self.text_conditional:
            return self._text_prompt(prompt)
        chosen, nothing = class_number(prompt, self._num_classes), self._num_classes
        return Prompt(Context.of_tokens([self.num_codes + chosen]), Context.of_tokens([self.num_codes + nothing]))

    def _text_prompt(self, prompt: str) -> Prompt:
        vectors = self.encoder.encode(prompt)
        first = len(self.projection.unconditional) - len(vectors)
        nothing = self.projection.unconditional[first:]
        with torch.inference_mode():
            return Prompt(
                Context(("text", prompt), embeddings=self.projection(vectors), first_position=first),
                Context(("no text", first), embeddings=self.projection(nothing), first_position=first),
            )

    def context_embeddings(self, context: Context) -> Tensor:
        if self.text_conditional:
            self.encoder.release()  # all prompts of the request are encoded once its first image begins
        return super().context_embeddings(context)

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        return Schedule(height // PATCH, width // PATCH)


def read_block(shapes: dict[str, torch.Size], max_positions: int) -> BlockConfig:
    """The block of a checkpoint, whose sizes its tensors tell."""
    hidden_size = shapes["tok_embeddings.weight"][1]
    head_dim = HEAD_DIMS.get(hidden_size, HEAD_DIM)
    gate = shapes.get("layers.0.feed_forward.w1.weight", (0,))
    return BlockConfig(
        num_layers=len([key for key in shapes if re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", key)]),
        hidden_size=hidden_size,
        intermediate_size=gate[0],
        num_heads=hidden_size // head_dim,
        num_kv_heads=hidden_size // head_dim,
        unpadded_head_dim=head_dim,
        max_positions=max_positions,
        rope_theta=1e4,
        norm_eps=1e-5,
    )


def layout(block: BlockConfig) -> Layout:
    """Final norm and blocks with the authors' names."""
    hidden_size, pad, halves = block.hidden_size, pad_heads(block), pair_halves(block.unpadded_head_dim)
    found: Layout = {"norm": [Piece.of("norm.weight")]}
    for i in range(block.num_layers):
        source, target = f"layers.{i}", f"blocks.{i}"
        joined = f"{source}.attention.wqkv.weight"
        found |= {
            f"{target}.norm1": [Piece.of(f"{source}.attention_norm.weight")],
            f"{target}.norm2": [Piece.of(f"{source}.ffn_norm.weight")],
            f"{target}.wqkv": [
                Piece.of(joined, rows(0, hidden_size), halves, pad),
                Piece.of(joined, rows(hidden_size, hidden_size), halves, pad),
                Piece.of(joined, rows(2 * hidden_size, hidden_size), pad),
            ],
            f"{target}.wo": [Piece.of(f"{source}.attention.wo.weight", pad_head_columns(block))],
            f"{target}.w_gate_up": [Piece.of(f"{source}.feed_forward.{x}.weight") for x in ("w1", "w3")],
            f"{target}.w_down": [Piece.of(f"{source}.feed_forward.w2.weight")],
        }
    return found


@cache
def class_names() -> list[str]:
    """The classes of ImageNet by number."""
    return (files("sjd_engine") / "assets" / "imagenet" / "classes.txt").read_text(encoding="utf-8").splitlines()


def class_number(prompt: str, num_classes: int) -> int:
    """The class that a prompt names or numbers. Raises: ValueError where it does neither."""
    text = prompt.strip()
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    names = class_names()[:num_classes]
    for candidates in (names, [name.lower() for name in names]):
        if text in candidates:
            return candidates.index(text)
        text = text.lower()
    raise ValueError(
        f"prompt: expected a class of ImageNet, by name like {names[1]!r} or by number 0..{num_classes - 1}, "
        f"got {prompt!r}"
    )
