"""The ops of the paged cache against plain PyTorch, bit for bit, and its attention against SDPA over a dense copy."""

from itertools import count

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

from sjd_engine import PagedKVCache, native
from sjd_engine.kernels import paged
from sjd_engine.kernels.layers import rotate
from sjd_engine.models.rope import rope_table

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ["cpu", "cuda"] if native.has_cuda() and torch.cuda.is_available() else ["cpu"]
PAGE_SIZES = (1, 16, 64, 256)
LAYERS, SEQS, KV_HEADS = 2, 3, 2


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=PAGE_SIZES, ids=lambda size: f"page{size}")
def page_size(request) -> int:
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(page_size: int, capacity: int, seed: int = 0) -> Tensor:
    width = -(-capacity // page_size)
    return torch.randperm(SEQS * width, generator=torch.Generator().manual_seed(seed)).int().view(SEQS, width)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class TestOps:
    """Head dim 24 moves 16 bytes at a time, 5 only 2."""

    @pytest.fixture(params=DEVICES)
    def device(self, request) -> str:
        return request.param

    @pytest.mark.parametrize("head_dim", [24, 5])
    def test_append(self, dtype, page_size, head_dim, device):
        table = tables(page_size, 300).to(device)
        table[0, -1] = table[1] = -1
        lens = torch.tensor([296, 0, 130], dtype=torch.int32, device=device)
        pages = random(table.numel(), 2, page_size, KV_HEADS, head_dim, dtype=dtype).to(device)
        qkv = random(SEQS, 9, 5 * KV_HEADS, head_dim, dtype=dtype, seed=1).to(device)
        # Keys and values lie between others.
        keys, values = qkv[:, :, KV_HEADS : 2 * KV_HEADS], qkv[:, :, 2 * KV_HEADS : 3 * KV_HEADS]
        for num_valid in (None, torch.tensor([9, 4, 3], dtype=torch.int32, device=device)):
            results = [pages.clone(), pages.clone()]
            for op, into in zip((native, paged), results, strict=True):
                op.append_kv(into, table, lens, keys, values, num_valid)
            assert same(*results)
            assert not same(results[0], pages)

    @pytest.mark.parametrize("head_dim", [128, 24, 2])
    def test_append_with_rotation(self, dtype, head_dim, device):
        table, lens = tables(16, 300).to(device), torch.tensor([296, 0, 130], dtype=torch.int32)
        pages = random(table.numel(), 2, 16, KV_HEADS, head_dim, dtype=dtype).to(device)
        keys, values = random(2, SEQS, 9, KV_HEADS, head_dim, dtype=dtype, seed=1).to(device)
        positions = lens.long()[:, None] + torch.arange(9)
        rows = [part[positions].to(device) for part in rope_table(305, head_dim, 1e4)]
        lens, num_valid = lens.to(device), torch.tensor([9, 4, 0], dtype=torch.int32, device=device)
        results = [pages.clone() for _ in range(3)]
        native.append_kv(results[0], table, lens, keys, values, num_valid, *rows)
        paged.append_kv(results[1], table, lens, keys, values, num_valid, *rows)
        rotated = rotate(keys.float(), *(part[:, :, None] for part in rows)).to(dtype)
        paged.append_kv(results[2], table, lens, rotated, values, num_valid)
        assert same(results[0], results[1])
        assert torch.allclose(results[0].float(), results[2].float(), atol=1e-6, rtol=torch.finfo(dtype).eps)
        assert not torch.allclose(results[0].float(), pages.float(), atol=0.1)

    @pytest.mark.parametrize("head_dim", [24, 5])
    def test_gather_copy_and_poison(self, dtype, page_size, head_dim, device):
        table = tables(page_size, 200).to(device)
        lens = torch.tensor([0, 64, 193], dtype=torch.int32, device=device)
        pages = random(LAYERS, table.numel(), 2, page_size, KV_HEADS, head_dim, dtype=dtype).to(device)
        got, expected = (
            op.gather_kv(pages[1], table, lens, num_new=3, span=250)  # past every table
            for op in (native, paged)
        )
        assert same(got[0], expected[0])
        assert same(got[1], expected[1])
        mine, theirs = pages.clone(), pages.clone()
        copies = torch.tensor([[0, 2], [1, table.numel() - 1]], dtype=torch.int32, device=device)
        for op, into in ((native, mine), (paged, theirs)):
            op.copy_pages(into, copies)
        assert same(mine, theirs)
        for op, into in ((native, mine), (paged, theirs)):
            op.poison_kv(into, table, lens, num_slots=20)
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())

    @pytest.mark.parametrize("head_dim", [24, 5])
    def test_compact(self, dtype, page_size, head_dim, device):
        """Two sequences of an image share its path; the last slot has no page."""
        table = tables(page_size, 200)[:2].to(device)
        lens = torch.tensor([63, 185], dtype=torch.int32, device=device)
        table[1, -(-192 // page_size) :] = -1
        slots = torch.tensor([[1, 6, 8]], device=device)
        pages = random(LAYERS, SEQS * table.shape[1], 2, page_size, KV_HEADS, head_dim, dtype=dtype).to(device)
        results = [pages.clone(), pages.clone()]
        for op, into in zip((native, paged), results, strict=True):
            op.compact_kv(into, table, lens, slots)
        assert same(*results)
        for layer in range(LAYERS):
            before, after = (
                torch.stack(paged.gather_kv(p[layer], table, lens, num_new=15, span=200)) for p in (pages, results[0])
            )
            assert same(after[:, 0, [64, 65, 66]], before[:, 0, [64, 69, 71]])
            assert same(after[:, 0, :64], before[:, 0, :64])
            assert same(after[:, 1, [186, 187]], before[:, 1, [186, 191]])

    def test_advance_rollback(self, device):
        lens = torch.zeros(2, 6, dtype=torch.int32, device=device)
        prefix = torch.arange(6, dtype=torch.int32, device=device)
        for op, row in zip((native, paged), lens, strict=True):
            op.advance_rollback(row, prefix, torch.tensor([10, 20, 30], device=device))
        assert lens.tolist() == [[10, 11, 22, 23, 34, 35]] * 2

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_without_a_gpu_says_so(self):
        """The call that tensors on a GPU would make, with addresses that nothing follows."""
        place = native._C.Place(cuda=True, device=0, stream=0, num_threads=1)
        why = "CUDA driver|no CUDA-capable|this build .* no CUDA"
        with pytest.raises(RuntimeError, match=f"advance_rollback: ({why})"):
            native._C.advance_rollback(
                context_lens=16, prefix_lens=16, num_committed=16, num_sequences=1, copies=1, place=place
            )

    def test_errors_name_op_and_argument(self):
        pages, table, lens = torch.zeros(2, 2, 4, 1, 8), torch.zeros(1, 2).int(), torch.zeros(1).int()
        keys = torch.zeros(1, 3, 1, 8)
        with pytest.raises(ValueError, match=r"append_kv: keys must be \[1, 3, 1, 8\] torch.float32 on cpu"):
            native.append_kv(pages, table, lens, keys.half(), keys)
        with pytest.raises(ValueError, match=r"append_kv: context_lens must be contiguous torch\.int32"):
            native.append_kv(pages, table, lens.long(), keys, keys)
        with pytest.raises(ValueError, match="pages must be contiguous"):
            native.append_kv(pages.double(), table, lens, keys.double(), keys.double())
        angles = torch.zeros(1, 3, 8)
        with pytest.raises(ValueError, match=r"append_kv: cos and sin must both be \[1, 3, 8\] .* got sin None"):
            native.append_kv(pages, table, lens, keys, keys, cos=angles)
        with pytest.raises(ValueError, match=r"append_kv: cos must be contiguous torch\.float32"):
            native.append_kv(pages, table, lens, keys, keys, cos=angles.half(), sin=angles)
        queries = torch.zeros(1, 3, 3, 8)
        with pytest.raises(ValueError, match="window_attention: num_heads must be a multiple of num_kv_heads = 2"):
            native.window_attention(queries, torch.zeros(2, 2, 4, 2, 8), table, lens, span=3)


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor, context: int) -> Tensor:
    """SDPA of one sequence: queries [N, H, D] behind `context` tokens; keys and values [context + N, KH, D]."""
    num_new, span = len(queries), len(keys)
    seen = torch.arange(span) <= context + torch.arange(num_new)[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


class TestAttention:
    LENS = (0, 63, 190)

    def case(self, dtype, page_size, head_dim, group, num_new=7):
        table = tables(page_size, 200 + num_new)
        pages = random(table.numel(), 2, page_size, KV_HEADS, head_dim, dtype=dtype)
        queries = random(SEQS, num_new, 2 + KV_HEADS * group, head_dim, dtype=dtype, seed=1)[:, :, 2:]
        return queries, pages, table, torch.tensor(self.LENS, dtype=torch.int32)

    @pytest.mark.parametrize("group", [1, 3], ids=["MHA", "GQA"])
    @pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
    def test_equals_sdpa(self, dtype, page_size, head_dim, group):
        queries, pages, table, lens = self.case(dtype, page_size, head_dim, group)
        got = native.window_attention(queries, pages, table, lens, span=200)
        keys, values = paged.gather_kv(pages, table, lens, num_new=7, span=200)
        for s, context in enumerate(self.LENS):
            dense = [x[s, : context + 7] for x in (keys, values)]
            exact = dense_attention(queries[s].double(), *(x.double() for x in dense), context)
            theirs = (dense_attention(queries[s], *dense, context) - exact).abs().max()
            assert (got[s] - exact).abs().max() <= max(2 * theirs, 1e-5)

    def test_the_reference_equals_sdpa(self, page_size):
        queries, pages, table, lens = self.case(torch.float32, page_size, 16, 2)
        got = paged.window_attention(queries, pages, table, lens, span=200)
        keys, values = paged.gather_kv(pages, table, lens, num_new=7, span=200)
        for s, context in enumerate(self.LENS):
            expected = dense_attention(queries[s], keys[s, : context + 7], values[s, : context + 7], context)
            assert (got[s] - expected).abs().max() <= 1e-5

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_bias_takes_the_place_of_the_causal_rule(self, dtype, shared):
        queries, pages, table, lens = self.case(dtype, 16, 64, 2)
        bias = random(SEQS, 7, 7).masked_fill_(random(SEQS, 7, 7, seed=3) > 0, float("-inf"))
        bias.diagonal(dim1=1, dim2=2).zero_()
        bias = bias[0].clone() if shared else bias
        args = (table, lens)
        exact = paged.window_attention(queries.float(), pages.float(), *args, span=197, window_bias=bias)
        theirs = paged.window_attention(queries, pages, *args, span=197, window_bias=bias)
        got = native.window_attention(queries, pages, *args, span=197, window_bias=bias)
        assert (got - exact).abs().max() <= max(2 * (theirs - exact).abs().max(), 1e-5)

    def test_a_row_is_the_same_in_any_window_batch_and_page_size(self, dtype):
        queries, pages, table, lens = self.case(dtype, 16, 64, 2, num_new=40)
        whole = native.window_attention(queries, pages, table, lens, span=230)
        assert same(native.window_attention(queries[:, :5], pages, table, lens, span=230), whole[:, :5])
        later = native.window_attention(queries[:, 30:], pages, table, lens + 30, span=230)
        assert same(later, whole[:, 30:])
        alone = native.window_attention(queries[1:2], pages, table[1:2], lens[1:2], span=230)
        assert same(alone, whole[1:2])
        flat = pages.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # pages of one token
        fine = (table[..., None] * 16 + torch.arange(16)).flatten(1).int()
        assert same(native.window_attention(queries, flat.contiguous(), fine, lens, span=230), whole)

    def test_what_lies_behind_the_window_is_not_read(self, dtype):
        queries, pages, table, lens = self.case(dtype, 16, 64, 2)
        expected = native.window_attention(queries, pages, table, lens, span=200)
        native.poison_kv(pages[None], table, lens + 7, num_slots=64)
        assert same(native.window_attention(queries, pages, table, lens, span=200), expected)

    @pytest.mark.parametrize("op", [native, paged], ids=["native", "reference"])
    @pytest.mark.parametrize("biased", [True, False])
    def test_tokens_without_a_page_are_hidden(self, op, dtype, page_size, biased):
        """Row 0 has no page at all, row 1 none for its window's end, row 2 ends with its table."""
        num_new, width = 7, -(-200 // page_size)
        lens = torch.tensor([0, 100, width * page_size - 3], dtype=torch.int32)
        table = 1 + tables(page_size, 200)
        table[0] = -1
        table[1, -(-103 // page_size) :] = -1
        held = torch.tensor([0, int((table[1] >= 0).sum()) * page_size, width * page_size])
        pages = torch.full((2 + int(table.max()), 2, page_size, KV_HEADS, 16), float("nan"), dtype=dtype)
        # Every slot that a row sees holds a number, every other slot of the pool NaN.
        native.append_kv(
            pages,
            table,
            torch.zeros_like(lens),
            *random(2, SEQS, int(lens.max()) + num_new, KV_HEADS, 16, dtype=dtype),
            num_valid=lens + num_new,
        )
        queries = random(SEQS, num_new, 2 * KV_HEADS, 16, dtype=dtype, seed=1)
        bias = torch.zeros(num_new, num_new).masked_fill_(torch.ones(num_new, num_new).triu(1) > 0, float("-inf"))
        got = op.window_attention(
            queries, pages, table, lens, span=int(lens.max()) + num_new, window_bias=bias if biased else None
        )
        assert (got[0] == 0).all()
        for s in (1, 2):
            dense = [x[s].float() for x in paged.gather_kv(pages, table, lens, num_new=num_new, span=int(held[s]))]
            for i in range(num_new):
                seen = min(int(lens[s]) + i + 1, int(held[s]))
                expected = dense_attention(queries[s, i : i + 1].float(), *(x[:seen] for x in dense), seen)
                assert (got[s, i] - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)

    @pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
    def test_nan_is_shown(self, dtype, nan):
        queries, pages, table, lens = self.case(dtype, 16, 64, 2)
        queries[1, 2] = nan
        got = native.window_attention(queries, pages, table, lens, span=200)
        assert got[1, 2].isnan().all()
        assert not got[[0, 2]].isnan().any()
        native.poison_kv(pages[None], table, lens - 9, num_slots=1)  # inside the context of the last two
        assert native.window_attention(queries, pages, table, lens, span=200)[1:].isnan().all()


@pytest.mark.parametrize("group", [1, 2], ids=["MHA", "GQA"])
def test_chunks_with_rejections_equal_one_full_pass(page_size, group):
    """Random chunks, random rejections, poison behind every length: each token as in dense attention."""
    generator = torch.Generator().manual_seed(page_size)
    total, head_dim, heads = 90, 16, KV_HEADS * group
    cache = PagedKVCache(
        1,
        KV_HEADS,
        head_dim,
        num_sequences=SEQS,
        capacity=total + 20,
        page_size=page_size,
        dtype=torch.float32,
        poison=20,
    )
    queries = random(SEQS, total, heads, head_dim, seed=1)
    keys, values = random(2, SEQS, total, KV_HEADS, head_dim, seed=2)
    lengths, got = torch.zeros(SEQS, dtype=torch.int64), torch.zeros_like(queries)
    while (lengths < total).any():
        width = int(torch.randint(1, 20, (), generator=generator))
        kept = torch.randint(0, width + 1, (SEQS,), generator=generator).minimum(total - lengths)
        rows = [slice(int(n), int(n + k)) for n, k in zip(lengths, kept, strict=True)]
        window = [random(SEQS, width, n, head_dim, seed=4) for n in (heads, KV_HEADS, KV_HEADS)]  # garbage past `kept`
        for s, (row, k) in enumerate(zip(rows, kept, strict=True)):
            for into, source in zip(window, (queries, keys, values), strict=True):
                into[s, :k] = source[s, row]
        _, span = cache.positions(width)
        cache.append(0, *window[1:])
        out = cache.attend(0, window[0], span)
        for s, (row, k) in enumerate(zip(rows, kept, strict=True)):
            got[s, row] = out[s, :k]
        lengths = lengths + kept
        cache.rollback(lengths)
    for s in range(SEQS):
        assert (got[s] - dense_attention(queries[s], keys[s], values[s], 0)).abs().max() <= 1e-5


class TestSequences:
    def cache(self, num_pages=8) -> PagedKVCache:
        return PagedKVCache(
            LAYERS, 1, 8, num_sequences=3, capacity=16, num_pages=num_pages, page_size=4, dtype=torch.float32
        )

    def write(self, cache: PagedKVCache, row: int, num_new: int, seed: int) -> Tensor:
        part, values = cache.select(slice(row, row + 1)), random(1, num_new, 1, 8, seed=seed)
        for layer in range(LAYERS):
            part.append(layer, values + layer, -values)
        cache.context_lens[row] += num_new
        return values

    def test_a_fork_shares_full_pages_and_copies_the_rest(self):
        cache = self.cache()
        cache.admit(0, 12)
        self.write(cache, 0, 6, seed=1)
        cache.fork(0, 1, num_tokens=6, capacity=9)
        assert cache.block_table[0, 0] == cache.block_table[1, 0]
        assert cache.block_table[0, 1] != cache.block_table[1, 1]
        before = cache.gather(1, 6)[0][0].clone()
        self.write(cache, 1, 3, seed=2)
        self.write(cache, 0, 3, seed=3)
        for row in (0, 1):
            assert torch.equal(cache.gather(1, 6)[0][row], before)
        assert not torch.equal(*cache.gather(1, 9)[0][:2])
        cache.own(1, 2)  # roll back into the shared page: now it may be written
        cache.context_lens[1] = 2
        self.write(cache, 1, 4, seed=4)
        assert torch.equal(cache.gather(1, 6)[0][0], before)
        assert torch.equal(cache.gather(1, 2)[0][1], before[:2])
        cache.check_invariants()

    def test_prompts_are_shared_and_pages_come_back(self):
        cache = self.cache()
        prompt = [5, 6, 7, 8, 9]
        assert cache.admit(0, 16, prompt) == 0
        self.write(cache, 0, 5, seed=1)
        cache.publish(0, 5)
        assert cache.admit(1, 16, prompt) == 4
        assert cache.num_free_pages == 1
        with pytest.raises(native.PagesExhausted, match="admit: needs 3 free pages, but 1 of 8 are free"):
            cache.admit(2, 16, prompt)
        cache.release(0)
        cache.release(1)
        assert cache.num_free_pages == 8
        assert (cache.block_table == -1).all()

    def test_bad_rows(self):
        cache = self.cache()
        with pytest.raises(ValueError, match="release: row must be taken, got 0"):
            cache.release(0)
        cache.admit(0, 4)
        with pytest.raises(ValueError, match="admit: row must be free, got 0"):
            cache.admit(0, 4)
        with pytest.raises(ValueError, match="capacity must be at most the cache's 16, got 17"):
            cache.admit(1, 17)
        whole = PagedKVCache(1, 1, 8, num_sequences=1, capacity=4, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="make it with num_pages"):
            whole.admit(0, 4)


class CacheMachine(RuleBasedStateMachine):
    """Sequences that are admitted, forked, decoded window by window and released, against lists of what was committed.

    A sequence of P prompt tokens has P - 1 of them in the cache before its first pass, whose window begins with the
    last one, the anchor. From then on the cache holds all committed tokens but the last: kv_valid == committed - 1.
    """

    ROWS, CAPACITY, WINDOW = 4, 12, 3

    @initialize(spare_pages=st.integers(0, 12), page_size=st.integers(1, 5))
    def start(self, spare_pages, page_size):
        num_pages = 2 * -(-self.CAPACITY // page_size) + spare_pages
        self.cache = PagedKVCache(
            2, 1, 2, num_sequences=self.ROWS, capacity=self.CAPACITY + self.WINDOW, num_pages=num_pages,
            page_size=page_size, dtype=torch.float32, poison=self.WINDOW,
        )  # fmt: skip
        self.committed: list[list[int] | None] = [None] * self.ROWS  # the tokens of each row, its prompt's among them
        self.fresh = count(1)

    def free_row(self) -> int | None:
        return next((row for row, tokens in enumerate(self.committed) if tokens is None), None)

    def append(self, row: int, tokens: list[int]) -> None:
        if not tokens:
            return
        part = self.cache.select(slice(row, row + 1))
        keys = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1, 1).expand(-1, -1, -1, 2)
        for layer in range(2):
            part.append(layer, keys + layer, -keys)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, prompt):
        row = self.free_row()
        if row is None:
            return
        try:
            cached = self.cache.admit(row, self.CAPACITY, prompt[:-1])
        except native.PagesExhausted:
            return
        # What is shared was written for these very tokens: a token's value is the number of the prompt up to it.
        values = [hash(tuple(prompt[: t + 1])) % 65521 for t in range(len(prompt))]
        self.append(row, values[cached:-1])
        self.cache.context_lens[row] = len(prompt) - 1
        self.cache.publish(row, len(prompt) - 1)
        self.committed[row] = values

    @rule(row=st.integers(0, 1), accepted=st.integers(1, WINDOW))
    def decode(self, row, accepted):
        """A window: the anchor, drafts that stay, and drafts that are rejected."""
        tokens = self.committed[row]
        if tokens is None:
            return
        accepted = min(accepted, self.CAPACITY - len(tokens))
        if accepted < 1:
            return
        new = [next(self.fresh) for _ in range(accepted)]
        rejected = [-1] * (self.WINDOW - accepted)
        self.append(row, [tokens[-1], *new[:-1], *rejected])
        tokens += new
        lens = self.cache.context_lens.clone()
        lens[row] = len(tokens) - 1
        self.cache.advance(lens, torch.zeros(self.ROWS, dtype=torch.int64))

    @rule(row=st.integers(0, 1), length=st.integers(1, CAPACITY))
    def fork(self, row, length):
        tokens, into = self.committed[row], self.free_row()
        if tokens is None or into is None:
            return
        length = min(length, len(tokens))
        try:
            self.cache.fork(row, into, length - 1, self.CAPACITY)
        except native.PagesExhausted:
            return
        self.committed[into] = tokens[:length]

    @rule(row=st.integers(0, ROWS - 1))
    def release(self, row):
        if self.committed[row] is not None:
            self.cache.release(row)
            self.committed[row] = None

    @invariant()
    def every_sequence_reads_what_it_committed(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        held = self.cache.block_table[self.cache.block_table >= 0].unique()
        assert self.cache.num_free_pages == self.cache.num_pages - len(held)
        longest = max((len(tokens) for tokens in self.committed if tokens), default=1)
        keys, values = self.cache.gather(1, longest)
        for row, tokens in enumerate(self.committed):
            valid = int(self.cache.context_lens[row])
            assert valid == (0 if tokens is None else len(tokens) - 1)
            if tokens:
                assert (keys[row, :valid, 0, 0] - 1).tolist() == tokens[:-1]
                assert (-values[row, :valid, 0, 1]).tolist() == tokens[:-1]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=2000, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_finds_pages_that_two_write(monkeypatch):
    """Broken on purpose: a fork that shares the page which both write next."""
    monkeypatch.setattr(PagedKVCache, "_copy", lambda self, copies: None)
    once = settings(TestCacheMachine.settings, max_examples=300, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CacheMachine, settings=once)
