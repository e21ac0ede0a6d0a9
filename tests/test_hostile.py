"""Recipes, TOML, data and model folders that mean harm: refused in a sentence, and nothing of theirs is executed."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.building import build
from distill_core.data import build_source
from distill_core.errors import DistilleryError
from distill_core.kinds.loading import load_model
from distill_core.metrics.extractors import load_extractor, load_scorer
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe import Recipe, load_recipe
from distill_core.recipe.tables import NetworkConfig
from distill_core.training.checkpoint import load_latest
from distill_service.jobs import specs
from tests.helpers import REPOSITORY, tiny_context

TINY = NetworkConfig(
    name="DiTTransformer2DModel",
    args={"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "patch_size": 8},
)


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that any executed code of these tests would leave."""
    return tmp_path / "executed"


@pytest.fixture
def model(tmp_path) -> Path:
    """A good diffusers folder, to be spoilt."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    build_denoiser(TINY, parameterisation="edm", shape=(1, 8, 8), num_classes=3).save(folder)
    load_model(folder)
    return folder


def refused(call, *arguments) -> str:
    with pytest.raises(DistilleryError) as caught:
        call(*arguments)
    said = str(caught.value)
    assert "\n" not in said
    return said


def evil_module(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    )


def test_a_bomb_would_be_noticed(marker):
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


# -- recipes


CODE = ("os", "os.system", "builtins.eval", "../evil", "distill_core.api", "__import__('os')", "evil:Evil")


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize(
    "key", ["method", "network.name", "data.name", "teacher.recipe", "optim.teacher.name"]
)
def test_a_name_in_a_recipe_is_looked_up_and_never_imported(key, name, tmp_path, monkeypatch, marker):
    evil_module(tmp_path, marker)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def attempt() -> None:
        changes = {"steps": 1, "teacher.recipe": name} if key == "teacher.recipe" else {"steps": 1, key: name}
        build(
            load_recipe("dmd2" if key.startswith("teacher") else "edm_digits", changes),
            tiny_context(tmp_path),
        )

    refused(attempt)
    assert not marker.exists()


@pytest.mark.parametrize(
    "toml",
    [
        "method = 'edm'\nsteps = 1\n__class__ = 'x'",
        "method = 'edm'\nsteps = 1\n[config]\n__init__ = 1\nmodel_config = {}",
        "method = 'edm'\nsteps = " + "9" * 5000,
        "method = 'edm'\nsteps = inf",
        "method = 'edm'\nsteps = 1\nmethod = 'dmd2'",
        "method = 'edm'\nsteps = 1\ntitle = 'a\\u0000b'\nevil = 1",
        "a = " + "[" * 100_000,
        "x = " + "{a = " * 5_000,
        "method = 'edm'\nsteps = 1\n" + "\n".join(f"[config.{'a.' * 500}b{n}]" for n in range(50)),
        "x = '''" + "x" * 300_000 + "'''",
        "\ufeffmethod = 'edm'",
        "",
    ],
    ids=lambda toml: toml[:24].replace("\n", " "),
)
def test_a_hostile_toml_is_refused(toml):
    def attempt() -> None:
        try:
            build(Recipe.parse(specs.draft_train(toml=toml).spec["recipe"]), None)
        except RecursionError:  # said in a sentence where a request is read
            raise DistilleryError("the request is nested too deeply") from None

    refused(attempt)


# -- model folders


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl"])
def test_pickled_weights_are_not_opened(model, marker, suffix):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(pickle.dumps(Bomb(marker)))
    refused(load_model, model)
    assert not marker.exists()


def test_a_pickle_that_calls_itself_safetensors_is_not_opened(model, marker):
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    refused(load_model, model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["DiffusionPipeline", "utils", "UNet2DModel", "__builtins__", "os", ["evil", "Evil"]]
)
def test_a_schedulers_class_is_a_scheduler(model, marker, name):
    folder = model / "scheduler"
    evil_module(folder, marker)
    config = json.loads((folder / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({**config, "_class_name": name}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    assert "which is no scheduler" in refused(load_model, model)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["DiffusionPipeline", "evil.Evil", ["evil", "Evil"], None])
def test_a_networks_class_is_one_of_ours(model, marker, name):
    folder = model / "transformer"
    evil_module(folder, marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    assert "not supported" in refused(load_model, model)
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_extractor, load_scorer, load_model])
def test_a_folders_own_code_is_not_run(tmp_path, marker, load):
    folder = tmp_path / "remote"
    folder.mkdir()
    evil_module(folder, marker)
    maps = {name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoImageProcessor", "AutoTokenizer")}
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        values = {
            "model_type": "evil",
            "auto_map": maps,
            "image_processor_type": "Evil",
            "tokenizer_class": "Evil",
        }
        (folder / file).write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(b"")
    refused(load, folder)
    assert not marker.exists()


def test_a_picture_processors_own_code_is_not_run(tmp_path, marker):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path / "vit"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
    evil_module(folder, marker)
    values = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    refused(load_extractor, folder)
    assert not marker.exists()


def test_a_checkpoint_that_is_a_pickle_is_skipped(tmp_path, marker):
    folder = tmp_path / "checkpoints" / "000000001"
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "state.json").write_text(json.dumps({"step": 1, "method": "edm", "parts": ["student"]}))
    assert load_latest(folder.parent, method="edm") is None
    assert not marker.exists()


def test_a_graph_cannot_read_files_outside_its_folder(tmp_path):
    """External data of an ONNX file, which the sampler would hand to everybody as pixels."""
    import onnxruntime

    secret = tmp_path / "secret"
    secret.write_bytes(b"\x00" * 16)
    folder = tmp_path / "export"
    folder.mkdir()
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "../secret"
    node = helper.make_node("Add", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weights])
    onnx.save(helper.make_model(graph), str(folder / "denoiser.onnx"))
    with pytest.raises(Exception, match="(?i)external|escape|outside|path"):
        onnxruntime.InferenceSession(str(folder / "denoiser.onnx"), providers=["CPUExecutionProvider"])


# -- stores and data


def test_a_store_takes_no_pickle_and_no_link(model, tmp_path, marker):
    store = ArtifactStore(tmp_path / "store")
    (model / "optimizer.pt").write_bytes(pickle.dumps(Bomb(marker)))
    refused(store.publish, model, Manifest(name="x", kind="denoiser"))
    (model / "optimizer.pt").unlink()
    (model / "link").symlink_to("/etc/hostname")
    refused(store.publish, model, Manifest(name="x", kind="denoiser"))
    shutil.rmtree(tmp_path / "store", ignore_errors=True)


@pytest.mark.parametrize("source", ["images", "huggingface", "idx"])
@pytest.mark.parametrize("file", ["set.pkl", "set.pt", "set.npz", "set.npy", "set.joblib"])
def test_pickled_data_is_not_opened(tmp_path, marker, source, file):
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(marker)))
    refused(build_source, {"name": source, "path": str(tmp_path / file)})
    assert not marker.exists()


def test_poses_of_objects_are_not_unpickled(tmp_path, marker):
    np.save(tmp_path / "poses_bounds.npy", np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    refused(build_source, {"name": "capture", "path": str(tmp_path)})
    assert not marker.exists()


def test_a_data_sets_own_script_is_not_run(tmp_path, marker):
    folder = tmp_path / "set"
    folder.mkdir()
    evil_module(folder, marker)
    shutil.copy(folder / "evil.py", folder / "set.py")
    (folder / "train.parquet").write_bytes(b"PAR1")
    refused(build_source, {"name": "huggingface", "path": str(folder)})
    assert not marker.exists()


# -- our own source


def sources() -> list[Path]:
    return [path for root in ("libs", "services") for path in (REPOSITORY / root).rglob("*.py")]


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Names of called functions, as written: `torch.load`, `eval`."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def test_no_code_of_ours_unpickles_or_evaluates():
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "joblib.load",
    }
    forbidden |= {"os.system", "os.popen", "yaml.load", "marshal.loads", "shelve.open"}
    for path in sources():
        used = {name for name, _ in calls(path)}
        assert not used & forbidden, f"{path.relative_to(REPOSITORY)} calls {used & forbidden}"
        for name, call in calls(path):
            shell = [word.arg for word in call.keywords if word.arg in ("shell", "allow_pickle")]
            values = [word.value for word in call.keywords if word.arg in shell]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in values), (
                path,
                name,
            )


def test_nothing_is_fetched_from_a_hub_and_no_folders_code_is_trusted():
    """Each `from_pretrained` reads local files alone; peft's has no such option and is asked for existing folders."""
    for path in sources():
        for name, call in calls(path):
            if not name.endswith("from_pretrained") or path.name == "peft_io.py":
                continue
            options = {word.arg: word.value for word in call.keywords}
            local = options.get("local_files_only")
            assert isinstance(local, ast.Constant), f"{path.name}: {ast.unparse(call)}"
            assert local.value is True
            if "Auto" in name:
                assert options["trust_remote_code"].value is False  # type: ignore[attr-defined]
