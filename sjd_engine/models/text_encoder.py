"""The T5 encoder that text-conditional LlamaGen reads its prompts through."""

import html
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sjd_engine.errors import CheckpointError


class TextEncoder:
    """Prompts to vectors. The encoder is loaded with the first prompt that is not known yet, and kept until `release`;
    vectors are kept.

    Args:
        folder: a T5 checkpoint in Hugging Face's layout, with tokenizer.json.
        max_tokens: of a prompt, the end token among them; longer ones are cut.
        device, dtype: of the encoder.
    """

    def __init__(self, folder: Path, max_tokens: int, device: torch.device, dtype: torch.dtype):
        self.folder, self.max_tokens, self.device, self.dtype = folder, max_tokens, device, dtype
        self._vectors: dict[str, Tensor] = {}
        self._loaded: tuple[Tokenizer, Any] | None = None

    def encode(self, text: str) -> Tensor:
        """[N, width] vectors of the tokens of `text`, in lower case, without entities of HTML, N <= max_tokens.

        Raises: CheckpointError where the encoder cannot be loaded; RuntimeError without transformers.
        """
        text = " ".join(html.unescape(text).lower().split())
        if text not in self._vectors:
            self._vectors[text] = self._encode(text)
        return self._vectors[text]

    def release(self) -> None:
        """Let go of the encoder's weights."""
        self._loaded = None

    @torch.inference_mode()
    def _encode(self, text: str) -> Tensor:
        tokenizer, model = self._loaded = self._loaded or self._load()
        ids = torch.tensor([tokenizer.encode(text).ids], device=self.device)
        return model(input_ids=ids).last_hidden_state[0]

    def _load(self) -> tuple[Tokenizer, Any]:
        try:
            from transformers import T5EncoderModel
        except ImportError:
            raise RuntimeError("prompt: LlamaGen reads texts through a T5 encoder; install transformers") from None
        try:
            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            model = T5EncoderModel.from_pretrained(self.folder, dtype=self.dtype, use_safetensors=True)
        except Exception as error:  # tokenizers raises a bare Exception
            raise CheckpointError(f"{self.folder}: not a T5 checkpoint ({error})") from None
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)
        return tokenizer, model.eval().to(device=self.device)
