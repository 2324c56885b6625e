"""What happens inside the window of one image, whatever decodes it.

Distance 0 is the frontier: the first position that is not committed. For every pass and distance:

    overlap   sum min(p, p') = 1 - TV(p, p') of the position's laws in this pass and the one before: the chance that the
              ratio test accepts a draft that was refreshed in the pass before
    kept      1 where the pass left the position's draft as it was. Maximal coupling, and equality with the position's
              own draw, keep a draft exactly where they would have accepted it, so this is acceptance behind the
              first rejection, too
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_engine.decoder import JacobiDecoder
from sjd_engine.ops import warp

from .statistics import Curve

MOST_REFRESHES = 32


class WindowTrace:
    """Watches every pass of images that are decoded one at a time while it is open. Takes time: seconds of a traced
    image mean nothing.

    Args:
        window: the largest window.
    """

    def __init__(self, window: int):
        self._window = window
        self.overlap, self.kept = Curve(window), Curve(window)
        self.overlap_by_refreshes = Curve(MOST_REFRESHES)
        self._forget()

    def _forget(self) -> None:
        self._laws = torch.empty(0)  # of the previous pass, from position `first` on
        self._first = 0
        self._seen: dict[int, int] = {}  # passes that each position has been in the window

    def __enter__(self) -> "WindowTrace":
        trace, verify = self, JacobiDecoder.verify
        self._verify = verify

        def traced(decoder: JacobiDecoder, logits: Tensor, *arguments: Any, **words: Any) -> Any:
            first = int(decoder.num_committed[0])
            drafts = decoder.draft_ids[0].clone()
            laws = trace.laws(decoder, logits, first)
            result = verify(decoder, logits, *arguments, **words)
            if len(laws):
                trace.note(first, laws, (decoder.draft_ids[0] == drafts).numpy())
            return result

        JacobiDecoder.verify = traced
        return self

    def __exit__(self, *_: object) -> None:
        JacobiDecoder.verify = self._verify

    @staticmethod
    def laws(decoder: JacobiDecoder, logits: Tensor, first: int) -> Tensor:
        """[R, V]: the target law of every row of the first sequence that predicts a token of the image."""
        rows = min(logits.shape[-2], decoder.num_tokens - first)
        parameters = {name: None if column is None else column[:1] for name, column in decoder.warp_arguments.items()}
        return warp(logits[..., :1, :rows, :], **parameters)[0][0].softmax(-1)

    def note(self, first: int, laws: Tensor, same: np.ndarray) -> None:
        """A pass whose rows predict positions `first`, `first` + 1, …; `same` tells the positions it left alone."""
        if first == 0 and self._first > 0:  # the next image
            self._forget()
        rows = np.arange(len(laws))
        drafted = rows[: min(len(laws), self._window - 1)]  # the last row has no draft in the window
        self.kept.add(drafted, same[first + drafted].astype(np.float64))
        both = np.arange(first, min(self._first + len(self._laws), first + len(laws)))
        if len(both):
            overlap = laws[both - first].minimum(self._laws[both - self._first]).sum(-1).numpy()
            self.overlap.add(both - first, overlap)
            self.overlap_by_refreshes.add(np.array([self._seen.get(int(t), 0) for t in both]), overlap)
        for t in range(first, first + len(laws)):
            self._seen[t] = self._seen.get(t, 0) + 1
        self._laws, self._first = laws, first

    def document(self) -> dict[str, list[float | None]]:
        """The curves; refreshes count the passes that drew or kept the draft before."""
        return {
            "overlap_by_distance": self.overlap.means(),
            "kept_by_distance": self.kept.means(),
            "overlap_by_refreshes": self.overlap_by_refreshes.means(),
        }
