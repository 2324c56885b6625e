"""A server on loopback in a thread of this process, and its clients."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from sjd_engine import Engine

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from sjd_engine import serve  # noqa: E402


def official_client(port: int, api_key: str = "none") -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=api_key, max_retries=0)


class Running:
    """A server on loopback in a thread of this process."""

    def __init__(self, engine: Engine, **chosen):
        self.engine = engine
        self.key = {"Authorization": f"Bearer {chosen['api_key']}".encode()} if "api_key" in chosen else {}
        self.app = serve.make_app(engine, serve.Settings(**chosen))
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join()

    def client(self, api_key: str = "none") -> "openai.OpenAI":
        return official_client(self.port, api_key)

    def request(self, path: str, body=None, **headers: str | bytes) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if data is not None:
            headers = {"Content-Type": "application/json", **headers}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET" if data is None else "POST", path, data, headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()

    def metric(self, name: str) -> float:
        text = self.request("/metrics", **self.key)[2].decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"sjd:{name}"))

    def wait_until(self, name: str, condition: Callable[[float], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition(value := self.metric(name)):
            assert time.monotonic() < deadline, (name, value)
            time.sleep(0.02)

    @contextmanager
    def busy(self, **arguments) -> Iterator[socket.socket]:
        """A client of ten images that is being served; leaves at the block's end."""
        body = json.dumps({"prompt": "a cat", "n": 10, "method": "ar", **arguments}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        before = self.metric("num_requests_running")
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            self.wait_until("num_requests_running", lambda images: images > before)
            yield client
