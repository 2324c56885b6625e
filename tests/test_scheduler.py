"""Continuous batching: who begins when, what is shared, and that nobody harms anybody else."""

import gc

import numpy as np
import pytest
import torch
from torch import Tensor

from sjd_engine import Engine, kv_cache
from sjd_engine.models.base import Context

PROMPTS = [
    "a red apple",
    "noto soccer ball on grass",
    "twemoji smiling face on brick",
    "a blue car",
    "fluent cat face on wood",
    "noto sunflower",
    "a yellow star on purple",
    "twemoji pizza on stars",
    "a tree",
    "noto dog face on gravel",
    "fluent rainbow on light blue",
    "a basketball on brick",
    "noto strawberry",
    "twemoji mushroom on grass",
    "fluent red heart",
    "noto crescent moon on stars",
]
SETTINGS = {"window_size": 32, "output_type": "codes"}
UNGUIDED = {**SETTINGS, "guidance_scale": 1.0}


def alone(engine: Engine, prompt: str, **arguments) -> Tensor:
    return engine.generate(prompt, progress=False, **{**SETTINGS, **arguments}).token_ids[0]


def free_pages(engine: Engine) -> int:
    """Those free once no prompt is kept; checks the books."""
    prompts = engine.scheduler.prompts
    while prompts.evict():
        pass
    prompts.kv_cache.check_invariants()
    return prompts.kv_cache.num_free_pages


def assert_nothing_is_left(engine: Engine) -> None:
    assert engine.scheduler.idle
    assert free_pages(engine) == engine.scheduler.prompts.kv_cache.num_pages
    assert len(engine.scheduler.prompts) == 0


@pytest.fixture(scope="module")
def engine(shallow) -> Engine:
    return shallow


@pytest.fixture
def fresh(engine) -> Engine:
    """Four images at once, float32."""
    return Engine(engine.model, max_batch_size=4)


class TestContinuousBatching:
    def test_images_admitted_at_any_time_are_those_of_their_seeds_alone(self, engine):
        """16 prompts and seeds, five images at once, three temperatures, begun whenever a row is free."""
        batched = Engine(engine.model, max_batch_size=5)
        arguments = [{"seed": 100 + i, "temperature": (1.0, 0.9, 0.8)[i % 3]} for i in range(16)]
        ids, steps = {}, 0
        while len(ids) < 16 or not batched.scheduler.idle:
            if steps % 7 == 0 and len(ids) < 16:
                for _ in range(2):
                    ids[batched.submit(PROMPTS[len(ids)], **SETTINGS, **arguments[len(ids)])] = len(ids)
            batched.step()
            steps += 1
        finished = {ids[done.request_id]: done for done in batched.collect()}
        assert sorted(finished) == list(range(16))
        for i, done in finished.items():
            assert done.error is None
            assert torch.equal(done.generation.token_ids[0], alone(engine, PROMPTS[i], **arguments[i])), PROMPTS[i]
        assert_nothing_is_left(batched)

    def test_methods_and_windows_of_all_kinds_take_turns(self, fresh, engine):
        kinds = [
            {"method": "exact"},
            {"method": "maximal", "window_size": 48},
            {"method": "sjd", "top_k": 50},
            {"method": "maximal", "guidance_scale": 1.0},
        ]
        numbers = [fresh.submit("a cat", **{**SETTINGS, **kind}) for kind in kinds]
        while fresh.step():
            pass
        finished = {done.request_id: done.generation for done in fresh.collect()}
        for number, kind in zip(numbers, kinds, strict=True):
            assert torch.equal(finished[number].token_ids[0], alone(engine, "a cat", **kind))

    def test_more_images_than_rows_wait_for_their_turn(self, engine):
        small = Engine(engine.model, max_batch_size=2)
        seen = []
        out = small.generate(PROMPTS[:4], seed=3, callback_on_step=seen.append, progress=False, **SETTINGS)
        running = [sum(c < 256 for c in info.num_committed) for info in seen]
        assert max(running) == 2
        assert seen[0].image_indices == [0, 1]
        assert seen[-1].image_indices == [0, 1, 2, 3]
        assert torch.equal(out.token_ids[3], alone(engine, PROMPTS[3], seed=6))

    def test_generate_goes_on_with_what_was_submitted(self, fresh, engine):
        number = fresh.submit(PROMPTS[0], seed=1, **SETTINGS)
        fresh.generate(PROMPTS[1], seed=2, progress=False, **SETTINGS)
        while fresh.step():
            pass
        (done,) = fresh.collect()
        assert done.request_id == number
        assert torch.equal(done.generation.token_ids[0], alone(engine, PROMPTS[0], seed=1))
        assert fresh.collect() == []

    def test_a_submitted_image_can_be_seen_on_its_way(self, fresh):
        """As `stream` shows it, whoever decodes beside it."""
        arguments = {**SETTINGS, "seed": 4, "output_type": "np"}
        events = {event.nfe: event for event in fresh.stream(PROMPTS[0], **arguments)}
        number = fresh.submit(PROMPTS[0], **arguments)
        mates = fresh.submit(PROMPTS[1], num_images_per_prompt=4, **SETTINGS)
        assert fresh.preview(number) is None
        while not (done := fresh.collect()):
            fresh.step()
            seen = fresh.preview(number)
            expected = events[seen.nfe]
            assert (seen.num_committed, seen.num_drafted) == (expected.num_committed, expected.num_drafted)
            np.testing.assert_array_equal(seen.image, expected.image)
            assert fresh.preview(mates, index=3) is None, "it waits for a row"
        assert done[0].request_id == number
        assert fresh.preview(number) is None
        fresh.cancel(mates)


