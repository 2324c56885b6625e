"""The Triton kernel of window attention is as exact as PyTorch: on a GPU, or without one in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from sjd_engine.kernels import launch, paged
from sjd_engine.testing import AttentionCase, attention_errors

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported", allow_module_level=True)

from sjd_engine.kernels.attention import window_attention  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
RAGGED = AttentionCase((0, 90, 33))
TREE = replace(RAGGED, bias="own", group=3, dtype=BRAIN)
CHUNKS = AttentionCase((600, 130), group=2)  # three chunks and one

CASES = {
    **{f"page{size}": replace(RAGGED, page_size=size) for size in (1, 16, 24, 64, 256)},
    **{f"D{dim}": replace(RAGGED, head_dim=dim, dtype=BRAIN) for dim in (24, 64, 100, 128)},
    **{f"D{dim}-float32": replace(RAGGED, head_dim=dim, group=2) for dim in (5, 80)},
    "float16": replace(RAGGED, head_dim=64, dtype=HALF, page_size=64),
    "GQA4": replace(RAGGED, group=4, dtype=HALF),
    "GQA3": replace(RAGGED, group=3, dtype=BRAIN),
    "N1": replace(RAGGED, num_new=1, group=4, page_size=64),
    "N16": replace(RAGGED, num_new=16, dtype=BRAIN),
    "N33": replace(RAGGED, num_new=33, group=3, dtype=BRAIN),  # two blocks of rows
    "N33-float32": replace(RAGGED, num_new=33),
    "prompt": AttentionCase((0,), num_new=70, group=2, dtype=HALF, page_size=64),
    "tree": TREE,
    "tree-shared": replace(RAGGED, bias="shared", num_new=16, page_size=64),
    "chunks": CHUNKS,
    "chunks-page64": replace(CHUNKS, page_size=64, dtype=BRAIN, head_dim=64),
    "chunks-tree": replace(CHUNKS, bias="own", num_new=16, dtype=HALF),
    "chunks-cut-the-window": AttentionCase((250, 500), num_new=33),
    "no-page-at-the-end": replace(RAGGED, without_page=1),
    "no-page-at-the-end-tree": replace(TREE, without_page=2),
    "no-page": replace(RAGGED, without_page=7),
    "no-page-in-the-last-chunks": replace(CHUNKS, without_page=22),
    "scale": replace(RAGGED, scale=0.7),
}


def within(errors: tuple[float, float]) -> bool:
    mine, theirs = errors
    return mine <= max(2 * theirs, 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_as_exact_as_the_definition(case):
    """Every slot that nobody may read is NaN, and so would be the error."""
    assert within(attention_errors(window_attention, paged.window_attention, case.arguments(DEVICE)))


@pytest.mark.parametrize("wrong", [{"context_lens": 1}, {"context_lens": -1}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["page16", "chunks"])
def test_a_wrong_kernel_would_be_noticed(name, wrong):
    """One token too many is NaN, one too few is an error; so is another scale."""
    arguments = CASES[name].arguments(DEVICE)

    def broken(**given):
        lens = given["context_lens"] + wrong.get("context_lens", 0)
        return window_attention(**given | {"context_lens": lens, "scale": wrong.get("scale")})

    assert not within(attention_errors(broken, paged.window_attention, arguments))


def test_a_sequence_is_the_same_in_any_batch_and_for_any_span():
    whole = CHUNKS.arguments(DEVICE)
    expected = window_attention(**whole)
    assert torch.equal(window_attention(**whole | {"span": 2000}), expected)
    for row in range(2):
        one = {name: whole[name][row : row + 1] for name in ("queries", "block_table", "context_lens")}
        span = CHUNKS.lens[row] + CHUNKS.num_new  # of one row it is one chunk: one launch
        assert torch.equal(window_attention(**whole | one | {"span": span}), expected[row : row + 1])


@pytest.mark.parametrize("chunk", [64, 128])
def test_chunks_of_another_size_are_as_exact(chunk, monkeypatch):
    monkeypatch.setattr(launch, "CHUNK", chunk)
    assert within(attention_errors(window_attention, paged.window_attention, CHUNKS.arguments(DEVICE)))


def test_blocks_of_another_size_are_as_exact(monkeypatch):
    row = launch.AttentionLaunch("tiny", None, 16, 16, 4, 1)
    monkeypatch.setattr(launch, "FLOAT32_LAUNCHES", (row,))
    case = replace(RAGGED, num_new=16, group=2)
    assert within(attention_errors(window_attention, paged.window_attention, case.arguments(DEVICE)))


def test_pages_and_queries_may_lie_between_others():
    arguments = replace(RAGGED, group=2).arguments(DEVICE)
    expected = window_attention(**arguments)
    pages, queries, table = arguments["pages"], arguments["queries"], arguments["block_table"]
    layers = torch.stack((pages, pages * 2), 1)
    qkv = torch.cat((queries, queries), 2)
    wide = torch.cat((table, table), 1)
    views = {"pages": layers[:, 0], "queries": qkv[:, :, : queries.shape[2]], "block_table": wide[:, : table.shape[1]]}
    assert torch.equal(window_attention(**arguments | views), expected)
    transposed = queries.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(window_attention(**arguments | {"queries": transposed}), expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum
def test_a_nan_query_is_shown_where_it_is_and_nowhere_else():
    arguments = CHUNKS.arguments(DEVICE)
    expected = window_attention(**arguments)
    arguments["queries"][1, 2] = float("nan")
    got = window_attention(**arguments)
    assert got[1, 2].isnan().all()
    got[1, 2] = expected[1, 2]
    assert torch.equal(got, expected)


def test_a_nan_key_in_the_context_is_shown():
    arguments = RAGGED.arguments(DEVICE)
    arguments["pages"][arguments["block_table"][1, 0].long(), 0, 3] = float("nan")
    got = window_attention(**arguments)
    assert got[1].isnan().all()
    assert not got[[0, 2]].isnan().any()


def test_nothing_to_do():
    arguments = RAGGED.arguments(DEVICE)
    none = {name: arguments[name][:0] for name in ("queries", "block_table", "context_lens")}
    assert window_attention(**arguments | none).shape == (0, 7, 2, 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("queries", lambda t: t.double(), "queries must be float32, float16 or bfloat16"),
        ("queries", lambda t: torch.zeros(3, 7, 2, 200), "a head dim of at most 128, got torch.float32 and 200"),
        ("queries", lambda t: t[:, :, :1], "num_heads must be a multiple of num_kv_heads = 2, got 1"),
        ("pages", lambda t: t.half(), "pages must be torch.float32 on .*, got torch.float16"),
        ("pages", lambda t: t[..., :8], r"pages must be \[P, 2, page_size, KH, 16\]"),
        ("block_table", lambda t: t.long(), "block_table must be torch.int32 on"),
        ("block_table", lambda t: t[:2], r"block_table must be \[3, width\]"),
        ("context_lens", lambda t: t[:2], r"context_lens must be contiguous \[3\], got \[2\]"),
        ("context_lens", lambda t: t.to("meta"), "context_lens must be torch.int32 on .*, got torch.int32 on meta"),
        ("window_bias", lambda t: torch.zeros(6, 7), r"window_bias must be \[N, N\] or \[S, N, N\] = \[3, 7, 7\]"),
        ("span", lambda t: 3, "span must be at least the 7 tokens of the window, got 3"),
    ],
)
def test_errors_name_op_and_argument(name, change, message):
    arguments = RAGGED.arguments(DEVICE)
    with pytest.raises(ValueError, match=f"window_attention: .*{message}"):
        window_attention(**arguments | {name: change(arguments[name])})
