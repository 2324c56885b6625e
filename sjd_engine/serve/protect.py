"""What stands before the application: who may come in, and how much they may bring."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sjd_engine.serve.replies import error_reply
from sjd_engine.serve.settings import BODY_TIMEOUT, MAX_BODY_BYTES, MAX_DROPPED_BYTES

OPEN_PATHS = ("/health",)


class KeyCheck:
    """Lets requests through that carry the key, and those for OPEN_PATHS."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = key_of(Headers(scope=scope).get("authorization", ""))
            if not hmac.compare_digest(given, self._key):
                message = "expected the server's API key as a bearer token, got " + ("another" if given else "none")
                reply = error_reply(401, message, code="invalid_api_key")
                reply.headers["WWW-Authenticate"] = 'Basic realm="sjd_engine: any name, the API key as password"'
                await reply(scope, receive, send)
                return
        await self._app(scope, receive, send)


def key_of(authorization: str) -> bytes:
    """The key in an Authorization header: a bearer token, or the password that a browser has asked for."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("latin-1")  # as it came
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class BodyCap:
    """Reads a body up to MAX_BODY_BYTES before anything looks at it, and refuses what is larger or comes too slowly."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await read_body(scope, receive)
        except TimeoutError:
            reply = error_reply(408, f"body: expected all of it within {BODY_TIMEOUT:g} s")
        else:
            if body is not None:
                await self._app(scope, replay(body, receive), send)
                return
            reply = error_reply(413, f"body: expected at most {MAX_BODY_BYTES} bytes; shorten it")
        reply.headers["Connection"] = "close"  # there may be more of the body
        await reply(scope, receive, send)


async def read_body(scope: Scope, receive: Receive) -> MutableMapping[str, Any] | None:
    """A message with all of a body, or of its client's leaving; None where it is too large. Of what is too large some
    is read and dropped: a client hears of it once it has sent everything."""
    announced = Headers(scope=scope).get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_DROPPED_BYTES:
        return None
    body, size, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return message
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > MAX_DROPPED_BYTES:
            return None
    return {"type": "http.request", "body": bytes(body), "more_body": False} if size <= MAX_BODY_BYTES else None


def replay(first: Message, receive: Receive) -> Callable[[], Any]:
    """A `receive` that gives `first` once, and then what comes."""
    messages = [first]

    async def receive_next() -> Message:
        return messages.pop() if messages else await receive()

    return receive_next
