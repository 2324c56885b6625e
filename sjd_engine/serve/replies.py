"""Replies in the shapes of OpenAI's API."""

import base64
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from PIL import Image
from pydantic import BaseModel
from starlette.responses import JSONResponse

from sjd_engine.images import encode_png
from sjd_engine.serve.schema import ErrorBody, ErrorReply

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code)).model_dump()


def error_reply(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error that OpenAI's clients raise as the exception of its status."""
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


def refusal(error: Exception) -> JSONResponse:
    """Arguments that the engine has refused; its errors begin with the name of the argument."""
    name, colon, _ = str(error).partition(":")
    return error_reply(400, str(error), param=name if colon and name.isidentifier() else None)


def plain_error(status: int) -> JSONResponse:
    """An error of HTTP itself."""
    return error_reply(status, HTTPStatus(status).phrase)


def sse(event: BaseModel | Mapping[str, Any], name: str) -> str:
    """One server-sent event."""
    data = event.model_dump_json() if isinstance(event, BaseModel) else json.dumps(event)
    return f"event: {name}\ndata: {data}\n\n"


def png_text(image: Image.Image, recipe: Mapping[str, Any] | None = None) -> str:
    """A PNG in base64, with a recipe where there is one."""
    return base64.b64encode(encode_png(image, recipe)).decode()
