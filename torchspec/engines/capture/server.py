"""What clients of a server that somebody else started share: its secret, and the way to it."""

from __future__ import annotations

from typing import Any

from torchspec.proxies import proxy_of

SERVER_TOKEN_VARIABLE = "TORCHSPEC_ENGINE_TOKEN"
"""Environment variable with the secret that the server was started with (its TORCHSPEC_TOKEN)."""


def http_options(url: str) -> dict[str, Any]:
    """Options of an httpx client: the proxy by our rule, certificates as the environment says."""
    import httpx

    proxy = proxy_of(url)
    certificates = {"verify": httpx.create_ssl_context()} if url.startswith("https:") else {}
    return {"trust_env": False, "proxy": None if proxy is None else proxy.address, **certificates}
