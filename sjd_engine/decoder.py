"""JacobiDecoder: the decode loop without a model."""

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine import ops
from sjd_engine.drafting import BY_ROW_ABOVE, Drafter, Drafts, RowAbove
from sjd_engine.methods import DRAFTED_INITS, METHODS, NEIGHBOURS, Method, check_init, check_relaxation, get_method
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

# What of a `WindowState` belongs to one sequence alone; the rest is scratch, or is not read in a first pass.
ROW_STATE = (
    "tokens",
    "num_committed",
    "iteration",
    "commit_pass",
    "law_row",
    "zero_residual",
    "nonfinite_rows",
    "zero_draft_prob",
    "siblings",
)


@dataclass(frozen=True)
class DecodeStats:
    """What a batch has done so far, one entry for each sequence.

    iterations: [B] passes each sequence took part in.
    committed_per_pass: for each sequence the tokens committed in each of its passes.
    commit_pass: [B, T] the pass in which each token was committed, from 0; -1 before.
    zero_residual, nonfinite_rows, zero_draft_prob: [B], see `kernels.state.WindowState`.
    """

    iterations: list[int]
    committed_per_pass: list[list[int]]
    commit_pass: Tensor
    zero_residual: list[int]
    nonfinite_rows: list[int]
    zero_draft_prob: list[int]


@dataclass(frozen=True)
class Layout:
    """How the slots of a window stand to each other.

    offsets: [W] int64, their positions relative to the anchor's.
    window_bias: [W, W] float32, the mask of their attention to each other, or [B, W, W] where images differ in it; None
        for the causal rule.
    sibling: [W] int64, (level - 1) * K + a of a slot that holds candidate a > 0 of a tree's level; 0 elsewhere.
    """

    offsets: Tensor
    window_bias: Tensor | None
    sibling: Tensor

    @classmethod
    def new(cls, tree: ops.Tree | None, chain_size: int, device: torch.device) -> "Layout":
        if tree is None:
            offsets = torch.arange(chain_size, device=device)
            return cls(offsets, None, torch.zeros_like(offsets))
        offsets, ranks = tree.offsets(chain_size), tree.ranks(chain_size)
        sibling = torch.where(ranks > 0, (offsets - 1) * tree.candidates + ranks, 0)
        return cls(offsets.to(device), tree.window_bias(chain_size).to(device), sibling.to(device))


