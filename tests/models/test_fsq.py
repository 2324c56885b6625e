import torch

from sjd_engine.models.detokenizers.fsq import FSQConfig, FSQDecoder, codes_to_values


def test_every_code_has_its_own_values_on_the_lattice():
    config = FSQConfig()
    values = codes_to_values(torch.arange(config.codebook_size), config.levels)
    assert len({tuple(row) for row in values.tolist()}) == config.codebook_size == 1000
    assert values.amin(0).tolist() == [-1.0] * 4
    assert values[:, 0].unique().tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    assert values[:, 1].unique().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_decoder_shape_and_range():
    decoder = FSQDecoder(FSQConfig(channels=16))
    image = decoder(torch.randint(0, 1000, (2, 3, 5)))
    assert image.shape == (2, 3, 12, 20)
    assert image.abs().max() <= 1
