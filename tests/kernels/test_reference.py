import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sjd_engine import JacobiDecoder, SamplingParams, Schedule
from sjd_engine.kernels import reference


def warp_one(row: list[float], **arguments) -> torch.Tensor:
    tensors = {name: torch.tensor([value]) for name, value in arguments.items()}
    return reference.warp(torch.tensor(row)[None, None], **tensors)[0][0, 0].softmax(-1)


class TestWarp:
    def test_guidance_moves_away_from_the_unconditional_logits(self):
        logits = torch.randn(2, 3, 4, 5)
        z, _ = reference.warp(logits, guidance_scale=torch.tensor([1.0, 2.0, 5.0]))
        for b, scale in enumerate((1.0, 2.0, 5.0)):
            expected = logits[1, b] + scale * (logits[0, b] - logits[1, b])
            torch.testing.assert_close(z[b], expected)

    def test_top_k_gives_ties_to_the_lowest_id(self):
        assert warp_one([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2).nonzero().flatten().tolist() == [1, 2]

    @pytest.mark.parametrize("k", [0, 5, 9])
    def test_top_k_of_zero_or_everything_keeps_all(self, k):
        torch.testing.assert_close(warp_one([1.0, 2.0, 3.0, 4.0, 5.0], top_k=k), warp_one([1.0, 2.0, 3.0, 4.0, 5.0]))

    def test_top_p_keeps_the_token_that_crosses_and_ties_go_to_the_lowest_id(self):
        logs = torch.tensor([0.1, 0.4, 0.4, 0.1]).log().tolist()
        assert warp_one(logs, top_p=0.5).nonzero().flatten().tolist() == [1, 2]
        assert warp_one(logs, top_p=0.3).nonzero().flatten().tolist() == [1]
        assert warp_one(logs, top_p=0.85).nonzero().flatten().tolist() == [0, 1, 2]

    def test_temperature_comes_before_top_p(self):
        logs = torch.tensor([0.6, 0.3, 0.1]).log().tolist()
        assert warp_one(logs, top_p=0.55).count_nonzero() == 1
        assert warp_one(logs, temperature=2.0, top_p=0.55).count_nonzero() == 2

    def test_parameters_are_per_sequence(self):
        logits = torch.randn(3, 2, 6)
        z, _ = reference.warp(logits, top_k=torch.tensor([1, 0, 3]))
        assert z.isfinite().sum(-1).tolist() == [[1, 1], [6, 6], [3, 3]]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_logits_that_are_not_finite_have_no_mass(self, bad):
        probs = warp_one([0.0, bad, 1.0])
        assert probs[1] == 0
        torch.testing.assert_close(probs.sum(), torch.tensor(1.0))

    def test_a_row_without_finite_logits_is_uniform_and_counted(self):
        z, nonfinite = reference.warp(torch.tensor([[[float("nan")] * 4, [0.0, 1.0, 2.0, 3.0]]]))
        assert nonfinite.tolist() == [[True, False]]
        torch.testing.assert_close(z[0, 0].softmax(-1), torch.full((4,), 0.25))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.05, 1.0))
    def test_filters_equal_a_naive_loop(self, seed, k, p):
        logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)).mul(2).round()  # many ties
        order = sorted(range(9), key=lambda i: (-logits[i].item(), i))[:k]
        probs = logits[order].double().softmax(0)
        kept, mass = [], 0.0
        for token, prob in zip(order, probs.tolist(), strict=True):
            if kept and mass >= p:
                break
            kept.append(token)
            mass += prob
        if abs(mass - p) > 1e-6 and all(abs(probs[:i].sum().item() - p) > 1e-6 for i in range(len(probs))):
            got = warp_one(logits.tolist(), top_k=k, top_p=p)
            assert sorted(kept) == got.nonzero().flatten().tolist()


class TestDraw:
    def test_a_token_of_zero_weight_is_never_drawn(self):
        weights = torch.tensor([0.0, 0.2, 0.0, 0.0, 0.7, 0.0])
        words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
        assert set(reference.draw(weights.expand(5, -1), words).tolist()) <= {1, 4}

    def test_frequencies(self):
        weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
        words = ((torch.arange(10_000) + 0.5) / 10_000 * 2**32).long()
        counts = torch.bincount(reference.draw(weights.expand(10_000, -1), words), minlength=4)
        assert counts.tolist() == [5000, 0, 3000, 2000]


