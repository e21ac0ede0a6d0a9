"""Common parts of all services' /metrics: how they are served, the buckets of seconds, and the disks they write to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distill_core.errors import ConfigError
from distill_service.addresses import joined
from distill_service.settings import Settings

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class DiskCollector(Collector):
    """Free and total bytes of the disks that hold some folders, looked at when asked."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)  # by what they are for: the label `folder`

    @classmethod
    def of(cls, settings: Settings) -> DiskCollector:
        """The folders that every service writes to."""
        store = {} if "://" in settings.store_url else {"store": Path(settings.store_url)}
        return cls({**store, "runs": settings.runs, "cache": settings.cache_dir})

    def collect(self) -> Iterator[Metric]:
        """Two gauges; a folder not yet made counts as its nearest parent."""
        free = GaugeMetricFamily("distillery_disk_free_bytes", "Left for us", labels=["folder"])
        size = GaugeMetricFamily("distillery_disk_size_bytes", "Of the whole disk", labels=["folder"])
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
            except OSError:
                continue  # not ours to look at
            free.add_metric([name], usage.free)
            size.add_metric([name], usage.total)
        yield from (free, size)

    def describe(self) -> list[Metric]:
        return []  # so that registering looks at no disk


def serve_metrics(registry: CollectorRegistry, settings: Settings, field: str) -> None:
    """Serve /metrics on the port of the setting called `field`; 0 is off.

    Raises:
        ConfigError: the port is taken.
    """
    host, port = settings.metrics_host, getattr(settings, field)
    if not port:
        return
    registry.register(DiskCollector.of(settings))
    ProcessCollector(registry=registry)
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {joined(host, port)}: {error.strerror}; "
            f"set DISTILLERY_{field.upper()} to a free port, or to 0 for none",
            field=field,
        ) from None
