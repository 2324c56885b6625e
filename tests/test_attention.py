"""What runs attention over pages, and what the libraries behind it are given.

No library is here: each is a fake that computes what its documentation says, from what it was given.
"""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine import attention, native, ops
from sjd_engine.kernels import paged
from sjd_engine.testing import AttentionCase, attention_errors

HALF = torch.float16
CASE = AttentionCase((0, 90, 33), head_dim=64, group=2, dtype=HALF)
CHOICE = {"page_size": 64, "dtype": HALF, "head_dim": 64}
LIBRARIES = ("flash_attn_2", "flash_attn_3", "varlen", "flashinfer")


@pytest.fixture(autouse=True)
def fresh_choice():
    for cached in (attention._backend, attention.flashinfer_wrapper):
        cached.cache_clear()
    yield
    for cached in (attention._backend, attention.flashinfer_wrapper):
        cached.cache_clear()


class TestChoice:
    def test_the_compiled_module_runs_on_a_cpu(self):
        assert attention.backend("cpu", **CHOICE).name == "cpu"

    def test_a_gpu_takes_our_kernel(self):
        pytest.importorskip("triton")
        for page_size in (1, 16, 64, 256):
            assert attention.backend("cuda", **CHOICE | {"page_size": page_size}).name == "triton"

    @pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
    def test_each_of_ours_can_be_asked_for_and_is_as_exact(self, name, monkeypatch):
        if obstacle := attention.missing(name, "cpu"):
            pytest.skip(obstacle)
        monkeypatch.setenv("SJD_ATTENTION", name)
        assert attention.backend("cpu", **CHOICE).name == name
        mine, theirs = attention_errors(attention.window_attention, paged.window_attention, CASE.arguments())
        assert mine <= 2 * theirs

    def test_an_unknown_one_lists_the_known(self, monkeypatch):
        monkeypatch.setenv("SJD_ATTENTION", "flash")
        with pytest.raises(ValueError, match=r"SJD_ATTENTION: unknown 'flash'; known: cpu, triton, flash_attn_2"):
            attention.backend("cpu", **CHOICE)

    @pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flashinfer"])
    def test_a_library_that_is_missing_is_an_error_with_the_remedy(self, name, monkeypatch):
        monkeypatch.setenv("SJD_ATTENTION", name)
        monkeypatch.setitem(sys.modules, attention.ATTENTIONS[name].library.partition(":")[0], None)
        with pytest.raises(RuntimeError, match=f"SJD_ATTENTION={name}: .*`pip install"):
            attention.backend("cuda", **CHOICE)

    def test_an_older_pytorch_has_no_block_tables(self, monkeypatch):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value: query)
        assert "takes no block_table; `pip install 'torch>=2.13'`" in attention.missing("varlen", "cuda")

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("flash_attn_2", {"page_size": 64}, "page_size must be a multiple of 256, got 64"),
            ("varlen", {"page_size": 128}, "page_size must be a multiple of 256, got 128"),
            ("flash_attn_3", {"dtype": torch.float32}, "dtype must be torch.float16 or torch.bfloat16"),
            ("flashinfer", {"head_dim": 80}, r"head_dim must be in \(64, 128, 256\), got 80"),
            ("triton", {"head_dim": 192}, r"head_dim must be in range\(1, 129\), got 192"),
            ("cpu", {}, "it runs on cpu, not on cuda"),
        ],
    )
    def test_pages_that_it_does_not_take_are_an_error(self, name, change, message, fakes, monkeypatch):
        monkeypatch.setenv("SJD_ATTENTION", name)
        with pytest.raises(RuntimeError, match=f"SJD_ATTENTION={name}: {message}"):
            attention.backend("cuda", **{"page_size": 256, "dtype": HALF, "head_dim": 64} | change)

    def test_the_interpreter_is_kept_from_bfloat16(self, monkeypatch):
        monkeypatch.setenv("SJD_ATTENTION", "triton")
        if obstacle := attention.missing("triton", "cpu"):
            pytest.skip(obstacle)
        with pytest.raises(RuntimeError, match="bits of bfloat16"):
            attention.backend("cpu", **CHOICE | {"dtype": torch.bfloat16})

    def test_a_missing_module_is_told_not_hidden(self, monkeypatch):
        monkeypatch.setattr(native, "_C", None)
        with pytest.warns(RuntimeWarning, match="the slow reference runs `window_attention`"):
            assert attention.backend("cpu", **CHOICE).name == "reference"


# ------------------------------------------------------------------------------------------------------------- fakes


