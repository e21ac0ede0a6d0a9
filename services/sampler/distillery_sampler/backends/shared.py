"""Weights that several models use, such as the base of many adapters: loaded once, freed with their last user."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary


class SharedWeights:
    """One process's whole models by version and device. It keeps none alive: whoever uses one holds it.

    `fetch` gives the verified folder of a version; `cache` is the folder for what this machine makes of one.
    """

    def __init__(self, fetch: Callable[[str], Path], cache: Path | None = None) -> None:
        self.fetch, self.cache = fetch, cache
        self._lock = threading.RLock()  # a base may itself be an adapter over another
        self._held: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()

    def get(self, ref: str, device: str, load: Callable[[], Any]) -> Any:
        """The model `ref` (name@version) on `device`; the first to ask loads it, and others wait for that."""
        with self._lock:
            model = self._held.get((ref, device))
            if model is None:
                model = self._held[ref, device] = load()
            return model
