import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams, Schedule
from sjd_engine.methods import INITS
from sjd_engine.testing import FUSED, TableModel, decode, forget

VOCAB, TOKENS = 5, 6
GRID = Schedule(2, 3)


def make(seeds=(1, 2, 3), **arguments) -> JacobiDecoder:
    arguments = {
        "num_tokens": TOKENS,
        "vocab_size": VOCAB,
        "window_size": 4,
        "schedule": GRID,
        "batch_size": len(seeds),
        **arguments,
    }
    return JacobiDecoder(seeds=list(seeds), **arguments)


@pytest.fixture(scope="module")
def model() -> TableModel:
    return TableModel(VOCAB, TOKENS, seed=1, spread=2.0)


class TestWindow:
    def test_first_window_starts_at_the_end_of_the_prompt(self):
        ids, positions = make().window()
        assert ids.shape == positions.shape == (3, 4)
        assert ids[:, 0].tolist() == [-1] * 3
        assert positions[0].tolist() == [-1, 0, 1, 2]
        assert ((ids[:, 1:] >= 0) & (ids[:, 1:] < VOCAB)).all()

    def test_anchor_is_the_last_committed_token(self, model):
        decoder, cache = make(), model.new_cache(3)
        while not decoder.done:
            ids, positions = decoder.window()
            committed, tokens = decoder.num_committed, decoder.token_ids
            for row in range(3):
                count = int(committed[row])
                assert positions[row, 0] == count - 1
                assert ids[row, 0] == (tokens[row, count - 1] if count else -1)
                assert (tokens[row, :count] >= 0).all()
                assert (tokens[row, count:] == -1).all()
            forget(cache, decoder.verify(model.forward(ids, positions, cache)))

    def test_slots_past_the_image_have_id_zero_and_position_t(self):
        ids, positions = make(window_size=12, num_tokens=6).window()
        assert positions[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6]
        assert (ids[:, 7:] == 0).all()

    def test_a_window_is_never_short_of_progress(self, model):
        decoder, cache = make(method="sjd"), model.new_cache(3)
        while not decoder.done:
            before = decoder.num_committed
            forget(cache, decoder.verify(model.forward(*decoder.window(), cache)))
            grown = decoder.num_committed - before
            assert ((grown >= 1) | (before == TOKENS)).all()
            assert (grown <= 4).all()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", FUSED)
def test_an_image_of_a_batch_is_the_one_its_seed_gives_alone(model, method, init):
    together = decode(model, make(method=method, init=init, seeds=range(20)))
    for seed in (0, 7, 19):
        alone = decode(model, make(method=method, init=init, seeds=[seed]))
        assert torch.equal(alone[0], together[seed])


def test_jacobi_equals_greedy_decoding(model):
    tokens = decode(model, make(method="jacobi"))
    context, greedy = torch.tensor(0), []
    for _ in range(TOKENS):
        greedy.append(model.logits(context).argmax())
        context = model.extend(context, greedy[-1])
    assert tokens.tolist() == [torch.stack(greedy).tolist()] * 3


@pytest.mark.parametrize("window", [2, 3, 6, 9])
def test_every_window_finishes(model, window):
    tokens = decode(model, make(window_size=window))
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_ar_takes_one_token_a_pass(model):
    decoder = make(method="ar", window_size=8)
    decode(model, decoder)
    assert decoder.window_size == 1
    assert decoder.stats.iterations == [TOKENS] * 3


def test_statistics(model):
    decoder = make(method="maximal", seeds=range(50))
    decode(model, decoder)
    stats = decoder.stats
    assert [sum(passes) for passes in stats.committed_per_pass] == [TOKENS] * 50
    assert [len(passes) for passes in stats.committed_per_pass] == stats.iterations
    assert all(min(passes) >= 1 for passes in stats.committed_per_pass)
    assert (stats.commit_pass.diff(dim=1) >= 0).all()
    assert len(set(stats.iterations)) > 1, "a ragged batch"


