"""Classes by name: one class may have different numbers in the data, in a teacher and in a judge.

A number says which class is meant only together with the list that it counts in. So labels are translated by name
wherever two lists meet, and a name that the other side does not have is an error. Classes without names (IDX labels,
`data.name = "classes"`, many foreign models) are called 0, 1, 2 …: such a name is the number itself.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from pydantic import field_validator
from torch import Tensor, nn

from distill_core.artifacts import CondSpec
from distill_core.config import Config as SourceConfig
from distill_core.config import Words
from distill_core.data.source import Source
from distill_core.errors import ConfigError, DataError, nearest
from distill_core.networks.classifier import Classifier, ClassifierConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.fake_tensors import real_tensors

MOST_SHOWN = 12  # names in a sentence
ABSENT = -1
log = logging.getLogger(__name__)


class Renaming(SourceConfig):
    """The option of all sources whose classes have names of their own."""

    # what the model calls a class, by what the data calls it, e.g. { tabby = "cat" }; of a model without names its
    # number, e.g. { tabby = "281" }
    rename_classes: dict[Words, Words] = {}

    @field_validator("rename_classes")
    @classmethod
    def _apart(cls, names: dict[str, str]) -> dict[str, str]:
        if len(set(names.values())) < len(names):
            raise ValueError("two classes cannot have one name")
        return names

    def renamed(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of the data's classes, changed as `rename_classes` says.

        Raises:
            ConfigError: it renames a class that the data does not have, or to the name of another one.
        """
        own = tuple(names)
        for name in self.rename_classes:
            if name not in own:
                raise ConfigError(
                    f"data.rename_classes renames {name!r}, and the data has no such class{nearest(name, own)}",
                    field="data.rename_classes",
                )
        renamed = tuple(self.rename_classes.get(name, name) for name in own)
        if self.rename_classes and (twice := _repeated(renamed)):
            raise ConfigError(
                f"with data.rename_classes two classes of the data are called {twice!r}; give each its own name",
                field="data.rename_classes",
            )
        return renamed


def class_names(of: CondSpec | ClassifierConfig) -> tuple[str, ...]:
    """Names of a model's classes: their numbers where it does not name every one."""
    count = of.num_classes or 0
    return of.class_names if len(of.class_names) == count else _counted(count)


def class_counts(source: Source) -> Tensor:
    """Items of each class (K,), float32.

    Raises:
        DataError: data without labels, or a class without a single item: its weight would be infinite.
    """
    if source.labels is None:
        raise DataError(
            "this data has no labels, so it has no classes to count; choose labelled data", field="data"
        )
    with real_tensors():
        counts = torch.bincount(source.labels, minlength=len(source.class_names)).float()
        empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"class {source.class_names[empty[0]]!r} has not a single item, and what is rare counts more; leave the "
            "class out, or add items of it",
            field="data",
        )
    return counts


