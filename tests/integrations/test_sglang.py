"""The backend of `sglang serve` against a stand-in of its interface, version 1."""

import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest

from sjd_engine import cli
from sjd_engine.integrations import sglang, vllm_omni


@dataclass(frozen=True)
class ServeRequest:
    argv: tuple[str, ...]
    model_path: str | None
    model_path_is_positional: bool = False


@dataclass(frozen=True)
class ServeBackend:
    api_version: int
    run: Any
    detect: Any = None
    requires_model_path: bool = True


def test_entry_points_lead_to_both():
    found = {
        group: entry_points(group=group, name="sjd")["sjd"].load()
        for group in ("sglang.serve_backends", "vllm_omni.general_plugins")
    }
    assert found == {
        "sglang.serve_backends": sglang.create_backend,
        "vllm_omni.general_plugins": vllm_omni.register,
    }


def test_the_backend_is_taken_by_name_alone(monkeypatch):
    interface = ModuleType("sglang.cli.serve_backends")
    interface.ServeBackend = ServeBackend
    for name, module in (("sglang", ModuleType("sglang")), ("sglang.cli", ModuleType("sglang.cli"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "sglang.cli.serve_backends", interface)
    assert sglang.create_backend() == ServeBackend(1, sglang.run, detect=None, requires_model_path=False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--model-path", "emoji", "--port", "0"), ["serve", "--model", "emoji", "--port", "0"]),
        (("--model-path=a=b", "--host", "::1"), ["serve", "--model=a=b", "--host", "::1"]),
        (("--help",), ["serve", "--help"]),
    ],
)
def test_arguments_are_those_of_sjd_serve(monkeypatch, argv, expected):
    given = []
    monkeypatch.setattr(cli, "app", lambda arguments: given.append(arguments))
    sglang.run(ServeRequest(argv, None))
    assert given == [expected]
