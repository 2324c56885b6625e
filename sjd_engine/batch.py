"""Images that are decoded together."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sjd_engine.auto_window import DECIDE_EVERY, AutoWindow, History, PassCosts, seconds_of
from sjd_engine.decoder import JacobiDecoder, Layout
from sjd_engine.eagle import EagleDrafter, Seen
from sjd_engine.graph import Progress, StepGraphs
from sjd_engine.methods import NEIGHBOURS
from sjd_engine.models import ImageModel
from sjd_engine.models.base import Context
from sjd_engine.neighbours import Neighbours
from sjd_engine.outputs import ImageStats
from sjd_engine.prompt_cache import PromptCache
from sjd_engine.request import Request
from sjd_engine.sjd2 import NoisyWindow, noise_plan
from sjd_engine.zipar import ZipDecoder

POISON = "SJD_POISON"  # environment variable: fill rejected slots of the cache with NaN, so that a stale read shows


class Batch:
    """Decoder, cache and the model between them. Every image advances at its own pace; images come and go.

    Args:
        model: the transformer and its embeddings.
        prompts: where the prompts stand; the images take pages from the same pool.
        request: one of those whose images are decoded; all of them have its `group`.
        num_rows: images at once.
        batch_invariant: give the transformer one image at a time, so that its matrix products have the same shapes, and
            hence the same rounding, whatever else is in the batch.
        graphs: replay each pass as a CUDA graph.
        costs: what passes of this model are known to take; None for nothing yet.
    """

    def __init__(
        self,
        model: ImageModel,
        prompts: PromptCache,
        request: Request,
        num_rows: int,
        *,
        batch_invariant: bool,
        graphs: bool = False,
        costs: PassCosts | None = None,
    ):
        self.model, self.prompts, self.num_rows, self.group = model, prompts, num_rows, request.group
        default = model.defaults.window_size if request.auto_window else request.window_size
        self._first_window = min(default, request.window_size)
        self._eagle, self._noisy = None, None
        if request.method.denoises:
            assert request.verify is not None
            self._noisy = NoisyWindow(
                noise_plan(model, request.steps),
                request.schedule.grid(model.device),
                batch_size=num_rows + 1,
                window_size=request.window_size,
                verify=request.verify,
            )
        elif request.method.trained:
            self._eagle = EagleDrafter(
                model,
                batch_size=num_rows + 1,
                guided=request.params.guidance_scale > 1,
                capacity=model.transformer.config.max_positions + request.window_size,
                window_size=request.window_size,
            )
        tables = model.neighbour_tables if request.init == NEIGHBOURS else None
        # One row more, which is always vacant: graphs of a fixed number of rows are filled up with it.
        decoder: Callable[..., JacobiDecoder] = JacobiDecoder
        if request.zipar_window is not None:
            decoder = partial(ZipDecoder, local_window=request.zipar_window)
        self.decoder = decoder(
            batch_size=num_rows + 1,
            num_tokens=request.schedule.num_tokens,
            vocab_size=model.num_codes,
            window_size=self._first_window,
            max_window_size=request.window_size,
            method=request.method.name,
            params=request.params,
            seeds=[0] * (num_rows + 1),
            schedule=request.schedule,
            init=request.init,
            reuse_threshold=request.reuse_threshold,
            drafter=self._eagle or self._noisy or (tables and Neighbours(tables.to(model.device))),
            tree=request.tree,
            relaxation=request.relaxation,
            codebook=model.detokenizer.code_vectors() if request.relaxation is not None else None,
            device=model.device,
        )
        for row in range(num_rows + 1):
            self.decoder.end(row)
        self._num_slots = request.num_slots
        self._copies = 2 if self.decoder.guided else 1  # sequences of an image; a guided pair lies side by side
        num_sequences = self._copies * (num_rows + 1)
        max_window = self.decoder.max_window_size
        capacity = model.transformer.config.max_positions + max_window
        self.kv_cache = prompts.kv_cache.sibling(num_sequences, capacity)
        self.kv_cache.poison = max_window if os.environ.get(POISON) else 0
        hidden, dtype = model.transformer.config.hidden_size, model.transformer.dtype
        self._anchors = torch.zeros(num_sequences, hidden, dtype=dtype, device=model.device)
        self._prefix_lens = torch.zeros(num_sequences, dtype=torch.int32, device=model.device)
        # Of this pass, and of the one before, from which the decoder computes the laws of its drafts.
        pair = (self._copies,) if self.decoder.guided else ()
        shape = (*pair, num_rows + 1, max_window, model.num_codes)
        self._logits = [torch.empty(shape, device=model.device) for _ in range(2)]
        self._parity = 0
        self._contexts: list[list[Context]] = [[] for _ in range(num_rows)]  # of each row; empty where it is vacant
        # Tokens each row's cache holds, or more: the device is not asked in every pass.
        self._at_most = [0] * num_rows
        self._ends = [0] * num_rows  # what it holds in the end
        self._progress = Progress(num_rows + 1, model.device)
        # Of each row: windows of its passes, passes when the device was last asked, and what is known since.
        self._windows: list[list[int]] = [[] for _ in range(num_rows)]
        self._asked = [0] * num_rows
        self._known = [(0, 0)] * num_rows
        costs = PassCosts() if costs is None else costs
        self._auto = AutoWindow(request.method.refresh, max_window, costs) if request.auto_window else None
        self._until_decision = 1
        self._invariant = batch_invariant
        self._graphs = StepGraphs(self._fixed_pass, num_rows, model.device) if graphs else None

    # --------------------------------------------------------------------------------------------- images come and go

    @property
    def rows(self) -> list[int]:
        """Those with an image."""
        return [row for row, contexts in enumerate(self._contexts) if contexts]

    def begin(self, request: Request, index: int) -> int:
        """Begin image `index` of `request` in a vacant row, and compute its prompt where it is not there yet. All pages
        that the image will ever need are reserved.

        Returns: its row.
        Raises: PagesExhausted where too few pages are free; nothing has changed then.
        """
        others = self.rows
        row = next(row for row, contexts in enumerate(self._contexts) if not contexts)
        contexts = request.prompts[index].contexts(guided=self.decoder.guided)
        try:
            for context in contexts:
                self._admit(row * self._copies + len(self._contexts[row]), context)
                self._contexts[row].append(context)
            self.decoder.begin(row, request.seeds[index], request.params, request.reuse_threshold)
        except BaseException:
            self.end(row)
            raise
        if self._noisy is not None:
            here = slice(row, row + 1)
            self._noisy.begin(here, self.decoder.seeds[here])
        if not others:  # nothing remains of the window of images that have left
            self.decoder.window_size = self._first_window
        self._progress.begin(row)
        self._windows[row], self._asked[row], self._known[row] = [], 0, (0, 0)
        self._until_decision = 1
        self._at_most[row] = max(map(len, contexts)) - 1
        self._ends[row] = self._at_most[row] + self.decoder.num_tokens
        return row

    def _admit(self, sequence: int, context: Context) -> None:
        """Reserve the pages of one sequence, which begins with `context`."""
        prefix = len(context) - 1
        capacity = prefix + self._num_slots
        self._anchors[sequence] = self.model.context_embeddings(context)[-1]
        self._prefix_lens[sequence] = prefix
        if self._eagle is not None:
            self._eagle.begin(sequence, context.first_position + len(context))
        if prefix:
            prompt = self.prompts.hold(context)
            try:
                self.kv_cache.fork(prompt, sequence, prefix, capacity, parent=self.prompts.kv_cache)
            except BaseException:
                self.prompts.drop(context)
                raise
        else:
            self.kv_cache.admit(sequence, capacity, first_position=context.first_position)

    def end(self, row: int) -> None:
        """Give up `row` and its pages."""
        self.decoder.end(row)
        for copy, context in enumerate(self._contexts[row]):
            self.kv_cache.release(row * self._copies + copy)
            if len(context) > 1:
                self.prompts.drop(context)
        self._contexts[row] = []

    # ------------------------------------------------------------------------------------------------------ the loop

    def step(self) -> None:
        """One pass: the windows through the transformer, verified, and the cache rolled back."""
        rows = self.rows
        if self._auto is not None and not any(self._windows[row] for row in rows):
            self.decoder.window_size, self._until_decision = self._best_window(rows), DECIDE_EVERY
        window, next_window = self.decoder.window_size, self._next_window(rows)
        if self._graphs is None or next_window != window:  # a change is not worth a graph
            groups = [[row] for row in rows] if self._invariant else [rows]
            device = self.model.device
            self._pass(
                [(torch.tensor(g, device=device), max(self._at_most[row] for row in g)) for g in groups],
                self._parity,
                next_window,
            )
        else:
            self._graphs.run(rows, self._parity, window)
        self._parity = 1 - self._parity
        for row in rows:
            self._at_most[row] = min(self._at_most[row] + window, self._ends[row])
            self._windows[row].append(window)

    def _fixed_pass(self, rows: Tensor, parity: int) -> None:
        """A pass whose shapes depend on the number of rows and the window alone."""
        self._pass([(rows, self.kv_cache.capacity - self.decoder.max_window_size)], parity)

    def _pass(self, groups: list[tuple[Tensor, int]], parity: int, next_window: int | None = None) -> None:
        """The pass itself: reads and writes nothing but tensors of the batch, in place, and waits for nothing.

        Args:
            groups: row numbers, and a bound of the tokens that their sequences hold, for each call of the transformer.
            parity: which logits are written; the others are those of the pass before.
            next_window: of the next pass; None for that of this one.
        """
        ids, _ = self.decoder.window()
        logits = self._logits[parity][..., : self.decoder.window_size, :]
        layout = self.decoder.layout
        for rows, longest in groups:
            logits.index_copy_(logits.ndim - 3, rows, self._forward(ids[rows], rows, longest, layout))
        result = self.decoder.verify(logits, self._logits[1 - parity], next_window)
        if result.accepted_slots is not None:
            self.kv_cache.compact(result.accepted_slots)
        self.kv_cache.advance(self._prefix_lens, result.num_committed)

    def _forward(
        self, ids: Tensor, rows: Tensor, longest: int, layout: Layout, context_lens: Tensor | None = None
    ) -> Tensor:
        """Logits [R, W, V], or [2, R, W, V] with guidance, of the windows ids [R, W] of some rows.

        Args:
            context_lens: of their sequences, in the place of the cache's own.
        """
        sequences = self._sequences(rows)
        windows = self.model.window_embeddings(ids.repeat_interleave(self._copies, 0), self._anchors[sequences])
        if self._noisy is not None:
            windows = self._noisy.embed(windows, rows.repeat_interleave(self._copies))
        bias = layout.window_bias
        if bias is not None and bias.ndim == 3:  # images that differ in it
            bias = bias[rows].repeat_interleave(self._copies, 0)
        kv_cache = self.kv_cache.select(sequences, longest)
        if context_lens is not None:
            kv_cache.context_lens = context_lens
        hidden = self.model.transformer(windows, kv_cache, offsets=layout.offsets, window_bias=bias)
        if self._eagle is not None:
            self._eagle.see(Seen(rows, sequences, hidden, longest))
        logits = self.model.transformer.logits(hidden).unflatten(0, (-1, self._copies))
        return logits.transpose(0, 1) if self.decoder.guided else logits.squeeze(1)

    def _sequences(self, rows: Tensor) -> Tensor:
        """Those of the images in `rows`, side by side."""
        return (rows[:, None] * self._copies + torch.arange(self._copies, device=rows.device)).flatten()

    # -------------------------------------------------------------------------------------------------------- windows

    def _next_window(self, rows: list[int]) -> int:
        """The window of the pass after this one."""
        self._until_decision = (self._until_decision or DECIDE_EVERY) - 1
        return self.decoder.window_size if self._auto is None or self._until_decision else self._best_window(rows)

    def _best_window(self, rows: list[int]) -> int:
        """The window that promises most, by counts that the host knows."""
        assert self._auto is not None
        together = [*rows, *[self.num_rows] * self.num_rows]  # filled up with the vacant row
        size = self._graphs.size(len(rows)) if self._graphs else len(rows)
        together = together[: 1 if self._invariant else size]
        num_sequences = self._copies * len(together)
        self._auto.measure(num_sequences, lambda window: self._timer(together, window))
        histories = [
            History(self._windows[row][:passes], committed, self.decoder.num_tokens - committed)
            for row in rows
            for passes, committed in [self._known[row]]
        ]
        return self._auto.choose(self.decoder.window_size, num_sequences, histories)

    def _timer(self, rows: list[int], window: int) -> Callable[[], float]:
        """What tells the seconds of the transformer on windows of some rows, of images that are half done or further.
        It writes behind the lengths of their caches, where passes to come write before they read."""
        device, num_tokens = self.model.device, self.decoder.num_tokens
        ids = torch.zeros(len(rows), window, dtype=torch.int64, device=device)
        prefixes = [self._ends[row] - num_tokens for row in rows if row < self.num_rows]
        counts = [self._at_most[row] - prefix for row, prefix in zip(rows, prefixes, strict=False)]
        counts = [min(max(count, num_tokens // 2), num_tokens - 1) for count in counts]
        longest = max(map(sum, zip(prefixes, counts, strict=True)))
        if self._graphs is not None:
            longest = self.kv_cache.capacity - self.decoder.max_window_size
        counts += [0] * (len(rows) - len(counts))  # the vacant row, which has no pages
        index = torch.tensor(rows, device=device)
        lengths = torch.tensor(counts, dtype=torch.int32, device=device).repeat_interleave(self._copies)
        lengths += self._prefix_lens[self._sequences(index)]
        layout = self.decoder.layout_of(window)

        def forward() -> None:
            self._forward(ids, index, longest, layout, lengths)

        if self._graphs is None:
            return partial(seconds_of, forward, self.model.transformer)
        forward()  # libraries choose their kernels before a capture
        return partial(seconds_of, self._graphs.capture(forward), self.model.transformer)

    def poll(self, *, lag: bool = False) -> list[int]:
        """Tokens of every row so far; with `lag` what is known without waiting for the passes under way."""
        committed = self._progress.poll(self.decoder.num_committed, lag=lag)
        passes = list(map(len, self._windows))
        self._known = list(zip(self._asked if lag else passes, committed, strict=False))  # not the vacant row
        self._asked = passes
        if not lag:
            for row in self.rows:
                self._at_most[row] = self._ends[row] - self.decoder.num_tokens + committed[row]
        return committed[: self.num_rows]

    # ------------------------------------------------------------------------------------------------------- results

    def codes(self, row: int) -> Tensor:
        """[rows * cols] int64 image codes of the image in `row`: committed, drafted, or without meaning."""
        image = self.decoder.schedule.image_positions.to(self.decoder.device)
        return self.decoder.draft_ids[row, image]

    def stats(self, row: int, seconds: float) -> ImageStats:
        """Statistics of the image in `row`."""
        schedule, stats = self.decoder.schedule, self.decoder.stats_of(slice(row, row + 1))
        return ImageStats(
            nfe=stats.iterations[0],
            num_tokens=schedule.num_tokens,
            committed_per_pass=stats.committed_per_pass[0],
            window_sizes=self._windows[row][: stats.iterations[0]],
            seconds=seconds,
            acceptance_map=stats.commit_pass[0, schedule.image_positions].view(schedule.rows, schedule.cols).numpy(),
            zero_residual=stats.zero_residual[0],
            nonfinite_rows=stats.nonfinite_rows[0],
            zero_draft_prob=stats.zero_draft_prob[0],
        )
