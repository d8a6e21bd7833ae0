"""What the settings say about who can reach the server, and whether that goes together.

Half of what encryption needs is a mistake, never a reason to do without it; and who does not ask callers for anything
must be out of their reach, or say aloud that he means it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from service.security.errors import SecurityError


def check_exposure(settings: Mapping[str, tuple[Any, str]]) -> None:
    """Settings, by name: value and source.

    Raises:
        SecurityError: in words about them.
    """
    values = {name: value for name, (value, _) in settings.items()}
    _check_tls(settings)
    host, source = settings["host"]
    if not is_loopback(host) and not values["allow_anonymous"] and not _asks(values):
        raise SecurityError(
            f"{source}: {host} is reachable by others and requests are not authenticated; use 127.0.0.1, or add "
            "--api-keys-file or --tls-client-ca, or --allow-anonymous on a network that is closed itself"
        )


def _check_tls(settings: Mapping[str, tuple[Any, str]]) -> None:
    mode = settings["tls_mode"]
    needed = ["tls_cert", "tls_key", *(["tls_client_ca"] if mode[0] == "mtls" else [])]
    given = [mode] if mode[0] in ("tls", "mtls") else []
    given += [settings[name] for name in ("tls_cert", "tls_key", "tls_client_ca") if settings[name][0]]
    if mode[0] == "disabled" or not given:
        return
    for name in needed:
        if not settings[name][0]:
            value, source = given[0]
            raise SecurityError(f"{source}: {value} needs --{name.replace('_', '-')} too")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host == "localhost"  # other names may come to mean anything


def encrypts(values: Mapping[str, Any]) -> bool:
    """Both ports speak TLS."""
    return values["tls_mode"] != "disabled" and bool(values["tls_cert"])


def asks_for_certificates(values: Mapping[str, Any]) -> bool:
    """In mode TLS clients need none, though the file of a CA may be there for another mode."""
    return encrypts(values) and values["tls_mode"] != "tls" and bool(values["tls_client_ca"])


def _asks(values: Mapping[str, Any]) -> bool:
    return bool(values["api_keys_file"]) or asks_for_certificates(values)
