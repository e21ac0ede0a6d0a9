"""A command tree run: the one place where an exception becomes a sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from distill_core.errors import (
    EXIT_OUT_OF_MEMORY,
    ConfigError,
    DistilleryError,
    codes_of,
    out_of_memory,
)
from distill_core.library_bars import hide_library_bars
from distillery_cli.terminal.consoles import speak_any_encoding
from distillery_cli.terminal.output import notes, styled

EXIT_INTERRUPTED = 130
USAGE_ERROR = typer.BadParameter.__bases__[0]  # base of the parser's errors; typer does not export it


def run(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `app`, which people type as `program`; the exit code."""
    speak_any_encoding()
    hide_library_bars()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed  # allowed anywhere, not only before the command
    typed = [argument for argument in typed if argument != "--debug"]
    try:
        code = app(typed, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, e.g. `| head`
        sys.stdout = None
        return 0
    except Exception as error:
        if debug and not isinstance(error, USAGE_ERROR | typer.Abort):
            raise
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, typer.Abort):
        return _failed("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, USAGE_ERROR):
        return _usage(error)
    translated = _known(error)
    if translated is not None:
        return _failed(str(translated), codes_of(translated).exit_code)
    memory_error = out_of_memory(error)
    if memory_error is not None:
        return _failed(memory_error, EXIT_OUT_OF_MEMORY)
    return _failed(f"internal error: {type(error).__name__}: {error}; --debug shows the traceback", 1)


def _known(error: Exception) -> DistilleryError | None:
    """The error as one of ours, if a person can act on it."""
    if isinstance(error, DistilleryError | OSError) and getattr(error, "strerror", ".") is not None:
        return _placed(error)
    grpc = sys.modules.get("grpc")
    if grpc is not None and isinstance(error, grpc.RpcError):
        from distill_service.status import error_from_call

        return error_from_call(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing(error)
    if isinstance(
        error, UnicodeEncodeError
    ):  # bytes of the command line that are no text, on their way to a server
        return ConfigError(f"{error.object[:80]!r} is not text in UTF-8; give it as such")
    return None


def _placed(error: DistilleryError | OSError) -> DistilleryError:
    try:
        from distill_service.settings import of_a_folder
    except ModuleNotFoundError as missing:  # without the extra service
        return error if isinstance(error, DistilleryError) else _missing(missing)
    return of_a_folder(error)


def _missing(error: ModuleNotFoundError) -> DistilleryError:
    from distill_core.errors import missing_package

    name = (error.name or "").split(".")[0]
    extras = {"grpc": "service", "structlog": "service", "pydantic_settings": "service", "matplotlib": "cli"}
    return missing_package(name, extras.get(name, "all"))


def _usage(error: Exception) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    command = context.command_path if context is not None else "distillery"
    sentence = message[:1].lower() + message[1:].rstrip(".")
    return _failed(f"{sentence}; see {command} --help", 2)


def _failed(sentence: str, code: int) -> int:
    notes.print(styled(("error:", "bold red"), f" {sentence}"))
    return code
