"""The relatives of SJD on the bundled model: complete images, and the passes that their definitions say."""

import pytest
import torch

ARGUMENTS = {"output_type": "codes", "progress": False, "seed": 3}


@pytest.mark.parametrize("method", ["sjd-block", "gsd", "lantern"])
def test_another_acceptance_draws_complete_images_in_about_as_many_passes_as_sjd_or_fewer(engine_bf16, method):
    three = ARGUMENTS | {"window_size": 8, "num_images_per_prompt": 3}
    sjd = engine_bf16.generate("a red apple on grass", method="sjd", **three)
    out = engine_bf16.generate("a red apple on grass", method=method, **three)
    assert out.token_ids.min() >= 0
    assert out.token_ids.max() < engine_bf16.model.num_codes
    assert all(sum(stats.committed_per_pass) == 256 for stats in out.stats)
    most = 1.15 if method == "sjd-block" else 1.0  # it saves less than images differ by
    assert sum(stats.nfe for stats in out.stats) < most * sum(stats.nfe for stats in sjd.stats)
    assert all(stats.zero_draft_prob == 0 for stats in out.stats)


def test_rows_follow_each_other_at_their_distance(shallow_bf16):
    out = shallow_bf16.generate("a red apple on grass", method="zipar", zipar_window=4, **ARGUMENTS)
    rows, cols = torch.arange(16)[:, None], torch.arange(16)
    assert torch.equal(torch.from_numpy(out.stats[0].acceptance_map), 4 * rows + cols)
    assert out.stats[0].nfe == 4 * 15 + 16
    assert out.token_ids.max() < shallow_bf16.model.num_codes


def test_an_adaptive_row_begins_later_and_never_earlier(shallow_bf16):
    out = shallow_bf16.generate("a red apple on grass", method="zipar-adaptive", zipar_window=4, **ARGUMENTS)
    begins = torch.from_numpy(out.stats[0].acceptance_map)[:, 0].diff()
    assert begins.min() >= 5  # seen four tokens, then five
    assert begins.max() > 5
    assert out.token_ids.max() < shallow_bf16.model.num_codes


def test_an_image_is_the_same_alone_and_in_a_batch(shallow_bf16):
    arguments = ARGUMENTS | {"method": "zipar-adaptive", "zipar_window": 3}
    together = shallow_bf16.generate("a red apple on grass", num_images_per_prompt=2, **arguments)
    alone = shallow_bf16.generate("a red apple on grass", **arguments | {"seed": 4})
    assert torch.equal(together.token_ids[1], alone.token_ids[0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "sjd", "zipar_window": 4}, ValueError, "only zipar"),
        ({"method": "zipar", "zipar_window": 0}, ValueError, "expected >= 1"),
        ({"method": "zipar", "zipar_window": 1.5}, TypeError, "expected an int"),
        ({"method": "maximal", "relaxation": 2.0}, ValueError, "maximal has none"),
    ],
)
def test_bad_arguments_are_refused(shallow_bf16, arguments, error, text):
    with pytest.raises(error, match=text):
        shallow_bf16.generate("a cat", **ARGUMENTS | arguments)
