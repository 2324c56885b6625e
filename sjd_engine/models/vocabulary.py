"""Tokenizers of checkpoints: words to ids, and the ids of the tokens that a family's grammar names."""

from collections.abc import Callable

from tokenizers import Tokenizer

from sjd_engine.errors import CheckpointError
from sjd_engine.models.checkpoint import Checkpoint


class Vocabulary:
    """A checkpoint's tokenizer.

    Args:
        checkpoint: whose folder holds it.
        names: files it may be in; the first that exists is taken.
        remedy: what to do where none does.
    Raises: CheckpointError where no file exists, or it is no tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, *names: str, remedy: str = "the checkpoint is incomplete"):
        path = next((checkpoint.folder / name for name in names if (checkpoint.folder / name).exists()), None)
        if path is None:
            raise CheckpointError(f"{checkpoint}: no {' or '.join(names)}; {remedy}")
        self.path = path
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{path}: not a tokenizer file ({error})") from None

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def __contains__(self, name: str) -> bool:
        return self.tokenizer.token_to_id(name) is not None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the tokens that the file adds around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, name: str) -> int:
        """The id of one token. Raises: CheckpointError where there is none of this name."""
        found = self.tokenizer.token_to_id(name)
        if found is None:
            raise CheckpointError(
                f"{self.path}: no token {name!r}; expected the tokenizer of the model's own checkpoint"
            )
        return found

    def check_fits(self, vocab_size: int) -> None:
        """Raises: CheckpointError where the model has embeddings for fewer tokens."""
        if len(self) > vocab_size:
            raise CheckpointError(
                f"{self.path}: expected at most {vocab_size} tokens, as config.json has it, got {len(self)}"
            )

    def codes(self, name: Callable[[int], str]) -> tuple[int, int]:
        """The tokens of image codes 0, 1, ...: the id of the first, and how many there are.

        Args:
            name: of a code's token.
        Raises: CheckpointError where their ids do not follow each other.
        """
        first, count = self.token(name(0)), 1
        while (found := self.tokenizer.token_to_id(name(count))) is not None:
            if found != first + count:
                raise CheckpointError(f"{self.path}: expected id {first + count} for {name(count)!r}, got {found}")
            count += 1
        return first, count
