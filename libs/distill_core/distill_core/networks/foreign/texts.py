"""Keys of the text encoders and tokenizers that are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError
from distill_core.files.json_tables import read_table
from distill_core.networks.foreign.keys import Keys, check_keys, names, shown

ENCODER = Keys(
    names(
        """
        vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads
        max_position_embeddings hidden_act layer_norm_eps pad_token_id bos_token_id eos_token_id use_attention_mask
        """
    ),
    idle=names(
        """
        architectures model_type transformers_version torch_dtype dtype attention_dropout dropout initializer_range
        initializer_factor id2label label2id return_dict
        """
    ),  # whose it is, how it was stored and trained, and labels that it does not give
)
ENCODER_DEFAULTS: Mapping[str, Any] = {"use_attention_mask": False}  # beside the class's own

TOKENIZER = Keys(
    names(
        """
        model_max_length tokenizer_class padding_side truncation_side pad_token bos_token eos_token unk_token
        added_tokens_decoder additional_special_tokens extra_special_tokens add_prefix_space
        """
    ),
    idle=names(
        """
        errors name_or_path special_tokens_map_file tokenizer_file use_fast backend is_local local_files_only
        clean_up_tokenization_spaces processor_class model_input_names split_special_tokens max_length stride
        truncation_strategy pad_to_multiple_of pad_token_type_id model_specific_special_tokens auto_map
        """
    ),  # where it came from, and how it would be called and read back by default
)
TOKENIZER_DEFAULTS: Mapping[str, Any] = {**dict.fromkeys(TOKENIZER.read), "do_lower_case": True}


def check_text_model(folder: Path, cls: Any) -> None:
    """Refuse a text model of another kind than `cls`, or one that says something that is not understood.

    Raises:
        ArtifactError: it is such; the sentence names file and key.
    """
    path = folder / "config.json"
    config = _table(path)
    kind, known = config.get("model_type", "clip_text_model"), cls.config_class.model_type
    if kind != known:
        raise ArtifactError(
            f"{path} says model_type = {shown(kind)}, which is not understood; only {known} is read"
        )
    built = config.get("architectures") or [cls.__name__]
    if built != [cls.__name__]:
        raise ArtifactError(
            f"{path} says architectures = {built}, and {folder.name}/ is read as a {cls.__name__}"
        )
    check_keys(path, config, ENCODER, {**cls.config_class().to_dict(), **ENCODER_DEFAULTS})


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer of another kind than CLIP's, or one that says something that is not understood.

    Raises:
        ArtifactError: it is such; the sentence names file and key.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = _table(path)
    kind = config.get("tokenizer_class")
    if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise ArtifactError(
            f"{path} says tokenizer_class = {kind}, which is not understood; only CLIPTokenizer is read"
        )
    check_keys(path, config, TOKENIZER, TOKENIZER_DEFAULTS)


def _table(path: Path) -> dict[str, Any]:
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"text encoder or tokenizer is damaged or incomplete: {path}: {error}") from None
