"""Tables that fit: names stay whole, prose wraps, and what is too wide becomes one entry below the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from distillery_cli.terminal.consoles import shown

GAP = 2
MIN_PROSE = 16  # columns of text that wraps


def figure(value: Any) -> str:
    """A value as people read it: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Column:
    """A heading and its cells; prose may wrap between words, anything else stays in one piece."""

    name: str
    cells: tuple[Text, ...]
    numeric: bool
    prose: bool

    @property
    def widest(self) -> int:
        """Cells of the terminal that it takes in one line."""
        return max(cell_len(self.name), *(cell.cell_len for cell in self.cells), 0)

    @property
    def narrowest(self) -> int:
        """Cells of the terminal that it takes at the least."""
        if not self.prose:
            return self.widest
        words = [cell_len(word) for cell in self.cells for word in cell.plain.split()]
        return min(self.widest, max(cell_len(self.name), MIN_PROSE, *words))


@dataclass(frozen=True)
class FittedTable:
    """A plain table. Where it is too wide, empty columns go first, then the spare ones, which is said."""

    columns: tuple[Column, ...]
    spare: tuple[str, ...] = ()
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Any]:
        """Parts that rich draws, for the width at hand."""
        width = options.max_width
        kept, left_out = self._fitting(width)
        if _least(kept) > width and console.is_terminal:
            yield from self._entries()
            return
        made = Table(title=self.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column, size in zip(kept, _widths(kept, max(width, _least(kept))), strict=True):
            justify: Literal["right", "left"] = "right" if column.numeric else "left"
            made.add_column(column.name, justify=justify, width=size, no_wrap=not column.prose)
        for cells in zip(*(column.cells for column in kept), strict=True):
            made.add_row(*cells)
        yield from console.render(made, options.update(width=max(width, _least(kept)), no_wrap=False))
        if left_out:
            yield Text(f"not shown for want of width: {', '.join(left_out)}", style="dim")

    def _fitting(self, width: int) -> tuple[list[Column], list[str]]:
        kept, left_out = list(self.columns), []
        if _least(kept) > width:
            kept = [column for column in kept if any(cell.plain for cell in column.cells)] or kept
        for name in self.spare:
            if _least(kept) > width and any(column.name == name for column in kept):
                kept = [column for column in kept if column.name != name]
                left_out.append(name)
        return kept, left_out

    def _entries(self) -> Iterable[Text]:
        """Every row as lines of its own; a long value is left to the terminal to wrap, so that it can be copied."""
        if self.title:
            yield Text(self.title, style="italic")
        wide = max(cell_len(column.name) for column in self.columns)
        for number in range(len(self.columns[0].cells)):
            if number:
                yield Text("")
            for column in self.columns:
                if column.cells[number].plain:
                    name = (column.name + " " * wide)[: max(wide, len(column.name))]
                    yield Text.assemble((name, "bold"), " " * GAP, column.cells[number])


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str | None = None,
    prose: Collection[str] = (),
    spare: Sequence[str] = (),
) -> FittedTable:
    """A plain table; numbers are right-aligned.

    `prose` names the columns whose text may wrap, `spare` those that a narrow terminal can do without, in that order.
    """
    made = []
    for index, name in enumerate(columns):
        values = [row[index] for row in rows]
        numeric = bool(rows) and all(isinstance(value, int | float) for value in values)
        made.append(Column(shown(name, lines=False), tuple(map(_cell, values)), numeric, name in prose))
    return FittedTable(tuple(made), tuple(spare), title)


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    return Text(shown(figure(value), lines=False))


def _least(columns: Sequence[Column]) -> int:
    return sum(column.narrowest for column in columns) + GAP * (len(columns) - 1)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """What is left beside the least is shared, first to those that need little."""
    sizes = [column.narrowest for column in columns]
    left = width - _least(columns)
    wanting = sorted(range(len(columns)), key=lambda index: columns[index].widest - sizes[index])
    for position, index in enumerate(wanting):
        more = min(columns[index].widest - sizes[index], left // (len(wanting) - position))
        sizes[index] += more
        left -= more
    return sizes