class TestPages:
    def test_images_of_one_prompt_share_its_pages(self, engine):
        """8 images of one prompt hold its full pages once, and those of the unconditional prompt once."""
        shared = Engine(engine.model, max_batch_size=8, page_size=2)
        prompt = "twemoji smiling face with sunglasses on brick"
        shared.submit(prompt, num_images_per_prompt=8, **SETTINGS)
        shared.step()
        pool = shared.scheduler.prompts.kv_cache
        contexts = vars(shared.model.build_prompt(prompt, None, 64, 64)).values()
        used = pool.num_pages - pool.num_free_pages
        prefixes = [len(context) - 1 for context in contexts]
        own = sum(pool.pages_of(n + 256) - n // 2 for n in prefixes)
        assert max(prefixes) >= 4
        assert used == sum(pool.pages_of(n) for n in prefixes) + 8 * own
        assert len(shared.scheduler.prompts) == 2

    def test_the_unconditional_prompt_is_computed_once(self, fresh, monkeypatch):
        computed, compute = [], type(fresh.scheduler.prompts)._compute

        def count(self, context):
            computed.append(context.key)
            return compute(self, context)

        monkeypatch.setattr(type(fresh.scheduler.prompts), "_compute", count)
        for prompt in ["a cat", "a dog", "a cat", "a tree"]:
            fresh.generate(prompt, progress=False, **SETTINGS)
        assert len(computed) == len(set(computed)) == 4

    def test_an_image_waits_until_its_pages_are_free(self, engine):
        slot = 2 * engine.model.transformer.config.num_layers * engine.model.transformer.config.kv_size * 4
        narrow = Engine(engine.model, max_batch_size=4, kv_cache_bytes=16 * 64 * slot)
        seen = []
        out = narrow.generate(PROMPTS[:3], callback_on_step=seen.append, progress=False, **SETTINGS)
        assert max(sum(c < 256 for c in info.num_committed) for info in seen) == 1, "16 pages hold one guided image"
        for i in range(3):
            assert torch.equal(out.token_ids[i], alone(engine, PROMPTS[i], seed=i))
        assert_nothing_is_left(narrow)

    def test_a_request_that_can_never_begin_is_refused(self, engine):
        slot = 2 * engine.model.transformer.config.num_layers * engine.model.transformer.config.kv_size * 4
        narrow = Engine(engine.model, kv_cache_bytes=8 * 64 * slot)
        with pytest.raises(
            ValueError, match="an image needs 12 pages of the key/value cache, which has 8; make the Eng"
        ):
            narrow.submit("a cat", **SETTINGS)
        with pytest.raises(ValueError, match="an image needs"):
            narrow.generate("a cat", **SETTINGS)
        assert_nothing_is_left(narrow)
        unguided = alone(narrow, "a cat", guidance_scale=1.0)
        assert torch.equal(unguided, alone(engine, "a cat", guidance_scale=1.0))

    def test_pages_that_share_nothing_give_the_same_image(self, engine, monkeypatch):
        monkeypatch.setattr(kv_cache, "new_allocator", kv_cache.UnsharedPages)
        plain = Engine(engine.model, max_batch_size=2)
        out = plain.generate("a cat", num_images_per_prompt=2, progress=False, **SETTINGS)
        assert isinstance(plain.scheduler.prompts.kv_cache._allocator, kv_cache.UnsharedPages)
        for i in range(2):
            assert torch.equal(out.token_ids[i], alone(engine, "a cat", seed=i))
        assert_nothing_is_left(plain)

    @pytest.mark.parametrize("page_size", [1, 16, 256])
    def test_page_sizes_give_the_same_image(self, engine, page_size):
        other = Engine(engine.model, page_size=page_size, max_batch_size=1)
        assert torch.equal(alone(other, "a cat", seed=5), alone(engine, "a cat", seed=5))

    def test_poison_changes_nothing(self, engine, monkeypatch):
        """The suite runs with poisoned pages; here the same images without, pages used again and again."""
        monkeypatch.delenv("SJD_POISON")
        clean = Engine(engine.model, max_batch_size=1, page_size=16)
        for seed, method in enumerate(("maximal", "exact")):
            arguments = {"seed": seed, "method": method}
            assert torch.equal(alone(clean, "a cat", **arguments), alone(engine, "a cat", **arguments))

    def test_trees_on_small_pages_in_a_batch_give_the_same_image(self, engine, fresh, monkeypatch):
        """Extra slots have pages to the image's very end, an accepted path is moved out of the poison's way, and all
        pages come back."""
        other = Engine(engine.model, page_size=7, max_batch_size=3)
        together = other.generate(PROMPTS[:3], tree=(3, 3), seed=5, **SETTINGS).token_ids
        assert_nothing_is_left(other)
        monkeypatch.delenv("SJD_POISON")
        for i in (0, 2):
            assert torch.equal(alone(fresh, PROMPTS[i], tree=(3, 3), seed=5 + i), together[i])

    def test_poison_shows_a_stale_read(self, engine, monkeypatch):
        """A length that is not rolled back: rejected tokens are read, and NaN shows it."""
        broken = Engine(engine.model, max_batch_size=1)
        advance = kv_cache.PagedKVCache.advance

        def too_far(self, prefix_lens, num_committed):
            advance(self, prefix_lens, num_committed)
            self.context_lens += 1

        monkeypatch.setattr(kv_cache.PagedKVCache, "advance", too_far)
        with pytest.warns(RuntimeWarning, match="no finite entry"):
            alone(broken, "a cat")


class TestHarm:
    """What goes wrong in one request stays there."""

    def others(self, engine: Engine) -> list[int]:
        return [engine.submit(PROMPTS[i], seed=i, **UNGUIDED) for i in range(2)]

    def check_others(self, fresh: Engine, engine: Engine, numbers: list[int]) -> dict[int, Exception | None]:
        while fresh.step():
            pass
        finished = {done.request_id: done for done in fresh.collect()}
        for i, number in enumerate(numbers):
            expected = alone(engine, PROMPTS[i], seed=i, **UNGUIDED)
            assert torch.equal(finished.pop(number).generation.token_ids[0], expected)
        assert_nothing_is_left(fresh)
        return {number: done.error for number, done in finished.items()}

    def test_a_cancelled_request(self, fresh, engine):
        numbers = self.others(fresh)
        third = fresh.submit(PROMPTS[2], num_images_per_prompt=4, **UNGUIDED)  # two decode, two wait
        for _ in range(5):
            fresh.step()
        free = fresh.scheduler.prompts.kv_cache.num_free_pages
        assert fresh.cancel(third)
        assert fresh.scheduler.prompts.kv_cache.num_free_pages > free
        assert not fresh.cancel(third)
        assert self.check_others(fresh, engine, numbers) == {}

    def test_an_exception_in_a_callback(self, fresh, engine):
        def fail(info):
            if info.passes == 4:
                raise LookupError("callback")

        numbers = self.others(fresh)
        third = fresh.submit(PROMPTS[2], callback_on_step=fail, **UNGUIDED)
        errors = self.check_others(fresh, engine, numbers)
        assert isinstance(errors[third], LookupError)

    def test_nan_in_one_sequence(self, fresh, engine, monkeypatch):
        bad = fresh.model.build_prompt(PROMPTS[2], None, 64, 64).conditional.key
        embeddings = type(fresh.model).context_embeddings

        def nan(self, context: Context) -> Tensor:
            out = embeddings(self, context)
            return out * float("nan") if context.key == bad else out

        numbers = self.others(fresh)
        with monkeypatch.context() as patch:
            patch.setattr(type(fresh.model), "context_embeddings", nan)
            third = fresh.submit(PROMPTS[2], **UNGUIDED)
            while fresh.step():
                pass
        with pytest.warns(RuntimeWarning, match="no finite entry"):
            assert self.check_others(fresh, engine, numbers)[third] is None

    def test_a_prompt_that_cannot_be_computed(self, fresh, engine, monkeypatch):
        bad = fresh.model.build_prompt(PROMPTS[2], None, 64, 64).conditional.key
        embeddings = type(fresh.model).context_embeddings

        def fail(self, context: Context) -> Tensor:
            if context.key == bad:
                raise MemoryError("prompt")
            return embeddings(self, context)

        monkeypatch.setattr(type(fresh.model), "context_embeddings", fail)
        third = fresh.submit(PROMPTS[2], **UNGUIDED)
        errors = self.check_others(fresh, engine, self.others(fresh))
        assert isinstance(errors[third], MemoryError)

    def test_a_pass_that_fails_ends_the_requests_of_its_batch_alone(self, fresh, engine, monkeypatch):
        numbers = self.others(fresh)
        third = fresh.submit(PROMPTS[2], **{**UNGUIDED, "window_size": 24})
        fresh.step()
        (batch,) = [b for b in fresh.scheduler._batches.values() if b.decoder.window_size == 24]

        def fail(*arguments):
            raise MemoryError("pass")

        monkeypatch.setattr(batch, "_pass", fail)
        errors = self.check_others(fresh, engine, numbers)
        assert isinstance(errors[third], MemoryError)

    def test_codes_that_no_image_can_be_made_of(self, fresh, engine, monkeypatch):
        def fail(self, grid: Tensor) -> Tensor:
            raise MemoryError("pixels")

        monkeypatch.setattr(type(fresh.model), "decode", fail)
        third = fresh.submit(PROMPTS[2], **{**UNGUIDED, "output_type": "pil"})
        errors = self.check_others(fresh, engine, self.others(fresh))
        assert isinstance(errors[third], MemoryError)

    def test_an_interrupt_leaves_a_usable_engine(self, fresh, engine):
        def interrupt(info):
            if info.passes == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fresh.generate(PROMPTS[0], callback_on_step=interrupt, progress=False, **UNGUIDED)
        assert_nothing_is_left(fresh)
        assert torch.equal(alone(fresh, "a cat", **UNGUIDED), alone(engine, "a cat", **UNGUIDED))

    def test_a_stream_that_is_left(self, fresh):
        for event in fresh.stream("a cat", num_images_per_prompt=2, **UNGUIDED):
            if event.nfe == 3:
                break
        del event
        gc.collect()
        assert_nothing_is_left(fresh)
