import numpy as np
import pytest
import torch

from sjd_engine.kernels import philox

KNOWN_ANSWERS = [  # Random123, kat_vectors: counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_known_answers(make, counter, key, expected):
    out = philox.philox(make([[w] for w in words(counter)]), make([[w] for w in words(key)]))
    assert [int(word[0]) for word in out] == words(expected)


def test_numpy_and_torch_agree_on_many_counters():
    counter = torch.randint(0, 2**32, (4, 3, 50), generator=torch.Generator().manual_seed(0))
    key = torch.tensor([[[7], [8], [9]], [[1], [2], [3]]])
    assert torch.equal(torch.from_numpy(philox.philox(counter.numpy(), key.numpy())), philox.philox(counter, key))


def test_draws_depend_on_seed_position_iteration_and_purpose_only():
    def draw(seed, position, iteration, purpose):
        return philox.draw_words(
            torch.tensor([seed]), torch.tensor([[position]]), torch.tensor([iteration]), purpose
        ).flatten()

    base = draw(5, 6, 7, philox.WINDOW)
    for other in ((4, 6, 7, 0), (5, 5, 7, 0), (5, 6, 8, 0), (5, 6, 7, 1), (5 + 2**40, 6, 7, 0), (-5, 6, 7, 0)):
        assert not torch.equal(base, draw(*other))
    batch = philox.draw_words(
        torch.tensor([1, 5, 3]), torch.tensor([[1, 2], [9, 6], [4, 5]]), torch.tensor([0, 7, 2]), philox.WINDOW
    )
    assert torch.equal(batch[:, 1, 1].flatten(), base)


def test_uniform_is_inside_the_open_interval():
    u = philox.uniform(torch.tensor([0, 2**32 - 1]))
    assert 0 < u[0] < u[1] < 1


def test_gumbel_noise_does_not_depend_on_how_many_positions_are_asked_for():
    seeds, positions = torch.tensor([3, 4]), torch.arange(5).expand(2, -1)
    noise = philox.gumbel_noise(seeds, positions, vocab_size=11)
    assert noise.shape == (2, 5, 11)
    assert torch.equal(noise[1:, 2:3], philox.gumbel_noise(seeds[1:], positions[1:, 2:3], vocab_size=11))
    assert torch.equal(noise[..., :7], philox.gumbel_noise(seeds, positions, vocab_size=7))


def test_gumbel_noise_has_the_gumbel_law():
    from scipy.stats import gumbel_r, kstest

    noise = philox.gumbel_noise(torch.arange(100), torch.arange(10).expand(100, -1), vocab_size=100).flatten()
    assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 1e-3
