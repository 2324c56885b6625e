"""libsjd, built and installed by CMake, decides as the package does: its C interface and the C++ example."""

import ctypes
import random
import shutil
import subprocess
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import pytest
import torch

from sjd_engine import JacobiDecoder, PagedKVCache, SamplingParams, Schedule, native

ROOT = Path(__file__).parents[1]
METHODS = ("maximal", "ar", "jacobi", "sjd", "sjd++", "gumbel", "exact")  # by sjd_method
INITS = ("random", "left-repeat", "above-repeat", "left-sample", "above-sample")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INVALID_ARGUMENT, OUT_OF_PAGES = 1, 2

pytestmark = pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("g++"), reason="no cmake, or no g++")


class DecoderOptions(ctypes.Structure):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_int64) for name in ("batch_size", "num_tokens", "vocab_size", "window_size")]
    _fields_ += [("seeds", POINTER(c_int64)), ("forced_ids", POINTER(c_int64)), ("cols", c_int64), ("top_k", c_int64)]
    _fields_ += [(name, c_float) for name in ("top_p", "temperature", "guidance_scale", "reuse_threshold")]
    _fields_ += [(name, c_int32) for name in ("method", "init", "num_threads")]


class Logits(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("data", c_void_p), ("dtype", c_int32), ("strides", c_int64 * 4)]


class CacheOptions(ctypes.Structure):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_int64) for name in ("num_layers", "num_kv_heads", "head_dim", "num_sequences")]
    _fields_ += [(name, c_int64) for name in ("capacity", "num_pages", "page_size")]
    _fields_ += [(name, c_int32) for name in ("dtype", "num_threads")]


def sized(struct: type[ctypes.Structure], **values) -> ctypes.Structure:
    return struct(size=ctypes.sizeof(struct), **values)


def int64s(values) -> ctypes.Array:
    return (c_int64 * len(values))(*values)