def make(method: str, *, window: int = 4, init: str = "random", schedule=None, vocab: int = 6, seeds=(1, 2)):
    schedule = schedule or Schedule(3, 4)
    return JacobiDecoder(
        batch_size=len(seeds),
        num_tokens=schedule.num_tokens,
        vocab_size=vocab,
        window_size=window,
        method=method,
        init=init,
        seeds=list(seeds),
        schedule=schedule,
    )


class TestVerify:
    @pytest.mark.parametrize("method", ["sjd", "sjd++", "maximal", "gumbel"])
    def test_equal_laws_accept_every_draft(self, method):
        decoder = make(method)
        result = decoder.verify(torch.zeros(2, 4, 6))  # uniform, as the drafts' law is
        assert result.num_accepted.tolist() == [3, 3]
        assert result.num_committed.tolist() == [4, 4]

    @pytest.mark.parametrize("method", ["sjd", "sjd++", "maximal", "gumbel", "exact", "jacobi"])
    def test_a_draft_the_target_excludes_is_rejected_and_replaced_from_the_target(self, method):
        decoder = make(method)
        draft = decoder.window()[0][:, 1]
        logits = torch.zeros(2, 4, 6)
        logits[torch.arange(2), 0, draft] = float("-inf")
        result = decoder.verify(logits)
        assert result.num_accepted.tolist() == [0, 0]
        assert (decoder.token_ids[:, 0] != draft).all()

    @pytest.mark.parametrize("method", ["sjd", "maximal"])
    def test_the_recovered_token_lies_in_the_residual(self, method):
        seeds = range(200)
        decoder = make(method, seeds=seeds)
        logits = torch.zeros(200, 4, 6)
        logits[:, 0, 0] = 2.0  # p > q = 1/6 for token 0 alone
        draft = decoder.window()[0][:, 1]
        result = decoder.verify(logits)
        rejected = result.num_accepted == 0
        assert rejected.any()
        assert (decoder.token_ids[rejected, 0] == 0).all()
        assert (draft[rejected] != 0).all()

    def test_maximal_keeps_drafts_that_pass_their_own_test_behind_a_rejection(self):
        decoder = make("maximal")
        before = decoder.window()[0]
        logits = torch.zeros(2, 4, 6)
        logits[torch.arange(2), 0, before[:, 1]] = float("-inf")
        decoder.verify(logits)
        assert torch.equal(decoder.window()[0][:, 1:3], before[:, 2:4])

    def test_every_row_commits_where_all_is_not_finite(self):
        decoder = make("maximal")
        decoder.verify(torch.full((2, 4, 6), float("nan")))
        assert (decoder.num_committed >= 1).all()
        assert decoder.stats.nonfinite_rows == [4, 4]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_the_dtype_of_the_logits_is_only_their_rounding(self, dtype):
        logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        narrow, wide = make("maximal"), make("maximal")
        narrow.verify(logits)
        wide.verify(logits.float())
        assert torch.equal(narrow.token_ids, wide.token_ids)

    def test_strided_logits(self):
        logits = torch.randn(2, 6, 4).transpose(1, 2)
        strided, packed = make("sjd"), make("sjd")
        strided.verify(logits)
        packed.verify(logits.contiguous())
        assert torch.equal(strided.token_ids, packed.token_ids)


