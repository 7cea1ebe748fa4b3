"""A local Telegram: the Bot API over HTTP, in a thread, and people who write to the bot.

    with Telegram() as telegram:
        telegram.say(ALICE, "/quote INFY")
        message = telegram.wait(lambda m: "INFY" in m.text)

It implements what the bot uses: getMe, setMyCommands, getUpdates (long poll; an offset confirms; a second
poller ends the first one's poll with 409), sendMessage, editMessageText, sendPhoto, sendDocument (multipart),
answerCallbackQuery. `misbehave` makes a method fail, refuse by 429, or dawdle; `moved` are groups that became
supergroups (old id → new), messages to `broken` chats fail.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support import wait_until

TOKEN = "123456:made-up-token-of-a-test-0123456789abc"
ALICE, BOB, MALLORY, GROUP = 1001, 1002, 6666, -500
BOT_NAME = "pkb_test_bot"


@dataclass
class Sent:
    """One call of the bot's that reached a chat."""

    method: str
    chat_id: int
    message_id: int
    text: str
    buttons: list[tuple[str, str]] = field(default_factory=list)
    file_name: str = ""
    content: bytes = b""
    at: float = field(default_factory=time.time)


@dataclass
class Fault:
    """How a method misbehaves, the next `times` times."""

    status: int = 0
    retry_after: int = 0
    seconds: float = 0.0
    times: int = 1
    body: str = ""