def at(tensor: torch.Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Where the library is installed, and the example's program lies in `example`."""
    folder = tmp_path_factory.mktemp("libsjd")
    for source, name, *arguments in (
        (ROOT / "csrc", "build", "-DCMAKE_BUILD_TYPE=Debug"),  # compiling takes longer than running
        (ROOT / "examples" / "embed_cpp", "example", f"-DCMAKE_PREFIX_PATH={folder}"),
    ):
        run("cmake", "-S", source, "-B", folder / name, *arguments)
        run("cmake", "--build", folder / name)
        if name == "build":
            run("cmake", "--install", folder / name, "--prefix", folder)
    return folder


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(built) -> ctypes.CDLL:
    (path,) = built.glob("lib*/libsjd.so")
    loaded = ctypes.CDLL(str(path))
    loaded.sjd_last_error.restype = ctypes.c_char_p
    for name, *types in (
        ("decoder_create", POINTER(DecoderOptions), POINTER(c_void_p)),
        ("decoder_destroy", c_void_p),
        ("decoder_done", c_void_p),
        ("decoder_window", c_void_p, c_void_p, c_void_p),
        ("decoder_verify", c_void_p, POINTER(Logits), c_void_p),
        ("decoder_read", c_void_p, c_void_p, c_void_p),
        ("cache_create", POINTER(CacheOptions), POINTER(c_void_p)),
        ("cache_destroy", c_void_p),
        ("cache_admit", c_void_p, c_int64, POINTER(c_int64), c_int64, c_int64, POINTER(c_int64)),
        ("cache_publish", c_void_p, c_int64, c_int64),
        ("cache_fork", c_void_p, c_int64, c_int64, c_int64, c_int64),
        ("cache_own", c_void_p, c_int64, c_int64),
        ("cache_release", c_void_p, c_int64),
        ("cache_append", c_void_p, c_int64, c_void_p, c_void_p, c_int64),
        ("cache_attend", c_void_p, c_int64, c_void_p, c_int64, c_int64, c_float, c_void_p),
        ("cache_gather", c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ("cache_rollback", c_void_p, POINTER(c_int64)),
        ("cache_read", c_void_p, c_void_p, POINTER(c_int64)),
    ):
        getattr(loaded, f"sjd_{name}").argtypes = types
    return loaded


def test_only_its_functions_are_exported(built):
    exported = run("nm", "-D", "--defined-only", *built.glob("lib*/libsjd.so")).split("\n")
    assert all(line.split()[-1].startswith("sjd_") for line in exported if line)


def test_the_header_is_c():
    run(
        "gcc",
        "-std=c99",
        "-pedantic-errors",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-xc",
        ROOT / "csrc/sjd.h",
    )


# ---------------------------------------------------------------------------------------------------------- example


def logit(context: list[int], code: int) -> float:
    """That of examples/embed_cpp/decode.cpp."""
    value = code
    for token in context[-3:]:
        value = (value ^ (token + 2)) * 0x9E3779B97F4A7C15 % 2**64
        value ^= value >> 29
    return value % 256 / 64


@pytest.mark.parametrize("method", METHODS)
def test_the_example_prints_what_the_package_decodes(built, method):
    decoder = JacobiDecoder(batch_size=1, num_tokens=64, vocab_size=32, window_size=16, method=method, seeds=[7])
    context: list[int] = []
    while not decoder.done:
        ids = decoder.window()[0][0].tolist()
        rows = [[logit(context + ids[: i + 1], code) for code in range(32)] for i in range(len(ids))]
        context = (context + ids)[: int(decoder.verify(torch.tensor([rows])).num_committed)]
    tokens, passes = run(built / "example" / "decode", "7", str(METHODS.index(method))).splitlines()
    assert tokens.split() == [str(token) for token in decoder.token_ids[0].tolist()]
    assert passes == f"{decoder.stats.iterations[0]} passes"


# ---------------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("case", range(24))
def test_a_batch_decodes_as_in_python(library, case):
    """Random settings: methods, initialisations, warping, guidance, forced tokens, dtypes, strides and threads."""
    pick = random.Random(case)
    batch, window, vocab, rows, cols = pick.randint(1, 3), pick.randint(1, 7), pick.randint(2, 300), 4, 5
    params = SamplingParams(
        guidance_scale=pick.choice((1.0, 3.0)),
        temperature=pick.choice((1.0, 0.7)),
        top_k=pick.choice((0, 1 + vocab // 3)),
        top_p=pick.choice((1.0, 0.8)),
    )
    schedule = Schedule.with_line_breaks(rows, cols, 1, [0]) if pick.random() < 0.5 else Schedule(rows, cols)
    method, init, dtype = pick.randrange(len(METHODS)), pick.randrange(len(INITS)), pick.randrange(len(DTYPES))
    threshold, seeds = pick.choice((0.5, 0.2)), [pick.randrange(-(2**63), 2**63) for _ in range(batch)]
    decoder = JacobiDecoder(
        batch_size=batch,
        num_tokens=schedule.num_tokens,
        vocab_size=vocab,
        window_size=window,
        method=METHODS[method],
        params=params,
        seeds=seeds,
        schedule=schedule,
        init=INITS[init],
        reuse_threshold=threshold,
    )
    forced = [schedule.forced.get(t, -1) for t in range(schedule.num_tokens)]
    options = sized(
        DecoderOptions,
        batch_size=batch,
        num_tokens=schedule.num_tokens,
        vocab_size=vocab,
        window_size=window,
        seeds=int64s(seeds),
        forced_ids=int64s(forced) if schedule.forced else None,
        cols=cols,
        method=method,
        init=init,
        reuse_threshold=threshold,
        num_threads=pick.randint(0, 2),
        **vars(params),
    )
    handle = c_void_p()
    assert library.sjd_decoder_create(byref(options), byref(handle)) == 0, library.sjd_last_error()
    window = decoder.window_size
    generator = torch.Generator().manual_seed(case)
    pair = (2,) if decoder.guided else ()
    kept = []
    while not decoder.done:
        assert not library.sjd_decoder_done(handle)
        ids, positions = torch.empty(2, batch, window, dtype=torch.int64)
        assert library.sjd_decoder_window(handle, at(ids), at(positions)) == 0
        assert all(torch.equal(mine, theirs) for mine, theirs in zip((ids, positions), decoder.window(), strict=True))
        wide = torch.randn(*pair, batch, window, vocab + 3, generator=generator).mul(2).to(DTYPES[dtype])
        logits = wide[..., :vocab] if pick.random() < 0.5 else wide[..., :vocab].contiguous()
        kept.append(logits)  # the next pass reads it again
        strides = (0,) * 4 if logits.is_contiguous() else ((0,) * (4 - logits.ndim) + logits.stride())
        view = sized(Logits, data=logits.data_ptr(), dtype=dtype, strides=(c_int64 * 4)(*strides))
        committed = torch.empty(batch, dtype=torch.int64)
        assert library.sjd_decoder_verify(handle, byref(view), at(committed)) == 0, library.sjd_last_error()
        assert torch.equal(committed, decoder.verify(logits).num_committed)
    tokens, passes = torch.empty(batch, schedule.num_tokens, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    assert library.sjd_decoder_read(handle, at(tokens), at(passes)) == 0
    assert torch.equal(tokens, decoder.token_ids)
    assert passes.tolist() == decoder.stats.iterations
    assert library.sjd_decoder_done(handle)
    library.sjd_decoder_destroy(handle)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"size": 4}, b"options must be a struct of at most 104 bytes that begins with its size, got 4"),
        ({"size": 1000}, b"link the library that the header came with or a later one"),
        ({"num_tokens": 0}, b"num_tokens must be in 1..2147483647, got 0"),
        ({"vocab_size": 1}, b"vocab_size must be in 2..262144, got 1"),
        ({"window_size": -1}, b"window_size must be in 1..2147483647, got -1"),
        ({"method": 7}, b"method must be in 0..6, got 7"),
        ({"temperature": -1.0}, b"temperature must be > 0 and finite, got -1"),
        ({"guidance_scale": 0.5}, b"guidance_scale must be >= 1 and finite, got 0.5"),
        ({"top_p": 1.5}, b"top_p must be in (0, 1], got 1.5"),
        ({"cols": 7}, b"cols must be a divisor of the 8 tokens that are not forced, got 7"),
    ],
)
def test_bad_options_are_refused(library, changed, expected):
    options = sized(DecoderOptions, num_tokens=8, vocab_size=4, window_size=2)
    for name, value in changed.items():
        setattr(options, name, value)
    handle = c_void_p()
    assert library.sjd_decoder_create(byref(options), byref(handle)) == INVALID_ARGUMENT
    assert b"sjd_decoder_create: " in library.sjd_last_error()
    assert expected in library.sjd_last_error()
    assert handle.value is None


def test_a_program_of_an_earlier_version_gets_the_defaults(library):
    """Its options end before `method`; what lies behind them is not read."""
    options = DecoderOptions(
        size=DecoderOptions.method.offset, num_tokens=8, vocab_size=4, method=99, init=99, num_threads=-5
    )
    handle = c_void_p()
    assert library.sjd_decoder_create(byref(options), byref(handle)) == 0, library.sjd_last_error()
    library.sjd_decoder_destroy(handle)


def test_logits_that_the_next_pass_still_needs_are_missed(library):
    options = sized(DecoderOptions, num_tokens=8, vocab_size=4, window_size=2)
    handle, logits = c_void_p(), torch.zeros(1, 2, 4)
    assert library.sjd_decoder_create(byref(options), byref(handle)) == 0
    view = sized(Logits, data=logits.data_ptr())
    assert library.sjd_decoder_verify(handle, byref(view), None) == 0
    assert library.sjd_decoder_verify(handle, byref(view), None) == INVALID_ARGUMENT
    assert b"let two buffers take turns" in library.sjd_last_error()
    library.sjd_decoder_destroy(handle)


# ------------------------------------------------------------------------------------------------------------ cache

LAYERS, KV_HEADS, HEADS, HEAD_DIM, ROWS, CAPACITY, PAGES, PAGE_SIZE = 2, 2, 4, 8, 3, 12, 7, 4


class Twins:
    """The library's cache and the package's, through the same calls; what they answer is compared."""

    def __init__(self, library: ctypes.CDLL, dtype: int):
        self.library, self.handle, self.dtype = library, c_void_p(), DTYPES[dtype]
        options = sized(
            CacheOptions,
            num_layers=LAYERS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            num_sequences=ROWS,
            capacity=CAPACITY,
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            dtype=dtype,
        )
        assert library.sjd_cache_create(byref(options), byref(self.handle)) == 0, library.sjd_last_error()
        self.other = PagedKVCache(
            LAYERS,
            KV_HEADS,
            HEAD_DIM,
            num_sequences=ROWS,
            capacity=CAPACITY,
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            dtype=self.dtype,
        )

    def call(self, name: str, *arguments) -> int:
        return getattr(self.library, f"sjd_cache_{name}")(self.handle, *arguments)

    def reserve(self, name: str, ours, *arguments) -> bool:
        """A call that takes pages, on both; whether there were enough."""
        status, refusal = self.call(name, *arguments), ""
        try:
            ours()
        except native.PagesExhausted as error:
            refusal = str(error)
        assert status == (OUT_OF_PAGES if refusal else 0), self.library.sjd_last_error()
        if refusal:
            assert self.library.sjd_last_error() == refusal.encode()
        return not refusal

    def step(self, generator: torch.Generator, num_new: int) -> None:
        """Append and attend in every layer, as a pass does."""
        for layer in range(LAYERS):
            keys, values = torch.randn(2, ROWS, num_new, KV_HEADS, HEAD_DIM, generator=generator).to(self.dtype)
            queries = torch.randn(ROWS, num_new, HEADS, HEAD_DIM, generator=generator).to(self.dtype)
            assert self.call("append", layer, at(keys), at(values), num_new) == 0
            self.other.append(layer, keys, values)
            out = torch.empty_like(queries)
            assert self.call("attend", layer, at(queries), HEADS, num_new, 0.0, at(out)) == 0
            # Sums are fused where the compiler optimises, and here it does not.
            torch.testing.assert_close(out, self.other.attend(layer, queries, CAPACITY + num_new))
            gathered = out.new_empty(2, ROWS, CAPACITY, KV_HEADS, HEAD_DIM)
            assert self.call("gather", layer, num_new, CAPACITY, at(gathered)) == 0
            assert torch.equal(gathered, torch.stack(self.other.gather(layer, CAPACITY, num_new)))

    def rollback(self, lengths: list[int]) -> None:
        assert self.call("rollback", int64s(lengths)) == 0, self.library.sjd_last_error()
        self.other.rollback(torch.tensor(lengths))
        read, num_free = torch.empty(ROWS, dtype=torch.int64), c_int64()
        assert self.call("read", at(read), byref(num_free)) == 0
        assert read.tolist() == lengths
        assert num_free.value == self.other.num_free_pages


@pytest.mark.skipif(not native.available(), reason="the package's own is not compiled")
@pytest.mark.parametrize("dtype", range(len(DTYPES)))
def test_a_cache_holds_what_the_packages_does(library, dtype):
    """Random admissions, shared prompts, forks, copies on write, passes, rollbacks and releases."""
    twins, generator, pick = Twins(library, dtype), torch.Generator().manual_seed(dtype), random.Random(dtype)
    lengths, rooms, prompts = [0] * ROWS, [0] * ROWS, [[] for _ in range(ROWS)]
    counts = dict.fromkeys(("admit", "shared", "fork", "own", "release", "refused"), 0)
    for _ in range(100):
        row, into, capacity = pick.randrange(ROWS), pick.randrange(ROWS), pick.randint(6, CAPACITY)
        first = pick.randint(0, min(lengths[row], capacity))
        if not rooms[row]:
            name, prompt, cached = "admit", [1] * pick.randint(0, 6), c_int64()
            ours = partial(twins.other.admit, row, capacity, prompt)
            taken = twins.reserve(name, ours, row, int64s(prompt), len(prompt), capacity, byref(cached))
            changed, length = row, cached.value
            prompts[row], counts["shared"] = prompt, counts["shared"] + (length > 0)
        elif pick.random() < 0.3:
            name, taken, changed, capacity, length = "release", True, row, 0, 0
            assert twins.call(name, row) == 0
            twins.other.release(row)
        elif not rooms[into]:
            name, changed, length, prompts[into] = "fork", into, first, []
            ours = partial(twins.other.fork, row, into, first, capacity)
            taken = twins.reserve(name, ours, row, into, first, capacity)
        else:
            name, changed, length, capacity = "own", row, first, rooms[row]
            taken = twins.reserve(name, partial(twins.other.own, row, first), row, first)
        counts[name if taken else "refused"] += 1
        if taken:
            lengths[changed], rooms[changed] = length, -(-capacity // PAGE_SIZE) * PAGE_SIZE
        twins.rollback(lengths)
        twins.step(generator, 3)
        lengths = [min(length + pick.randint(0, 3), room) for length, room in zip(lengths, rooms, strict=True)]
        twins.rollback(lengths)
        written = min(lengths[row], len(prompts[row]))
        if rooms[row]:
            assert twins.call("publish", row, written) == 0
            twins.other.publish(row, written)
    assert min(counts.values()) > 0, counts
    library.sjd_cache_destroy(twins.handle)


def test_a_cache_says_what_is_wrong(library):
    twins = Twins(library, 0)
    assert twins.call("admit", 3, None, 0, 4, None) == INVALID_ARGUMENT
    assert library.sjd_last_error() == b"sjd_cache_admit: row must be in 0..2, got 3"
    assert twins.call("release", 0) == INVALID_ARGUMENT
    assert library.sjd_last_error() == b"sjd_cache_release: row must be taken, got 0"
    assert twins.call("admit", 0, None, 0, 4, None) == 0
    assert twins.call("rollback", int64s([5, 0, 0])) == INVALID_ARGUMENT
    assert library.sjd_last_error() == b"sjd_cache_rollback: every length must be in 0..4, got 5"
    assert twins.call("append", 2, None, None, 1) == INVALID_ARGUMENT
    assert library.sjd_last_error() == b"sjd_cache_append: layer must be in 0..1, got 2"
    library.sjd_cache_destroy(twins.handle)
