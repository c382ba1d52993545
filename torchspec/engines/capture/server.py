"""What clients of a server that somebody else started share: its secret, the way to it, and how long one asks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torchspec.errors import UserError
from torchspec.network import bare, check_url, route_to
from torchspec.proxies import around, proxy_of, through

if TYPE_CHECKING:
    import httpx

R = TypeVar("R")
SERVER_TOKEN_VARIABLE = "TORCHSPEC_ENGINE_TOKEN"
"""Environment variable with the secret that the server was started with (its TORCHSPEC_TOKEN)."""
_ANSWERS = 600.0
"""Seconds for one request."""
_HEALTH = 10.0
"""Seconds for a server to say that it is well."""


class BadAnswer(Exception):
    """The server refused a request."""


def http_options(url: str) -> dict[str, Any]:
    """Options of an httpx client: the proxy by our rule, certificates as the environment says."""
    import httpx

    proxy = proxy_of(url)
    certificates = {"verify": httpx.create_ssl_context()} if url.startswith("https:") else {}
    return {"trust_env": False, "proxy": None if proxy is None else proxy.address, **certificates}


@dataclass(frozen=True)
class Server:
    """A server as its address and the environment tell of it."""

    url: str
    report_host: str
    """Under which it reaches this host."""
    token: str
    headers: dict[str, str]

    @classmethod
    def of(cls, arguments: dict[str, Any], *, example: str, key_variable: str) -> Server:
        """From ``engine_args``.

        Args:
            arguments: ``url`` of the server, ``report_host`` (left out: the address on the route to it).
            example: of a URL.
            key_variable: environment variable with the key that the server asks for, if it does.

        Raises:
            UserError: the URL is none, or the secret is not set.
        """
        url = str(arguments.get("url", ""))
        parts = check_url(url, field="data.engines.engine_args.url", example=example)
        token = os.environ.get(SERVER_TOKEN_VARIABLE, "")
        if not token:
            raise UserError(SERVER_TOKEN_VARIABLE, None, "is not set", "export the secret that the server was started with (its TORCHSPEC_TOKEN)")
        host = bare(str(arguments.get("report_host") or "")) or str(route_to(str(parts.hostname), parts.port or 80))
        key = os.environ.get(key_variable)
        return cls(url, host, token, {"Authorization": f"Bearer {key}"} if key else {})

    def facts(self, read: Callable[[httpx.Client], R], *, called: str, command: str, seconds: float) -> R:
        """What the server says of itself; one that is still loading is waited for.

        Args:
            read: asks it; what it raises means that this is not such a server, or not yet.
            called, command: name of the server, and the command of ours that says how it is started.
            seconds: to wait.

        Raises:
            UserError: it does not answer in time.
        """
        import httpx

        deadline = time.monotonic() + seconds
        while True:
            try:
                with httpx.Client(base_url=self.url, timeout=10.0, headers=self.headers, **http_options(self.url)) as client:
                    return read(client)
            except (httpx.HTTPError, KeyError, IndexError, ValueError, TypeError) as error:
                if time.monotonic() > deadline or (isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403)):
                    problem = f"does not answer as {called} does{through(self.url)} ({error})"
                    raise UserError("data.engines.engine_args.url", self.url, problem, f"start it: main.py {command}{around(self.url)}") from error
                time.sleep(2.0)

    def client(self) -> ServerClient:
        """For requests to it."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)  # a server closes after 5
        return ServerClient(httpx.AsyncClient(base_url=self.url, timeout=_ANSWERS, limits=limits, headers=self.headers, **http_options(self.url)))


class ServerClient:
    """Asks a server, and knows when it is gone.

    Args:
        http: the client of its address.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.lost = False
        """It did not answer twice, or said that it is not well."""

    async def post(self, path: str, body: Callable[[bool], dict[str, Any]]) -> Any:
        """The JSON of an answer. What fails once is asked again.

        Args:
            path: of the request.
            body: made for the first time (False) and for the last (True).

        Raises:
            ConnectionError: the server is gone.
            BadAnswer: it is well and refuses this request.
        """
        import httpx

        for last in (False, True):
            try:
                answer = await self._http.post(path, json=body(last))
            except httpx.TransportError as error:
                reason = type(error).__name__
            else:
                if answer.status_code < 500 or (last and await self._healthy()):
                    break  # a healthy server that cannot answer: this request's fault, and no other's
                reason = f"answers {answer.status_code}: {answer.text[:200]}"
            if last:
                self.lost = True
                raise ConnectionError(f"the server at {self._http.base_url} is gone{through(str(self._http.base_url))} ({reason})")
            await asyncio.sleep(1.0)
        if answer.status_code != 200:
            raise BadAnswer(f"the server answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    async def _healthy(self) -> bool:
        """Whether the server says that it is well."""
        import httpx

        try:
            answer: httpx.Response = await self._http.get("/health", timeout=_HEALTH)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    async def aclose(self) -> None:
        """End its connections."""
        await self._http.aclose()
