"""Every setting of every service, from `DISTILLERY_*` variables. The only file that reads the environment."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill_core.errors import ConfigError, DistilleryError, Unavailable
from distill_core.files.paths import url_of
from distill_core.files.text import read_text
from distill_service.addresses import check_host, dialled, is_loopback, without_proxy

# One file a setting, named like its variable (distillery_database_url): how containers are given passwords.
SECRETS = Path("/run/secrets")
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free port; for metrics: off


def _expanded(path: Path, field: str) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ConfigError(
            f"{path} is in a home folder, and this user has none; set HOME, or DISTILLERY_{field.upper()} to a folder "
            "that can be written",
            field=field,
        ) from None


def _host(value: str) -> str:
    try:
        return check_host(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Host = Annotated[str, AfterValidator(_host)]


class ClientTls(TypedDict):
    """Files of a client's channel; None: without."""

    ca: Path | str | None
    cert: Path | str | None
    key: Path | str | None


class Settings(BaseSettings):
    """Where things live and how services talk. Folders and URLs left empty follow from `state_dir`."""

    model_config = SettingsConfigDict(
        env_prefix="DISTILLERY_",
        frozen=True,
        populate_by_name=True,
        extra="forbid",
        env_ignore_empty=True,
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
    )

    state_dir: Path = Path(
        "~/.local/state/distillery"
    )  # job table, run folders, logs and store, where nothing else is set
    store_url: str = ""  # artifact store: a folder or any fsspec URL; default <state_dir>/store
    runs_dir: Path | None = None  # one folder per job; default <state_dir>/runs
    cache_dir: Path = Path(
        "~/.cache/distillery"
    )  # models that recipes train once, teacher samples, fetched artifacts
    database_url: str = Field(
        "", repr=False
    )  # SQLAlchemy URL of the job table; default sqlite:///<state_dir>/jobs.db
    broker_url: str = Field("", repr=False)  # Celery broker; empty: the embedded one

    jobs_host: Host = "127.0.0.1"  # where the Jobs API listens, and clients look for it
    jobs_port: Port = 50051  # of the Jobs API
    sampler_host: Host = "127.0.0.1"  # where the sampler listens, and clients look for it
    sampler_port: Port = 50052  # of the sampler
    metrics_host: Host = "127.0.0.1"  # where all metrics are served
    jobs_metrics_port: Port = 9464  # of the Jobs API; 0: off
    worker_metrics_port: Port = 9465  # of the trainer worker; 0: off
    sampler_metrics_port: Port = 9466  # of the sampler; 0: off
    converter_metrics_port: Port = 9467  # of the converter worker; 0: off

    tls_cert: Path | None = None  # server side: the certificate, PEM; unset: no TLS
    tls_key: Path | None = None  # server side: its key
    tls_client_ca: Path | None = None  # require client certificates signed by this authority
    tls_ca: Path | None = None  # client side: trust this authority
    tls_client_cert: Path | None = None  # client side: the own certificate, for servers with tls_client_ca
    tls_client_key: Path | None = None  # client side: the key of tls_client_cert
    tokens_file: Path | None = None  # server side: lines name:sha256:scope
    audit_log: Path | None = None  # server side: admin calls are appended here too
    token: str = Field("", repr=False)  # client side
    token_file: Path | None = None  # client side: read the token from here instead

    data_roots: str = (
        ""  # folders, separated by ':', that submitted jobs may read; empty: see `readable_roots`
    )

    log_format: Literal["auto", "json", "console"] = "auto"  # auto: console on a terminal, else JSON
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # the least that is logged
    otlp_endpoint: str = Field("", validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")  # empty: no tracing

    lease_s: float = Field(
        30.0, gt=0
    )  # a running job whose supervisor is silent for longer is given to another
    heartbeat_s: float = Field(5.0, gt=0)  # how often the supervisor renews its lease
    reap_s: float = Field(10.0, gt=0)  # how often expired leases and lost messages are looked for
    resend_s: float = Field(60.0, gt=0)  # a job queued for longer than this is announced again
    stop_grace_s: float = Field(120.0, gt=0)  # between SIGTERM and SIGKILL of a job's processes
    max_attempts: int = Field(3, ge=1, le=100)  # of a job whose worker dies; then it has failed

    def model_post_init(self, _context: object) -> None:
        """Fill in what follows from `state_dir`; `~` is the user's home."""
        state = _expanded(self.state_dir, "state_dir")
        derived = {
            "state_dir": state,
            "cache_dir": _expanded(self.cache_dir, "cache_dir"),
            "runs_dir": _expanded(self.runs_dir or state / "runs", "runs_dir"),
            "store_url": self.store_url or str(state / "store"),
            "database_url": self.database_url or url_of("sqlite", f"/{state / 'jobs.db'}"),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def runs(self) -> Path:
        """The folder of run folders."""
        assert self.runs_dir is not None
        return self.runs_dir

    def naming(self, path: Path) -> dict[str, Path]:
        """The folders that `path` lies in, or that lie in it, by the variables that would move them."""
        rests = {"runs_dir", "store_url"} - self.model_fields_set  # follow from the state folder
        folders = {"state_dir": self.state_dir, "cache_dir": self.cache_dir, "runs_dir": self.runs}
        if "://" not in self.store_url:
            folders["store_url"] = Path(self.store_url)
        named = {name: folder for name, folder in folders.items() if name not in rests}
        within = {name: folder for name, folder in named.items() if path.is_relative_to(folder)}
        nearest = max((len(folder.parts) for folder in within.values()), default=0)
        closest = {name: folder for name, folder in within.items() if len(folder.parts) == nearest}
        closest = closest or {name: folder for name, folder in named.items() if folder.is_relative_to(path)}
        return {f"DISTILLERY_{name.upper()}": folder for name, folder in closest.items()}

    @property
    def jobs_address(self) -> str:
        """Address at which callers on this machine find the Jobs API."""
        return dialled(self.jobs_host, self.jobs_port)

    @property
    def sampler_address(self) -> str:
        """Address at which callers on this machine find the sampler."""
        return dialled(self.sampler_host, self.sampler_port)

    def client_tls(self) -> ClientTls:
        """The files that a client's channel takes: the server's authority, the own certificate and its key."""
        return {"ca": self.tls_ca, "cert": self.tls_client_cert, "key": self.tls_client_key}

    def readable_roots(self) -> tuple[Path, ...] | None:
        """The folders that jobs may name files of; None is any file, as long as only this machine can submit."""
        if self.data_roots:
            roots = [root for root in self.data_roots.split(":") if root]
            return tuple(_expanded(Path(root), "data_roots").resolve() for root in roots)
        alone = self.tokens_file is None and is_loopback(self.jobs_host)
        return None if alone else ()

    def client_token(self) -> str | None:
        """The bearer token a client sends, from `token_file` or `token`.

        Raises:
            ConfigError: the token file cannot be read.
        """
        if self.token_file is None:
            return self.token or None
        try:
            return read_text(self.token_file).strip() or None
        except OSError as error:
            raise ConfigError(f"token file {self.token_file} cannot be read: {error.strerror}") from None


def load_settings(**values: object) -> Settings:
    """Settings from the environment, with `values` above it.

    Raises:
        ConfigError: a variable has a value that is not allowed; the sentence names it.
    """
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        sentence = first["msg"][0].lower() + first["msg"][1:]
        message = f"DISTILLERY_{name.upper()} = {first.get('input')!r} is not allowed: {sentence}"
        raise ConfigError(message, field=name) from None


def of_a_folder(error: OSError | DistilleryError, known: Settings | None = None) -> DistilleryError:
    """The sentence for what could not be read or written, with the setting that would name another folder.

    Errors of ours that no file caused, or none of those folders, are returned as they are.
    """
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or not isinstance(error, OSError | Unavailable):
        assert isinstance(error, DistilleryError)
        return error
    reason = (
        f"{cause.strerror or cause}: {cause.filename}" if cause.filename else str(cause.strerror or cause)
    )
    failure = error if isinstance(error, DistilleryError) else Unavailable(reason)
    named: dict[str, Path] = {}
    if isinstance(cause.filename, str | Path):
        with contextlib.suppress(ConfigError):  # settings that are wrong themselves name nothing
            named = (known or settings()).naming(Path(cause.filename).absolute())
    missing = cause.errno == errno.ENOENT and not any(folder.exists() for folder in named.values())
    if not named or not (missing or cause.errno in _NOT_OURS):
        return failure
    folders = " and ".join(f"{variable} (now {folder})" for variable, folder in named.items())
    advice = f"make it writable, or set {folders} to where you can write"
    return Unavailable(f"{str(failure).partition('; ')[0]}; {advice}", field=failure.field)


@cache
def settings() -> Settings:
    """This process's settings, read once; from then on no library gives a proxy what stays on this machine."""
    _spare_loopback()
    return load_settings()


def _spare_loopback() -> None:
    """Add the loopback to `no_proxy` where a proxy is set: stores' libraries, and our processes, read it."""
    if any(os.environ.get(name) for kind in _PROXIES for name in (kind, kind.upper())):
        known = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = without_proxy(known)
