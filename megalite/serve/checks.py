"""What a server's config must be besides what holds for all jobs; asked before any process is started. Torch-free."""

from __future__ import annotations

from importlib.util import find_spec
from ipaddress import ip_address

from megalite.config.schema import ServeConfig, ServerSection
from megalite.errors import ConfigError, Problem

_LIBRARIES = ("fastapi", "uvicorn", "httptools", "pydantic", "prometheus_client")
"""Of the extra `serve`."""


def problems(config: ServeConfig) -> list[Problem]:
    """What is wrong with the server's own keys, and with what is installed here."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        rule = f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        return [Problem(key="server", rule=rule, fix="Type: pip install 'megalite[serve]'")]
    if config.server.api_key is None:
        return []
    from megalite.serve.gate import read_api_key  # imports FastAPI

    try:
        read_api_key(config.server.api_key)
    except ConfigError as error:
        return list(error.problems)
    return []


def warnings(server: ServerSection) -> list[str]:
    """Warnings of settings that are allowed and dangerous."""
    if server.api_key is not None or is_loopback(server.host):
        return []
    return [
        f"server.host {server.host} is open to a network, and server.api_key is null: whoever reaches it may use the "
        "model. Set server.api_key=env:NAME, and put TLS in front."
    ]


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
