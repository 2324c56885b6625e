"""The page allocator against a model made of lists: no page is lost, shared wrongly or written by two."""

from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from sjd_engine import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


class Model:
    """A sequence as a list of values, one for each token it may hold; None where nothing is written."""

    def __init__(self, number: int, prompt: list[int], values: list):
        self.number, self.prompt, self.values = number, prompt, values


class Machine(RuleBasedStateMachine):
    """Every slot of the pool holds a value. What a sequence reads through its table is what its list holds."""

    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, num_pages, page_size):
        self.size = page_size
        self.pool = native.page_allocator(num_pages, page_size)
        self.slots = {(page, i): None for page in range(num_pages) for i in range(page_size)}
        self.live: list[Model] = []
        self.fresh = count()

    def slot(self, model: Model, token: int) -> tuple[int, int]:
        return self.pool.pages(model.number)[token // self.size], token % self.size

    def write(self, model: Model, token: int, value) -> None:
        page, place = self.slot(model, token)
        assert self.pool.references(page) == 1, "a shared page is written"
        self.slots[page, place] = model.values[token] = value

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for i in range(self.size):
                self.slots[target, i] = self.slots[source, i]

    def exhausted(self, needed: int, call) -> bool:
        """Whether `call` needs more pages than are free, in which case it raises and changes nothing."""
        free = self.pool.num_free
        if needed <= free:
            return False
        with pytest.raises(native.PagesExhausted, match=f"needs {needed} free pages, but {free} of"):
            call()
        assert self.pool.num_free == free
        return True

    @rule(target=sequences, prompt=st.lists(st.integers(0, 1), max_size=9), extra=st.integers(0, 8))
    def admit(self, prompt, extra):
        capacity = max(1, len(prompt) + extra)
        if capacity > self.pool.num_pages * self.size:
            with pytest.raises(ValueError, match="capacity must be in"):
                self.pool.admit(prompt=prompt, capacity=capacity)
            return multiple()
        needed = self.pool.pages_needed(prompt=prompt, capacity=capacity)
        if self.exhausted(needed, lambda: self.pool.admit(prompt=prompt, capacity=capacity)):
            return multiple()
        number, cached = self.pool.admit(prompt=prompt, capacity=capacity)
        model = Model(number, prompt, [None] * (len(self.pool.pages(number)) * self.size))
        assert cached % self.size == 0
        assert cached <= len(prompt)
        # The value of a prompt token is the prompt up to it, as keys and values are.
        model.values[:cached] = [tuple(prompt[: t + 1]) for t in range(cached)]
        self.live.append(model)
        for token in range(cached, len(model.values)):
            self.write(model, token, tuple(prompt[: token + 1]) if token < len(prompt) else None)
        self.pool.publish(number, num_tokens=len(prompt))
        return model

    @rule(model=sequences, data=st.data())
    def append_or_roll_back(self, model, data):
        """A window that starts anywhere: what lies behind is overwritten, and poisoned where it is not."""
        first = data.draw(st.integers(0, len(model.values)))
        shared = sum(self.pool.references(page) > 1 for page in self.pool.pages(model.number)[first // self.size :])
        if self.exhausted(shared, lambda: self.pool.own(model.number, first=first)):
            return
        self.copy(self.pool.own(model.number, first=first))
        width = data.draw(st.integers(0, 5))
        for token in range(first, len(model.values)):
            self.write(model, token, next(self.fresh) if token < first + width else None)
        model.prompt = model.prompt[:first]

    @rule(target=sequences, parent=sequences, data=st.data())
    def fork(self, parent, data):
        length = data.draw(st.integers(0, len(parent.values)))
        capacity = max(1, length + data.draw(st.integers(0, 8)))
        if capacity > self.pool.num_pages * self.size:
            with pytest.raises(ValueError, match="fork: capacity must be in"):
                self.pool.fork(parent.number, num_tokens=length, capacity=capacity)
            return multiple()
        needed = self.pool.pages_needed_to_fork(num_tokens=length, capacity=capacity)
        if self.exhausted(needed, lambda: self.pool.fork(parent.number, num_tokens=length, capacity=capacity)):
            return multiple()
        number, copies = self.pool.fork(parent.number, num_tokens=length, capacity=capacity)
        self.copy(copies)
        pages = self.pool.pages(number)
        assert pages[: length // self.size] == self.pool.pages(parent.number)[: length // self.size]
        assert [self.pool.references(page) for page in pages[length // self.size :]] == [1] * needed
        assert len(copies) == (length % self.size > 0)
        model = Model(number, parent.prompt[:length], parent.values[:length])
        model.values += [None] * (len(pages) * self.size - length)
        for token in range(length, len(model.values)):
            self.write(model, token, None)
        self.live.append(model)
        return model

    @rule(model=consumes(sequences))
    def release(self, model):
        self.pool.release(model.number)
        self.live.remove(model)
        with pytest.raises(ValueError, match="sequence must be one that was admitted and not released"):
            self.pool.pages(model.number)

    @invariant()
    def every_sequence_reads_its_own(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        held = [page for model in self.live for page in self.pool.pages(model.number)]
        assert sorted(held) == sorted(p for p in range(self.pool.num_pages) for _ in range(self.pool.references(p)))
        assert self.pool.num_free == self.pool.num_pages - len(set(held))
        for model in self.live:
            assert [self.slots[self.slot(model, t)] for t in range(len(model.values))] == model.values


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=2000, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_images_of_one_prompt_share_its_full_pages():
    pool = native.page_allocator(num_pages=20, page_size=4)
    prompt = list(range(10))
    first, cached = pool.admit(prompt=prompt, capacity=16)
    assert cached == 0
    assert pool.admit(prompt=prompt, capacity=16)[1] == 0  # nothing is written yet
    pool.publish(first, num_tokens=10)
    twin, cached = pool.admit(prompt=prompt, capacity=16)
    assert cached == 8
    assert pool.pages(twin)[:2] == pool.pages(first)[:2]
    assert pool.admit(prompt=prompt[:6] + [99] * 4, capacity=16)[1] == 4
    pool.release(first)
    assert pool.admit(prompt=prompt, capacity=10)[1] == 8  # the twin still holds them
    pool.check_invariants()


def test_a_fork_has_a_capacity_of_its_own():
    pool = native.page_allocator(num_pages=8, page_size=4)
    parent, _ = pool.admit(prompt=list(range(10)), capacity=10)
    assert pool.pages_needed_to_fork(num_tokens=10, capacity=22) == 4
    child, copies = pool.fork(parent, num_tokens=10, capacity=22)
    first, second = pool.pages(parent), pool.pages(child)
    assert (len(first), len(second)) == (3, 6)
    assert second[:2] == first[:2]
    assert copies == [(first[2], second[2])]
    assert pool.num_free == 1
    with pytest.raises(native.PagesExhausted, match="fork: needs 4 free pages, but 1 of 8"):
        pool.fork(parent, num_tokens=10, capacity=22)
    assert pool.num_free == 1
    short, copies = pool.fork(child, num_tokens=6, capacity=8)
    assert pool.pages(short)[:1] == first[:1]
    with pytest.raises(ValueError, match=r"publish: num_tokens must be in 0\.\.6, got 7"):
        pool.publish(short, num_tokens=7)  # what it holds behind its parent's first 6 tokens is its own
    for sequence in (parent, short, child):
        pool.release(sequence)
    assert pool.num_free == 8
    pool.check_invariants()


def test_bad_arguments():
    with pytest.raises(ValueError, match="PageAllocator: page_size must be in 1"):
        native.page_allocator(num_pages=3, page_size=0)
    pool = native.page_allocator(num_pages=3, page_size=2)
    with pytest.raises(ValueError, match=r"admit: capacity must be in 3\.\.6, got 2"):
        pool.admit(prompt=[1, 2, 3], capacity=2)
    with pytest.raises(RuntimeError, match=r"admit: needs 3 free pages, but 1 of 3 are free; release a sequence"):
        pool.admit(prompt=[], capacity=4), pool.admit(prompt=[], capacity=6)
    with pytest.raises(ValueError, match=r"fork: num_tokens must be in 0\.\.4, got 5"):
        pool.fork(0, num_tokens=5, capacity=6)
    with pytest.raises(ValueError, match=r"fork: capacity must be in 4\.\.6, got 3"):
        pool.fork(0, num_tokens=4, capacity=3)
