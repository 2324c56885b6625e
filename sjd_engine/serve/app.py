"""The application: routes, and what lies between a request and the engine's loop."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sjd_engine.engine import Engine
from sjd_engine.methods import METHODS, Method
from sjd_engine.models import ImageModel
from sjd_engine.outputs import Generation, StreamEvent
from sjd_engine.recipe import recipe_of
from sjd_engine.serve import schema
from sjd_engine.serve.loop import EngineLoop, NotServingError, QueueFullError, Ticket
from sjd_engine.serve.metrics import Metrics
from sjd_engine.serve.protect import BodyCap, KeyCheck
from sjd_engine.serve.replies import error_body, error_reply, plain_error, png_text, refusal, sse
from sjd_engine.serve.settings import Settings

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
KEEP_ALIVE = 15.0  # seconds of silence after which a stream says that it is there
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": schema.ErrorReply} for status in ("4XX", "5XX")}


def make_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The images API, a page, health and metrics as an ASGI application.

    Its lifespan starts the thread that drives `engine`, which nobody else may use meanwhile, and ends it once all
    accepted requests have ended.

    Args:
        engine: decodes; images of all requests share its batches.
        settings: None for the defaults.
    Raises: ValueError for settings that the model cannot follow.
    """
    settings = Settings() if settings is None else settings
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.loop.stop)

    guards = [Middleware(BodyCap)]
    if settings.api_key is not None:
        guards.insert(0, Middleware(KeyCheck, api_key=settings.api_key))
    app = FastAPI(title="sjd_engine", docs_url=None, redoc_url=None, lifespan=lifespan, middleware=guards)
    add_error_handlers(app)
    add_routes(app, service)
    add_page(app)
    return app


class Service:
    """What the routes do."""

    def __init__(self, engine: Engine, settings: Settings):
        self.settings, self.engine, self.model = settings, engine, engine.model
        self.name = settings.model_name or engine.model.name
        self.window_size = settings.window_of(engine.model)
        self.methods = served_methods(engine.model)
        if settings.method not in self.methods:
            raise ValueError(f"method: expected one of {', '.join(self.methods)}, got {settings.method!r}")
        self.metrics = Metrics(engine)
        capacity = engine.max_batch_size + settings.max_waiting
        self.loop = EngineLoop(engine, capacity=capacity, metrics=self.metrics)
        self.info = schema.ModelInfo(
            id=self.name,
            created=int(time.time()),
            methods=[
                schema.MethodInfo(
                    name=method.name,
                    summary=method.summary,
                    lossless=method.lossless,
                    takes_window=not method.one_token and not method.trained,
                )
                for method in self.methods.values()
            ],
            default_method=settings.method,
            default_window_size=self.window_size,
            max_window_size=engine.model.defaults.max_window_size,
            sizes=[f"{width}x{height}" for height, width in engine.model.sizes],
        )

    def start(self) -> None:
        method = self.settings.method
        self.loop.start(method=method, window_size=self.default_window(method))

    def default_window(self, method: str) -> int | None:
        """Of requests that name none; None where chains of a trained drafter have a length of their own."""
        return None if self.methods[method].trained else self.window_size

    async def generate(self, body: schema.ImageRequest, request: Request) -> Response | schema.ImagesReply:
        """One request from its acceptance to its last image."""
        try:
            arguments = self.arguments_of(body)
        except ValueError as error:
            return refusal(error)
        if body.model not in (None, self.name):
            message = f"model: this server has {self.name!r}, got {body.model!r}"
            return error_reply(404, message, param="model", code="model_not_found")
        news, event_loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            event_loop.call_soon_threadsafe(news.set)

        num_images, num_previews = len(arguments["seed"]), body.partial_images or 0
        ticket = Ticket(arguments, num_images, num_previews, notify)
        deadline = event_loop.time() + self.settings.request_timeout
        try:
            self.loop.submit(ticket)
            await asyncio.wrap_future(ticket.accepted)
        except QueueFullError as error:
            message = f"the queue is full; try again in {error.retry_after} s"
            return error_reply(429, message, code="queue_full", headers={"Retry-After": str(error.retry_after)})
        except NotServingError as error:
            return error_reply(503, f"the server is {error}", headers={"Retry-After": "5"})
        except (ValueError, TypeError) as error:
            return refusal(error)
        except BaseException:
            self.loop.cancel(ticket, "abort")
            raise
        answer = Answer(ticket, self, deadline)
        return EventStream(answer, news) if body.stream else await answer.whole(request)

    def arguments_of(self, body: schema.ImageRequest) -> dict[str, Any]:
        """Those of `Engine.submit`. Raises: ValueError for values that do not fit each other or the model."""
        if body.partial_images and not body.stream:
            raise ValueError("partial_images: needs stream=true; leave it out")
        arguments = {name: value for name in schema.ENGINE_FIELDS if (value := getattr(body, name)) is not None}
        method = body.method or self.settings.method
        if method not in self.methods:
            raise ValueError(f"method: expected one of {', '.join(self.methods)}, got {method!r}")
        window = self.default_window(method) if body.window_size is None else body.window_size
        largest = self.model.defaults.max_window_size
        if isinstance(window, int) and window > largest:
            raise ValueError(f"window_size: expected at most {largest}, got {window}")
        if body.size is not None and body.size != "auto":
            width, height = map(int, body.size.split("x"))
            arguments |= {"width": width, "height": height}
        if body.tree is not None:
            arguments["tree"] = tuple(body.tree)
        first = secrets.randbelow(1 << 32) if body.seed is None else body.seed
        num_images = body.n or 1
        return arguments | {
            "prompt": body.prompt,
            "method": method,
            "window_size": window,
            "seed": [first + i for i in range(num_images)],
            "num_images_per_prompt": num_images,
        }