class TestPreemption:
    @pytest.mark.parametrize("method", FUSED)
    def test_a_decoder_goes_on_from_a_saved_state(self, model, method):
        whole = decode(model, make(method=method))
        first, cache = make(method=method), model.new_cache(3)
        for _ in range(2):
            forget(cache, first.verify(model.forward(*first.window(), cache)))
        second = make(method=method)
        second.load_state_dict(first.state_dict())
        while not second.done:
            forget(cache, second.verify(model.forward(*second.window(), cache)))
        assert torch.equal(second.token_ids, whole)

    def test_the_window_goes_on_from_a_saved_state(self):
        first, second = (make(max_window_size=6) for _ in range(2))
        first.verify(torch.zeros(3, 4, VOCAB), next_window_size=6)
        second.load_state_dict(first.state_dict())
        assert second.window()[0].tolist() == first.window()[0].tolist()
        assert second.window_size == 6

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("window_size", {"window_size": 3}),
            ("seeds", {"seeds": (1, 2, 4)}),
            ("method", {"method": "sjd"}),
            ("params", {"params": SamplingParams(top_k=2)}),
        ],
    )
    def test_a_state_of_another_set_up_is_refused(self, name, other):
        decoder = make()
        before = decoder.draft_ids.clone()
        with pytest.raises(ValueError, match=name):
            decoder.load_state_dict(make(**other).state_dict())
        assert torch.equal(decoder.draft_ids, before)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"window_size": 0}, "window_size: expected >= 1, got 0"),
            ({"window_size": -3}, "window_size: expected >= 1, got -3"),
            ({"max_window_size": 3}, "max_window_size: expected >= 4, got 3"),
            ({"vocab_size": 1}, "vocab_size"),
            ({"batch_size": 2}, "seeds: expected 2"),
            ({"method": "magic"}, "known methods: ar, jacobi, sjd"),
            ({"init": "noise"}, "known initialisations: random"),
            ({"reuse_threshold": 0.0}, "reuse_threshold"),
            ({"num_tokens": 7}, "schedule: expected num_tokens = 7"),
            ({"seeds": (1, 2, 1 << 64)}, "64-bit"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(**arguments)

    def test_seeds_must_be_ints(self):
        with pytest.raises(TypeError, match=r"seeds: expected a 64-bit integer, got 3\.5; choose a whole number"):
            make(seeds=(1, 2, 3.5))
        with pytest.raises(TypeError, match="seeds: expected a list of 64-bit integers, one for each image, got 3"):
            JacobiDecoder(batch_size=1, num_tokens=TOKENS, vocab_size=VOCAB, window_size=4, seeds=3)
        with pytest.raises(TypeError, match="seed: expected a 64-bit integer, got '3'"):
            make().begin(0, "3")

    def test_a_next_window_beyond_the_largest_leaves_the_state_alone(self):
        decoder = make(max_window_size=6)
        with pytest.raises(ValueError, match=r"next_window_size must be in 1\.\.6, got 7"):
            decoder.verify(torch.zeros(3, 4, VOCAB), next_window_size=7)
        assert decoder.stats.iterations == [0, 0, 0]

    @pytest.mark.parametrize(
        ("params", "shape"), [({}, (3, 3, VOCAB)), ({}, (2, 3, 4, VOCAB)), ({"guidance_scale": 2.0}, (3, 4, VOCAB))]
    )
    def test_logits_of_another_shape_leave_the_state_alone(self, params, shape):
        decoder = make(params=SamplingParams(**params))
        before = decoder.window()[0]
        with pytest.raises(ValueError, match=r"verify: logits must be .* got"):
            decoder.verify(torch.zeros(shape))
        assert torch.equal(decoder.window()[0], before)
        assert decoder.num_committed.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"guidance_scale": 0.5}, ValueError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 2.5}, TypeError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.5}, ValueError),
        ({"temperature": "hot"}, TypeError),
    ],
)
def test_sampling_params_are_checked(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        SamplingParams(**arguments)


class TestSchedule:
    def test_line_breaks_and_end_tokens(self):
        schedule = Schedule.with_line_breaks(2, 3, token=9, end_tokens=[10, 11])
        assert schedule.num_tokens == 10
        assert schedule.forced == {3: 9, 7: 9, 8: 10, 9: 11}
        assert schedule.image_positions.tolist() == [0, 1, 2, 4, 5, 6]
        grid = schedule.grid()
        assert grid.above.tolist() == [-1, -1, -1, -1, 0, 1, 2, -1, -1, -1]
        assert grid.row_start.tolist() == [0, 0, 0, -1, 4, 4, 4, -1, -1, -1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rows": 0, "cols": 3}, "rows and cols"),
            ({"rows": 1, "cols": 3, "forced": {9: 0}}, "position 9"),
            ({"rows": 1, "cols": 3, "forced": {0: -2}}, "must be >= 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Schedule(**arguments)
