import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sjd_engine import Engine, StepInfo, ops
from sjd_engine.auto_window import AutoWindow
from sjd_engine.methods import INITS
from sjd_engine.request import make_request
from sjd_engine.testing import FUSED

PROMPTS = ["a red apple", "noto soccer ball on grass", "twemoji smiling face on brick"]
SHORT = {"window_size": 32, "progress": False, "output_type": "codes"}


def codes(engine: Engine, prompt, **arguments) -> torch.Tensor:
    return engine.generate(prompt, **{**SHORT, **arguments}).token_ids


@pytest.fixture(scope="module")
def ar_codes(engine) -> torch.Tensor:
    return codes(engine, PROMPTS, method="ar", seed=[11, 12, 13])


class TestExactSeed:
    """T4: `exact` gives token for token what `ar` gives, in float32."""

    @pytest.mark.parametrize("window", [2, 8, 32, 64])
    def test_in_a_batch(self, engine, ar_codes, window):
        assert torch.equal(codes(engine, PROMPTS, method="exact", seed=[11, 12, 13], window_size=window), ar_codes)

    @pytest.mark.parametrize("window", [8, 64])
    def test_alone(self, engine, ar_codes, window):
        assert torch.equal(codes(engine, PROMPTS[1], method="exact", seed=12, window_size=window), ar_codes[1:2])

    def test_with_windows_that_change(self, engine, ar_codes, monkeypatch):
        """They grow and shrink, and passes that are only timed lie between."""
        wanted = itertools.cycle([8, 64, 4, 24, 48, 12])
        monkeypatch.setattr(AutoWindow, "choose", lambda *arguments: next(wanted))
        out = engine.generate(PROMPTS, method="exact", seed=[11, 12, 13], progress=False, output_type="codes")
        assert torch.equal(out.token_ids, ar_codes)
        for stats in out.stats:
            assert len(stats.window_sizes) == stats.nfe
            assert set(stats.window_sizes) >= {4, 8, 12, 24, 48, 64}

    def test_whatever_the_neighbours(self, engine, ar_codes):
        prompts = ["blue car on stars", PROMPTS[0], "a cat face", "dark wood"]
        assert torch.equal(codes(engine, prompts, method="exact", seed=[1, 11, 2, 3])[1], ar_codes[0])

    def test_whatever_the_initialisation(self, engine, ar_codes):
        for init in INITS[1:]:
            assert torch.equal(codes(engine, PROMPTS[0], method="exact", seed=11, init=init), ar_codes[:1])

    def test_in_bfloat16(self, engine_bf16, capsys):
        """With matrices in panels a row of a pass does not depend on the others. Otherwise a window's logits are
        rounded unlike one token's, so an image may part from `ar`'s; until then the tokens are the same. The rate is
        printed; only nonsense fails."""
        ar = codes(engine_bf16, PROMPTS, method="ar", seed=[11, 12, 13])
        exact = codes(engine_bf16, PROMPTS, method="exact", seed=[11, 12, 13])
        if ops.multiplies_panels():
            assert torch.equal(exact, ar)
            assert torch.equal(codes(engine_bf16, PROMPTS[1], method="exact", seed=12, window_size=8), ar[1:2])
            return
        differ = (ar != exact).float().mean().item()
        parted = int((ar != exact).any(1).sum())
        with capsys.disabled():
            print(f"\nexact against ar in bfloat16: {parted} of 3 images part, {differ:.1%} of the tokens differ")
        assert (ar[:, 0] == exact[:, 0]).float().mean() >= 2 / 3


@pytest.mark.parametrize(("method", "window"), [("maximal", None), ("ar", 1), ("eagle", 6)])
def test_no_window_is_the_models_default(engine, method, window):
    request = make_request(engine.model, PROMPTS[0], method=method, window_size=None)
    assert request.window_size == (window or engine.model.defaults.window_size)
    assert not request.auto_window


@pytest.mark.parametrize("method", ["sjd", "sjd++", "maximal", "gumbel", "jacobi"])
def test_an_image_of_a_mixed_batch_is_the_one_its_seed_gives_alone(shallow, method):
    batch = codes(shallow, PROMPTS, method=method, seed=[5, 6, 7])
    assert torch.equal(codes(shallow, PROMPTS[2], method=method, seed=7), batch[2:])


