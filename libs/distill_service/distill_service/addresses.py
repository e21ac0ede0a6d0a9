"""Addresses of servers: the one place that joins and parts hosts and ports, and knows what stays on this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from distill_core.errors import ConfigError

SOCKETS = ("unix:", "unix-abstract:")
RESOLVERS = ("dns:", "ipv4:", "ipv6:")  # gRPC's names for what follows them
# Where a server listens to all, and where its own machine finds it then.
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # nosec B104: nothing is bound here
# For `no_proxy`, written so for each of the libraries that read it: suffixes of hosts, hosts with brackets, networks.
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]", "127.0.0.0/8")
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")


def is_socket(address: str) -> bool:
    """Whether an address, or the host of a setting, is a unix socket."""
    return address.startswith(SOCKETS)


def check_host(host: str) -> str:
    """A host, without brackets, or a unix socket.

    Raises:
        ConfigError: empty, with a port or a scheme, or no name or number of a host.
    """
    if is_socket(host):
        return host
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _ip(bare) is None and (bare != host or not _NAME.fullmatch(bare)):
        raise ConfigError(
            f"{host[:200]!r} is no host: write a name, a number such as 127.0.0.1 or ::1, or unix:/path; "
            "the port is a setting of its own",
            field="host",
        )
    return bare


def joined(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 number; a unix socket has no port.

    Raises:
        ConfigError: `host` is none.
    """
    host = check_host(host)
    if is_socket(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dialled(host: str, port: int) -> str:
    """As `joined`, for a caller on the same machine: a server that listens to all addresses is on the loopback."""
    bare = check_host(host)
    return joined(ANYWHERE.get(bare, bare), port)


def parted(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of `host:port`, `[::1]:port` or `dns:///host:port`.

    Raises:
        ConfigError: no port, one out of 1 to 65535, an IPv6 number without brackets, or a URL.
    """
    rest = address
    for resolver in RESOLVERS:
        if address.startswith(resolver):
            rest = address.removeprefix(resolver).rpartition("/")[2]
    host, colon, port = rest.rpartition(":")
    if "://" in rest or not colon or not host or (":" in host and not host.startswith("[")):
        raise ConfigError(_how(rest, host), field="address")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ConfigError(
            f"{address[:200]!r} has no port from 1 to 65535 at its end; write HOST:PORT", field="address"
        )
    try:
        return check_host(host), int(port)
    except ConfigError:
        raise ConfigError(_how(rest, host), field="address") from None


def _how(address: str, host: str) -> str:
    refusal = f"{address[:200]!r} is no address of a server"
    if "://" in address:
        return f"{refusal}: write HOST:PORT, without {address.partition('://')[0]}://"
    if _ip(address.strip("[]")) is not None or _ip(host) is not None:
        number = host if _ip(address.strip("[]")) is None else address.strip("[]")
        return f"{refusal}: write {f'[{number}]' if ':' in number else number}:PORT"
    if ":" not in address and _NAME.fullmatch(address):
        return f"{refusal}: it names no port; write {address}:PORT"
    return f"{refusal}: write HOST:PORT, [IPV6]:PORT or unix:/path"


def checked(address: str) -> str:
    """`address` as gRPC takes it.

    Raises:
        ConfigError: it is none; the sentence says how it is written.
    """
    if is_socket(address):
        return address
    host, port = parted(address)
    return address if address.startswith(RESOLVERS) else joined(host, port)


def is_local(address: str) -> bool:
    """Whether an address cannot be reached from another machine."""
    return is_socket(address) or is_loopback(parted(address)[0])


def is_loopback(host: str) -> bool:
    """Whether a host or socket is this machine by its own word: no name server is asked."""
    number = _ip(host.strip("[]"))
    if number is None:
        name = host.lower().removesuffix(".")
        return is_socket(host) or name == "localhost" or name.endswith(".localhost")
    mapped = getattr(number, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or number).is_loopback


def grpc_options(address: str) -> list[tuple[str, int]]:
    """A channel's options: what stays on this machine, with whatever token, is never given to a proxy.

    `address` may be a URL too. An address that listens to all is dialled on the loopback.
    """
    if is_socket(address):
        host = address
    elif "://" in address and not address.startswith(RESOLVERS):
        host = urlsplit(address).hostname or ""
    else:
        host = parted(address)[0]
    return [("grpc.enable_http_proxy", 0)] if is_loopback(host) or host in ANYWHERE else []


def listens(address: str, timeout_s: float = 2.0) -> bool:
    """Whether something accepts connections at `address`."""
    try:
        if is_socket(address):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(timeout_s)
                probe.connect(_path(address))
        else:
            with socket.create_connection(parted(address), timeout_s):
                pass
    except OSError:
        return False
    return True


def without_proxy(value: str) -> str:
    """The value of `no_proxy` with the loopback added, so that every library leaves it alone."""
    named = [part.strip() for part in value.split(",") if part.strip()]
    return value if "*" in named else ",".join(dict.fromkeys([*named, *LOOPBACK]))


def _path(address: str) -> str:
    scheme, _, path = address.partition(":")
    if scheme == "unix-abstract":
        return f"\0{path}"
    return path.removeprefix("//")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
