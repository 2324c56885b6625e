"""The face of diffusers: the same images as the engine's, and diffusers' conventions."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sjd_engine import SJDPipeline
from sjd_engine.pipeline import draw_seeds

PROMPTS = ["a red apple", "blue car on stars"]


@pytest.fixture
def pipe(shallow) -> SJDPipeline:
    made = SJDPipeline(shallow)
    made.set_progress_bar_config(disable=True)
    return made


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_engine(pipe, shallow):
    """Seeds come from the generator, and the window is a named one, so that they can be had again."""
    out = pipe(PROMPTS, generator=generator(3), guidance_scale=3.0, output_type="np")
    window = shallow.model.defaults.window_size
    arguments = {"guidance_scale": 3.0, "output_type": "np", "progress": False}
    again = shallow.generate(PROMPTS, seed=out.seeds, window_size=window, **arguments)
    assert np.array_equal(out.images, again.images)
    assert out.images.shape == (2, 64, 64, 3)
    assert len(set(out.seeds)) == len(out.stats) == 2


def test_a_generator_gives_the_same_seeds_once():
    used = generator(3)
    first, second = draw_seeds(used, 2), draw_seeds(used, 2)
    assert first == draw_seeds(generator(3), 2) != second


def test_a_list_has_one_generator_for_each_image(pipe):
    alone = [*draw_seeds(generator(1), 1), *draw_seeds(generator(2), 1)]
    assert pipe("a red apple", num_images_per_prompt=2, generator=[generator(1), generator(2)]).seeds == alone
    with pytest.raises(ValueError, match="expected one or a list of 2, one for each image, got 1"):
        pipe("a red apple", num_images_per_prompt=2, generator=[generator(1)])
    with pytest.raises(TypeError, match=r"expected a torch.Generator or a list of them, got 7"):
        pipe("a red apple", generator=7)


def test_without_a_generator_torchs_own_seed_counts():
    torch.manual_seed(5)
    first = draw_seeds(None, 2)
    torch.manual_seed(5)
    assert draw_seeds(None, 2) == first


@pytest.mark.parametrize(("output_type", "kind"), [("pil", list), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_output_types(pipe, output_type, kind):
    (images,) = pipe("a red apple", output_type=output_type, return_dict=False)
    assert isinstance(images, kind)
    assert isinstance(images[0], Image.Image) == (output_type == "pil")


def test_other_output_types_are_refused(pipe):
    with pytest.raises(ValueError, match="output_type: expected one of pil, np, pt, got 'latent'"):
        pipe("a red apple", output_type="latent")


def test_steps_are_ignored_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="num_inference_steps: ignored"):
        warned = pipe("a red apple", num_inference_steps=20, generator=generator(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warned.images == pipe("a red apple", generator=generator(1)).images


def test_without_guidance_the_negative_prompt_is_ignored(pipe):
    plain, negated = (
        pipe("a red apple", generator=generator(1), guidance_scale=scale, negative_prompt=text).images
        for scale, text in ((1.0, None), (0.0, "blue"))
    )
    assert plain == negated


def test_the_callback_follows_the_passes(pipe):
    calls = []
    out = pipe(PROMPTS, callback_on_step_end=lambda *told: calls.append(told))
    assert [step for _, step, _, _ in calls] == list(range(max(stats.nfe for stats in out.stats)))
    missing = [left for _, _, left, _ in calls]
    assert missing == sorted(missing, reverse=True)
    assert missing[-1] == 0
    assert calls[0][0] is pipe
    assert calls[-1][3] == {"num_committed": [256, 256], "num_tokens": 256}


def test_interrupt(pipe, shallow):
    """Pages come back, and the next call runs."""

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2

    free = shallow.scheduler.prompts.kv_cache.num_free_pages
    assert pipe("a red apple", callback_on_step_end=stop).images == []
    assert shallow.scheduler.idle
    assert shallow.scheduler.prompts.kv_cache.num_free_pages == free
    assert len(pipe("a red apple").images) == 1


def test_from_pretrained_and_to():
    pipe = SJDPipeline.from_pretrained("emoji", torch_dtype=torch.float32, device="cpu", max_batch_size=2)
    assert (pipe.device, pipe.dtype, pipe.engine.max_batch_size) == (torch.device("cpu"), torch.float32, 2)
    engine = pipe.engine
    assert pipe.to("cpu") is pipe
    assert pipe.to("cpu", torch.float32).engine is engine
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.engine.max_batch_size == 2
    with pytest.raises(ValueError, match="either dtype or torch_dtype, got both"):
        SJDPipeline.from_pretrained("emoji", dtype=torch.float32, torch_dtype=torch.float32)


def test_a_pipeline_of_an_engine_stays(pipe):
    assert pipe.to("cpu") is pipe
    with pytest.raises(ValueError, match=r"use SJDPipeline.from_pretrained, or make the engine there"):
        pipe.to("cpu", torch.bfloat16)
