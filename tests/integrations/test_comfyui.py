"""ComfyUI's nodes, loaded as ComfyUI loads a folder of custom_nodes, against stand-ins of its modules."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


class InterruptProcessingError(Exception):
    """As ComfyUI's own."""


@pytest.fixture
def comfy(monkeypatch) -> SimpleNamespace:
    """interrupted: what the user has pressed; bars: [value, total] of every update."""
    seen = SimpleNamespace(interrupted=False, bars=[])

    class ProgressBar:
        def __init__(self, total):
            seen.bars.append([0, total])

        def update_absolute(self, value, total=None):
            seen.bars.append([value, total])

    def throw_exception_if_processing_interrupted():
        if seen.interrupted and len(seen.bars) > 4:
            raise InterruptProcessingError

    package, management, utils = (ModuleType(f"comfy{part}") for part in ("", ".model_management", ".utils"))
    management.get_torch_device = lambda: torch.device("cpu")
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    utils.ProgressBar = ProgressBar
    package.model_management, package.utils = management, utils
    for module in (package, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.fixture
def nodes(comfy, monkeypatch) -> dict[str, type]:
    spec = importlib.util.spec_from_file_location(
        "custom_nodes.sjd", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    del sys.modules[f"{spec.name}.nodes"]  # it holds the stand-ins
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    return module.NODE_CLASS_MAPPINGS


def defaults(node: type) -> dict:
    """The values of a node's widgets before anybody touches them."""
    found = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        found[name] = options[0]["default"] if options else kind[0]
    return found


def test_functions_take_what_the_widgets_give(nodes):
    for node in nodes.values():
        names = list(node.INPUT_TYPES()["required"])
        assert list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:] == names


def test_the_loader_makes_an_engine(nodes):
    with torch.inference_mode():  # as ComfyUI does
        (engine,) = nodes["SJDLoader"]().load(**{**defaults(nodes["SJDLoader"]), "dtype": "float32"})
    assert not any(parameter.is_inference() for parameter in engine.model.transformer.parameters())
    assert engine.model.name == "emoji"
    assert engine.model.transformer.dtype == torch.float32


def test_the_sampler_draws_and_tells(nodes, comfy, shallow):
    """Image i has the seed + i, past the largest one from 0 on; the bar ends at its total."""
    widgets = {**defaults(nodes["SJDSampler"]), "engine": shallow, "seed": 2**64 - 1, "num_images": 2}
    with torch.inference_mode():
        (images,) = nodes["SJDSampler"]().sample(**widgets)
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    window = shallow.model.defaults.window_size
    arguments = {"window_size": window, "output_type": "np", "progress": False, "num_images_per_prompt": 2}
    expected = shallow.generate("a red apple", seed=[2**64 - 1, 0], **arguments).images
    assert torch.equal(images, torch.from_numpy(expected))
    assert comfy.bars[-1] == [512, 512]


def test_an_interrupt_reaches_comfyui(nodes, comfy, shallow):
    comfy.interrupted = True
    with pytest.raises(InterruptProcessingError):
        nodes["SJDSampler"]().sample(**{**defaults(nodes["SJDSampler"]), "engine": shallow})
    assert len(comfy.bars) == 5
    assert shallow.scheduler.idle
