"""`memory`: what the recipes for published models need of memory at full size, from configs alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_core.errors import NotFound, nearest
from distill_core.recipe import Recipe, load_recipe, recipe_names
from distillery_cli.terminal.output import markdown_table, notes, results
from tools.pipeline_folders import facts, model_names, write_folder

PAGE, KEPT = Path("docs/memory.md"), Path("docs/memory.json")
CARDS = (24, 48, 80, 141)  # GiB
FEW = 8  # devices of one machine
GIB = 2**30
ROOM = 1.1  # what an allocator adds to a plan: a tenth
ONCE = ("critic_steps", "fake_steps")  # updates that are alike, and each as large as the next
LORA: Mapping[str, Any] = {"student.lora": {"rank": 64, "alpha": 64.0}}
COLUMNS = ("recipe", "model", "trained", "frozen", "weights, optimiser, EMA", "a step", "in all")
OTHERS: Mapping[
    str, tuple[str, Mapping[str, Any]]
] = {  # a model without published settings: the few-step LoRA of docs/task_lora.md, at levels of its own schedule
    "sd35": ("task_lora_few_steps", {"config.levels": [999.0, 3.0, 1.0, 0.333]}),
}


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: python -m tools memory  ·  python -m tools memory sdxl_dmd2")(memory)


def memory(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Without any: those not planned yet.")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Plan, or only write the page.")] = True,
    repository: Annotated[Path, typer.Option(help="The checkout whose page is written.")] = Path(),
) -> int:
    """Plan recipes at the full size of the model that they are for, and write docs/memory.md."""
    kept = repository / KEPT
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    chosen = names or [name for name in planned_recipes() if name not in known]
    for name in chosen if run else []:
        if name not in planned_recipes():
            raise NotFound(
                f"no recipe for a model is called {name!r}{nearest(name, planned_recipes())}", field="names"
            )
        known[name] = planned(name)
        notes.print(f"{name}: {known[name]['plan']['total'] / GIB:.1f} GiB")
        kept.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (repository / PAGE).write_text(page(known), encoding="utf-8")
    results.print(f"{len(known)} plans; written: {PAGE}, {KEPT}")
    return 0


def planned_recipes() -> list[str]:
    """Recipes for published models, and the general one for the models that have none."""
    return [name for name in recipe_names() if load_recipe(name).for_model] + [
        f"{recipe} on {model}" for model, (recipe, _) in OTHERS.items()
    ]


def planned(name: str) -> dict[str, Any]:
    """The plan of a recipe for one picture a device, and as a LoRA where all weights want many large devices."""
    recipe_name, _, other = name.partition(" on ")
    recipe = load_recipe(recipe_name, OTHERS[other][1] if other else None)
    model = other or str(recipe.for_model)
    found: dict[str, Any] = {"model": model, "plan": full_size(recipe, model)}
    shared = found["plan"]["processes"][str(CARDS[-2])]
    if recipe.student.lora is None and (shared is None or shared > FEW):
        found["lora"] = full_size(recipe.override(LORA), model)
    return found


def full_size(recipe: Recipe, model: str) -> dict[str, Any]:
    """What one process needs to train `recipe` on `model` a picture at a time; bytes, and in how many processes."""
    from distill_core import api

    with tempfile.TemporaryDirectory(prefix="distillery-memory-") as scratch:
        folder = write_folder(model, Path(scratch) / "model")
        alone = one_picture(recipe, folder, Path(scratch))
        plan = api.plan(alone, api.context(Path(scratch) / "store", Path(scratch) / "cache"))
    expected = facts(model)["network_parameters"]
    network = max(part.parameters for part in plan.parts if part.name == "teacher")
    assert expected in (None, network), f"{model}: {network} parameters, and {expected} are published"
    return {
        "trained": sum(part.trained for part in plan.parts),
        "frozen": sum(part.weights for part in plan.parts if not part.role),
        "standing": plan.standing,
        "step": plan.step,
        "total": plan.total,
        "processes": {str(card): plan.processes_for(int(card * GIB / ROOM)) for card in CARDS},
    }


def one_picture(recipe: Recipe, folder: Path, scratch: Path) -> Recipe:
    """`recipe` with this teacher and one picture a step; updates that repeat are made once."""
    values = recipe.model_dump(mode="json", exclude_none=True, exclude={"publish", "micro_batch"})
    once = {f"config.{key}": 1 for key in ONCE if key in recipe.config}
    values["teacher"] = {"path": str(folder)}
    values["data"] = _data(recipe, scratch)
    values.pop("pairs", None)
    if recipe.pairs is not None:  # which come before the stage that needs most
        values.pop("stages", None)
        once["config.regression_steps"] = 0
    return Recipe.parse(values).override({"batch_size": 1, "accumulate": 1, "steps": 10, **once})


def _data(recipe: Recipe, scratch: Path) -> dict[str, Any]:
    table = dict(recipe.data or {})
    if table["name"] == "prompts":
        return {"name": "prompts", "prompts": ["a lighthouse"]}
    from PIL import Image

    pictures = scratch / "pictures"
    pictures.mkdir()
    Image.new("RGB", (table["size"], table["size"])).save(pictures / "one.png")
    (pictures / "one.txt").write_text("a lighthouse", encoding="utf-8")
    return table | {"path": str(pictures)}


def page(known: Mapping[str, Any]) -> str:
    """The page of all plans."""
    ordered = [name for name in planned_recipes() if name in known]
    rows, cards = [], []
    for name in ordered:
        entry, plan = known[name], known[name]["plan"]
        sizes = [f"{plan[key] / GIB:.1f}" for key in ("frozen", "standing", "step", "total")]
        rows.append([f"`{name}`", facts(entry["model"])["title"], f"{plan['trained'] / 1e6:,.0f} M", *sizes])
        cards.append([f"`{name}`", *(smallest_change(entry, card) for card in CARDS)])
    models = [
        [model["title"], f"`{model['pipeline']}`", model["source"]] for model in map(facts, model_names())
    ]
    return _PAGE.format(
        plans=markdown_table(COLUMNS, rows),
        cards=markdown_table(("recipe", *(f"{card} GiB" for card in CARDS)), cards),
        models=markdown_table(("model", "pipeline", "sizes from"), models),
    )


def smallest_change(entry: Mapping[str, Any], card: int) -> str:
    """The smallest change that makes a recipe fit on a card of so many GiB, in words."""
    if entry["plan"]["total"] * ROOM <= card * GIB:
        return "as it is"
    count = entry["plan"]["processes"][str(card)]
    if count is not None and count <= FEW:
        return f"{count} such devices"
    lora: Mapping[str, Any] | None = entry.get("lora")
    if lora is not None and lora["total"] * ROOM <= card * GIB:
        return "a LoRA"
    if lora is not None and (shared := lora["processes"][str(card)]) is not None:
        return f"a LoRA on {shared} such devices"
    return f"{count} such devices" if count is not None else "no"


_PAGE = """# Memory at full size

Written by `python -m tools memory`; not edited by hand. What [recipes for published models](methods.md) need to train,
a picture at a time on each device, in GiB of 2^30 bytes. They are plans: one step of the real training loop on tensors
without data, at the sizes of the models' configs. No weight was read, nothing was trained, and no GPU was used. A
further picture at once costs about another step's activations; `micro_batch = "auto"`, which the recipes have, finds
how many fit. `distillery train RECIPE --dry-run` plans the same for your own model, batch and device.

{plans}

A recipe that is not in the table has not been planned yet. "Frozen" are the teacher, its text encoders and its picture
decoder, in float32 as they are held. A step has activations, gradients and temporaries at their peak.

## What fits where

The smallest change, with a tenth of the card left to the allocator. "2 such devices" is `processes = 2` with
`sharding = "fsdp"`: the same results, each device with its share of what is trained. "A LoRA" is
`student.lora.rank = 64` instead of all weights: another student. Frozen weights are on every device.

{cards}

## The models

Their configs are in `tools/model_configs`. Where the number of a network's parameters is known to the last digit, that
of the plan's is compared with it.

{models}
"""