class Answer:
    """What a client is told of its request.

    Args:
        ticket: accepted by the loop of `service`.
        deadline: on the event loop's clock.
    """

    def __init__(self, ticket: Ticket, service: Service, deadline: float):
        self._ticket, self._service, self._deadline = ticket, service, deadline
        self._result = asyncio.wrap_future(ticket.result)
        self._result.add_done_callback(lambda result: result.exception())  # asyncio warns of one that nobody has seen

    async def whole(self, request: Request) -> Response | schema.ImagesReply:
        """One reply with all images; a client that leaves meanwhile frees their pages."""
        left = asyncio.create_task(disconnected(request))
        try:
            async with asyncio.timeout_at(self._deadline):
                await asyncio.wait((self._result, left), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return error_reply(504, self._timed_out(), code="timeout", headers={"X-Should-Retry": "false"})
        finally:
            left.cancel()
            self.give_up()
        if not self._result.done():
            return Response(status_code=499)  # nobody reads it
        try:
            generation = self._result.result()
        except Exception:
            return plain_error(500)
        images = await asyncio.to_thread(self._encode, generation)
        data = [schema.ImageData(b64_json=text, stats=stats) for text, stats in images]
        return schema.ImagesReply(created=int(time.time()), data=data, size=size_of(generation.images[0]))

    async def events(self, news: asyncio.Event) -> AsyncIterator[str]:
        """Server-sent events: previews, then every image."""
        self._result.add_done_callback(lambda _: news.set())
        num_partial = 0
        while not self._result.done():
            left = self._deadline - asyncio.get_running_loop().time()
            if left <= 0:
                yield sse(error_body(504, self._timed_out(), code="timeout"), "error")
                return
            try:
                await asyncio.wait_for(news.wait(), min(left, KEEP_ALIVE))
            except TimeoutError:
                yield ": waiting\n\n"
            news.clear()
            for preview in self._ticket.take_previews():
                partial = await asyncio.to_thread(self._partial, preview, num_partial)
                yield sse(partial, partial.type)
                num_partial += 1
        try:
            generation = self._result.result()
        except Exception:
            yield sse(error_body(500, "the request has failed"), "error")
            return
        for completed in await asyncio.to_thread(self._completed, generation):
            yield sse(completed, completed.type)

    def give_up(self) -> None:
        """The client has left, or was told everything."""
        self._service.loop.cancel(self._ticket, "abort")

    def _timed_out(self) -> str:
        self._service.loop.cancel(self._ticket, "timeout")
        return "the request took longer than this server allows; try again later, or ask for fewer images"

    def _encode(self, generation: Generation) -> list[tuple[str, schema.Stats]]:
        prompt, method = self._ticket.arguments["prompt"], self._ticket.arguments["method"]
        encoded = []
        for i, (image, stats) in enumerate(zip(generation.images, generation.stats, strict=True)):
            recipe = recipe_of(self._service.engine, self._service.name, prompt, generation, i)
            encoded.append((png_text(image, recipe), schema.Stats.of(stats, generation.seeds[i], method)))
        return encoded

    def _completed(self, generation: Generation) -> list[schema.CompletedImage]:
        return [
            schema.CompletedImage(
                created_at=int(time.time()), b64_json=text, image_index=index, stats=stats, size=size_of(image)
            )
            for index, (image, (text, stats)) in enumerate(
                zip(generation.images, self._encode(generation), strict=True)
            )
        ]

    def _partial(self, preview: StreamEvent, number: int) -> schema.PartialImage:
        schedule = self._service.model.schedule(preview.image.height, preview.image.width)
        return schema.PartialImage(
            created_at=int(time.time()),
            b64_json=png_text(preview.image),
            partial_image_index=number,
            image_index=preview.index,
            num_committed=preview.num_committed,
            num_drafted=preview.num_drafted,
            num_tokens=preview.num_tokens,
            grid=(schedule.rows, schedule.cols),
            committed_cells=int((schedule.image_positions < preview.num_committed).sum()),
            drafted_cells=int((schedule.image_positions < preview.num_drafted).sum()),
            nfe=preview.nfe,
            size=size_of(preview.image),
        )


class EventStream(StreamingResponse):
    """The events of an answer; however it ends, nothing is decoded for it afterwards."""

    def __init__(self, answer: Answer, news: asyncio.Event):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(news), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.give_up()


def add_routes(app: FastAPI, service: Service) -> None:
    """The API."""

    @app.post("/v1/images/generations", responses=STREAM | REFUSALS, response_model=schema.ImagesReply)
    async def generate_images(body: schema.ImageRequest, request: Request) -> Any:
        return await service.generate(body, request)

    @app.get("/v1/models")
    async def list_models() -> schema.ModelList:
        return schema.ModelList(data=[service.info])

    @app.get("/v1/models/{name}", responses=REFUSALS, response_model=schema.ModelInfo)
    async def retrieve_model(name: str) -> Any:
        if name != service.name:
            return error_reply(404, f"model: this server has {service.name!r}", param="model", code="model_not_found")
        return service.info

    @app.get("/health")
    async def health(response: Response) -> dict[str, str]:
        status = service.loop.status
        response.status_code = 200 if status == "ok" else 503
        return {"status": status}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def add_page(app: FastAPI) -> None:
    """The page and its parts, all of which lie in the package."""
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}

    def serve(path: str, name: str, media_type: str) -> None:
        content = (files("sjd_engine.serve") / "page" / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def part() -> Response:
            return Response(content, media_type=media_type, headers=headers)

    for path, (name, media_type) in PAGE.items():
        serve(path, name, media_type)


def add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        param = where[0] if where else None
        return error_reply(400, f"{'.'.join(where) or 'body'}: {first['msg']}", param=param, code=first["type"])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_reply(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return plain_error(500)


def served_methods(model: ImageModel) -> dict[str, Method]:
    """Those that `model` has all parts for. Methods that run in plain PyTorch, for comparison, would hold everybody
    up."""

    def served(method: Method) -> bool:
        part = model.denoiser if method.denoises else model.draft_head
        return method.acceptance == "token" and not method.rows_at_once and (part is not None or not method.trained)

    return {name: method for name, method in METHODS.items() if served(method)}


def size_of(image: Any) -> str:
    return f"{image.width}x{image.height}"


async def disconnected(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
