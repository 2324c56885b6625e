"""EAGLE's draft head: one layer beside a transformer, which guesses how the transformer would go on.

    hidden of slot i, token that follows it  ->  hidden of slot i + 1

It shares the transformer's embedding and image head. Its guesses are fed back to it, so that a chain of them drafts
several tokens.

Source: Li et al., "EAGLE: speculative sampling requires rethinking feature uncertainty" (arXiv 2401.15077), section 4.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sjd_engine.models.block import Block, BlockConfig, Pass, Transformer
from sjd_engine.models.checkpoint import read_tensors
from sjd_engine.models.linear import linear
from sjd_engine.models.weights import assign

FILE = "eagle.safetensors"  # beside the weights of the transformer


class DraftHead(nn.Module):
    """The layer. Its parameters are stored by their names here.

    Args:
        config: of the transformer that it guesses.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = replace(config, num_layers=1)
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.w_in = nn.Parameter(torch.empty(config.hidden_size, 2 * config.hidden_size))
        self.block = Block(self.config, 0)

    def forward(self, embeddings: Tensor, hidden: Tensor, run: Pass) -> Tensor:
        """One causal pass.

        Args:
            embeddings: [S, N, hidden] of the tokens that follow the slots.
            hidden: [S, N, hidden] of the slots, the transformer's or guessed, before the final norm.
        Returns: [S, N, hidden], guesses for the next slots, before the final norm.
        """
        hidden = run.layers.rms_norm(hidden, self.norm, self.config.norm_eps)
        return self.block(linear(torch.cat((embeddings, hidden), -1), self.w_in), run)


def load_draft_head(folder: Path, transformer: Transformer) -> DraftHead | None:
    """The head that lies in a checkpoint's folder, for its transformer; None where there is none.

    Raises: CheckpointError where the file is damaged, or of another transformer.
    """
    path = folder / FILE
    if not path.exists():
        return None
    with torch.device("meta"):
        head = DraftHead(transformer.config)
    assign(head, {name: tensor.to(transformer.dtype) for name, tensor in read_tensors(path).items()}, path)
    return head.to(transformer.embedding.device)
