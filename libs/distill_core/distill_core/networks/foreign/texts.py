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
T5 = Keys(
    names(
        """
        vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets
        relative_attention_max_distance layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act pad_token_id
        eos_token_id
        """
    ),
    idle=ENCODER.idle
    | names(
        """
        dropout_rate classifier_dropout num_decoder_layers decoder_start_token_id use_cache is_encoder_decoder
        is_decoder output_past n_positions task_specific_params gradient_checkpointing tie_word_embeddings
        scale_decoder_outputs bos_token_id
        """
    ),  # of the decoder, which is not there
)
GEMMA2 = Keys(
    names(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        hidden_activation hidden_act max_position_embeddings rms_norm_eps pad_token_id eos_token_id bos_token_id
        rope_parameters rope_theta attention_bias query_pre_attn_scalar sliding_window sliding_window_size layer_types
        attn_logit_softcapping
        """
    ),
    idle=ENCODER.idle | names("use_cache cache_implementation tie_word_embeddings final_logit_softcapping"),
)  # the last of the head, which is not there
_QWEN = names(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling attention_bias
    use_sliding_window sliding_window max_window_layers layer_types bos_token_id eos_token_id pad_token_id
    """
)
_NOT_QWEN = ENCODER.idle | names("use_cache tie_word_embeddings")
QWEN3 = Keys(_QWEN, _NOT_QWEN)
QWEN_VL = Keys(
    _QWEN | {"text_config"},
    _NOT_QWEN
    | names(
        """
        vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id vision_token_id
        """
    ),  # it is shown no pictures
)
ENCODERS: Mapping[str, Keys] = {
    "T5EncoderModel": T5,
    "Gemma2Model": GEMMA2,
    "Qwen3Model": QWEN3,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen2_5_VLForConditionalGeneration": QWEN_VL,
}  # others are CLIP's

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
CLIP = "CLIPTokenizer"
FAST = ("TokenizersBackend", "PreTrainedTokenizerFast")  # whatever tokenizer.json says
TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    CLIP: (CLIP, "CLIPTokenizerFast"),
    "T5Tokenizer": ("T5Tokenizer", "T5TokenizerFast", *FAST),
    "Qwen2Tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *FAST),
    "GemmaTokenizer": ("GemmaTokenizer", "GemmaTokenizerFast", *FAST),
}  # classes that a folder may name
SENTENCES = Keys(
    TOKENIZER.read | names("mask_token extra_ids add_bos_token add_eos_token sp_model_kwargs chat_template"),
    idle=TOKENIZER.idle | names("legacy use_default_system_prompt spaces_between_special_tokens vocab_file"),
)  # of tokenizers that come from sentencepiece


WHOLE = {
    "T5EncoderModel": ("T5ForConditionalGeneration",),
    "Gemma2Model": ("Gemma2ForCausalLM",),
    "Qwen3Model": ("Qwen3ForCausalLM",),
}
"""Classes whose weights hold a text model's too."""


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
    built = [name for name in built if name not in WHOLE.get(cls.__name__, ())] or [cls.__name__]
    if built != [cls.__name__]:
        raise ArtifactError(
            f"{path} says architectures = {built}, and {folder.name}/ is read as a {cls.__name__}"
        )
    defaults = {**cls.config_class().to_dict(), **ENCODER_DEFAULTS}
    check_keys(path, config, ENCODERS.get(cls.__name__, ENCODER), defaults)


def check_tokenizer(folder: Path, kind: str = CLIP) -> None:
    """Refuse a tokenizer of another kind than one of `TOKENIZERS`, or one that says something that is not understood.

    Raises:
        ArtifactError: it is such; the sentence names file and key.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = _table(path)
    found = config.get("tokenizer_class")
    if found is not None and found not in TOKENIZERS[kind]:
        raise ArtifactError(
            f"{path} says tokenizer_class = {found}, which is not understood; only {kind} is read"
        )
    if kind == CLIP:
        check_keys(path, config, TOKENIZER, TOKENIZER_DEFAULTS)
    else:
        check_keys(path, config, SENTENCES, dict.fromkeys(SENTENCES.read))


def _table(path: Path) -> dict[str, Any]:
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"text encoder or tokenizer is damaged or incomplete: {path}: {error}") from None