def class_numbers(given: Sequence[str], known: Sequence[str]) -> list[int]:
    """The place in `known` of each class that `given` names; ABSENT where there is none, or more than one.

    Names that merely count are numbers where the other side does not have them as names.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(map(_key, known)):
        places[name] = ABSENT if name in places else place
    numbers = [places.get(_key(name), ABSENT) for name in given]
    if ABSENT in numbers and tuple(given) == _counted(len(given)):
        return [number if number < len(known) else ABSENT for number in range(len(given))]
    return numbers


def use_classes_of(source: Source, cond: CondSpec) -> None:
    """Make the labels of `source` the numbers that a model conditioned on `cond` gives to the same classes.

    Raises:
        ConfigError: the data has no labels, or items of a class that the model does not have.
    """
    if source.labels is None:
        raise ConfigError(
            f"the teacher knows {cond.num_classes} classes, the data has no labels; "
            "choose data whose labels the teacher was trained on",
            field="data",
        )
    use_class_names(source, class_names(cond))


def use_class_names(
    source: Source, known: tuple[str, ...], *, owner: str = "the teacher", field: str = "data"
) -> None:
    """Make the labels of `source` the places in `known` of the same classes.

    Raises:
        ConfigError: the data has items of a class that `owner`, who knows them, does not have.
    """
    assert source.labels is not None
    numbers, labels = _known_numbers(source, known, owner=owner, field=field), source.labels
    if numbers and source.class_names == _counted(len(numbers)) != known[: len(numbers)]:
        log.info("the data's classes have no names: its label 0 is %s's class %r", owner, known[numbers[0]])
    if not _is_counting(numbers):
        with real_tensors():
            source.labels = torch.tensor(numbers)[labels]
        source.class_names, source.num_classes = known, len(known)


def check_classes(source: Source, cond: CondSpec, *, field: str) -> None:
    """Refuse labelled data of which a model that names its classes does not know one.

    Raises:
        ConfigError: the data has items of a class that the model does not have.
    """
    if source.labels is not None and cond.class_names:
        _known_numbers(source, class_names(cond), owner="the model", field=field)


def check_same_classes(teacher: nn.Module | None, student: nn.Module) -> None:
    """Refuse a student that begins as a model whose numbers mean other classes than the teacher's.

    Raises:
        ConfigError: both have names, and they differ.
    """
    if not isinstance(teacher, Denoiser) or not isinstance(student, Denoiser):
        return
    taught, learnt = teacher.cond.class_names, student.cond.class_names
    if not taught or not learnt:
        return
    for number, place in enumerate(class_numbers(taught, learnt)):
        if place != number:
            begun = learnt[number] if number < len(learnt) else "no class"
            raise ConfigError(
                f"class {number} is {taught[number]!r} to the teacher and {begun!r} to the model that the student "
                "begins as; begin as a model of the same classes in the same order",
                field="student",
            )


def in_order(classifier: Classifier, names: Sequence[str], *, what: str, field: str) -> Classifier:
    """`classifier` with its answers in the order of `names`, then those that `names` leaves out.

    Raises:
        ConfigError: it does not know one of them; `what` is what the sentence calls it.
    """
    known = class_names(classifier.config)
    numbers = class_numbers(names, known)
    if ABSENT in numbers:
        name = names[numbers.index(ABSENT)]
        raise _unknown(name, known, owner=what, whose="the generator", field=field)
    if _is_counting(numbers):
        return classifier
    return classifier.reordered([*numbers, *sorted(set(range(len(known))) - set(numbers))])


def naming_classes(extractor: nn.Module | None, cond: CondSpec, *, asked: bool) -> nn.Module | None:
    """`extractor`; a classifier that is `asked` for classes answers in the order of those in `cond`.

    Raises:
        ConfigError: it does not know one of them.
    """
    if not asked or not isinstance(extractor, Classifier) or cond.kind != "class_label":
        return extractor
    return in_order(extractor, class_names(cond), what="the extractor", field="extractor")


def answers_in_order(classifier: Classifier, names: Sequence[str]) -> bool:
    """Whether the first answers of `classifier` are those to `names`, one by one."""
    return _is_counting(class_numbers(names, class_names(classifier.config)))


def _known_numbers(source: Source, known: Sequence[str], *, owner: str, field: str) -> list[int]:
    """The numbers in `known` of the classes of `source`, of which those with items are there."""
    assert source.labels is not None
    numbers = class_numbers(source.class_names, known)
    with real_tensors():  # in a plan too
        present = torch.unique(source.labels).tolist()
    for label in present:
        if numbers[label] == ABSENT:
            raise _unknown(source.class_names[label], known, owner=owner, whose="the data", field=field)
    return numbers


def _unknown(name: str, known: Sequence[str], *, owner: str, whose: str, field: str) -> ConfigError:
    if list(map(_key, known)).count(_key(name)) > 1:
        problem, remedy = (
            f"more than one class of {owner} is called so",
            "use a model whose classes have names of their own",
        )
    elif tuple(known) == _counted(len(known)):
        problem = f"the classes of {owner} have no names, only the numbers 0 to {len(known) - 1}"
        remedy = f"say which number it is, e.g. data.rename_classes.{name} = '0'"
    else:
        shown = ", ".join(known[:MOST_SHOWN]) + (" …" if len(known) > MOST_SHOWN else "")
        problem = f"{owner} has no such class, but {shown}"
        remedy = "leave it out, or say with data.rename_classes what it is called there"
    if field in ("evaluate.judge", "extractor"):
        remedy = f"set {field} to a classifier of these classes, e.g. one trained on the same data"
    return ConfigError(f"{whose} has a class {name!r}, and {problem}; {remedy}", field=field)


def _counted(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _is_counting(numbers: Sequence[int]) -> bool:
    return all(number == place for place, number in enumerate(numbers))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # folders from macOS spell é as e and its accent


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)
