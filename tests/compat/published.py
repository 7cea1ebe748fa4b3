"""Files served under GitHub's own addresses, to a program with fixed addresses.

The program gets the environment of `Published.env`: a proxy that answers for `raw.githubusercontent.com` with
a certificate of the test's own authority, and refuses every other host. Nothing of the program is replaced.
"""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import trustme

HOST = "raw.githubusercontent.com"


class Published:
    """`with Published(folder, {"/owner/repo/branch/file": path}) as site: run(…, env=site.env)`."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        authority = trustme.CA()
        bundle = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(bundle))
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST).configure_cert(tls)
        self.files = files
        self.requests: list[str] = []  # "200 /owner/…", in order
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(tls))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
        self.env = {
            **dict.fromkeys(names, proxy),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
            "REQUESTS_CA_BUNDLE": str(bundle),
            "SSL_CERT_FILE": str(bundle),
        }

    def __enter__(self) -> Published:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, tls: ssl.SSLContext) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_CONNECT(self) -> None:
                """From here on the client speaks TLS with what it takes for the host."""
                if self.path != f"{HOST}:443":
                    self.send_error(403)
                    return
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self.connection = tls.wrap_socket(self.connection, server_side=True)
                self.rfile = self.connection.makefile("rb")
                self.wfile = self.connection.makefile("wb", buffering=0)
                self.close_connection = False

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                found = site.files.get(path)
                site.requests.append(f"{200 if found else 404} {path}")
                data = found.read_bytes() if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Nothing on stderr: `requests` records them."""

        return Handler
