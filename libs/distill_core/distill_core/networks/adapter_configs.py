"""Keys of a foreign `adapter_config.json` that are read; whatever else would change the result is refused by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table

MOST = 10**6  # of ranks: peft makes factors of that many rows before any file is read
Rank = Annotated[int, Field(ge=1, le=MOST)]
Names = str | list[str]  # a regular expression, or ends of layer names

KEEP_BASE = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    "mica",
)  # initialisations whose product is 0, or is trained
CHANGE_BASE = ("pissa", "olora")  # what they take from the base follows from its weights alone
# Keys that change nothing in what a finished adapter computes.
IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),  # of `init_lora_weights`, which is read
}
PLAIN = (
    "only plain LoRA is loaded; merge it into its base with peft (merge_and_unload) and load the merged model"
)
CONVERT = "its base is not the model it was begun from; save it in peft with path_initial_model_for_weight_conversion"


class AdapterConfig(Config):
    """The keys of peft's `LoraConfig` that are honoured, as peft does."""

    model_config = ConfigDict(strict=True)

    r: Rank
    lora_alpha: float
    target_modules: Names
    exclude_modules: Names | None = None
    use_rslora: bool = False  # the product is scaled by alpha / sqrt(r)
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names | None = None
    fan_in_fan_out: bool = False  # of layers that no diffusion network has; peft ignores it for all others
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str = True

    def rank_of(self, layer: str) -> int:
        """Rank of a layer's factors."""
        return int(_of_layer(self.rank_pattern, layer, self.r))

    def scale_of(self, layer: str) -> float:
        """Factor of a layer's product: alpha / r, or alpha / sqrt(r)."""
        rank, alpha = self.rank_of(layer), float(_of_layer(self.alpha_pattern, layer, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def for_peft(self) -> dict[str, Any]:
        """The arguments of a `peft.LoraConfig` that puts factors in the same places and leaves the base alone."""
        values = self.model_dump(exclude={"fan_in_fan_out", "init_lora_weights"}, exclude_none=True)
        return {**values, "init_lora_weights": False}


def read_adapter_config(path: Path) -> AdapterConfig:
    """The `adapter_config.json` at `path`.

    Raises:
        ArtifactError: damaged, of another kind than LoRA, or with a key that is not understood and not neutral.
    """
    try:
        values = read_table(path)
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if "peft_type" not in values:
        raise ArtifactError(f"{path} is damaged: KeyError 'peft_type'")
    return adapter_config_of(values, path)


def adapter_config_of(values: dict[str, Any], path: Path | str) -> AdapterConfig:
    """The configuration in the table that `path` holds; of plain LoRA if it does not say of what.

    Raises:
        ArtifactError: of another kind than LoRA, or with a key that is not understood and not neutral.
    """
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise ArtifactError(f"{path} says peft_type = {_shown(kind)}, which is no plain LoRA; {PLAIN}")
    known = AdapterConfig.model_fields.keys()
    for key in sorted(values.keys() - known - IGNORED - {"peft_type"}):
        if values[key]:  # None, false, 0 and all that is empty leave peft's layers as they are
            raise ArtifactError(f"{path} says {key} = {_shown(values[key])}, which is no plain LoRA; {PLAIN}")
    return _checked(path, {key: value for key, value in values.items() if key in known})


def _checked(path: Path | str, values: dict[str, Any]) -> AdapterConfig:
    if values.get("bias", "none") != "none":
        raise ArtifactError(f"{path} says bias = {_shown(values['bias'])}, which is no plain LoRA; {PLAIN}")
    try:
        config = AdapterConfig.parse(values)
    except ConfigError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    init = config.init_lora_weights
    if init not in (*KEEP_BASE, *CHANGE_BASE):
        raise ArtifactError(f"{path} says init_lora_weights = {_shown(init)}: {CONVERT}")
    return config


def _of_layer(patterns: dict[str, Any] | None, layer: str, otherwise: float) -> float:
    """Value of the first pattern, in peft's order, that the end of the layer's name matches."""
    fitting = (
        value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", layer)
    )
    return float(next(fitting, otherwise))


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