def test_jacobi_equals_greedy_decoding(engine):
    greedy = codes(engine, PROMPTS[0], method="jacobi", window_size=1)
    assert torch.equal(codes(engine, PROMPTS[0], method="jacobi", window_size=16), greedy)


@pytest.mark.skipif(not ops.multiplies_panels(), reason="this CPU does not multiply bfloat16 in vectors")
@pytest.mark.parametrize("method", ["sjd", "maximal"])
def test_in_bfloat16_an_image_of_a_mixed_batch_is_the_one_its_seed_gives_alone(shallow_bf16, method):
    """Prompts of several lengths, one call of the transformer for all."""
    engine = Engine(shallow_bf16.model, batch_invariant=False)
    batch = codes(engine, PROMPTS, method=method, seed=[5, 6, 7])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (5, 6, 7), strict=True)):
        assert torch.equal(codes(engine, prompt, method=method, seed=seed), batch[i : i + 1])


def test_bfloat16_can_be_batch_invariant_too(shallow_bf16):
    engine = Engine(shallow_bf16.model, batch_invariant=True)
    batch = codes(engine, PROMPTS, seed=[5, 6, 7])
    assert torch.equal(codes(engine, PROMPTS[1], seed=6), batch[1:2])


def test_batches_are_taken_in_turn(shallow):
    small = Engine(shallow.model, max_batch_size=2)
    out, expected = (codes(e, PROMPTS, seed=3) for e in (small, shallow))
    assert torch.equal(out, expected)


class TestOutputs:
    def test_images_and_statistics(self, shallow_bf16):
        out = shallow_bf16.generate(PROMPTS[:2], num_images_per_prompt=2, seed=4, progress=False)
        assert out.seeds == [4, 5, 6, 7]
        assert [type(image) for image in out.images] == [Image.Image] * 4
        assert out.images[0].size == (64, 64)
        assert out.token_ids.shape == (4, 256)
        assert out.token_ids.dtype == torch.int64
        assert ((out.token_ids >= 0) & (out.token_ids < 1000)).all()
        for stats in out.stats:
            assert sum(stats.committed_per_pass) == stats.num_tokens == 256
            assert len(stats.committed_per_pass) == stats.nfe < 256
            assert stats.step_compression == 256 / stats.nfe
            assert stats.acceptance_map.shape == (16, 16)
            assert stats.acceptance_map[0, 0] == 0
            assert stats.acceptance_map[15, 15] == stats.nfe - 1
            assert stats.seconds > 0
            assert stats.zero_draft_prob == stats.nonfinite_rows == 0

    def test_ar_has_a_step_compression_of_one(self, shallow_bf16):
        stats = shallow_bf16.generate("a cat", method="ar", **SHORT).stats[0]
        assert stats.nfe == 256
        assert stats.step_compression == 1.0

    def test_output_types_agree(self, shallow_bf16):
        pil, array, tensor = (
            shallow_bf16.generate("a cat", seed=2, progress=False, output_type=kind).images
            for kind in ("pil", "np", "pt")
        )
        assert array.shape == (1, 64, 64, 3)
        assert tensor.shape == (1, 3, 64, 64)
        assert 0 <= array.min() <= array.max() <= 1
        np.testing.assert_allclose(array[0], tensor[0].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))

    def test_codes_have_no_images(self, shallow_bf16):
        assert shallow_bf16.generate("a cat", **SHORT).images is None

    def test_guidance_temperature_and_top_k_change_the_image(self, shallow_bf16):
        base = codes(shallow_bf16, "a cat")
        for change in (
            {"guidance_scale": 1.0},
            {"temperature": 0.5},
            {"top_k": 5},
            {"top_p": 0.5},
            {"negative_prompt": "a dog"},
            {"seed": 1},
        ):
            assert not torch.equal(codes(shallow_bf16, "a cat", **change), base), change