def attend(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int, scale: float | None) -> Tensor:
    """[N, H, D] of one sequence at the end of `length` tokens on the pages [P, page_size, KH, D] that `table` names."""
    assert (table >= 0).all(), "a library reads whatever page it is given"
    rows = [pages[table.long()].flatten(0, 1)[:length].transpose(0, 1)[None] for pages in (keys, values)]
    assert rows[0].shape[2] == length
    seen = torch.arange(length) <= length - len(queries) + torch.arange(len(queries))[:, None]
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], *rows, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def with_kvcache(table_name):
    """`flash_attn_with_kvcache` of FlashAttention 2 or 3, which differ in the name of the table."""

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, **table):
        (table,) = (table.pop(table_name), *table)
        assert causal
        assert cache_seqlens.dtype == table.dtype == torch.int32
        parts = zip(q, table, cache_seqlens.tolist(), strict=True)
        return torch.stack([attend(one, k_cache, v_cache, row, n, softmax_scale) for one, row, n in parts])

    return flash_attn_with_kvcache


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert num_splits is None  # FlashAttention 2 refuses it
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert cu_seq_q.diff().unique().tolist() == [max_q]
    assert max_k >= seqused_k.max()
    parts = zip(query.split(cu_seq_q.diff().tolist()), block_table, seqused_k.tolist(), strict=True)
    return torch.cat([attend(one, key, value, row, n, scale) for one, row, n in parts])


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal, sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert causal
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32
        assert (paged_kv_last_page_len >= 1).all()
        assert (paged_kv_last_page_len <= page_size).all()
        self.planned = (num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, kv_data_type)
        self.num_new, self.num_pages, self.scale = qo_indptr.diff().tolist(), paged_kv_indptr.diff(), sm_scale
        self.tables = paged_kv_indices.split(self.num_pages.tolist())
        self.lens = ((self.num_pages - 1) * page_size + paged_kv_last_page_len).tolist()

    def run(self, q, paged_kv_cache):
        assert q.is_contiguous()
        assert paged_kv_cache.is_contiguous()
        _, _, page_size, num_kv_heads, head_dim = paged_kv_cache.shape
        assert self.planned == (q.shape[1], num_kv_heads, head_dim, page_size, q.dtype, paged_kv_cache.dtype)
        keys, values = paged_kv_cache.unbind(1)
        parts = zip(q.split(self.num_new), self.tables, self.lens, strict=True)
        return torch.cat([attend(one, keys, values, table, n, self.scale) for one, table, n in parts])


@pytest.fixture
def fakes(monkeypatch):
    """The libraries, importable."""
    for name, function in {
        "flash_attn_2": with_kvcache("block_table"),
        "flash_attn_3": with_kvcache("page_table"),
        "flashinfer": BatchPrefillWithPagedKVCacheWrapper,
    }.items():
        module, _, attribute = attention.ATTENTIONS[name].library.partition(":")
        fake = ModuleType(module)
        setattr(fake, attribute, function)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", LIBRARIES)
