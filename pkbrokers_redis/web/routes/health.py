"""How the pipeline is: a word for load balancers, everything for programs."""

from __future__ import annotations

from aiohttp import web

from pkbrokers_redis.runtime.health import as_dict, health_of
from pkbrokers_redis.web.answers import json_answer
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services


async def healthz(_: web.Request, services: Services) -> web.Response:
    """200 while candles are made, if need be late or in part; 503 when none are. One word for strangers."""
    findings = (await services.picture.get())[1]
    health = health_of(findings)
    return json_answer({"health": health}, 503 if health == "down" else 200)


async def status(_: web.Request, services: Services) -> web.Response:
    """What `pkb status --json` prints; 503 while Redis is away."""
    facts, findings = await services.picture.get()
    return json_answer(as_dict(facts, findings), 503 if facts is None else 200)


ROUTES = [
    Route("/healthz", healthz, "/healthz", is_open=True),
    Route("/api/status", status, "/api/status"),
]
