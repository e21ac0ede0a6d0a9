"""`distillery health`: one probe for containers and for `distillery up`; exit code 0 is healthy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from distill_core.errors import Unavailable
from distillery_cli.terminal.output import AsJson, emit_json, results

if TYPE_CHECKING:
    from distill_service.settings import Settings

health_app = typer.Typer(help="Ask a server or a worker whether it is well.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(health_app, name="health")


@health_app.command("grpc", epilog="Example: distillery health grpc 127.0.0.1:50052")
def grpc_health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    service: Annotated[str, typer.Option(help="A service's full name; empty: the whole server.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to wait.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Succeed if the gRPC server at HOST:PORT says SERVING."""
    state = grpc_state(address, service, timeout_s=timeout)
    if state != "SERVING":
        raise Unavailable(f"{address} answers {state}, not SERVING; its log says why")
    emit_json({"address": address, "state": state}) if as_json else results.print(f"{address} {state}")


def grpc_state(address: str, service: str = "", *, timeout_s: float = 5.0) -> str:
    """State that grpc.health.v1 answers, e.g. `SERVING`.

    Raises:
        Unavailable: nothing answers there in time.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from distill_service.channels import channel
    from distill_service.settings import settings
    from distill_service.status import error_from_call

    with channel(address, **settings().client_tls()) as connection:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health_pb2_grpc.HealthStub(connection).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"{address} did not answer within {timeout_s:g} s; is it running?"
                ) from None
            raise error_from_call(error, address) from None
    state: str = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return state


@health_app.command("worker", epilog="Example: distillery health worker --queue convert")
def worker_health(
    queue: Annotated[str, typer.Option(help="The queue that some worker must listen to.")] = "train",
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to wait.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Succeed if a worker on QUEUE answers through the broker."""
    from distill_service.settings import settings

    workers = worker_state(queue, settings(), timeout_s=timeout)
    if as_json:
        emit_json({"queue": queue, "workers": workers})
    else:
        results.print(f"{queue}: {', '.join(workers)}")


def worker_state(queue: str, settings: Settings, *, timeout_s: float = 5.0) -> list[str]:
    """Names of the workers that listen to `queue`.

    Raises:
        Unavailable: the broker is gone, or no such worker answers in time.
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from distill_service.jobs.broker import broker_url
    from distill_service.jobs.celery_app import make_app

    app = make_app(broker_url(settings))
    try:
        replies = app.control.inspect(timeout=timeout_s).active_queues() or {}
    except (OperationalError, RedisError, OSError) as error:
        raise Unavailable(
            f"the broker does not answer ({str(error).splitlines()[0]}); is it running?"
        ) from None
    finally:
        app.close()
    workers = sorted(
        name for name, queues in replies.items() if any(entry["name"] == queue for entry in queues)
    )
    if not workers:
        raise Unavailable(f"no worker on queue {queue!r} answered within {timeout_s:g} s; is one running?")
    return workers


def broker_answers(settings: Settings) -> bool:
    """Whether the configured broker can be connected to."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from distill_service.jobs.broker import broker_url
    from distill_service.jobs.celery_app import make_app

    app = make_app(broker_url(settings))
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
        return True
    except (OperationalError, RedisError, OSError):
        return False
    finally:
        app.close()
