"""What the editor asks while a user types, so that text is read by the same code as when it runs."""

from __future__ import annotations

from typing import Any

from ...gcfg.curves import CURVES, make_curve
from ...gcfg.errors import GuidanceError
from ...gcfg.prompt_lines import read_prompt_lines
from ...gcfg.terms import GuidanceTerm
from .live import prompt_server

_SAMPLES = 101


def check_prompt(body: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a decoupled prompt, line by line.

    Args:
        body: `{"text": str}`.
    """
    lines, problems = read_prompt_lines(str(body.get("text", "")))
    return {
        "lines": [str(line) for line in lines],
        "problems": [{"line": problem.number, "message": problem.message} for problem in problems],
    }


def weight_curve(body: dict[str, Any]) -> dict[str, Any]:
    """The weight of a Guidance Term over the sampling, as it will be used.

    Args:
        body: the node's widget values by name.

    Returns:
        `{"weights": [...]}` at even percents from 0 to 1, or `{"error": str}`.
    """
    try:
        weight, start, end = (float(body[name]) for name in ("weight", "start_percent", "end_percent"))
        kind, points = str(body.get("curve", CURVES[0])), str(body.get("points", ""))
        curve = make_curve(kind, float(body.get("end_weight", 0.0)), points, "Guidance Term")
        term = GuidanceTerm(weight, start, end, curve=curve)
    except GuidanceError as error:  # before ValueError, of which it is one
        return {"error": str(error)}
    except (KeyError, TypeError, ValueError) as error:
        return {"error": f"weight curve: expected numbers ({type(error).__name__}: {error})."}
    return {"weights": [term.weight_at(number / (_SAMPLES - 1)) for number in range(_SAMPLES)]}


def register() -> None:
    """Add the routes to the running server, if this process has one."""
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web

    def route(path: str, answer: Any) -> None:
        async def handler(request: Any) -> Any:
            try:
                body = await request.json()
            except ValueError:
                body = None
            if not isinstance(body, dict):
                return web.json_response({"error": f"{path}: expected a JSON object."}, status=400)
            return web.json_response(answer(body))

        server.routes.post(path)(handler)

    route("/gcfg/prompt", check_prompt)
    route("/gcfg/curve", weight_curve)