class TestCallbacks:
    def test_every_pass_is_told(self, shallow_bf16):
        seen: list[StepInfo] = []
        out = shallow_bf16.generate(PROMPTS[:2], callback_on_step=seen.append, **SHORT)
        assert [info.passes for info in seen] == list(range(1, max(s.nfe for s in out.stats) + 1))
        assert seen[-1].num_committed == [256, 256]
        assert seen[0].image_indices == [0, 1]

    def test_a_callback_cancels_and_the_engine_goes_on(self, shallow_bf16):
        class CancelledError(Exception):
            pass

        def cancel(info: StepInfo) -> None:
            if info.passes == 3:
                raise CancelledError

        expected = codes(shallow_bf16, "a cat")
        with pytest.raises(CancelledError):
            codes(shallow_bf16, "a cat", callback_on_step=cancel)
        assert torch.equal(codes(shallow_bf16, "a cat"), expected)

    def test_progress_bar(self, shallow_bf16, capsys):
        shallow_bf16.generate("a cat", **{**SHORT, "progress": True})
        assert "256/256" in capsys.readouterr().err
        shallow_bf16.generate("a cat", **SHORT)
        assert capsys.readouterr().err == ""


class TestStream:
    def test_previews_grow_to_the_image(self, shallow_bf16):
        expected = shallow_bf16.generate("a red apple", seed=9, progress=False)
        events = list(shallow_bf16.stream("a red apple", seed=9))
        assert [event.nfe for event in events] == list(range(1, expected.stats[0].nfe + 1))
        committed = [event.num_committed for event in events]
        assert committed == sorted(committed)
        assert all(event.num_committed <= event.num_drafted <= 256 for event in events)
        assert all(event.stats is None for event in events[:-1])
        assert events[-1].stats.committed_per_pass == expected.stats[0].committed_per_pass
        assert events[-1].image.tobytes() == expected.images[0].tobytes()
        first = np.asarray(events[0].image)
        assert (first[60:] == 128).all(), "no token yet: grey"

    def test_every_and_batches(self, shallow_bf16):
        events = list(shallow_bf16.stream(PROMPTS[:2], every=10, output_type="codes"))
        done = [event for event in events if event.stats is not None]
        assert {event.index for event in done} == {0, 1}
        assert all(event.nfe % 10 == 0 for event in events if event.stats is None)

    def test_leaving_the_loop_leaves_the_engine_usable(self, shallow_bf16):
        for event in shallow_bf16.stream("a cat"):
            if event.nfe == 2:
                break
        assert codes(shallow_bf16, "a cat").shape == (1, 256)

    def test_bad_arguments_are_told_at_the_call(self, shallow_bf16):
        with pytest.raises(ValueError, match="unknown 'magic'"):
            shallow_bf16.stream("a cat", method="magic")
        with pytest.raises(TypeError, match="colour"):
            shallow_bf16.stream("a cat", colour="red")


