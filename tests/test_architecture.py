"""The import order of the tree, walked from the import statements themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from distill_core.methods import method_files
from tests.helpers import REPOSITORY

CORE = REPOSITORY / "libs/distill_core/distill_core"
PACKAGES = {
    "distill_core": CORE,
    "distill_service": REPOSITORY / "libs/distill_service/distill_service",
    "distillery_cli": REPOSITORY / "libs/distillery_cli/distillery_cli",
    "distillery_trainer": REPOSITORY / "services/trainer/distillery_trainer",
    "distillery_converter": REPOSITORY / "services/converter/distillery_converter",
    "distillery_sampler": REPOSITORY / "services/sampler/distillery_sampler",
}
SERVICES = ("distillery_trainer", "distillery_converter", "distillery_sampler")
MAY_IMPORT = {
    "distill_core": (),
    "distill_service": ("distill_core",),
    "distillery_cli": ("distill_core", "distill_service"),
    **{service: ("distill_core", "distill_service") for service in SERVICES},
}
CLIENTS = (
    "distillery_trainer.client",
    "distillery_sampler.client",
    "distillery_sampler.settings",
)  # what the command line may use of services

# The half of a kind that needs torch; the other, its card, is data that a manifest holds.
KINDS = tuple(f"kinds.{path.parent.name}" for path in sorted((CORE / "kinds").glob("*/kind.py")))

# A module may import from its own layer and lower ones.
LAYERS = [
    ("errors", "library_bars", "config", "files", "recipe", "artifacts.remote", "signature", "reductions"),
    ("diffusion", "losses", "metrics.image", "metrics.frechet", "metrics.classification"),
    (
        "artifacts",
        "probe",
        "pictures",
        "charts",
        "kinds",
        "method",
        "radiance.light.spherical_harmonics",
        "radiance.cameras.camera",
        "radiance.cameras.distortion",
    ),
    ("networks", "tensorrt", "data", "radiance", "metrics"),
    ("methods", "training", "recipe.transfer", "kinds.base", "kinds.loading", *KINDS),
    ("context", "recipe.references", "cache_keys"),
    ("building",),
    ("running",),
    ("api",),
    ("job.dry_run",),
    ("reference",),
    ("job",),
]


def modules(package: str) -> list[tuple[str, Path]]:
    root = PACKAGES[package]
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        names.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return names


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int | None:
    name = module.removeprefix("distill_core.")
    if name.split(".")[0] == "kinds" and name.split(".")[2:3] == ["card"]:
        name = "kinds"
    best: tuple[int, int] | None = None
    for index, members in enumerate(LAYERS):
        for member in members:
            if (name == member or name.startswith(member + ".")) and (best is None or len(member) > best[0]):
                best = len(member), index
    return best[1] if best else None


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_the_table_allows(package):
    for name, path in modules(package):
        for imported in imports(path):
            top = imported.split(".")[0]
            if top not in PACKAGES or top == package or top in MAY_IMPORT[package]:
                continue
            client = package == "distillery_cli" and any(imported.startswith(c) for c in CLIENTS)
            named_client = package == "distillery_cli" and any(c.startswith(imported + ".") for c in CLIENTS)
            assert client or named_client, f"{name} imports {imported}"


def test_what_is_shipped_needs_nothing_that_is_not():
    for package in PACKAGES:
        for name, path in modules(package):
            assert not {found.split(".")[0] for found in imports(path)} & {"benchmarks", "tools", "tests"}, (
                name
            )


def test_every_module_of_the_library_has_a_layer():
    for name, _ in modules("distill_core"):
        if name != "distill_core" and not name.endswith("recipes"):
            assert layer(name) is not None, f"{name} is in no layer: add it to LAYERS where it belongs"


def test_the_library_imports_only_downwards():
    for name, path in modules("distill_core"):
        here = layer(name)
        for imported in imports(path, top_level_only=True):
            there = layer(imported) if imported.startswith("distill_core.") else None
            if here is not None and there is not None:
                assert there <= here, f"{name} (layer {here}) imports {imported} (layer {there})"


def test_no_circle_of_imports():
    graph: dict[str, set[str]] = {}
    for package in PACKAGES:
        known = {name for name, _ in modules(package)}
        for name, path in modules(package):
            found = imports(path, top_level_only=True) & known
            # `from package import module` needs the module; the package's own __init__ is already running
            graph[name] = (
                found - {name} - {other for other in found if any(m.startswith(other + ".") for m in found)}
            )
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circle of imports: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for following in graph.get(name, ()):
                visit(following, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_methods_do_not_import_each_other_and_training_knows_no_method():
    methods = set(method_files().values())
    assert len(methods) > 20
    for name, path in modules("distill_core"):
        for imported in imports(path):
            if name.startswith("distill_core.training"):
                assert not imported.startswith("distill_core.methods"), f"{name} imports {imported}"
            if name.startswith("distill_core.methods."):  # those that begin with _ are what methods share
                assert imported not in methods - {name}, f"{name} imports {imported}"


def test_only_settings_read_the_environment():
    allowed = {
        "settings",
        "broker",
        "supervisor",
        "child",
        "stack",
        "launch",
        "library_bars",
        "distill_core",  # which tells libraries that they report nothing
    }  # these pass the environment on to child processes
    for package in PACKAGES:
        for name, path in modules(package):
            text = path.read_text(encoding="utf-8")
            if "os.environ" in text or "getenv(" in text:
                assert name.split(".")[-1] in allowed, f"{name} reads the environment; settings.py does that"


def test_diffusers_and_peft_have_one_door_each():
    doors = {"diffusers": "distill_core.networks.diffusers_", "peft": "distill_core.networks.peft_io"}
    for name, path in modules("distill_core"):
        tops = {imported.split(".")[0] for imported in imports(path)}
        for library in tops & doors.keys():
            assert name.startswith(doors[library]), f"{name} imports {library}"


def test_the_command_line_prints_in_one_way():
    """Markup is read from no string, so only the room `terminal` knows rich; the rest give data."""
    printers = ("print", "typer.echo", "typer.secho", "typer.prompt", "typer.confirm", "sys.stdout.write")
    for module, path in modules("distillery_cli"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if module.rpartition(".")[0] != "distillery_cli.terminal":
            assert not {found for found in imports(path) if found.split(".")[0] == "rich"}, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in printers, (module, node.lineno)
                assert not ast.unparse(node.func).endswith("from_markup"), (module, node.lineno)
