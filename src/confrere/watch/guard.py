"""Who may read the live page: the right host, the right method, the right token; headers that keep browsers strict."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/healthz",)
"""Paths that need no token: a supervisor asks them, and they tell nothing of the run."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets a request through to ``app`` or refuses it; every answer gets the headers.

    Args:
        app: what is guarded.
        token: what a reader must know, as ``Authorization: Bearer``, ``?token=`` or the cookie that the latter sets.
        names: host names under which the server may be asked; any other one is a page elsewhere whose name was
            rebound to this address.
        cookie: its name; cookies are shared by all ports of a host.
        secure: whether the server speaks TLS.
    """

    def __init__(self, app: ASGIApp, *, token: str, names: Collection[str], cookie: str, secure: bool) -> None:
        self._app, self._token, self._cookie, self._secure = app, token, cookie, secure
        self._names = {name.lower() for name in names}
        self._headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if secure else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self._app)(scope, receive, strict)

    def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that does not pass, None for one that does."""
        if _host(request.headers) not in self._names:
            return PlainTextResponse("This server does not go by that name.\n", 421)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("There is nothing to change here.\n", 405, {"Allow": "GET, HEAD"})
        if request.url.path in OPEN:
            return None
        given = request.query_params.get("token")
        if given is not None and self._is_token(given):  # into a cookie, out of the address line and the history
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(self._cookie, given, httponly=True, samesite="strict", secure=self._secure)
            return answer
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(self._cookie, "")
        if not self._is_token(shown):
            text = "Open the address with the token that `confrere watch` printed, or send it as a bearer token.\n"
            return PlainTextResponse(text, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _host(headers: Headers) -> str:
    """Return the name of the ``Host`` header without its port, "" where there is not exactly one."""
    hosts = headers.getlist("host")
    host = hosts[0].lower() if len(hosts) == 1 else ""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[")
    return host.partition(":")[0]
