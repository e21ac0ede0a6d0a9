"""Remote file systems whose errors are one sentence."""

from __future__ import annotations

from typing import Any

from distill_core.errors import Unavailable


class RemoteFileSystem:
    """A remote file system: errors of its library for a server that is unreachable or refuses are `Unavailable`."""

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, url

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return value(*arguments, **options)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # botocore's are no OSErrors
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise Unavailable(f"artifact store {self._url} cannot be used: {reason}") from error

        return call
