"""Static bearer tokens: who calls, and what they may do."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, NamedTuple

from distill_core.errors import ConfigError
from distill_core.files.text import lines, read_text
from distill_service.status import StatusError

Scope = Literal["use", "admin"]


class Caller(NamedTuple):
    """Caller of the call now being handled: a token's name; without tokens, a certificate's, or the peer's host."""

    name: str
    scope: Scope


LOCAL = Caller("local", "admin")
CALLER: ContextVar[Caller] = ContextVar("distillery_caller", default=LOCAL)


class Tokens:
    """The tokens of a server: a file of lines `name:sha256-of-the-token:scope`, scope `use` or `admin`."""

    def __init__(self, callers: dict[str, Caller]) -> None:
        self._callers = callers

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """Read a tokens file.

        Raises:
            ConfigError: it cannot be read, or a line is not of that form. The line itself is never shown.
        """
        try:
            entries = lines(read_text(file))
        except OSError as error:
            raise ConfigError(
                f"tokens file {file} cannot be read: {error.strerror}", field="tokens_file"
            ) from None
        except UnicodeDecodeError:
            raise ConfigError(f"tokens file {file} is not UTF-8 text", field="tokens_file") from None
        return cls(
            dict(_parsed(file, number, line) for number, line in enumerate(entries, start=1) if _used(line))
        )

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Holder of the call's `authorization: Bearer …`; UNAUTHENTICATED if nobody does."""
        header = _authorization(metadata)
        holder = self._holder(header)
        if holder is None:
            bearer = header.lower().startswith("bearer ")
            what = "the bearer token is not known" if bearer else "a bearer token is needed"
            raise StatusError(
                "UNAUTHENTICATED",
                f"{what}; set DISTILLERY_TOKEN to one that the operator gave you, or in another program send it as "
                "the header 'authorization: Bearer TOKEN'",
            )
        return holder

    def knows(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether `caller` would name somebody."""
        return self._holder(_authorization(metadata)) is not None

    def _holder(self, header: str) -> Caller | None:
        scheme, _, token = header.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        matches = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, digest)]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def _authorization(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    header = next((value for key, value in metadata if key.lower() == "authorization"), "")
    return header if isinstance(header, str) else ""


def _used(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _parsed(file: Path, number: int, line: str) -> tuple[str, Caller]:
    parts = line.strip().split(":")
    if len(parts) != 3 or len(parts[1]) != 64 or parts[2] not in ("use", "admin"):
        raise ConfigError(
            f"tokens file {file}, line {number}: each line is name:sha256:scope, the sha256 in hexadecimal, "
            "the scope use or admin",
            field="tokens_file",
        )
    return parts[1].lower(), Caller(parts[0], "admin" if parts[2] == "admin" else "use")


def check_admin(caller: Caller, method: str) -> None:
    """Refuse an admin's `method` (`/package.Service/Method`) to a caller without that scope."""
    if caller.scope != "admin":
        raise StatusError("PERMISSION_DENIED", f"{method.rsplit('/')[-1]} needs a token of scope admin")
