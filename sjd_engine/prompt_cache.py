"""Keys and values of prompts, computed once and shared by every image that begins with them."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models import ImageModel
from sjd_engine.models.base import Context
from sjd_engine.native import PagesExhausted


@dataclass
class Resident:
    """A prompt in the cache: its row, and how many images hold it."""

    row: int
    users: int = 0


class PromptCache:
    """Prompts without their last token, which is the anchor of an image's first window.

    A prompt stays after its last image, so that the next one finds it, until its pages are wanted: the unconditional
    prompt of a family is computed once for all requests.

    Args:
        model: computes them.
        kv_cache: on whose pages they stand; a sequence for each prompt that may be held at once.
        share_beginnings: a prompt that begins like another shares the full pages of the common part. Its keys and
            values were then computed in another pass, with another rounding.
    """

    def __init__(self, model: ImageModel, kv_cache: PagedKVCache, *, share_beginnings: bool):
        self.model, self.kv_cache, self.share_beginnings = model, kv_cache, share_beginnings
        self._residents: dict[Hashable, Resident] = {}  # least recently used first
        self._free_rows = list(range(len(kv_cache.context_lens)))

    def __len__(self) -> int:
        return len(self._residents)

    def hold(self, context: Context) -> int:
        """The row of `context` without its last token, of which there is at least one. `drop` lets it go again.

        Raises: PagesExhausted; nothing has changed then.
        """
        resident = self._residents.pop(context.key, None)
        if resident is None:
            if not self._free_rows and not self.evict():
                raise PagesExhausted(f"all {len(self)} prompts of the cache are held by images")
            resident = Resident(self._compute(context))
        self._residents[context.key] = resident  # now the most recently used
        resident.users += 1
        return resident.row

    def drop(self, context: Context) -> None:
        """One image fewer begins with `context`."""
        self._residents[context.key].users -= 1

    def evict(self, keep: Iterable[Context] = ()) -> bool:
        """Give back the pages of the prompt that no image has asked for the longest; False where all are held or among
        those to `keep`."""
        kept = {context.key for context in keep}
        for key, resident in self._residents.items():
            if resident.users == 0 and key not in kept:
                del self._residents[key]
                self._release(resident.row)
                return True
        return False

    def _compute(self, context: Context) -> int:
        row, num_tokens = self._free_rows.pop(), len(context) - 1
        ids = context.ids[:num_tokens] if self.share_beginnings else ()
        try:
            cached = self.kv_cache.admit(row, num_tokens, ids, first_position=context.first_position)
        except BaseException:
            self._free_rows.append(row)
            raise
        try:
            if cached < num_tokens:
                embeddings = self.model.context_embeddings(context)[None, cached:num_tokens]
                self.model.transformer(embeddings, self.kv_cache.select(slice(row, row + 1), cached))
            self.kv_cache.publish(row, len(ids))
        except BaseException:
            self._release(row)
            raise
        self.kv_cache.context_lens[row] = num_tokens
        return row

    def _release(self, row: int) -> None:
        self.kv_cache.release(row)
        self._free_rows.append(row)
