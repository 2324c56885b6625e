"""The decoding methods: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a pass accepts and refreshes drafts; the words are those of `kernels.reference.verify`.

    accept: "ratio" or "match".
    refresh: "fresh", "reuse", "maximal", "gumbel" or "argmax".
    lossless: the images follow exactly the law of one-token-a-pass sampling.
    summary: a line for people.
    one_token: the window is one token, whatever the caller asks.
    trained: needs a part of the checkpoint that was trained for it: the draft head that drafts, or with `denoises` the
        denoiser, which reads noise in the place of drafts.
    acceptance: how drafts are judged, see `kernels.acceptance`; all but "token" run on the slow reference: compare
        their passes, not their seconds.
    rows_at_once: "fixed" or "adaptive" where grid rows are decoded side by side, with no drafts; see `kernels.zipar`.
    relaxation: default of the number that says how much more is accepted, least_relaxation its smallest value; None
        where there is none.
    """

    name: str
    accept: str
    refresh: str
    lossless: bool
    summary: str
    one_token: bool = False
    trained: bool = False
    denoises: bool = False
    acceptance: str = "token"
    rows_at_once: str = ""
    relaxation: float | None = None
    least_relaxation: float = 0.0

    @property
    def takes_tree(self) -> bool:
        """Each draft is verified by itself, by a law that siblings can be drawn from, and no head reads what a path
        leaves behind."""
        return self.accept == "ratio" and self.acceptance == "token" and self.lossless and not self.trained


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
        Method(
            "sjd2",
            "ratio",
            "maximal",
            True,
            "drafts denoised from noise, by a model fine-tuned for it (arXiv 2510.08994)",
            trained=True,
            denoises=True,
        ),
        Method("exact", "match", "gumbel", True, "the very image that `ar` gives for the same seed"),
        Method(
            "sjd-block",
            "ratio",
            "fresh",
            True,
            "SJD that accepts drafts as a block (arXiv 2403.10444)",
            acceptance="block",
        ),
        Method(
            "gsd",
            "ratio",
            "fresh",
            False,
            "SJD that judges a draft by the tokens like it, `relaxation` ranks up and down (arXiv 2508.07747); lossy",
            acceptance="group",
            relaxation=7,
        ),
        Method(
            "lantern",
            "ratio",
            "fresh",
            False,
            "SJD where neighbours in the codebook may add `relaxation` - 1 of p(d) (arXiv 2410.03355); lossy",
            acceptance="neighbours",
            relaxation=2.0,
            least_relaxation=1.0,
        ),
        Method(
            "zipar",
            "match",
            "gumbel",
            False,
            "grid rows side by side, `zipar_window` tokens apart (arXiv 2412.04062); lossy",
            rows_at_once="fixed",
        ),
        Method(
            "zipar-adaptive",
            "match",
            "gumbel",
            False,
            "zipar whose rows begin once their first token is accepted; lossy",
            rows_at_once="adaptive",
        ),
    )
}
TRAINING_FREE = tuple(name for name, method in METHODS.items() if not method.trained)  # for any model
INITS = ("random", "left-repeat", "above-repeat", "left-sample", "above-sample")
# By a drafter of `sjd_engine.drafting` or `sjd_engine.neighbours`; beside it, how drafts enter that it leaves alone.
NEIGHBOURS = "neighbours"
DRAFTED_INITS = {"above-law": "above-sample", "above-blend": "above-sample", NEIGHBOURS: "above-sample"}
ALL_INITS = (*INITS, *DRAFTED_INITS)


def get_method(name: str) -> Method:
    """The method called `name`. Raises: ValueError that lists the known names."""
    if name not in METHODS:
        raise ValueError(f"method: unknown {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def check_relaxation(method: Method, value: float | None) -> float | None:
    """`value`, or the method's default where it is None. Raises: ValueError, TypeError where the method has no use for
    it."""
    if value is None:
        return method.relaxation
    if method.relaxation is None:
        takers = ", ".join(name for name, other in METHODS.items() if other.relaxation is not None)
        raise ValueError(f"relaxation: {method.name} has none, only {takers}; leave it out")
    kinds = int if isinstance(method.relaxation, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(
            f"relaxation: expected {'an int' if kinds is int else 'a number'} for {method.name}, got {value!r}"
        )
    if not value >= method.least_relaxation:
        raise ValueError(f"relaxation: expected >= {method.least_relaxation:g} for {method.name}, got {value}")
    return value


def check_init(init: str) -> str:
    """`init` itself. Raises: ValueError that lists the known names."""
    if init not in ALL_INITS:
        raise ValueError(f"init: unknown {init!r}; known initialisations: {', '.join(ALL_INITS)}")
    return init
