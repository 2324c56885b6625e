"""Ray: a run that loses a worker, and the server as a deployment. Skipped where Ray is not installed."""

import base64
import io
import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from sjd_engine import Engine
from sjd_engine.evaluate.generate import Artist, generate
from sjd_engine.evaluate.layouts import get_layout
from sjd_engine.evaluate.manifest import read_images
from sjd_engine.scale_out import RayPool, deployment

ARTIST = Artist("emoji", {"window_size": 64}, batch_size=2)
NUM_IMAGES = 16


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class Killing(RayPool):
    """Kills the worker of the first image that comes back."""

    def draw(self, artist, shots):
        killed = False
        for record, content in super().draw(artist, shots):
            if not killed:
                os.kill(int(record["worker"].rpartition(":")[2]), signal.SIGKILL)
                killed = True
            yield record, content


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_a_lost_worker_costs_no_image_and_draws_none_twice(ray, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {thing}\n" for thing in ("red apple", "blue car", "tree", "cat")))

    def draw(name: str, source: RayPool | None) -> Path:
        arguments = {"seed": 3, "images_per_prompt": NUM_IMAGES // 4, "progress": False, "source": source}
        generate(prompts, tmp_path / name, get_layout("plain"), ARTIST, **arguments)
        return tmp_path / name

    far, here = draw("ray", Killing(workers=2)), draw("here", None)
    lines = (far / "manifest.jsonl").read_text().splitlines()
    assert len(lines) == 1 + NUM_IMAGES  # each image once
    assert files(far) == files(here)
    assert len({image["worker"] for image in read_images(far)}) >= 2


def test_the_server_as_a_deployment_gives_the_offline_image(ray):
    for package in ("fastapi", "prometheus_client"):
        pytest.importorskip(package)
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment("emoji", max_batch_size=2), name="sjd")
    body = json.dumps({"prompt": "a red apple", "seed": 5, "method": "exact"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        content = base64.b64decode(json.load(reply)["data"][0]["b64_json"])
    serve.shutdown()
    offline = Engine("emoji").generate("a red apple", seed=5, method="exact", window_size=32, progress=False)
    with Image.open(io.BytesIO(content)) as served:
        assert served.tobytes() == offline.images[0].tobytes()


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("gpus", -1), ("cpus", 0)])
def test_a_pool_of_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        RayPool(**{name: value})