class TestLibraries:
    def test_it_can_be_asked_for_on_a_gpu(self, name, monkeypatch):
        monkeypatch.setenv("SJD_ATTENTION", name)
        chosen = attention.backend("cuda", page_size=256, dtype=HALF, head_dim=64)
        assert (chosen.name, chosen.reason) == (name, "SJD_ATTENTION asks for it")

    @pytest.mark.parametrize(
        "case",
        [
            CASE,
            replace(CASE, group=1, page_size=256),
            replace(CASE, num_new=1, page_size=1, scale=0.2),
            replace(CASE, num_new=16, head_dim=128, dtype=torch.bfloat16),
        ],
        ids=["GQA", "MHA", "one", "wide"],
    )
    def test_it_is_given_what_the_definition_computes(self, name, case):
        arguments = case.arguments()
        mine, theirs = attention_errors(causal(name), paged.window_attention, without_bias(arguments))
        assert mine <= 2 * theirs

    @pytest.mark.parametrize("wide", [False, True], ids=["no page", "past the table"])
    def test_a_row_whose_own_token_has_a_page_does_not_see_the_pages_that_are_missing(self, name, wide):
        """The pages of tokens 96 on are missing: in the table as -1, or because it ends there."""
        case = replace(CASE, lens=(0, 90, 33), num_new=16)
        whole = without_bias(case.arguments())
        expected = paged.window_attention(**whole)
        table = whole["block_table"].clone()
        table[:, 6:] = -1
        table[0] = -1
        got = causal(name)(**whole | {"block_table": table[:, :6].contiguous() if wide else table})
        assert got.isfinite().all()
        assert (got[0] == 0).all()
        assert (got[1, :6] - expected[1, :6]).abs().max() < 1e-3
        assert (got[2] - expected[2]).abs().max() < 1e-3

    def test_only_what_says_so_reads_numbers_on_the_host(self, name, monkeypatch):
        """Meta tensors have none. That FlashAttention 2 reads some is its own doing."""
        if name != "flashinfer":
            module, _, attribute = attention.ATTENTIONS[name].library.partition(":")
            monkeypatch.setattr(sys.modules[module], attribute, lambda q, *args, **options: torch.empty_like(q))
            assert causal(name)(**without_bias(CASE.arguments("meta"))).shape == (3, 7, 4, 64)
        else:
            with pytest.raises(NotImplementedError, match="meta"):
                causal(name)(**without_bias(CASE.arguments("meta")))

    def test_a_tree_goes_to_triton(self, name, monkeypatch):
        given = {}
        monkeypatch.setattr(attention, "triton", lambda *args, **options: given.update(options) or args[0])
        arguments = replace(CASE, bias="own").arguments()
        attention.implementation(name)(*positional(arguments), **arguments)
        assert given["window_bias"] is arguments["window_bias"]

    def test_it_says_what_it_asks_for(self, name):
        asks = str(attention.ATTENTIONS[name])
        assert ("256n tokens" in asks) == (name in ("flash_attn_2", "varlen"))
        assert ("host sync, no CUDA graph" in asks) == (name in ("flash_attn_2", "flashinfer"))
        assert "trees by triton" in asks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_library_itself_is_as_exact(name):
    if obstacle := attention.missing(name, "cuda"):
        pytest.skip(obstacle)
    case = replace(CASE, page_size=256, lens=(0, 900, 250))
    mine, theirs = attention_errors(causal(name), paged.window_attention, without_bias(case.arguments("cuda")))
    assert mine <= 2 * theirs


def causal(name: str):
    return attention.ATTENTIONS[name].run


def without_bias(arguments: dict) -> dict:
    return {key: value for key, value in arguments.items() if key != "window_bias"}


def positional(arguments: dict) -> list[Tensor]:
    """Takes the positional arguments out."""
    return [arguments.pop(name) for name in ("queries", "pages", "block_table", "context_lens")]


# ---------------------------------------------------------------------------------------------------- torch.ops.sjd


class TestKVOps:
    def test_the_compiled_module_has_them_on_a_cpu(self):
        assert ops.kv_ops("cpu").name == "compiled"
        assert ops.kv_ops("cpu").copy_pages is native.copy_pages

    def test_the_reference_can_be_asked_for(self, monkeypatch):
        monkeypatch.setenv("SJD_BACKEND", "reference")
        chosen = ops.kv_ops("cpu")
        assert (chosen.name, chosen.reason) == ("reference", "SJD_BACKEND asks for it")
        assert chosen.copy_pages is paged.copy_pages

    @pytest.mark.parametrize(
        ("built", "hip", "name"),
        [(True, None, "compiled"), (False, None, "reference"), (True, "6.4", "reference")],
        ids=["CUDA", "none", "HIP"],
    )
    def test_a_gpu_takes_the_compiled_module_where_it_has_cuda(self, built, hip, name, monkeypatch):
        monkeypatch.setattr(native, "has_cuda", lambda: built)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert ops.kv_ops("cuda").name == name

    def test_a_traced_pass_writes_and_attends_as_an_eager_one(self):
        arguments = CASE.arguments()
        queries, pages, table, lens = positional(arguments)
        keys, values = torch.randn(2, *queries.shape[:2], *pages.shape[3:]).to(HALF)

        def step(queries, pages, table, lens, keys, values):
            ops.append_kv(pages, table, lens, keys, values)
            return ops.window_attention(queries, pages, table, lens, span=97)

        eager, traced = pages.clone(), pages.clone()
        expected = step(queries, eager, table, lens, keys, values)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(queries, traced, table, lens, keys, values)
        assert torch.equal(got, expected)
        assert torch.equal(traced.nan_to_num(), eager.nan_to_num())
        assert not torch.equal(eager.nan_to_num(), pages.nan_to_num())

    def test_opcheck(self):
        arguments = replace(CASE, dtype=torch.float32, without_page=1).arguments()
        queries, pages, table, lens = positional(arguments)
        pages.nan_to_num_()
        keys = torch.randn(*queries.shape[:2], *pages.shape[3:])
        torch.library.opcheck(
            torch.ops.sjd.append_kv.default, (pages, table, lens, keys, keys.clone(), None, None, None)
        )
        torch.library.opcheck(torch.ops.sjd.window_attention.default, (queries, pages, table, lens, 97, None, None))
