"""The pages of Kite's web login, and the market-data routes under /oms for its sessions.

    GET  /connect/login?api_key&v=3            → 302 to itself with sess_id, cookie kf_session
    GET  /connect/login?api_key&sess_id        → the login page; with a web session → 302 /connect/finish
    POST /api/login   user_id, password        → request_id
    POST /api/twofa   user_id, request_id,     → cookies enctoken, public_token, user_id
                      twofa_value, twofa_type
    GET  /connect/finish?api_key&sess_id       → 302 to the app with request_token, or the consent page
    POST /connect/finish  … authorize          → consent given; 302 as above
    GET  /oms/…                                → as the REST API, `Authorization: enctoken …`

Kite documents only the first, the redirect and the token. The rest is what the public clients of its web
login have in common.
"""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import urlencode, urlsplit

from aiohttp import web

from pkbrokers_redis.simulator.accounts import Account, WebSession
from pkbrokers_redis.simulator.responses import KiteRefusal, success
from pkbrokers_redis.simulator.rest import SimulatorState, add_market_data_routes, kite_app

LOGIN_PAGE = "<html><head><title>Kite - Login</title></head><body>Log in to {app}</body></html>"
CONSENT_PAGE = """<html><head><title>Kite - Authorize</title></head><body>
<form method="post" action="/connect/finish"><input type="hidden" name="api_key" value="{api_key}">
<input type="hidden" name="sess_id" value="{sess_id}"><input type="hidden" name="authorize" value="{token}">
<button>Authorize</button></form></body></html>"""
REDIRECT_PAGE = "<html><body>The app gets this request_token: <code>{token}</code></body></html>"
REDIRECT_PATH = "/_sim/redirect"


def login_app(state: SimulatorState) -> web.Application:
    """Return the application behind PKB_KITE_LOGIN_URL."""
    app = kite_app(state)
    pages = _LoginPages(state)
    app.router.add_get("/connect/login", pages.connect)
    app.router.add_get("/connect/finish", pages.finish)
    app.router.add_post("/connect/finish", pages.consent)
    app.router.add_post("/api/login", pages.login)
    app.router.add_post("/api/twofa", pages.twofa)
    app.router.add_get(REDIRECT_PATH, pages.redirected)
    add_market_data_routes(app, state, "/oms", pages.oms_account)
    return app


class _LoginPages:
    def __init__(self, state: SimulatorState) -> None:
        self._accounts = state.accounts

    async def connect(self, request: web.Request) -> web.Response:
        api_key, sess_id = request.query.get("api_key", ""), request.query.get("sess_id")
        if sess_id is None:
            sess_id = self._accounts.begin_connect(api_key)
            response = _redirect("/connect/login", api_key=api_key, sess_id=sess_id)
            _set_cookie(response, "kf_session", secrets.token_urlsafe(16))
            return response
        self._accounts.connect_app(sess_id, api_key)
        if self._session(request) is None:
            return _page(LOGIN_PAGE.format(app=api_key))
        return _redirect("/connect/finish", api_key=api_key, sess_id=sess_id)

    async def login(self, request: web.Request) -> web.Response:
        form = await request.post()
        user_id, password = str(form.get("user_id", "")), str(form.get("password", ""))
        if not (user_id and password):
            raise KiteRefusal(400, "Missing `user_id` or `password`.")
        request_id = self._accounts.check_password(user_id, password)
        account = self._accounts.users[user_id.upper()]
        return success(
            {
                "user_id": account.user_id,
                "request_id": request_id,
                "twofa_type": "totp",
                "twofa_types": ["totp"],
                "twofa_status": "active",
                "profile": _short_profile(account),
            }
        )

    async def twofa(self, request: web.Request) -> web.Response:
        form = await request.post()
        names = ("user_id", "request_id", "twofa_value")
        user_id, request_id, value = (str(form.get(name, "")) for name in names)
        if not (user_id and request_id and value):
            raise KiteRefusal(400, "Missing `user_id`, `request_id` or `twofa_value`.")
        if str(form.get("twofa_type", "totp")) not in ("totp", "app_code"):
            raise KiteRefusal(400, "Invalid `twofa_type`.")
        session = self._accounts.check_totp(user_id, request_id, value)
        response = success({"profile": _short_profile(self._accounts.users[session.user_id])})
        for name, value in (
            ("enctoken", session.enctoken),
            ("public_token", session.public_token),
            ("user_id", session.user_id),
            ("kf_session", secrets.token_urlsafe(16)),
        ):
            _set_cookie(response, name, value)
        return response

    async def finish(self, request: web.Request) -> web.Response:
        api_key, sess_id = request.query.get("api_key", ""), request.query.get("sess_id", "")
        account = self._accounts.connect_app(sess_id, api_key)
        session = self._session(request)
        if session is None:
            return _redirect("/connect/login", api_key=api_key, sess_id=sess_id)
        if not account.authorised:
            return _page(CONSENT_PAGE.format(api_key=api_key, sess_id=sess_id, token=session.public_token))
        return self._to_app(account, sess_id)

    async def consent(self, request: web.Request) -> web.Response:
        form = await request.post()
        api_key, sess_id = str(form.get("api_key", "")), str(form.get("sess_id", ""))
        account = self._accounts.connect_app(sess_id, api_key)
        session = self._session(request)
        if session is None or str(form.get("authorize", "")) != session.public_token:
            raise KiteRefusal(403, "The consent belongs to another session.")
        account.authorised = True
        return self._to_app(account, sess_id)

    async def redirected(self, request: web.Request) -> web.Response:
        token = request.query.get("request_token", "")
        return _page(REDIRECT_PAGE.format(token="".join(c for c in token if c.isalnum() or c in "-_")))

    def oms_account(self, request: web.Request) -> Account:
        scheme, _, enctoken = request.headers.get("Authorization", "").partition(" ")
        session = self._accounts.with_enctoken(enctoken) if scheme == "enctoken" else None
        if session is None:
            raise KiteRefusal(403, "Invalid session credentials")
        return self._accounts.users[session.user_id]

    def _session(self, request: web.Request) -> WebSession | None:
        return self._accounts.with_enctoken(request.cookies.get("enctoken", ""))

    def _to_app(self, account: Account, sess_id: str) -> web.Response:
        token = self._accounts.finish_connect(sess_id, account.api_key)
        address = account.redirect_url or REDIRECT_PATH
        query = {"action": "login", "type": "login", "status": "success", "request_token": token}
        return _redirect(address, **query)


def _redirect(address: str, **query: str) -> web.Response:
    separator = "&" if urlsplit(address).query else "?"
    return web.Response(status=302, headers={"Location": f"{address}{separator}{urlencode(query)}"})


def _set_cookie(response: web.Response, name: str, value: str) -> None:
    # aiohttp's set_cookie quotes the / and = of an enctoken. Kite does not.
    response.headers.add("Set-Cookie", f"{name}={value}; Path=/; HttpOnly")


def _page(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html")


def _short_profile(account: Account) -> dict[str, Any]:
    name = account.user_name
    return {"user_name": name, "user_shortname": name.split()[0], "avatar_url": None}
