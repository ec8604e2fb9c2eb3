"""What the editor asks while a user types, so that text is read by the same code as when it runs.

A question may come with a workflow from anywhere: it is answered beside the server's event loop, and one that is none
is told so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from ...gcfg.curves import CURVES, make_curve
from ...gcfg.errors import GuidanceError
from ...gcfg.prompt_lines import read_prompt_lines
from ...gcfg.terms import GuidanceTerm
from .live import prompt_server

MAX_BODY = 1 << 18  # bytes; a hundred long prompts

_SAMPLES = 101

Answer = dict[str, Any]


def check_prompt(body: dict[str, Any]) -> Answer:
    """What is wrong with a decoupled prompt, line by line.

    Args:
        body: `{"text": str}`.

    Raises:
        GuidanceError: if it is not that.
    """
    lines, problems = read_prompt_lines(_text(body, "text", ""))
    return {
        "lines": [str(line) for line in lines],
        "problems": [{"line": problem.number, "message": problem.message} for problem in problems],
    }


def weight_curve(body: dict[str, Any]) -> Answer:
    """The weight of a Guidance Term over the sampling, as it will be used.

    Args:
        body: the node's widget values by name.

    Returns:
        `{"weights": [...]}` at even percents from 0 to 1, or `{"error": str}` where the node would refuse them.

    Raises:
        GuidanceError: if a value is of another type than its widget's.
    """
    weight, start, end = (_number(body, name) for name in ("weight", "start_percent", "end_percent"))
    kind, points = _text(body, "curve", CURVES[0]), _text(body, "points", "")
    end_weight = _number({"end_weight": 0.0, **body}, "end_weight")
    try:
        term = GuidanceTerm(weight, start, end, curve=make_curve(kind, end_weight, points, "Guidance Term"))
    except GuidanceError as error:
        return {"error": str(error)}
    return {"weights": [term.weight_at(number / (_SAMPLES - 1)) for number in range(_SAMPLES)]}


def answered(path: str, answer: Callable[[dict[str, Any]], Answer], data: bytes) -> tuple[Answer, int]:
    """The answer to a request's body, and its HTTP status: 200, or 400 with the `error` in one sentence."""
    try:
        body = json.loads(data, parse_int=float, parse_constant=_refuse)  # a long integer takes long to read
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return {"error": f"{path}: expected a JSON object of at most {MAX_BODY} bytes."}, 400
    try:
        return answer(body), 200
    except GuidanceError as error:
        return {"error": f"{path}: {error}"}, 400


def register() -> None:
    """Add the routes to the running server, if this process has one."""
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web

    def route(path: str, answer: Callable[[dict[str, Any]], Answer]) -> None:
        async def handler(request: Any) -> Any:
            data = await _body(request)
            found, status = await asyncio.to_thread(answered, path, answer, data)
            return web.json_response(found, status=status)

        server.routes.post(path)(handler)

    route("/gcfg/prompt", check_prompt)
    route("/gcfg/curve", weight_curve)


async def _body(request: Any) -> bytes:
    """The body of a request; nothing where it is too large, cannot be unpacked, or nobody waits any more."""
    from aiohttp import ClientError, http_exceptions, web

    data = bytearray()
    try:
        while len(data) <= MAX_BODY and not request.content.at_eof():
            data += await request.content.readany()
    except (ClientError, ConnectionError, http_exceptions.HttpProcessingError, web.RequestPayloadError):
        return b""
    return bytes(data) if len(data) <= MAX_BODY else b""


def _number(body: dict[str, Any], name: str) -> float:
    value = body.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise GuidanceError(f"{name} is {_kind(value)}, expected a number.")
    return float(value)


def _text(body: dict[str, Any], name: str, default: str) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise GuidanceError(f"{name} is {_kind(value)}, expected text.")
    return value


def _kind(value: Any) -> str:
    """What JSON calls it."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "empty")


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN is not JSON
