"""Many machines: `sjd eval generate --ray` on Ray Data, and the server as a Ray Serve deployment.

Engines are actors, one for each GPU or for a share of the CPUs; batches of images stream to them and files come back.
Only the process that asked writes: a batch whose actor was lost is drawn again by another, and gives the same bytes, so
every file is written once, and no disk need be shared.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sjd_engine.engine import Engine
from sjd_engine.errors import require
from sjd_engine.evaluate.generate import Artist
from sjd_engine.evaluate.layouts import Shot
from sjd_engine.request import at_least

if TYPE_CHECKING:
    from ray.serve import Application

    from sjd_engine.serve import Settings

IN_FLIGHT = 2  # batches of an actor: one under way, one that waits beside it


class Painter:
    """The actor: an engine, and a batch of images at a time. Records travel as JSON, which Arrow leaves as it is."""

    def __init__(self, artist: Artist, threads: int | None):
        if threads is not None:
            torch.set_num_threads(threads)
        self._artist, self._engine = artist, artist.engine()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        shots = [Shot(**json.loads(text)) for text in batch["shot"]]
        records, contents = zip(*self._artist.draw(self._engine, shots), strict=True)
        return {"record": [json.dumps(record) for record in records], "content": list(contents)}


@dataclass(frozen=True)
class RayPool:
    """Draws with Ray Data; a source of `evaluate.generate`.

    Args:
        workers: actors, >= 1.
        gpus: of each actor; 0 decodes on CPUs.
        cpus: of each actor, and threads of its engine where it has no GPU.
        address: of a cluster; None joins the one that RAY_ADDRESS names, or starts one on this machine.
    """

    workers: int = 2
    gpus: float = 0
    cpus: float = 1
    address: str | None = None

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)
        if self.gpus < 0 or self.cpus <= 0:
            raise ValueError(f"gpus, cpus: expected >= 0 and > 0 of each worker, got {self.gpus} and {self.cpus}")

    def settings(self, artist: Artist) -> dict[str, Any]:
        """Those of a worker, which loads the model for it. Raises: MissingExtraError without Ray."""
        ray = self._joined()

        def there() -> dict[str, Any]:
            return artist.settings(artist.engine())

        return ray.get(ray.remote(num_gpus=self.gpus, num_cpus=self.cpus)(there).remote())

    def draw(self, artist: Artist, shots: list[Shot]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """(record, bytes of the file) of every image, batch by batch as they come back."""
        ray = self._joined()
        # Enough to fill an engine and its queue; fewer where a worker would get nothing.
        batch_size = min(2 * artist.batch_size, -(-len(shots) // self.workers))
        lines = [{"shot": json.dumps(vars(shot))} for shot in shots]
        drawn = ray.data.from_items(lines, override_num_blocks=-(-len(shots) // batch_size)).map_batches(
            Painter,
            fn_constructor_args=(artist, None if self.gpus else max(1, int(self.cpus))),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=IN_FLIGHT),
            num_gpus=self.gpus,
            num_cpus=self.cpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in drawn.iter_rows():
            yield json.loads(row["record"]), row["content"]

    def _joined(self) -> Any:
        """Ray, with a cluster."""
        require("ray", "ray")
        import ray
        import ray.data

        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False)
        return ray


def deployment(
    model: str = "emoji",
    settings: "Settings | None" = None,
    *,
    replicas: int = 1,
    gpus: float = 0,
    cpus: float = 1,
    max_ongoing_requests: int = 64,
    max_queued_requests: int = 64,
    **engine_arguments: Any,
) -> "Application":
    """The application of `sjd serve` for Ray Serve: `ray.serve.run(deployment("emoji", replicas=2))`.

    Args:
        model, engine_arguments: those of `Engine`, one in each replica.
        settings: of the server.
        replicas, gpus, cpus: how many, and what each takes.
        max_ongoing_requests: that a replica decodes or lets wait.
        max_queued_requests: that Ray's proxy holds beside them; more get status 503.
    Raises: MissingExtraError without Ray or FastAPI.
    """
    require("ray", "ray")
    require("serve", "fastapi", "prometheus_client", "uvicorn")
    from ray import serve

    def app() -> Any:
        """In the replica."""
        from sjd_engine.serve import make_app

        return make_app(Engine(model, **engine_arguments), settings)

    configure: Any = serve.deployment(
        name="sjd",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
    )
    return configure(serve.ingress(app)()).bind()