class JacobiDecoder:
    """Decodes a batch of images with a window of draft tokens; the caller owns the model and its cache.

        while not dec.done:
            ids, positions = dec.window()
            logits = caller_forward(ids, positions)
            result = dec.verify(logits)
            caller_cache.truncate(result.num_committed)

    With a tree the caller's pass takes `dec.layout.window_bias` as its mask, and before it truncates the cache it moves
    the keys and values of slot result.accepted_slots[b, l] of the window to slot l + 1.

    Sequences of one batch advance at their own pace, and each gives what its seed gives alone.

    Args:
        batch_size: B >= 1.
        num_tokens: T >= 1, tokens of an image, forced ones included.
        vocab_size: V >= 2, image codes.
        window_size: W >= 1, tokens of a forward pass, a tree's among them. `ar` always takes 1.
        max_window_size: of windows that change from pass to pass, see `verify`; None: W stays as it is.
        method: a name of `sjd_engine.methods.METHODS`.
        params: sampling parameters of the batch.
        seeds: B integers of 64 bits, one for each image.
        schedule: forced tokens and grid; None: T free tokens in one row.
        init: how new drafts enter: random, left-repeat, above-repeat, left-sample, above-sample,
            above-law, above-blend, or neighbours.
        reuse_threshold: tau of `sjd++`, > 0.
        drafter: what draws drafts anew after each pass; None leaves them to `init`, and so must it be for above-law and
            above-blend. neighbours needs one, see `sjd_engine.neighbours.Neighbours`.
        tree: (K, D), up to K candidates for each of the first D - 1 positions, see `kernels.tree`; None for one.
        relaxation: of `gsd` and `lantern`, see `sjd_engine.methods`; None for the method's default.
        codebook: [V, E] vectors of the image codes, which those two compare.
        device: where the state lives.
    Raises: ValueError naming the argument, what was expected and what it got.
    """

    row_state: tuple[str, ...] = ROW_STATE
    decodes_rows = False

    def __init__(
        self,
        *,
        batch_size: int,
        num_tokens: int,
        vocab_size: int,
        window_size: int,
        max_window_size: int | None = None,
        seeds: Sequence[int],
        method: str = "maximal",
        params: SamplingParams | None = None,
        schedule: Schedule | None = None,
        init: str = "random",
        reuse_threshold: float = 0.5,
        drafter: Drafter | None = None,
        tree: tuple[int, int] | None = None,
        relaxation: float | None = None,
        codebook: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        max_window_size = window_size if max_window_size is None else max_window_size
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_tokens", num_tokens, 1),
            ("vocab_size", vocab_size, 2),
            ("window_size", window_size, 1),
            ("max_window_size", max_window_size, window_size),
        ):
            if value < least:
                raise ValueError(f"{name}: expected >= {least}, got {value}")
        if get_method(method).trained and drafter is None:
            raise ValueError(f"drafter: {method} needs one, see `sjd_engine.batch`")
        if check_init(init) == NEIGHBOURS and drafter is None:
            raise ValueError(f"drafter: init {init!r} needs one, a `sjd_engine.neighbours.Neighbours`")
        if init in BY_ROW_ABOVE and drafter is not None:
            raise ValueError(f"drafter: expected None with init {init!r}, which brings its own, got {drafter}")
        seeds = check_seeds("seeds", seeds)
        if len(seeds) != batch_size:
            raise ValueError(f"seeds: expected {batch_size}, one for each image, got {len(seeds)}")
        if not reuse_threshold > 0:
            raise ValueError(f"reuse_threshold: expected > 0, got {reuse_threshold}")
        schedule = Schedule.line(num_tokens) if schedule is None else schedule
        if schedule.num_tokens != num_tokens:
            raise ValueError(f"schedule: expected num_tokens = {num_tokens} tokens, got {schedule.num_tokens}")

        self.method = get_method(method)
        if bool(self.method.rows_at_once) != self.decodes_rows:
            raise ValueError(f"method: {type(self).__name__} does not decode {method}; Engine.generate does")
        self.init = init
        self.relaxation = check_relaxation(self.method, relaxation)
        self._acceptance = ops.acceptance(self.method.acceptance, codebook, self.relaxation)
        self.window_size = 1 if self.method.one_token else window_size
        self.max_window_size = 1 if self.method.one_token else max_window_size
        self.tree = check_tree(tree, self.method, self.window_size)
        self._layouts: dict[int, Layout] = {}
        self.params = params or SamplingParams()
        self.schedule, self.vocab_size = schedule, vocab_size
        self.reuse_threshold = reuse_threshold
        self.device = torch.device(device)
        self._grid = schedule.grid(self.device)
        self._drafter = drafter or self._own_drafter(batch_size)
        self._row_params = [self.params] * batch_size
        self._reuse_threshold = torch.full((batch_size,), float(reuse_threshold), device=self.device)
        self._seeds = torch.tensor([signed_64(seed) for seed in seeds], device=self.device)
        self.warp_arguments = self.params.warp_arguments(batch_size, vocab_size, self.device)
        self._state = self._first_state(self._seeds)

    def _own_drafter(self, batch_size: int) -> Drafter | None:
        """What `init` needs beside the way that drafts enter in the pass itself."""
        longest = self.max_window_size - self.num_extra
        if self.init not in BY_ROW_ABOVE or not RowAbove.is_needed(self.init, self.chain_size, longest, self._grid):
            return None
        return RowAbove(batch_size, longest, self.vocab_size, self._grid, uniform=BY_ROW_ABOVE[self.init])

    def _first_state(self, seeds: Tensor) -> ops.WindowState:
        chain_size = self.max_window_size - self.num_extra
        drafted_codes = self.vocab_size if self._drafter else 0
        state = ops.WindowState.new(
            len(seeds), self.num_tokens, chain_size, self.device, drafted_codes=drafted_codes, tree=self.tree
        )
        arguments = {"window_size": chain_size, "init": self._entry, "vocab_size": self.vocab_size}
        ops.start(state, self._grid, seeds=seeds, **arguments)
        return state

    # ------------------------------------------------------------------------------------------------------ the loop

    @property
    def done(self) -> bool:
        """Every image is complete. On CUDA a poll waits for the device; poll every few passes."""
        return bool((self._state.num_committed == self.num_tokens).all())  # sync: the caller asked

    def window(self) -> tuple[Tensor, Tensor]:
        """The tokens of the next forward pass: (ids, positions), both [B, W] int64.

        Slot 0 is the anchor, the last committed token, or -1 at position -1 (the end of the caller's prompt) before
        anything is committed. Slots past the image's end have id 0 and position T. The slots of a tree's siblings
        follow those of the chain, with positions of their own; slots of siblings that do not exist have id 0.
        """
        layout = self.layout
        slots = self._state.num_committed[:, None] + layout.offsets
        ids = self._state.tokens.gather(1, slots)
        if self.tree is not None:
            candidates = F.pad(self._state.siblings.clamp_min(0), (1, 0)).flatten(1)  # the first is the chain's draft
            ids = torch.where(layout.sibling > 0, candidates[:, layout.sibling], ids)
        past = slots > self.num_tokens
        return ids.masked_fill(past, 0), (slots - 1).masked_fill(past, self.num_tokens)

    def verify(
        self,
        logits: Tensor,
        previous_logits: Tensor | None = None,
        next_window_size: int | None = None,
    ) -> ops.VerifyResult:
        """One pass: slot i of `logits` predicts position positions[:, i] + 1.

        Args:
            logits: [B, W, V], or [2, B, W, V] (conditional, unconditional) where guidance_scale > 1. bfloat16, float16
                or float32, any strides. Must keep its values until the next call returns: the law of the next drafts is
                computed from it again, so that no probabilities are stored.
            previous_logits: those of the last pass, where this decoder did not see it because a CUDA graph replayed it;
                None for those of the last call.
            next_window_size: W of the next pass, up to max_window_size, and at least 1 or what the tree takes; None:
                that of this one. What it is must depend on committed tokens alone, never on drafts: only then does the
                law of the images stay as it is.
        Returns: VerifyResult; K/V is valid for `num_committed` slots from the anchor of the first pass on.
        Raises: ValueError where the shape differs; the state is unchanged.
        """
        self._check_logits(logits)
        next_window_size = self.window_size if next_window_size is None else next_window_size
        least = 1 if self.tree is None else self.tree.least_window
        if not least <= next_window_size <= self.max_window_size:
            raise ValueError(
                f"verify: next_window_size must be in {least}..{self.max_window_size}, got {next_window_size}"
            )
        if previous_logits is not None and ops.reads_previous_logits(self.method.accept, self.max_window_size):
            self._state.previous_logits = previous_logits
        previous = None if torch.compiler.is_compiling() else self._state.previous_logits
        if previous is not None and previous.dtype != logits.dtype:
            raise ValueError(f"verify: logits must stay {previous.dtype} from pass to pass, got {logits.dtype}")
        if previous is not None and previous.data_ptr() == logits.data_ptr():
            raise ValueError(
                "verify: logits occupy the memory of the previous pass's logits, which this pass still reads; "
                "pass a new tensor, or alternate between two buffers"
            )
        chain = slice(self.chain_size)
        result = ops.verify(
            logits,
            self._state,
            self._grid,
            window_size=self.chain_size,
            next_window_size=next_window_size - self.num_extra,
            tree=self.tree,
            accept=self.method.accept,
            refresh=self.method.refresh,
            init=self._entry,
            seeds=self._seeds,
            reuse_threshold=self._reuse_threshold,
            acceptance=self._acceptance,
            most_accepted=getattr(self._drafter, "most_accepted", None),
            **self.warp_arguments,
        )
        self.window_size = next_window_size
        if self._drafter is not None and next_window_size > 1:
            self._drafter(self._drafts(logits[..., chain, :], result))
        return result

    @property
    def _entry(self) -> str:
        """How drafts enter in the pass itself."""
        return DRAFTED_INITS.get(self.init, self.init)

    def _drafts(self, logits: Tensor, result: ops.VerifyResult) -> Drafts:
        return Drafts(
            self._state,
            self._grid,
            self._seeds,
            logits,
            first=result.num_committed - result.num_accepted - 1,  # at the image's end less, where nothing is drafted
            num_drafts=self.chain_size - 1,
            warp_arguments=self.warp_arguments,
        )

    def _check_logits(self, logits: Tensor) -> None:
        pair = (2,) if self.guided else ()
        expected = (*pair, self.batch_size, self.window_size, self.vocab_size)
        if tuple(logits.shape) != expected:
            names = "[2, B, W, V]" if self.guided else "[B, W, V]"
            raise ValueError(f"verify: logits must be {names} = {list(expected)}, got {list(logits.shape)}")

    # ---------------------------------------------------------------------------------------- sequences come and go

    def begin(
        self, row: int, seed: int, params: SamplingParams | None = None, reuse_threshold: float | None = None
    ) -> None:
        """Begin another image in `row`; what stood there is forgotten, the other rows do not notice. No sync.

        Args:
            row: in 0..B-1.
            seed: of the new image.
            params, reuse_threshold: None for those of the decoder. Whether guidance, temperature, top-k and top-p are
                in use at all is the same for all rows.
        Raises: ValueError, TypeError; nothing has changed then.
        """
        params = self.params if params is None else params
        expected, got = self.params.in_use(self.vocab_size), params.in_use(self.vocab_size)
        if got != expected:
            raise ValueError(f"begin: params must use {', '.join(expected) or 'nothing'} as the other rows, got {got}")
        self._seeds[self._check_row("begin", row)] = signed_64(check_seed("seed", seed))
        for name, column in params.warp_arguments(1, self.vocab_size, self.device).items():
            if column is not None:
                mine = self.warp_arguments[name]
                assert mine is not None
                mine[row : row + 1] = column
        self._row_params[row] = params
        self._reuse_threshold[row] = self.reuse_threshold if reuse_threshold is None else reuse_threshold
        first = self._first_state(self._seeds[row : row + 1])
        for name in self.row_state:
            getattr(self._state, name)[row : row + 1] = getattr(first, name)

    def end(self, row: int) -> None:
        """Let `row` take no part in later passes. No sync."""
        self._state.num_committed[self._check_row("end", row)] = self.num_tokens

    def _check_row(self, op: str, row: int) -> int:
        if not 0 <= row < self.batch_size:
            raise ValueError(f"{op}: row must be in 0..{self.batch_size - 1}, got {row}")
        return row

    # ------------------------------------------------------------------------------------------------------- results

    @property
    def batch_size(self) -> int:
        return len(self._seeds)

    @property
    def seeds(self) -> Tensor:
        """[B] int64, with the low 64 bits of the images' seeds."""
        return self._seeds

    @property
    def num_tokens(self) -> int:
        return self.schedule.num_tokens

    @property
    def num_extra(self) -> int:
        """Slots of a window that a tree adds to the chain."""
        return 0 if self.tree is None else self.tree.num_extra

    @property
    def chain_size(self) -> int:
        """Slots of the window's chain."""
        return self.window_size - self.num_extra

    @property
    def layout(self) -> Layout:
        """Of the next window."""
        return self.layout_of(self.window_size)

    def layout_of(self, window_size: int) -> Layout:
        """Of a window of `window_size` slots."""
        if window_size not in self._layouts:
            self._layouts[window_size] = Layout.new(self.tree, window_size - self.num_extra, self.device)
        return self._layouts[window_size]

    @property
    def guided(self) -> bool:
        """Guidance is on: logits come in pairs."""
        return self.params.guidance_scale > 1

    @property
    def num_committed(self) -> Tensor:
        """[B] int64: tokens committed so far."""
        return self._state.num_committed.clone()

    @property
    def token_ids(self) -> Tensor:
        """[B, T] int64: committed tokens; -1 where nothing is committed yet."""
        positions = torch.arange(self.num_tokens, device=self.device)
        return self.draft_ids.masked_fill(positions >= self._state.num_committed[:, None], -1)

    @property
    def draft_ids(self) -> Tensor:
        """[B, T] int64: committed tokens, then the drafts of the window, then tokens without meaning."""
        return self._state.tokens[:, 1 : self.num_tokens + 1]

    @property
    def stats(self) -> DecodeStats:
        """Statistics so far; copies them to the host."""
        return self.stats_of(slice(None))

    def stats_of(self, rows: slice) -> DecodeStats:
        """Those of some rows."""
        state = self._state
        commit_pass = state.commit_pass[rows, : self.num_tokens].cpu()  # sync: for people
        iterations = state.iteration[rows].tolist()  # sync: for people
        per_pass = [
            torch.bincount(row[row >= 0], minlength=passes).tolist()  # sync: on the host already
            for row, passes in zip(commit_pass, iterations, strict=True)
        ]
        counters = (state.zero_residual, state.nonfinite_rows, state.zero_draft_prob)
        return DecodeStats(iterations, per_pass, commit_pass, *(c[rows].tolist() for c in counters))  # sync: for people

    # -------------------------------------------------------------------------------------------------- preemption

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, on this or another device: tensors and plain values."""
        carried = self._drafter.tensors if isinstance(self._drafter, RowAbove) else {}
        return {
            "setup": self._setup(),
            "drafter": {name: tensor.clone() for name, tensor in carried.items()},
            "window_size": self.window_size,
            "tensors": {name: None if t is None else t.clone() for name, t in vars(self._state).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, taken from a decoder with the same arguments.

        Raises: ValueError naming the first argument that differs; this decoder is then unchanged.
        """
        for name, mine in self._setup().items():
            if state["setup"].get(name) != mine:
                raise ValueError(f"load_state_dict: {name} is {mine} here, {state['setup'].get(name)} in the state")
        self.window_size = state["window_size"]
        if isinstance(self._drafter, RowAbove):
            for name, saved in state["drafter"].items():
                self._drafter.tensors[name].copy_(saved)
        for name, mine in vars(self._state).items():
            saved = state["tensors"][name]
            if isinstance(mine, Tensor) and isinstance(saved, Tensor) and name != "previous_logits":
                mine.copy_(saved)
            else:  # of the last pass, or of none yet
                setattr(self._state, name, None if saved is None else saved.to(self.device, copy=True))

    def _setup(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "init": self.init,
            "max_window_size": self.max_window_size,
            "tree": self.tree,
            "vocab_size": self.vocab_size,
            "params": [vars(params) for params in self._row_params],
            "reuse_threshold": self._reuse_threshold.tolist(),  # sync: preemption
            "relaxation": self.relaxation,
            "seeds": self._seeds.tolist(),  # sync: preemption
            "schedule": (self.schedule.rows, self.schedule.cols, dict(self.schedule.forced)),
        }


