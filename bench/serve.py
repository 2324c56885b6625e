"""Many clients at once against a server on loopback, and every image they get against the offline one of its seed.

    python bench/serve.py                                               # 64 clients, 2 minutes, the bundled model
    python bench/serve.py --clients 32 --seconds 30 --max-waiting 10    # with a short queue: status 429 by design

Each client asks for one image, waits for it, and asks again until the time is over; after status 429 it waits as long
as the server says. Nobody is cut off at the end: what was asked for is waited for, and counted.

Columns:
    images, errors, 429s   replies with an image; any other reply or a broken connection; refusals by the full queue
    wrong                  images that differ in a pixel from what `Engine.generate` gives for their prompt and seed
    images/s               over the time from the first request to the last image
    p50, p95               seconds from a request to its image, those of waiting in the queue included
    tokens a pass          of all images, by the server's own count

Exits with status 1 where there are errors or wrong images. The last line is one JSON document.
"""

import argparse
import base64
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from sjd_engine import Engine

PROMPTS = ("a red apple", "noto soccer ball on grass", "a blue car", "twemoji pizza on stars", "a tree", "a cat face")
NUM_SEEDS = 4  # of each prompt: so many images have to be drawn again offline


@dataclass
class Seen:
    """What the clients saw; they all write to it."""

    seconds: list[float] = field(default_factory=list)
    images: list[tuple[str, int, bytes]] = field(default_factory=list)  # prompt, seed, PNG
    errors: list[str] = field(default_factory=list)
    num_refused: int = 0


@contextmanager
def served(args: argparse.Namespace) -> Iterator[int]:
    """The port of a server that is warm; SIGTERM at the end."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sjd_engine.cli", "serve", "--port", str(port), "--model", args.model]
    command += ["--max-waiting", str(args.max_waiting), "--max-batch-size", str(args.max_batch_size)]
    environment = {name: value for name, value in os.environ.items() if name != "SJD_API_KEY"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while request(port, "/health")[0] != 200:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}: {' '.join(command)}")
            time.sleep(0.1)
        yield port
        process.send_signal(signal.SIGTERM)


def request(port: int, path: str, body: object = None) -> tuple[int, http.client.HTTPMessage | None, bytes]:
    """(status, headers, body) of one reply; status 0 where nobody listens."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        except ConnectionRefusedError:
            return 0, None, b""


def keep_asking(port: int, turns: Iterator[int], end: float, seen: Seen) -> None:
    """One client."""
    while time.perf_counter() < end:
        turn = next(turns)
        prompt, seed = PROMPTS[turn % len(PROMPTS)], turn // len(PROMPTS) % NUM_SEEDS
        started = time.perf_counter()
        try:
            status, headers, reply = request(port, "/v1/images/generations", {"prompt": prompt, "seed": seed})
        except OSError as error:
            seen.errors.append(repr(error))
            continue
        if status == 200:
            seen.seconds.append(time.perf_counter() - started)
            seen.images.append((prompt, seed, base64.b64decode(json.loads(reply)["data"][0]["b64_json"])))
        elif status == 429 and headers is not None:
            seen.num_refused += 1
            time.sleep(float(headers["Retry-After"]))
        else:
            seen.errors.append(f"{status}: {reply[:200]!r}")


def load(port: int, num_clients: int, seconds: float) -> tuple[Seen, float]:
    """What all clients saw, and the seconds until the last of them had its image."""
    seen, turns, started = Seen(), count(), time.perf_counter()
    clients = [
        threading.Thread(target=keep_asking, args=(port, turns, started + seconds, seen)) for _ in range(num_clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return seen, time.perf_counter() - started


def metric(port: int, name: str) -> float:
    lines = request(port, "/metrics")[2].decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sjd:{name} "))


def count_wrong(images: list[tuple[str, int, bytes]], model: str) -> int:
    """Images with a pixel that the offline image of their seed does not have."""
    engine = Engine(model)
    window = engine.model.defaults.window_size
    offline: dict[tuple[str, int], np.ndarray] = {}
    wrong = 0
    for prompt, seed, png in images:
        if (prompt, seed) not in offline:
            out = engine.generate(prompt, seed=seed, window_size=window, progress=False)
            offline[prompt, seed] = np.asarray(out.images[0])
        with Image.open(io.BytesIO(png)) as image:
            wrong += not np.array_equal(np.asarray(image), offline[prompt, seed])
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="'emoji' or a checkpoint folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0, help="after which no client asks again")
    parser.add_argument("--max-batch-size", type=int, default=8, help="of the server")
    parser.add_argument("--max-waiting", type=int, default=64, help="of the server")
    args = parser.parse_args()
    with served(args) as port:
        seen, seconds = load(port, args.clients, args.seconds)
        tokens_a_pass = metric(port, "step_compression_ratio")
    for error in sorted(set(seen.errors)):
        print(error)
    quantiles = statistics.quantiles(seen.seconds, n=20) if len(seen.seconds) > 1 else [float("nan")] * 19
    measured = {
        "clients": args.clients,
        "images": len(seen.images),
        "errors": len(seen.errors),
        "429s": seen.num_refused,
        "wrong": count_wrong(seen.images, args.model),
        "images/s": round(len(seen.images) / seconds, 3),
        "p50": round(quantiles[9], 2),
        "p95": round(quantiles[18], 2),
        "tokens a pass": round(tokens_a_pass, 2),
    }
    table = Table(*measured)
    table.add_row(*map(str, measured.values()))
    Console().print(table)
    print(json.dumps({"setup": vars(args), **measured}))
    return 1 if measured["errors"] or measured["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