class TestFillWindow:
    GRID = Schedule(4, 3)

    def first_pass(self, init: str, method: str = "maximal", schedule=None, window: int = 4):
        decoder = make(method, init=init, schedule=schedule or self.GRID, window=window, seeds=(3,), vocab=50)
        logits = torch.randn(1, window, 50, generator=torch.Generator().manual_seed(1)) * 3
        logits[:, :2] = 0  # the drafts' own law: two are accepted, so that new ones enter
        decoder.verify(logits)
        return decoder, logits

    def law(self, decoder, position):
        state = decoder._state
        row = position - state.num_committed
        ids = state.tokens[:, position + 1].expand(1, decoder.window_size)
        weights, scale = reference.draft_laws(state, ids, torch.arange(ids.shape[1]), decoder.vocab_size, None, None)
        return (weights * scale[..., None])[0, row].squeeze(0)

    def test_random_drafts_have_the_uniform_law(self):
        decoder, _ = self.first_pass("random")
        committed = int(decoder.num_committed)
        entered = committed + decoder.window_size - 2
        torch.testing.assert_close(self.law(decoder, entered), torch.full((50,), 1 / 50))

    def test_above_repeat_copies_the_token_one_row_up(self):
        decoder, _ = self.first_pass("above-repeat")
        tokens, entered = decoder.draft_ids[0], int(decoder.num_committed) + decoder.window_size - 2
        assert entered >= 4
        assert tokens[entered] == tokens[entered - 3]
        assert self.law(decoder, entered).argmax() == tokens[entered]
        assert self.law(decoder, entered).max() == 1

    def test_above_sample_draws_from_the_law_one_row_up(self):
        decoder, logits = self.first_pass("above-sample")
        entered = int(decoder.num_committed) + decoder.window_size - 2
        torch.testing.assert_close(self.law(decoder, entered), logits[0, entered - 3].softmax(-1))

    def test_left_neighbours_stop_at_the_row(self):
        decoder, logits = self.first_pass("left-sample")
        entered = int(decoder.num_committed) + decoder.window_size - 2  # 4 or 5: row 1, whose first column is 3
        assert entered in (5, 6)
        if entered < 6:
            torch.testing.assert_close(self.law(decoder, entered), logits[0, 3].softmax(-1))
        else:
            torch.testing.assert_close(self.law(decoder, entered), torch.full((50,), 1 / 50))

    @pytest.mark.parametrize("init", ["random", "left-repeat", "above-repeat", "left-sample", "above-sample"])
    def test_forced_positions_enter_with_their_token(self, init):
        schedule = Schedule.with_line_breaks(3, 3, token=77, end_tokens=[88])
        decoder = make("maximal", init=init, schedule=schedule, window=5, seeds=range(20), vocab=50)
        while not decoder.done:
            ids, positions = decoder.window()
            forced = torch.tensor([schedule.forced.get(int(t), -1) for t in positions.flatten()]).view_as(positions)
            assert torch.equal(ids[forced >= 0], forced[forced >= 0])
            decoder.verify(torch.randn(20, 5, 50))
        assert (decoder.token_ids[:, [3, 7, 11]] == 77).all()
        assert (decoder.token_ids[:, 12] == 88).all()
        assert (decoder.token_ids[:, schedule.image_positions] < 50).all()

    @pytest.mark.parametrize("first", [0, 2, 4])
    def test_neighbours_of_every_entering_position_equal_a_walk(self, first):
        schedule = Schedule.with_line_breaks(5, 3, token=9)
        grid, last = schedule.grid(), torch.tensor([[6]])
        entering = torch.arange(7, 19)[None]
        inits = ("above-repeat", "above-sample", "left-sample")
        found = (reference.neighbour(grid, entering, torch.tensor([[first]]), last, init)[0].tolist() for init in inits)
        for position, repeated, sampled, left in zip(entering[0].tolist(), *found, strict=True):
            row, column = divmod(position, 4)
            while row >= 0 and row * 4 + column > 6:
                row -= 1
            above = -1 if column == 3 or row < 0 else row * 4 + column
            assert repeated == above
            assert sampled == (above if above >= first else -1)
            assert left == -1  # position 6 ends its row's tokens; every entering token starts further down

    def test_above_sample_takes_the_left_neighbour_where_the_law_above_is_gone(self):
        grid, entering = Schedule(3, 8).grid(), torch.arange(14, 20)[None]
        first, last = torch.tensor([[10]]), torch.tensor([[13]])
        assert reference.neighbour(grid, entering, first, last, "above-sample")[0].tolist() == [13, 13, -1, -1, 10, 11]
        assert reference.neighbour(grid, entering, first, last, "above-repeat")[0].tolist() == [6, 7, 8, 9, 10, 11]


def test_sampling_params_reach_the_kernel():
    decoder = JacobiDecoder(
        batch_size=2,
        num_tokens=4,
        vocab_size=8,
        window_size=2,
        seeds=[0, 1],
        params=SamplingParams(top_k=1),
    )
    logits = torch.randn(2, 2, 8)
    decoder.verify(logits)
    assert torch.equal(decoder.token_ids[:, 0], logits[:, 0].argmax(-1))
