"""The server, by clients of its own kind: OpenAI's official one, plain HTTP, and clients that misbehave."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import Running, official_client, openai

from sjd_engine import Engine, errors
from sjd_engine.outputs import ImageStats
from sjd_engine.serve.loop import EngineLoop, Ticket
from sjd_engine.serve.metrics import Metrics, draft_counts
from sjd_engine.serve.settings import MAX_BODY_BYTES

WINDOW = 32  # the default of the bundled model
FUZZED = int(os.environ.get("SJD_FUZZED_REQUESTS", "60"))


def pixels(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def running(shallow) -> Iterator[Running]:
    with Running(Engine(shallow.model, max_batch_size=4), max_waiting=10) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(shallow) -> Iterator[Running]:
    """Asks for a key, and gives no image the time it takes."""
    with Running(Engine(shallow.model, max_batch_size=1), api_key="sécret", request_timeout=0.02) as running:
        yield running


@pytest.fixture
def offline(shallow) -> Callable[..., np.ndarray]:
    """What the engine gives for one seed, alone."""

    def image(prompt: str, seed: int, **arguments) -> np.ndarray:
        given = {"window_size": WINDOW, "progress": False, **arguments}
        return np.asarray(shallow.generate(prompt, seed=seed, **given).images[0])

    return image


class TestOfficialClient:
    def test_generates_the_images_of_their_seeds(self, running, offline):
        reply = running.client().images.generate(prompt="a cat", n=2, size="64x64", extra_body={"seed": 5})
        assert reply.size == "64x64"
        assert [image.stats["seed"] for image in reply.data] == [5, 6]
        for i, image in enumerate(reply.data):
            np.testing.assert_array_equal(pixels(image.b64_json), offline("a cat", 5 + i))
            with Image.open(io.BytesIO(base64.b64decode(image.b64_json))) as file:
                recipe = json.loads(file.text["sjd_engine"])
            assert recipe["seed"] == 5 + i
            assert recipe["window_size"] == WINDOW
        assert np.shape(reply.data[0].stats["acceptance_map"]) == (16, 16)

    def test_streams_previews_and_the_image(self, running, offline):
        asked = {"prompt": "a cat", "stream": True, "partial_images": 3, "extra_body": {"seed": 5, "method": "exact"}}
        events = list(running.client().images.generate(**asked))
        kinds = [event.type.removeprefix("image_generation.") for event in events]
        assert kinds == ["partial_image"] * (len(events) - 1) + ["completed"]
        assert 1 <= len(events) - 1 <= 3
        assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
        committed = [event.num_committed for event in events[:-1]]
        assert committed == sorted(set(committed))
        assert all(64 <= event.num_committed < event.num_drafted <= 256 for event in events[:-1])
        np.testing.assert_array_equal(pixels(events[-1].b64_json), offline("a cat", 5, method="exact"))

    def test_seeds_are_random_and_told_where_none_is_named(self, running):
        seeds = {running.client().images.generate(prompt="a cat").data[0].stats["seed"] for _ in range(2)}
        assert len(seeds) == 2

    @pytest.mark.parametrize(
        ("arguments", "error", "param"),
        [
            ({"n": 11}, "BadRequestError", "n"),
            ({"prompt": "a" * 4001}, "BadRequestError", "prompt"),
            ({"prompt": "  "}, "BadRequestError", "prompt"),
            ({"response_format": "url"}, "BadRequestError", "response_format"),
            ({"size": "1024x1024"}, "BadRequestError", None),
            ({"partial_images": 2}, "BadRequestError", "partial_images"),
            ({"model": "dall-e-3"}, "NotFoundError", "model"),
            ({"extra_body": {"quailty": 1}}, "BadRequestError", "quailty"),
            ({"extra_body": {"method": "gsd"}}, "BadRequestError", "method"),
            ({"extra_body": {"window_size": 65}}, "BadRequestError", "window_size"),
            ({"extra_body": {"temperature": 0}}, "BadRequestError", "temperature"),
            ({"extra_body": {"tree": [3, 60], "window_size": 8}}, "BadRequestError", "tree"),
            ({"stream": True, "extra_body": {"top_p": 2}}, "BadRequestError", "top_p"),
        ],
    )
    def test_raises_typed_errors(self, running, arguments, error, param):
        with pytest.raises(getattr(openai, error)) as raised:
            running.client().images.generate(**{"prompt": "a cat", **arguments})
        assert raised.value.param == param

    def test_lists_the_model(self, running):
        (model,) = running.client().models.list()
        assert running.client().models.retrieve(model.id).id == model.id
        assert {method["name"] for method in model.methods} >= {"ar", "exact", "maximal"}
        with pytest.raises(openai.NotFoundError):
            running.client().models.retrieve("dall-e-3")

    def test_a_full_queue(self, running):
        with running.busy(), pytest.raises(openai.RateLimitError) as raised:
            running.client().images.generate(prompt="a cat", n=5)
        assert int(raised.value.response.headers["Retry-After"]) >= 1
        running.wait_until("num_requests_running", lambda images: images == 0)


class TestManyClients:
    def test_each_gets_the_image_of_its_seed(self, running, offline):
        """Six at once, of two methods, four rows."""
        settings = [{"seed": seed, "method": ("maximal", "exact")[seed % 2]} for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            replies = pool.map(lambda s: running.request("/v1/images/generations", {"prompt": "a tree", **s}), settings)
        for setting, (status, _, body) in zip(settings, replies, strict=True):
            assert status == 200, body
            image = pixels(json.loads(body)["data"][0]["b64_json"])
            np.testing.assert_array_equal(image, offline("a tree", **setting))

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_frees_its_pages(self, running, offline, stream):
        aborted = running.metric('request_success_total{finished_reason="abort"}')
        with running.busy(stream=stream, partial_images=8 if stream else 0):
            assert running.metric("kv_pages_in_use") > 8
            mate = running.client().with_options(timeout=60).images
            pending = ThreadPoolExecutor(1).submit(mate.generate, prompt="a dog", extra_body={"seed": 3})
            running.wait_until("num_requests_waiting", lambda images: images % 2 == 1)  # ten are four, four and two
        image = pending.result().data[0].b64_json
        np.testing.assert_array_equal(pixels(image), offline("a dog", 3))
        running.wait_until("num_requests_running", lambda images: images == 0)
        assert running.metric('request_success_total{finished_reason="abort"}') == aborted + 1
        prompts = running.engine.scheduler.prompts
        while prompts.evict():
            pass
        prompts.kv_cache.check_invariants()
        assert running.metric("kv_pages_in_use") == 0


class TestProtection:
    def test_a_key_on_every_route_but_health(self, guarded):
        paths = ["/", "/page.js", "/page.css", "/metrics", "/v1/models", "/openapi.json", "/nowhere"]
        assert {guarded.request(path)[0] for path in paths} == {401}
        assert guarded.request("/health")[0] == 200
        basic = base64.b64encode("me:sécret".encode()).decode()
        for right in ("Bearer sécret", f"Basic {basic}"):
            assert guarded.request("/v1/models", Authorization=right.encode())[0] == 200
        for wrong in ("Bearer wrong", "Bearer", "Basic !", "Basic bWU=", "secret"):
            assert guarded.request("/v1/models", Authorization=wrong)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            guarded.client("wrong").images.generate(prompt="a cat")

    def test_a_request_that_takes_too_long(self, guarded):
        body = {"prompt": "a cat", "method": "ar"}
        status, headers, reply = guarded.request("/v1/images/generations", body, **guarded.key)
        assert (status, headers["x-should-retry"]) == (504, "false")
        assert json.loads(reply)["error"]["code"] == "timeout"
        status, _, reply = guarded.request("/v1/images/generations", {**body, "stream": True}, **guarded.key)
        assert status == 200
        assert b"event: error\ndata: " in reply
        guarded.wait_until("num_requests_running", lambda images: images == 0)
        assert guarded.metric('request_success_total{finished_reason="timeout"}') == 2

    def test_bodies_are_read_with_a_cap(self, running):
        large = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
        assert running.request("/v1/images/generations", large)[0] == 413
        with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            parts = iter([large[: 1 << 18]] * 8)  # of a length that nobody knows
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", parts, headers, encode_chunked=True)
            assert connection.getresponse().status == 413


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class TestMalformed:
    @settings(
        max_examples=FUZZED,
        deadline=None,
        derandomize=True,
    )
    @given(data=st.data())
    def test_get_4xx_and_never_5xx(self, running, data):
        """Fields of the API's own schema with values that do not fit, and fields it does not have."""
        if not hasattr(running, "fields"):
            schema = json.loads(running.request("/openapi.json")[2])
            running.fields = sorted(schema["components"]["schemas"]["ImageRequest"]["properties"])
        field = data.draw(st.sampled_from(running.fields) | st.text(max_size=8))
        value = data.draw(json_values)
        body = {"prompt": "a cat", "method": "exact", "window_size": 64, field: value}
        status, _, reply = running.request("/v1/images/generations", body)
        assert status in (200, 400, 404), reply
        if status != 200:
            assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}
        else:
            assert field in running.fields

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"a cat"',
            b"\xff",
            b"[" * 100_000,
            b'{"prompt": "\\ud800"}',
            b'{"seed": 1' + b"0" * 5000,
        ],
    )
    def test_bodies_that_are_no_request(self, running, body):
        status, _, reply = running.request("/v1/images/generations", body)
        assert status == 400
        assert json.loads(reply)["error"]["type"] == "invalid_request_error"

    def test_paths_and_verbs(self, running):
        assert running.request("/v1/nowhere")[0] == 404
        assert running.request("/v1/images/generations")[0] == 405
        status, _, reply = running.request("/v1/images/generations", {"prompt": "a"}, **{"Content-Type": "text/plain"})
        assert (status, json.loads(reply)["error"]["type"]) == (400, "invalid_request_error")


