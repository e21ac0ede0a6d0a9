"""Builders of tiny real objects, shared by all tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from distill_core import api
from distill_core.building import build
from distill_core.context import Context
from distill_core.data import Source
from distill_core.kinds import find_kind
from distill_core.method import Method
from distill_core.recipe import Recipe, load_recipe, recipe_names
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

TINY = {
    "steps": 2,
    "batch_size": 8,
    "threads": 1,
    "log_every": 1,
    "sample_every": 1000,
    "checkpoint_every": 1000,
    "evaluate": {"num_samples": 40, "batch_size": 40},
}

PHASES = (
    "reconstruct_steps",
    "regression_steps",
    "warmup_steps",
    "distil_steps",
    "teacher_steps",
    "record_steps",
    "reflow_steps",
    "pretrain_steps",
)  # config keys: steps in which not every role is trained

SOLVERS = {"flow_steps": 2, "walk_steps": 6, "probes": 8}  # config keys: how finely paths are followed


def tiny_recipe(name: str, **changes: object) -> Recipe:
    """A shipped recipe at its smallest: two steps of eight items, nothing published, a first phase of one step."""
    recipe = load_recipe(name)
    phases = {f"config.{key}": 1 for key in PHASES if recipe.config.get(key)}
    phases |= {f"config.{key}": few for key, few in SOLVERS.items() if recipe.config.get(key)}
    if recipe.pairs is not None and "pairs" not in changes:
        phases["pairs.num_steps"] = 2
    recipe = recipe.override({**TINY, **phases, **changes})
    return recipe.model_copy(
        update={
            "publish": None,
            "evaluate": {key: value for key, value in recipe.evaluate.items() if key != "judge"},
        }
    )


def tiny_context(folder: Path, cache: Path | None = None) -> Context:
    """A context whose teachers are the recipes' own, trained for two steps and kept in `cache`, or in `folder`."""
    cache = cache or folder / "cache"

    def train(recipe: Recipe, target: Path) -> Path:
        small = recipe.override(TINY).model_copy(update={"publish": None})
        return api.train(small, target, context).folder / "model"

    store = api.context(folder / "store", cache).store
    context = Context(store, cache, train)
    return context


def self_contained_recipes() -> list[str]:
    """Shipped recipes that run without a path from the user."""
    return [name for name in recipe_names() if "path" not in (load_recipe(name).data or {})]


def recipe_of(method: str) -> str:
    """A shipped recipe that runs this method without a path from the user."""
    return next(name for name in self_contained_recipes() if load_recipe(name).method == method)


def tiny_trainer(name: str, context: Context, folder: Path, **changes: object) -> Trainer:
    """The loop around a tiny recipe, ready to step."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(name, **changes)
    method, source = build(recipe, context)
    return Trainer(method, source, recipe, Run(folder))


def entered(method: Method, step: int) -> Method:
    """The method, with the stage entered that begins at `step`, as the loop does before that step."""
    stage = method.stage_of(step)
    if step and method.stage_of(step - 1).name != stage.name:
        method.enter(stage)
    return method


def previewed(method: Method, source: Source, seed: int = 0) -> torch.Tensor | None:
    """What the loop would show of the method's result now."""
    return find_kind(method.kind).preview(method.main, source, seed, method.references())


def parameters_by_module(method: Method) -> dict[str, dict[str, torch.Tensor]]:
    """Clones of the parameters of every child module: the roles, and whatever must stay frozen."""
    return {
        child: {name: value.detach().clone() for name, value in module.named_parameters()}
        for child, module in method.named_children()
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


TINY_NETWORKS: dict[str, dict[str, object]] = {
    "DiTTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "patch_size": 4,
    },
    "UNet2DModel": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
}
WITH_ATTENTION = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def tiny_pixels(folder: Path, scheduler: object, **args: object) -> Path:
    """A plain diffusers folder of an unconditional pixel model with random weights: 8x8 pictures, `args` its own."""
    import diffusers

    torch.manual_seed(0)
    diffusers.UNet2DModel(**{**TINY_UNET, **args}).save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    return folder


def edited(folder: Path, part: str, name: str = "config.json", **changes: object) -> Path:
    """The folder, with other values in one of its JSON files."""
    path = folder / part / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def tiny_text_to_image(folder: Path, *, tokens: int = 8, prediction: str = "epsilon") -> Path:
    """A plain diffusers Stable Diffusion folder with random weights: 8x8 latents, 16x16 pictures, letters as tokens."""
    import diffusers
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(
        unet=_tiny_unet(cross_attention_dim=16),
        vae=_tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokens)),
        tokenizer=letter_tokenizer(folder.parent / f"{folder.name}-tokenizer", tokens),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, *, tokens: int = 8, zero_null: bool = True) -> Path:
    """The same for Stable Diffusion XL: two text encoders, pooled prompts and picture sizes as conditions."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = letter_tokenizer(folder.parent / f"{folder.name}-tokenizer", tokens)
    diffusers.StableDiffusionXLPipeline(
        unet=_tiny_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
        ),
        vae=_tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokens, num_hidden_layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(
            tiny_text_config(tokens, num_hidden_layers=2, projection_dim=12)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=zero_null,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def _tiny_unet(**args: object) -> torch.nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **args,
    )


def _tiny_vae() -> torch.nn.Module:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_text_config(tokens: int, **args: object) -> object:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextConfig(
        vocab_size=54,
        max_position_embeddings=tokens,
        bos_token_id=0,
        eos_token_id=53,
        pad_token_id=53,
        **{**sizes, **args},
    )


def letter_tokenizer(folder: Path, tokens: int) -> object:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=tokens)


def tiny_clip(folder: Path, *, seed: int = 0, tokens: int = 8) -> Path:
    """A transformers CLIP folder with random weights: 32x32 pictures in four patches, letters as tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **shape,
        "vocab_size": 54,
        "max_position_embeddings": tokens,
        "bos_token_id": 0,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    vision = {**shape, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    tokenizer = letter_tokenizer(folder.parent / f"{folder.name}-tokenizer", tokens)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