BAD_ARGUMENTS = [
    ({"prompt": ""}, ValueError, "prompt: expected words"),
    ({"prompt": "   "}, ValueError, "prompt: expected words"),
    ({"prompt": []}, ValueError, "empty list"),
    ({"prompt": ["a cat", ""]}, ValueError, "prompt: expected words"),
    ({"prompt": 5}, TypeError, "prompt: expected str"),
    ({"prompt": ["a cat", None]}, TypeError, "prompt: expected str"),
    ({"prompt": "very " * 40 + "long"}, ValueError, "prompt: expected at most 20 tokens, got 1"),
    ({"method": "magic"}, ValueError, "known methods: ar, jacobi, sjd, sjd"),
    ({"init": "magic"}, ValueError, "known initialisations"),
    ({"window_size": 0}, ValueError, "window_size: expected >= 1, got 0"),
    ({"window_size": -4}, ValueError, "window_size: expected >= 1, got -4"),
    ({"window_size": 2.5}, TypeError, "window_size: expected an int"),
    ({"window_size": "wide"}, TypeError, "window_size: expected an int or 'auto', got 'wide'"),
    ({"top_k": -1}, ValueError, "top_k: expected >= 0"),
    ({"top_p": 0.0}, ValueError, "top_p"),
    ({"temperature": 0.0}, ValueError, "temperature: expected > 0"),
    ({"guidance_scale": 0.0}, ValueError, "guidance_scale: expected >= 1"),
    ({"seed": [1, 2]}, ValueError, "seed: expected one int or 1"),
    ({"seed": "x"}, TypeError, "seed: expected a 64-bit integer, got 'x'; choose a whole number"),
    ({"seed": None}, TypeError, "seed: expected a 64-bit integer, got None"),
    ({"seed": True}, TypeError, "seed: expected a 64-bit integer, got True"),
    ({"seed": [1.5]}, TypeError, "seed: expected a 64-bit integer, got 1.5"),
    ({"seed": torch.tensor([1.5])}, TypeError, r"seed: expected a 64-bit integer, got tensor\(1.5"),
    ({"seed": torch.tensor([[1]])}, TypeError, "seed: expected a list of 64-bit integers"),
    ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, ValueError, "seed: expected a 64-bit integer, got 18446744"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt: expected one text or 1"),
    ({"negative_prompt": "a", "guidance_scale": 1.0}, ValueError, "negative_prompt: needs guidance_scale > 1"),
    ({"negative_prompt": "very " * 40}, ValueError, "negative_prompt: expected at most 20"),
    ({"height": 128}, ValueError, "height, width: emoji draws 64x64 pixels, got 128x64"),
    ({"output_type": "gif"}, ValueError, "output_type: expected one of"),
    ({"reuse_threshold": 0.0}, ValueError, "reuse_threshold"),
    ({"tree": 3}, TypeError, r"tree: expected \(K, D\), two ints, got 3"),
    ({"tree": (6, 2)}, ValueError, r"tree: expected 2..5 candidates and a depth >= 2"),
    ({"tree": (2, 2), "method": "exact"}, ValueError, "tree: exact takes none; choose one of sjd, maximal, gumbel"),
    ({"tree": (4, 3), "window_size": 16}, ValueError, r"tree: \(4, 3\) takes a window of 21 tokens or more, got 16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_refused_before_anything_runs(shallow_bf16, change, error, message, monkeypatch):
    monkeypatch.setattr(type(shallow_bf16.model.transformer), "forward", None)
    arguments = {"prompt": "a cat", **SHORT, **change}
    with pytest.raises(error, match=message):
        shallow_bf16.generate(**arguments)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (np.int64(3), [3, 4]),
        (torch.tensor(3), [3, 4]),
        (range(5, 7), [5, 6]),
        (np.array([7, 2], dtype=np.uint8), [7, 2]),
        (torch.tensor([7, 2]), [7, 2]),
        ((np.uint64(2**64 - 1), torch.tensor(-1)), [2**64 - 1, -1]),
    ],
    ids=repr,
)
def test_seeds_may_be_integers_of_numpy_and_torch(shallow_bf16, seed, expected):
    seeds = make_request(shallow_bf16.model, "a cat", seed=seed, num_images_per_prompt=2).seeds
    assert seeds == expected
    assert {type(value) for value in seeds} == {int}


def test_a_model_that_says_nothing_finite_is_warned_about(shallow_bf16, monkeypatch):
    transformer = type(shallow_bf16.model.transformer)
    monkeypatch.setattr(transformer, "logits", lambda self, hidden: torch.full((*hidden.shape[:-1], 1000), torch.nan))
    with pytest.warns(RuntimeWarning, match="no finite entry"):
        assert codes(shallow_bf16, "a cat").shape == (1, 256)


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": 3},
        {"max_batch_size": 0},
        {"max_batch_size": "8"},
        {"page_size": 0},
        {"kv_cache_bytes": 0},
        {"device": "cpu", "cuda_graphs": True},
    ],
)
def test_bad_engine_arguments(arguments):
    with pytest.raises((TypeError, ValueError)):
        Engine(**arguments)


@pytest.mark.parametrize("method", [*FUSED, "gsd", "zipar"])
def test_a_failing_pass_leaves_the_engine_usable(shallow_bf16, method, monkeypatch):
    expected = codes(shallow_bf16, "a cat", method=method)
    transformer = type(shallow_bf16.model.transformer)
    forward, calls = transformer.forward, []

    def failing(self, ids, kv_cache, **masks):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(self, ids, kv_cache, **masks)

    monkeypatch.setattr(transformer, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        codes(shallow_bf16, "a cat", method=method)
    monkeypatch.undo()
    assert torch.equal(codes(shallow_bf16, "a cat", method=method), expected)