class TestMetrics:
    def test_count_what_was_decoded(self, shallow):
        with Running(Engine(shallow.model, max_batch_size=2)) as running:
            stats = running.client().images.generate(prompt="a cat", n=2).data
            nfe = sum(image.stats["nfe"] for image in stats)
            assert running.metric("iterations_total") == nfe
            assert running.metric("tokens_total") == 512
            assert running.metric("step_compression_ratio") == pytest.approx(512 / nfe)
            drafts = running.metric("spec_decode_num_drafts_total")
            assert 1 + running.metric("spec_decode_num_accepted_tokens_total") / drafts == pytest.approx(512 / nfe)
            assert running.metric("images_total") == running.metric("image_latency_seconds_count") == 2
            assert running.metric('request_success_total{finished_reason="stop"}') == 1

    def test_drafts_of_a_pass(self):
        stats = ImageStats(4, 10, [1, 4, 3, 2], [4, 4, 4, 4], 1.0, np.zeros((2, 5)), 0, 0, 0)
        assert draft_counts(stats) == [(3, 0), (3, 3), (3, 2), (2, 1)]
        assert draft_counts(replace(stats, committed_per_pass=[1] * 10, window_sizes=[1] * 10)) == []


class TestEnd:
    def test_a_preview_that_fails_ends_its_request_alone(self, running, offline, monkeypatch):
        def fail(number: int, index: int) -> None:
            raise MemoryError("pixels")

        monkeypatch.setattr(running.engine, "preview", fail)
        images = running.client().images
        with pytest.raises(openai.APIError, match="the request has failed"):
            list(images.generate(prompt="a dog", stream=True, partial_images=3))
        image = images.generate(prompt="a cat", extra_body={"seed": 5}).data[0].b64_json
        np.testing.assert_array_equal(pixels(image), offline("a cat", 5))

    def test_an_engine_that_fails_leaves_nobody_waiting(self, shallow, monkeypatch):
        engine = Engine(shallow.model, max_batch_size=1)
        loop = EngineLoop(engine, capacity=4, metrics=Metrics(engine))
        loop.start(window_size=WINDOW)

        def fail() -> None:
            raise LookupError("a defect")

        monkeypatch.setattr(engine, "step", fail)
        tickets = [Ticket({"prompt": "a cat"}, 1) for _ in range(3)]
        for ticket in tickets[:2]:
            loop.submit(ticket)
        for ticket in tickets[:2]:
            with pytest.raises(LookupError):
                ticket.result.result(timeout=60)
        assert loop.status == "failed"
        with pytest.raises(RuntimeError, match="failed"):
            loop.submit(tickets[2])

    def test_sigterm_under_load_loses_no_accepted_request(self):
        """A process of its own; clients keep asking until the port closes."""
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "sjd_engine.cli", "serve", "--port", str(port), "--max-batch-size", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert any("Uvicorn running" in line for line in process.stderr)
        client = official_client(port)
        outcomes: list[str] = []

        def keep_asking(seed: int) -> None:
            while True:
                try:
                    client.images.generate(prompt="a cat", extra_body={"seed": seed, "guidance_scale": 1})
                    outcomes.append("answered")
                except openai.APIConnectionError:  # the port is closed: nothing was accepted
                    return

        clients = [threading.Thread(target=keep_asking, args=(seed,)) for seed in range(6)]
        for thread in clients:
            thread.start()
        while len(outcomes) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join()
        log = process.stderr.read()
        assert process.wait() in (0, -signal.SIGTERM)
        (counts,) = [line for line in log.splitlines() if "accepted" in line]
        assert f"{len(outcomes)} requests accepted, {len(outcomes)} answered" in counts
        assert len(outcomes) > 3, "what waited is answered, too"


def test_a_missing_extra_tells_the_one_command():
    with pytest.raises(errors.MissingExtraError, match=r"no_such: .* pip install 'sjd-engine\[serve\]'"):
        errors.require("serve", "json", "no_such")
