"""The manifest of one version of a model, part by part. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints

from distill_core.config import Config, Name
from distill_core.probe import ImageProbe
from distill_core.signature import Signature

MANIFEST = "manifest.json"
KindName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
C = TypeVar("C", bound=Config)


class FileEntry(Config):
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class GraphReport(Config):
    """One graph of an export, at its worst over all compared batches."""

    precision: Literal["fp32", "fp16", "bf16", "int8"]  # of its weights
    size: int = Field(ge=0)  # bytes, with its side file
    max_abs_difference: float
    rel_l2: float
    snr_db: float | None = None  # the same as a signal-to-noise ratio; None: no difference at all
    changed_pixels: float | None = None  # share of 8-bit values that differ; None: its output is no picture
    agreement: float | None = None  # share of equal answers; None: it is no classifier
    left_in_float: str = ""  # what of it is in float32, and why, where the target says otherwise


class FrechetReport(Config):
    """Samples of the model before and after conversion, each against the same reference."""

    before: float = Field(ge=0)
    after: float = Field(ge=0)
    ratio: float = Field(ge=0)
    samples: int = Field(ge=1)  # of each set
    num_steps: int = Field(ge=1)
    features: str  # what the distance compares
    reference: str  # with what: the pictures that the model was trained for, or other samples of it


class ExportReport(Config):
    """One export of the model, and how it compares with PyTorch on fixed inputs."""

    target: str
    files: tuple[str, ...]
    opset: int | None = None
    max_abs_difference: float
    rel_l2: float
    tolerance: float
    batches: tuple[int, ...]
    seconds: float
    tool_versions: dict[str, str] = {}
    graphs: dict[str, GraphReport] = {}  # by file stem
    frechet: FrechetReport | None = None  # None: no pictures, too dear, or a target that needs none

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of the worst graph; None where no graph differs."""
        return min((graph.snr_db for graph in self.graphs.values() if graph.snr_db is not None), default=None)

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the comparison, by name."""
        changed = [graph.changed_pixels for graph in self.graphs.values() if graph.changed_pixels is not None]
        agreed = [graph.agreement for graph in self.graphs.values() if graph.agreement is not None]
        figures = {
            "max_abs_difference": self.max_abs_difference,
            "rel_l2": self.rel_l2,
            "snr_db": self.snr_db,
            "changed_pixels": max(changed, default=None),
            "agreement": min(agreed, default=None),
            "frechet_before": self.frechet.before if self.frechet else None,
            "frechet_after": self.frechet.after if self.frechet else None,
            "frechet_ratio": self.frechet.ratio if self.frechet else None,
            "megabytes": sum(graph.size for graph in self.graphs.values()) / 1e6 if self.graphs else None,
        }
        return {name: value for name, value in figures.items() if value is not None}


class Manifest(Config):
    """Everything known of one version. `version`, `created` and `files` are filled in by `publish`.

    `kind` is open and `card` stays as it was written, so that a listing shows kinds that are not installed here.
    """

    schema_version: Literal[2] = 2
    name: Name
    version: int = Field(0, ge=0)
    created: str = ""
    kind: KindName
    method: str = ""
    paper: str = ""
    title: str = ""
    licence: str = ""  # unset: nobody has chosen one
    parents: tuple[str, ...] = ()  # artifacts it was made from, as name@version
    imported: dict[str, str] = {}  # files of other programs that it was made from, by name: their SHA-256
    job: str = ""  # that made it, or what stands for a run without a queue
    recipe_sha256: str = ""
    step: int = 0
    card: dict[str, Any] = {}  # facts of its kind: see `card_as`
    signature: Signature = Signature()  # functions that a server calls by name
    parity: ImageProbe | None = None  # its image for fixed inputs when it was published
    metrics: dict[str, float | int | str] = {}
    exports: dict[str, ExportReport] = {}
    files: dict[str, FileEntry] = {}

    def card_as(self, cls: type[C]) -> C:
        """The card, read as its kind's `Card` once.

        Raises:
            ConfigError: facts that a card of that kind does not have.
        """
        held = self.__dict__.get(
            "_read"
        )  # beside the fields, as cached properties are: not compared, not written
        if (
            held is None or held[0] is not self.card or type(held[1]) is not cls
        ):  # a copy may have another card
            held = self.__dict__["_read"] = (self.card, cls.parse(self.card, where="card"))
        card: C = held[1]
        return card

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def form(self) -> Literal["full", "merged", "adapter"]:
        """Without low-rank factors; with them, beside the weights they are merged into; or these factors alone."""
        if "adapter/adapter_config.json" not in self.files:
            return "full"
        whole = any(f"{slot}/config.json" in self.files for slot in ("unet", "transformer"))
        return "merged" if whole else "adapter"


class AliasMove(Config):
    alias: str
    version: int
    previous: int | None = None
    who: str = ""
    when: str = ""