class Telegram:
    """Start it with `with`. `sent` is what reached the chats, `calls` every method in order."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answered: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.moved: dict[int, int] = {}
        self.broken: set[int] = set()
        self.conflicts = 0
        self._updates: list[Any] = []
        self._next_update, self._next_message = 700, 1
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._poll: object | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        """For PKB_TELEGRAM_API_URL."""
        return f"http://127.0.0.1:{self.port}/bot"

    def __enter__(self) -> Telegram:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    # people

    def say(self, chat_id: int, text: str, user_id: int | None = None, **more: Any) -> int:
        """A person writes; the update's id. In a private chat the chat's id is the person's."""
        message = {**self._message(chat_id, user_id), "text": text, **more}
        if text.startswith("/"):
            length = len(text.split()[0]) if text.split() else 1
            message["entities"] = [{"type": "bot_command", "offset": 0, "length": length}]
        return self.push({"message": message})

    def upload(self, chat_id: int, name: str) -> int:
        """A person sends a file."""
        document = {"file_id": "f1", "file_unique_id": "u1", "file_name": name, "file_size": 10}
        return self.push({"message": {**self._message(chat_id, None), "document": document}})

    def press(self, message: Sent, label: str, user_id: int | None = None) -> int:
        """A person presses a button under a message of the bot's."""
        [data] = [data for text, data in message.buttons if text == label]
        query = {
            "id": str(self._next_update),
            "from": self._user(message.chat_id if user_id is None else user_id),
            "chat_instance": "1",
            "message": {**self._message(message.chat_id, 1), "message_id": message.message_id, "text": "…"},
            "data": data,
        }
        return self.push({"callback_query": query})

    def push(self, update: Any, update_id: int | None = None) -> int:
        """Any update, also a malformed one; `update_id` repeats an earlier one."""
        number = self._next_update if update_id is None else update_id
        self._next_update = max(self._next_update, number) + 1
        made = {"update_id": number, **update} if isinstance(update, dict) else update

        def put() -> None:
            self._updates.append(made)
            self._news.set()

        self._loop.call_soon_threadsafe(put)
        return number

    def misbehave(self, method: str, **fault: Any) -> None:
        """`status=500`, `status=429, retry_after=1`, `seconds=2.0`, `body="<html>"`; `times=` how often."""
        self.faults.setdefault(method, []).append(Fault(**fault))

    # what the bot sent

    def messages(self, chat_id: int | None = None) -> list[Sent]:
        """New messages (no edits), of one chat or all."""
        return [
            message
            for message in list(self.sent)
            if not message.method.startswith("edit") and chat_id in (None, message.chat_id)
        ]

    def wait(self, matches: Callable[[Sent], bool], since: int = 0, timeout_seconds: float = 20.0) -> Sent:
        """The first call to a chat, edits too, from number `since` on, that `matches`."""

        def found() -> Sent | None:
            return next((sent for sent in list(self.sent)[since:] if matches(sent)), None)

        try:
            answer = wait_until(found, timeout_seconds=timeout_seconds, what="a message")
        except AssertionError as error:
            raise AssertionError(
                f"{error}; sent: {[sent.text[:200] for sent in self.sent[since:]]}"
            ) from None
        assert answer is not None
        return answer

    def ask(self, chat_id: int, text: str, user_id: int | None = None) -> Sent:
        """Say something and wait for the next message in that chat."""
        since = len(self.sent)
        self.say(chat_id, text, user_id)
        return self.wait(lambda m: m.chat_id == chat_id and not m.method.startswith("edit"), since)

    # the server

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=200 * 2**20)
        app.router.add_route("*", "/bot{token}/{method}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.match_info["token"] != TOKEN:
            return self._refuse(404 if ":" not in request.match_info["token"] else 401, "Unauthorized")
        method = request.match_info["method"]
        fields: dict[str, Any] = {}
        for name, value in (await request.post()).items():
            fields[name] = (value.filename, value.file.read()) if isinstance(value, web.FileField) else value
        self.calls.append((method, fields))
        if fault := self._fault(method):
            await asyncio.sleep(fault.seconds)
            if fault.body:
                return web.Response(status=fault.status or 200, text=fault.body, content_type="text/html")
            if fault.status == 429:
                more = {"parameters": {"retry_after": fault.retry_after}}
                return self._refuse(429, f"Too Many Requests: retry after {fault.retry_after}", **more)
            if fault.status:
                return self._refuse(fault.status, "refused by the test")
        handler = getattr(self, f"_{method}", None)
        if handler is None:
            return self._refuse(404, "Not Found")
        found: web.Response | Any = await handler(fields)
        return found if isinstance(found, web.Response) else web.json_response({"ok": True, "result": found})

    def _fault(self, method: str) -> Fault | None:
        faults = self.faults.get(method)
        if not faults:
            return None
        faults[0].times -= 1
        return faults[0] if faults[0].times > 0 else faults.pop(0)

    def _refuse(self, status: int, why: str, **more: Any) -> web.Response:
        return web.json_response(
            {"ok": False, "error_code": status, "description": why, **more}, status=status
        )

    async def _getMe(self, _: dict[str, Any]) -> Any:  # noqa: N802  Telegram's names
        return {"id": 1, "is_bot": True, "first_name": "pkb", "username": BOT_NAME}

    async def _setMyCommands(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        self.commands = json.loads(fields["commands"])
        return True

    async def _getUpdates(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        offset = int(fields.get("offset", 0))
        self._updates = [
            u for u in self._updates if not isinstance(u, dict) or u.get("update_id", offset) >= offset
        ]
        me = self._poll = object()
        self._news.set()  # ends another's poll
        deadline = self._loop.time() + float(fields.get("timeout", 0))
        while not self._updates:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), max(deadline - self._loop.time(), 0.0))
            except TimeoutError:
                return []
            if self._poll is not me:
                self.conflicts += 1
                return self._refuse(409, "Conflict: terminated by other getUpdates request")
        return list(self._updates[:100])

    async def _sendMessage(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        chat_id = int(fields["chat_id"])
        if chat_id in self.moved:
            more = {"parameters": {"migrate_to_chat_id": self.moved[chat_id]}}
            return self._refuse(400, "Bad Request: group chat was upgraded to a supergroup chat", **more)
        if chat_id in self.broken:
            return self._refuse(500, "Internal Server Error")
        return self._note("sendMessage", fields, fields["text"])

    async def _editMessageText(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        return self._note("editMessageText", fields, fields["text"], int(fields["message_id"]))

    async def _sendPhoto(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        made = self._note("sendPhoto", fields, fields.get("caption", ""), file=fields["photo"])
        return {**made, "photo": [{"file_id": "p", "file_unique_id": "p", "width": 9, "height": 9}]}

    async def _sendDocument(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        made = self._note("sendDocument", fields, fields.get("caption", ""), file=fields["document"])
        return {**made, "document": {"file_id": "d", "file_unique_id": "d"}}

    async def _answerCallbackQuery(self, fields: dict[str, Any]) -> Any:  # noqa: N802
        self.answered.append(fields)
        return True

    def _note(
        self, method: str, fields: dict[str, Any], text: str, message_id: int = 0, file: Any = ("", b"")
    ) -> Any:
        if not message_id:
            message_id, self._next_message = self._next_message, self._next_message + 1
        markup = json.loads(fields.get("reply_markup") or "{}")
        rows = markup.get("inline_keyboard", [])
        buttons = [(button["text"], button["callback_data"]) for row in rows for button in row]
        chat_id = int(fields["chat_id"])
        self.sent.append(Sent(method, chat_id, message_id, text, buttons, file[0], file[1]))
        return {**self._message(chat_id, 1), "message_id": message_id, "text": text}

    def _message(self, chat_id: int, user_id: int | None) -> dict[str, Any]:
        number, self._next_message = self._next_message, self._next_message + 1
        kind = "private" if chat_id > 0 else "group"
        return {
            "message_id": number,
            "date": int(time.time()),
            "chat": {"id": chat_id, "type": kind, "first_name": "x", "title": "x"},
            "from": self._user(chat_id if user_id is None else user_id),
        }

    def _user(self, user_id: int) -> dict[str, Any]:
        return {"id": user_id, "is_bot": False, "first_name": "x"}
