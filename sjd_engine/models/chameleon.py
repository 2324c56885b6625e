"""What Lumina-mGPT and Anole share: the Chameleon transformer, its vocabulary and its VQGAN.

Image code c is the token IMGIMG...Z whose letters spell the digits of c, A for 0 to J for 9. Files beside the weights:
    tokenizer.json, or Meta's text_tokenizer.json, here or in tokenizer/
    vqgan.ckpt, here or in tokenizer/, where the weights have no model.vqmodel.decoder.*
"""

import torch

from sjd_engine.errors import CheckpointError
from sjd_engine.models.base import ImageModel
from sjd_engine.models.block import Transformer
from sjd_engine.models.checkpoint import Checkpoint, read_tensors
from sjd_engine.models.detokenizers.vqgan import VQGANDecoder
from sjd_engine.models.vocabulary import Vocabulary
from sjd_engine.models.weights import Piece, block_config, hf_layout, load_transformer, rows

CONFIG = {  # what Hugging Face's ChameleonConfig has where config.json is silent
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
VQ_PREFIX = "model.vqmodel."
LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


class ChameleonModel(ImageModel):
    """The parts; prompts and grammar are those of a family."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.vocabulary = Vocabulary(
            checkpoint,
            *("tokenizer.json", "text_tokenizer.json", "tokenizer/text_tokenizer.json"),
            remedy="put the tokenizer folder of Meta's Chameleon there",
        )
        self.first_code, self.num_codes = self.vocabulary.codes(lambda code: f"IMGIMG{str(code).translate(LETTERS)}Z")
        self.beginning, self.separator = self.vocabulary.token("<s>"), self.vocabulary.token("<reserved08706>")
        self.image_start, self.image_end = self.vocabulary.token("<racm3:break>"), self.vocabulary.token("<eoss>")
        self.detokenizer = self._load_detokenizer(checkpoint).to(device)
        self.check_codes(checkpoint)
        self.transformer = self._load_transformer(checkpoint, device, dtype)

    def _load_transformer(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Transformer:
        config = {**CONFIG, **checkpoint.config}
        block = block_config(config, checkpoint, theta=1e4, qk_norm=True)
        self.vocabulary.check_fits(config["vocab_size"])
        return load_transformer(
            checkpoint,
            block,
            lambda block: {
                "embedding": [Piece.of("model.embed_tokens.weight")],
                "head": [Piece.of("lm_head.weight", rows(self.first_code, self.num_codes))],
                **hf_layout(block, "model"),
            },
            vocab_size=config["vocab_size"],
            num_codes=self.num_codes,
            device=device,
            dtype=dtype,
            ignored=(VQ_PREFIX,),
        )

    def _load_detokenizer(self, checkpoint: Checkpoint) -> VQGANDecoder:
        if has_decoder(checkpoint):
            return VQGANDecoder.from_tensors(checkpoint.stored.part(VQ_PREFIX), checkpoint.path, l2_norm=False)
        for name in ("vqgan.ckpt", "tokenizer/vqgan.ckpt"):
            path = checkpoint.folder / name
            if path.exists():
                return VQGANDecoder.from_tensors(read_tensors(path), path, l2_norm=False)
        raise CheckpointError(f"{checkpoint}: no vqgan.ckpt; put the tokenizer folder of Meta's Chameleon there")


def has_decoder(checkpoint: Checkpoint) -> bool:
    """Whether a decoder of images is stored with the weights. transformers' class has none."""
    return f"{VQ_PREFIX}decoder.conv_in.weight" in checkpoint.stored.shapes
