"""The pipeline of vLLM-Omni against stand-ins of its interface, as release 0.30 has it."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sjd_engine.integrations import vllm_omni


@dataclass
class DiffusionOutput:
    output: torch.Tensor | None = None
    error: str | None = None


@dataclass
class SamplingParams:
    height: int | None = None
    width: int | None = None
    num_outputs_per_prompt: int = 1
    seed: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    guidance_scale: float = 1.0
    guidance_scale_provided: bool = False
    extra_args: dict[str, Any] = field(default_factory=dict)


class RequestBatch:
    def __init__(self, *requests: tuple[Any, SamplingParams]):
        self.prompts = [prompt for prompt, _ in requests]
        self.sampling_params_list = [params for _, params in requests]


@pytest.fixture
def registered(monkeypatch) -> list[tuple]:
    """The calls of vLLM-Omni's register_diffusion_model."""
    calls: list[tuple] = []

    def register_diffusion_model(model_arch, module_name, class_name, *, post_process_func_name):
        calls.append((model_arch, module_name, class_name, post_process_func_name))

    contents = {
        "vllm_omni": {},
        "vllm_omni.diffusion": {},
        "vllm_omni.diffusion.registry": {"register_diffusion_model": register_diffusion_model},
        "vllm_omni.diffusion.data": {"DiffusionOutput": DiffusionOutput},
        "vllm_omni.diffusion.distributed": {},
        "vllm_omni.diffusion.distributed.utils": {"get_local_device": lambda: torch.device("cpu")},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def pipeline(registered, shallow) -> vllm_omni.OmniPipeline:
    made = vllm_omni.OmniPipeline(od_config=SimpleNamespace())
    made.engine = shallow
    return made


def test_the_registered_names_are_this_modules(registered):
    vllm_omni.register()
    ((architecture, module, class_name, post_process),) = registered
    assert architecture == "SJDPipeline"
    assert vars(sys.modules[module])[class_name] is vllm_omni.OmniPipeline
    images = vars(sys.modules[module])[post_process](SimpleNamespace())(torch.zeros(2, 3, 4, 4))
    assert [isinstance(image, Image.Image) for image in images] == [True, True]


def test_it_loads_as_vllm_omni_does(registered):
    """Under the model's default dtype, and with no weights of the loader's."""
    made = vllm_omni.OmniPipeline(
        od_config=SimpleNamespace(model="emoji", dtype=torch.bfloat16, max_num_seqs=16), prefix=""
    )
    with vllm_omni.default_dtype(torch.bfloat16):
        assert made.load_weights(iter(())) == set()
        assert torch.get_default_dtype() == torch.bfloat16
    assert list(made.named_parameters()) == []
    assert made.engine.max_batch_size == 16
    assert made.engine.model.transformer.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in made.engine.model.detokenizer.state_dict().values()} == {torch.float32}


def test_a_batch_of_requests(pipeline, shallow):
    """Each gets its images, in order; a bad one gets its error, and harms no other."""
    requests = RequestBatch(
        ("a red apple", SamplingParams(seed=7)),
        ({"prompt": "blue car", "negative_prompt": "red"}, SamplingParams(seed=1, height=65)),
        (
            {"prompt": "a cat", "negative_prompt": "dog"},
            SamplingParams(
                seed=3,
                num_outputs_per_prompt=2,
                guidance_scale=3.0,
                guidance_scale_provided=True,
                extra_args={"method": "exact", "window_size": 8},
            ),
        ),
        ("a cat", SamplingParams(seed=3, extra_args={"no_such_argument": 1})),
        ({"prompt_ids": [1, 2]}, SamplingParams(seed=3)),
    )
    with torch.inference_mode():
        outputs = pipeline.forward(requests)
    window = shallow.model.defaults.window_size
    arguments = {"output_type": "pt", "progress": False}
    expected = shallow.generate("a red apple", seed=7, window_size=window, **arguments).images
    assert torch.equal(outputs[0].output, expected)
    arguments |= {"method": "exact", "guidance_scale": 3.0, "negative_prompt": "dog", "num_images_per_prompt": 2}
    assert torch.equal(outputs[2].output, shallow.generate("a cat", seed=3, window_size=8, **arguments).images)
    assert [output.error is None for output in outputs] == [True, False, True, False, False]
    assert "65" in outputs[1].error
    assert "no_such_argument" in outputs[3].error
    assert "prompt: expected str" in outputs[4].error


def test_seeds_of_generators(pipeline):
    first, second = (
        pipeline.forward(RequestBatch(("a cat", SamplingParams(generator=torch.Generator().manual_seed(seed)))))
        for seed in (4, 4)
    )
    assert torch.equal(first[0].output, second[0].output)


def test_a_failing_pass_is_an_error_of_its_requests(pipeline, shallow, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(shallow.model.transformer, "forward", fail)
        (output,) = pipeline.forward(RequestBatch(("a red apple", SamplingParams(seed=1))))
    assert output.error == "out of memory"
    (output,) = pipeline.forward(RequestBatch(("a red apple", SamplingParams(seed=1))))
    assert output.error is None
