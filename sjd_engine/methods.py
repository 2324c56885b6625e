"""The decoding methods: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a pass accepts and refreshes drafts; the words are those of `kernels.reference.verify`.

    accept: "ratio" or "match".
    refresh: "fresh", "reuse", "maximal", "gumbel" or "argmax".
    lossless: the images follow exactly the law of one-token-a-pass sampling.
    one_token: the window is one token, whatever the caller asks.
    trained: drafts come from the draft head of the checkpoint.
    summary: a line for people.
    """

    name: str
    accept: str
    refresh: str
    lossless: bool
    summary: str
    one_token: bool = False
    trained: bool = False

    @property
    def takes_tree(self) -> bool:
        """Drafts are verified by laws that siblings can be drawn from, and no head reads what a path leaves behind."""
        return self.accept == "ratio" and self.lossless and not self.trained


METHODS = {
    method.name: method
    for method in (
        Method("ar", "match", "gumbel", True, "one token a pass", one_token=True),
        Method("jacobi", "match", "argmax", False, "greedy Jacobi: deterministic, equals greedy decoding"),
        Method("sjd", "ratio", "fresh", True, "speculative Jacobi decoding (arXiv 2410.01699)"),
        Method("sjd++", "ratio", "reuse", False, "SJD with reuse of confident drafts (arXiv 2512.07503); lossy"),
        Method("maximal", "ratio", "maximal", True, "drafts refreshed by maximal coupling (arXiv 2510.24211)"),
        Method("gumbel", "ratio", "gumbel", True, "drafts refreshed with position-keyed Gumbel noise"),
        Method("eagle", "ratio", "fresh", True, "chains of drafts by a trained head (arXiv 2401.15077)", trained=True),
        Method("exact", "match", "gumbel", True, "the very image that `ar` gives for the same seed"),
    )
}
TRAINING_FREE = tuple(name for name, method in METHODS.items() if not method.trained)  # for any model
INITS = ("random", "left-repeat", "above-repeat", "left-sample", "above-sample")


def get_method(name: str) -> Method:
    """The method called `name`. Raises: ValueError that lists the known names."""
    if name not in METHODS:
        raise ValueError(f"method: unknown {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def check_init(init: str) -> str:
    """`init` itself. Raises: ValueError that lists the known names."""
    if init not in INITS:
        raise ValueError(f"init: unknown {init!r}; known initialisations: {', '.join(INITS)}")
    return init
