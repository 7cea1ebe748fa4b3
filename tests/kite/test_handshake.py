"""Answers to the websocket's handshake that are none: one line each, and the client goes on."""

from __future__ import annotations

import socket

import pytest

from tests.kite.test_socket import SECRET, raw_server, receiving, shake_hands
from tests.support import wait_until


def test_a_cookie_that_cannot_be_parsed_is_an_error_and_not_a_crash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def bad_cookie(link: socket.socket) -> None:
        shake_hands(link, b"Set-Cookie: a@b=1\r\n")
        link.recv(1)

    with raw_server(bad_cookie) as url, receiving(url) as received:
        wait_until(lambda: received.client.stats.errors >= 2 or received.failure is not None)
        assert received.failure is None
    printed = "".join(capsys.readouterr())
    assert "reason=CookieError" in printed and SECRET not in printed


@pytest.mark.parametrize("location", [b"Location: /elsewhere\r\n", b""])
def test_a_redirect_is_told_by_its_status(location: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def redirect(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(b"HTTP/1.1 302 x\r\n" + location + b"\r\n")

    with raw_server(redirect) as url, receiving(url) as received:
        wait_until(lambda: received.client.stats.errors >= 1)
    assert 'reason="HTTP 302"' in "".join(capsys.readouterr())
