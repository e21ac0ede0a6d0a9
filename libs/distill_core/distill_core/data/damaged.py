"""Pictures of a set that cannot be read: all of them in one error, or left out where that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import Field

from distill_core.config import Config as SourceConfig
from distill_core.errors import DataError

log = logging.getLogger(__name__)
MAX_NAMED = 20  # in one error, and the search for more ends there


class Skipping(SourceConfig):
    """The option of all sources whose pictures are files."""

    # leave out pictures that cannot be read, and say how many; else they are an error
    skip_damaged: bool = Field(False)


def together(problems: Sequence[DataError], total: int, *, looked_at: int) -> DataError:
    """One error for the `problems` among the first `looked_at` of `total` pictures."""
    hint = "data.skip_damaged = true leaves out what cannot be read"
    if len(problems) == 1:
        return DataError(f"{problems[0]}; {hint}", field=problems[0].field)
    of = f"{total} pictures" if looked_at == total else f"the first {looked_at} of {total} pictures"
    shown = "; ".join(str(problem) for problem in problems)
    return DataError(f"{len(problems)} of {of} cannot be read: {shown}; {hint}", field=problems[0].field)


def say_skipped(problems: Sequence[DataError], total: int) -> None:
    """Log which pictures are left out, and why."""
    shown = "; ".join(str(problem) for problem in problems[:MAX_NAMED])
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    log.warning("data.skip_damaged left out %d of %d pictures: %s%s", len(problems), total, shown, more)