def check_seeds(argument: str, seeds: Any) -> list[int]:
    """`seeds` as ints, be they in a list, a range or an array of NumPy or torch. Raises: TypeError, ValueError."""
    if not isinstance(seeds, Sequence) and getattr(seeds, "ndim", 0) != 1:
        raise TypeError(f"{argument}: expected a list of 64-bit integers, one for each image, got {seeds!r}")
    return [check_seed(argument, seed) for seed in seeds]


def check_seed(argument: str, seed: Any) -> int:
    """`seed` as an int, be it one of Python, NumPy or torch. Raises: TypeError, ValueError where it is no 64-bit
    integer."""
    remedy = "choose a whole number from -2**63 to 2**64 - 1"
    value = None
    if not isinstance(seed, bool) and getattr(seed, "dtype", None) != torch.bool:
        with suppress(TypeError):
            value = operator.index(seed)
    if value is None:
        raise TypeError(f"{argument}: expected a 64-bit integer, got {seed!r}; {remedy}")
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{argument}: expected a 64-bit integer, got {seed}; {remedy}")
    return value


def signed_64(seed: int) -> int:
    """The int64 with the same 64 bits as `seed`."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def check_tree(tree: tuple[int, int] | None, method: Method, window_size: int) -> ops.Tree | None:
    """`tree` itself. Raises: ValueError, TypeError where it is none, or neither the method nor the window takes it."""
    if tree is None:
        return None
    if not isinstance(tree, tuple | list) or len(tree) != 2 or not all(type(value) is int for value in tree):
        raise TypeError(f"tree: expected (K, D), two ints, got {tree!r}")
    candidates, depth = tree
    if not 2 <= candidates <= ops.MOST_CANDIDATES or depth < 2:
        raise ValueError(f"tree: expected 2..{ops.MOST_CANDIDATES} candidates and a depth >= 2, got {tree!r}")
    if not method.takes_tree:
        known = ", ".join(name for name, method in METHODS.items() if method.takes_tree)
        raise ValueError(f"tree: {method.name} takes none; choose one of {known}")
    found = ops.Tree(candidates, depth)
    if window_size < found.least_window:
        raise ValueError(
            f"tree: {tuple(tree)} takes a window of {found.least_window} tokens or more, got {window_size}; choose a "
            "smaller tree or a larger window_size"
        )
    return found
