"""Faults of the REST side and of the login pages, applied before a request is looked at."""

from __future__ import annotations

import asyncio

from aiohttp import web

from pkbrokers_redis.simulator.answers import Refused
from pkbrokers_redis.simulator.faults import STATUS_KINDS, Faults

MAINTENANCE_PAGE = "<html><head><title>Kite</title></head><body>We are down for maintenance.</body></html>"
CUT_OFF_JSON = b'{"status": "success", "data": {"candles": [['


async def spoil(faults: Faults, request: web.Request) -> web.Response | None:
    """The answer a fault gives instead; None if there is none. Raises Refused for Kite's own errors."""
    path = request.path
    slow = faults.strike("rest", "slow", path=path)
    if slow is not None:
        await asyncio.sleep(slow.delay_seconds)
    fault = faults.strike("rest", "drop", "html", "garbage_json", *STATUS_KINDS, path=path)
    if fault is None:
        return None
    if fault.kind == "drop":
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)  # nobody is there to read it
    if fault.kind == "html":
        return web.Response(status=503, text=MAINTENANCE_PAGE, content_type="text/html")
    if fault.kind == "garbage_json":
        return web.Response(body=CUT_OFF_JSON, content_type="application/json")
    raise Refused(int(fault.kind))
