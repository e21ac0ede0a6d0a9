"""Keys of the networks and codecs that are read.

Those that no code here names are the class's own affair: it builds itself by them, and is called in the same way.
"""

from __future__ import annotations

from distill_core.networks.foreign.keys import Keys, names

_BLOCKS = names(
    """
    sample_size in_channels out_channels block_out_channels down_block_types mid_block_type up_block_types
    layers_per_block mid_block_scale_factor downsample_padding dropout act_fn attention_head_dim norm_num_groups
    norm_eps center_input_sample freq_shift flip_sin_to_cos time_embedding_dim resnet_time_scale_shift
    """
)
_WHY = {
    "class_embed_type": "the network is told numbers beside the noise level",
    "num_class_embeds": "the network is told a class beside the prompt",
    "class_embeddings_concat": "the network is told a class beside the prompt",
    "encoder_hid_dim": "prompts are projected or replaced before the network reads them",
    "encoder_hid_dim_type": "prompts are projected or replaced before the network reads them",
    "dual_cross_attention": "the network reads pictures beside the prompt",
    "only_cross_attention": "a negative prompt could not steer all of its attention",
    "cross_attention_norm": "a negative prompt could not steer its attention",
    "attention_type": "the network is told boxes beside the prompt",
    "time_embedding_type": "its network is told noise levels of another kind",
    "num_attention_heads": "attention_head_dim has their number",
}


def _attend_plainly(types: object) -> bool:
    """Blocks whose attention a negative prompt can steer."""
    blocks = types if isinstance(types, list | tuple) else [types]
    return not any("SimpleCrossAttn" in str(name) or str(name).startswith("KC") for name in blocks)


_PROMPTED = {"down_block_types", "mid_block_type", "up_block_types"}
_UNET_2D = _BLOCKS | names(
    "num_class_embeds num_train_timesteps add_attention attn_norm_num_groups downsample_type upsample_type"
)
_UNET_2D_CONDITION = (_BLOCKS - _PROMPTED) | names(
    """
    cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block use_linear_projection
    upcast_attention resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_act_fn
    time_cond_proj_dim timestep_post_act conv_in_kernel conv_out_kernel mid_block_only_cross_attention
    addition_embed_type addition_time_embed_dim projection_class_embeddings_input_dim
    """
)  # the last line is for `text.check_text`
_DIT = names(
    """
    sample_size in_channels out_channels patch_size num_layers num_attention_heads attention_head_dim attention_bias
    dropout activation_fn num_embeds_ada_norm norm_num_groups norm_elementwise_affine norm_eps upcast_attention
    """
)
_SD3 = names(
    """
    sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads joint_attention_dim
    caption_projection_dim pooled_projection_dim out_channels pos_embed_max_size dual_attention_layers qk_norm
    """
)
_FLUX = names(
    """
    in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim
    pooled_projection_dim guidance_embeds axes_dims_rope
    """
)
_PIXART = names(
    """
    num_attention_heads attention_head_dim in_channels out_channels num_layers dropout norm_num_groups
    cross_attention_dim attention_bias sample_size patch_size activation_fn num_embeds_ada_norm upcast_attention
    norm_elementwise_affine norm_eps interpolation_scale use_additional_conditions caption_channels
    """
)
_SANA = names(
    """
    in_channels out_channels num_attention_heads attention_head_dim num_layers num_cross_attention_heads
    cross_attention_head_dim cross_attention_dim caption_channels mlp_ratio dropout attention_bias sample_size
    patch_size norm_elementwise_affine norm_eps interpolation_scale qk_norm timestep_scale guidance_embeds
    guidance_embeds_scale
    """
)
_QWEN_IMAGE = names(
    """
    in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim axes_dims_rope
    """
)
_Z_IMAGE = names(
    """
    in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm cap_feat_dim rope_theta t_scale
    axes_dims axes_lens
    """
)
_FLUX2 = names(
    """
    in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim
    timestep_guidance_channels mlp_ratio axes_dims_rope rope_theta eps guidance_embeds
    """
)
_CODEC = names(
    """
    in_channels out_channels latent_channels block_out_channels down_block_types up_block_types layers_per_block
    act_fn norm_num_groups mid_block_add_attention scaling_factor
    """
)
_CODEC_IDLE = names(
    "sample_size force_upcast"
)  # the size of tiles, and half precision in float16: neither is used
NETWORKS = {
    "UNet2DModel": Keys(_UNET_2D, why=_WHY),
    "UNet2DConditionModel": Keys(
        _UNET_2D_CONDITION,
        idle=names("addition_embed_type_num_heads"),  # of a kind that is refused
        bound=dict.fromkeys(_PROMPTED, _attend_plainly),
        why={**_WHY, **dict.fromkeys(_PROMPTED, "a negative prompt could not steer its attention")},
    ),
    "DiTTransformer2DModel": Keys(_DIT),
    "SD3Transformer2DModel": Keys(_SD3),
    "FluxTransformer2DModel": Keys(_FLUX),
    "Flux2Transformer2DModel": Keys(_FLUX2),
    "PixArtTransformer2DModel": Keys(_PIXART),
    "SanaTransformer2DModel": Keys(_SANA),
    "QwenImageTransformer2DModel": Keys(_QWEN_IMAGE),
    "ZImageTransformer2DModel": Keys(_Z_IMAGE),
}
CODECS = {
    "AutoencoderKL": Keys(
        _CODEC | names("shift_factor latents_mean latents_std use_quant_conv use_post_quant_conv"),
        _CODEC_IDLE,
    ),
    "AutoencoderTiny": Keys(
        names(
            """
            in_channels out_channels encoder_block_out_channels decoder_block_out_channels act_fn upsample_fn
            latent_channels upsampling_scaling_factor num_encoder_blocks num_decoder_blocks scaling_factor shift_factor
            """
        ),
        _CODEC_IDLE
        | names("latent_magnitude latent_shift block_out_channels"),  # of latents kept as pictures; a copy
    ),
    "AutoencoderKLFlux2": Keys(
        (_CODEC - {"scaling_factor"})
        | names("decoder_block_out_channels use_quant_conv use_post_quant_conv batch_norm_eps"),
        _CODEC_IDLE | {"batch_norm_momentum"},
    ),
    "AutoencoderKLQwenImage": Keys(
        names(
            """
            base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample dropout input_channels latents_mean
            latents_std
            """
        )
    ),
    "AutoencoderDC": Keys(
        names(
            """
            in_channels latent_channels attention_head_dim encoder_block_types decoder_block_types
            encoder_block_out_channels decoder_block_out_channels encoder_layers_per_block decoder_layers_per_block
            encoder_qkv_multiscales decoder_qkv_multiscales upsample_block_type downsample_block_type
            decoder_norm_types decoder_act_fns encoder_out_shortcut decoder_in_shortcut decoder_conv_act_fn
            scaling_factor
            """
        )
    ),
    "VQModel": Keys(_CODEC | names("num_vq_embeddings vq_embed_dim norm_type"), _CODEC_IDLE),
}
