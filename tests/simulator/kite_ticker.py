"""The official KiteTicker, unchanged, in a process of its own (Twisted's reactor starts once a process).

usage: python kite_ticker.py ROOT MODE TOKEN…   prints one JSON object once every token has ticked in MODE.
The session is that of PKB_KITE_API_KEY and PKB_KITE_ACCESS_TOKEN, if they are set.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from kiteconnect import KiteTicker


def main(root: str, mode: str, *texts: str) -> None:
    tokens = [int(text) for text in texts]
    ticks: dict[int, Any] = {}
    messages: list[str] = []
    session = [os.environ.get(f"PKB_KITE_{name}", name) for name in ("API_KEY", "ACCESS_TOKEN")]
    ticker = KiteTicker(*session, root=root)

    def on_connect(ws: KiteTicker, response: object) -> None:
        ws.subscribe(tokens)
        if mode != "quote":
            ws.set_mode(mode, tokens)

    def on_ticks(ws: KiteTicker, received: list[dict[str, Any]]) -> None:
        ticks.update({tick["instrument_token"]: tick for tick in received if tick["mode"] == mode})
        if len(ticks) == len(tokens):
            ws.close()
            ws.stop()

    def on_message(ws: KiteTicker, payload: bytes, is_binary: bool) -> None:
        if not is_binary:
            messages.append(payload.decode())

    ticker.on_connect, ticker.on_ticks, ticker.on_message = on_connect, on_ticks, on_message
    ticker.connect()
    text = json.dumps({"ticks": ticks, "messages": messages}, default=str)
    sys.stdout.write(f"\n{text}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
