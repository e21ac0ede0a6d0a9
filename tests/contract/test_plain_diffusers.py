"""What a student's folder makes in plain diffusers is what its sampler makes of the same noise, for every method."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import numpy as np
import peft
import pytest
import torch
from PIL import Image

from distill_core.building import build
from distill_core.diffusion.sampling import sample
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.networks.diffusers_plain import plain_use
from distill_core.networks.levels import few_step_sampler, student_levels
from distill_core.recipe import load_recipe
from distill_core.recipe.tables import NetworkConfig
from tests.helpers import TINY_NETWORKS, tiny_context, tiny_sdxl, tiny_text_to_image

PROMPTS = ["a red wall", "a blue wall"]
ALWAYS = {"threads": 1, "batch_size": 4, "steps": 1, "evaluate": {}, "publish": {"name": "student"}}
OFF = {"config.guidance_min": 1.0, "config.guidance_max": 1.0}  # a teacher without conditions has no guidance
METHODS = {  # a shipped recipe, and what of it cannot be said of these teachers
    "dmd2": {"config.gan_weight": 0.0},
    "dmd2_4step": {},
    "f_distill": {"student": {}, "config.divergence": "reverse_kl", "config.features": "fake_score"},
    "disback": {"student": {}},
    "hipa": {"pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2},
    "hyper_sd_score": {"pairs": {"count": 4, "num_steps": 1}},
    "instaflow": {"pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2},
    "rf_pp": {"pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2, "config.features": "off"},
    "slimflow": {"student": {}, "pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2},
    "boss": {"pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2},
    "boot": {},
    "swiftbrush": {},
    "pg_sb": {},
    "nasa": {"config.negative_prompts": []},
    "tsm": {"student": {}},
    "progressive": {"config.start_steps": 4, "config.end_steps": 4},
    "consistency": {},
    "lcm": {"config.start": None, "config.guidance": 3.0},
    "tscd": {},
    "mlcm": {},
    "scott": {},
    "slam": {},
}
TUNED = {
    "pso": {},
    "hyper_sd_feedback": {"config.perception_weight": 0.0, "config.threshold": 0.5},
}
KINDS = ("sd_v", "sdxl", "ddpm")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def teachers(root):
    return {
        "sd": tiny_text_to_image(root / "sd"),
        "sd_v": tiny_text_to_image(root / "sd_v", prediction="v_prediction"),
        "sdxl": tiny_sdxl(root / "sdxl"),
        "ddpm": tiny_ddpm(root / "ddpm"),
    }


@pytest.fixture(scope="module")
def pictures(root):
    folder = root / "pictures"
    folder.mkdir()
    for index in range(8):
        colour = ["red", "blue"][index % 2]
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} wall")
    return {"name": "images", "path": str(folder)}


def tiny_ddpm(folder):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_end=0.013)).save_pretrained(folder)
    return folder


def student_of(name, teacher, data, root, **changes):
    """The folder that the shipped recipe saves for this teacher, before its first step."""
    recipe = load_recipe(name, {**ALWAYS, "data": data, **changes, "teacher.path": str(teacher)})
    method, _ = build(recipe, tiny_context(root))
    folder = root / "students" / f"{teacher.name}-{name}"
    method.main.save(folder)
    return folder


def difference(folder, num_steps=None, pipeline=None):
    """The mean difference, of 255, of the pictures of plain diffusers and of the sampler; and the pipeline."""
    denoiser = load_denoiser(folder)
    pipeline = pipeline or diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    spec, image = denoiser.sampler, denoiser.image
    count, guidance = num_steps or spec.num_steps, min(spec.guidance, 1.0)
    first = torch.Generator().manual_seed(5)
    z = torch.randn(2, image.channels, image.height, image.width, generator=first)
    again = torch.Generator().manual_seed(5)
    if isinstance(pipeline, diffusers.DDPMPipeline):
        cond = denoiser.null_cond(2)
        theirs = pipeline(2, again, num_inference_steps=count, output_type="pt").images
    else:
        cond = denoiser.encode_prompts(PROMPTS)
        again.set_state(first.get_state())
        told = named_steps(denoiser, type(pipeline).__name__, count)
        options = {"guidance_scale": 0, "latents": z, "generator": again, "output_type": "pt"}
        theirs = pipeline(PROMPTS, height=16, width=16, **told, **options).images

    def draw(k):
        return torch.randn(z.shape, generator=first) if k else z

    with torch.no_grad():
        ours = denoiser.decode(sample(denoiser.bound(cond, guidance), spec, draw, count)).clamp(-1, 1)
    assert float(ours.std()) > 0.01, "a constant picture would hide every mistake"
    return float((theirs - (ours + 1) / 2).abs().mean() * 255), pipeline


def named_steps(denoiser, pipeline, count):
    """What the card says of this number of steps."""
    use = plain_use(
        denoiser.scheduler, denoiser.schedule, denoiser.sampler, denoiser.parameterisation, pipeline
    )
    named = use.steps.get(count)
    return {"timesteps": list(named)} if named else {"num_inference_steps": count}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_student_makes_the_same_picture_in_plain_diffusers(name, kind, teachers, pictures, root):
    changes = dict(METHODS[name])
    if kind == "ddpm" and name in ("pg_sb", "nasa"):
        changes |= OFF
    folder = student_of(name, teachers[kind], pictures, root, **changes)
    if (
        name == "tsm" and kind == "ddpm"
    ):  # no few-step student: many steps of a teacher, and diffusers' are its own
        assert "takes others" in (folder / "README.md").read_text()
        return
    off, _ = difference(folder)
    assert off <= 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TUNED))
def test_a_student_that_is_tuned_further_keeps_its_picture(name, kind, teachers, pictures, root):
    first = student_of("dmd2", teachers[kind], pictures, root, **METHODS["dmd2"])
    lora = {"rank": 2, "alpha": 2.0, "targets": "all-linear"}
    changes = {**TUNED[name], "student": {"path": str(first), "lora": lora}}
    values = {**ALWAYS, "data": pictures, **changes}
    recipe = load_recipe(name, values)
    method, _ = build(recipe.model_copy(update={"extractor": None}), tiny_context(root))
    folder = root / "students" / f"{kind}-{name}"
    method.main.save(folder)
    assert difference(folder)[0] <= 0.1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_lcm_lora_over_its_base_is_sampled_by_plain_diffusers_lcm_scheduler(
    kind, teachers, pictures, root
):
    changes = {"data": pictures, "config.start": None, "teacher.path": str(teachers[kind])}
    method, _ = build(load_recipe("lcm", {**ALWAYS, **changes}), tiny_context(root))
    torch.manual_seed(0)
    for factor in method.student.parameters():  # as if it had been trained
        torch.nn.init.normal_(factor, std=0.2)
    folder = root / "students" / f"{kind}-lcm-lora"
    method.main.save(folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teachers[kind])
    pipeline.scheduler = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    without, _ = difference(folder, 4, pipeline)
    pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, folder / "adapter")
    assert difference(folder, 4, pipeline)[0] <= 0.1
    assert without > 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("levels", [(), (14.0, 3.0, 1.0, 0.3), (7.7, 0.9), (2.0,)])
def test_every_number_of_steps_is_that_of_the_sampler(levels, kind, teachers, tmp_path):
    denoiser = load_denoiser(teachers[kind])
    chosen = student_levels(denoiser, levels, count=8)
    denoiser.sampler = few_step_sampler(denoiser, chosen)
    denoiser.save(tmp_path)
    for count in range(1, len(chosen) + 1):
        assert difference(tmp_path, count)[0] <= 0.1


def test_a_level_between_two_timesteps_is_met_too(teachers, tmp_path):
    denoiser = load_denoiser(teachers["sd"])
    denoiser.sampler = few_step_sampler(denoiser, (13.0 * 1.004,))  # as a folder of an older release has it
    denoiser.save(tmp_path)
    off, pipeline = difference(tmp_path)
    assert off <= 0.1
    assert isinstance(pipeline.scheduler, diffusers.EulerDiscreteScheduler)


@pytest.mark.parametrize(("levels", "opens"), [((), True), ((5.0,), False), ((80.0, 1.0), False)])
def test_an_edm_pipeline_opens_where_it_begins_with_the_sampler_s_noise(levels, opens, teachers, tmp_path):
    """Diffusers' noise is sqrt(1 + sigma^2) large and ours sigma: alike at 80, and 2 % apart at 5."""
    shutil.copytree(teachers["sdxl"], tmp_path / "edm")
    diffusers.EDMEulerScheduler().save_pretrained(tmp_path / "edm" / "scheduler")
    index = tmp_path / "edm" / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "EDMEulerScheduler"))
    denoiser = load_denoiser(tmp_path / "edm")
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, levels))
    denoiser.save(tmp_path / "student")
    assert (tmp_path / "student" / "model_index.json").exists() == opens
    if opens:
        assert difference(tmp_path / "student")[0] <= 0.1


@pytest.mark.parametrize("count", [1, 4])
def test_a_schedule_that_ends_without_signal_is_met(count, teachers, tmp_path):
    shutil.copytree(teachers["sd_v"], tmp_path / "zero")
    options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = diffusers.DDIMScheduler(**options, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path / "zero" / "scheduler")
    denoiser = load_denoiser(tmp_path / "zero")
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, count=count))
    denoiser.save(tmp_path / "student")
    assert difference(tmp_path / "student")[0] <= 0.1


def test_a_pipeline_that_does_not_read_its_codecs_scale_is_not_named(teachers, tmp_path):
    moments = {"latents_mean": [1.0, -2.0, 0.5, 3.0], "latents_std": [2.0, 3.0, 0.5, 1.5]}
    cases = {("sd", "shift"): {"shift_factor": 0.3}, ("sd", "moments"): moments, ("sdxl", "moments"): moments}
    for (kind, name), scale in cases.items():
        folder = tmp_path / f"{kind}-{name}"
        shutil.copytree(teachers[kind], folder)
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | scale))
        denoiser = load_denoiser(folder)
        denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser))
        denoiser.save(folder / "student")
        assert (folder / "student" / "model_index.json").exists() == (kind == "sdxl")
    assert difference(tmp_path / "sdxl-moments" / "student")[0] <= 0.1


def test_a_saved_scheduler_keeps_the_whole_schedule(teachers, tmp_path):
    """A student may be a teacher again: of all the levels that its own teacher knew."""
    denoiser = load_denoiser(teachers["sdxl"])
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, (3.0,)))
    denoiser.save(tmp_path)
    assert load_denoiser(tmp_path).schedule.same_as(denoiser.schedule)
    assert torch.equal(load_denoiser(tmp_path).schedule.log_sigmas, denoiser.schedule.log_sigmas)


def code_of(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.M | re.S)
    return code


def run_card(folder, monkeypatch):
    """The variables of the card's code, run where it lies."""
    monkeypatch.chdir(folder)
    variables: dict[str, object] = {}
    exec(compile(code_of(folder), "README.md", "exec"), variables)
    return variables


@pytest.mark.parametrize("kind", ["sd", "ddpm"])
def test_the_code_of_a_card_opens_the_folder_as_a_pipeline(kind, teachers, tmp_path, monkeypatch):
    denoiser = load_denoiser(teachers[kind])
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, count=2))
    denoiser.save(tmp_path)
    assert run_card(tmp_path, monkeypatch)["picture"].size == (16, 16)
    assert "num_inference_steps=2" in code_of(tmp_path)


NETWORKS = TINY_NETWORKS | {
    "UNet2DConditionModel": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 1,
        "norm_num_groups": 4,
    },
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("parameterisation", ["edm", "flow", "eps", "v"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_code_of_a_card_is_the_sampler_where_diffusers_has_no_pipeline(
    name, parameterisation, few, tmp_path, monkeypatch
):
    torch.manual_seed(1)
    prompts = ["a photograph", "a wall"] if name == "UNet2DConditionModel" else None
    denoiser = build_denoiser(
        NetworkConfig(name=name, args=NETWORKS[name]),
        parameterisation=parameterisation,
        shape=(1, 8, 8),
        num_classes=None if prompts else 3,
        prompts=prompts,
    )
    for parameter in denoiser.parameters():  # a new DiT answers nothing but zeros
        torch.nn.init.normal_(parameter, std=0.2)
    if few:
        denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, (7.0,)))
    else:
        changes = {"kind": "euler", "num_steps": 3, "sigma_min": 0.1, "sigma_max": 9.0}
        scale = denoiser.schedule.start_scale(9.0)
        denoiser.sampler = denoiser.sampler.model_copy(update={**changes, "noise_scale": scale})
    denoiser.save(tmp_path)
    assert not (tmp_path / "model_index.json").exists()

    variables = run_card(tmp_path, monkeypatch)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"class_label": torch.arange(4) % 3}
    if prompts:
        cond = denoiser.encode_prompts(["a photograph"] * 4)

    def denoise(x, sigma):
        return denoiser(x, torch.full((4,), sigma), cond)

    with torch.no_grad():
        wanted = sample(denoise, denoiser.sampler, lambda k: z, denoiser.sampler.num_steps)
    torch.testing.assert_close(variables["x0"], wanted, atol=2e-3, rtol=2e-3)


def test_a_folder_whose_pictures_no_pipeline_makes_has_no_index(teachers, tmp_path):
    denoiser = load_denoiser(teachers["ddpm"])
    denoiser.sampler = few_step_sampler(denoiser, student_levels(denoiser, (9.0, 0.4)))
    denoiser.save(tmp_path / "unevenly")  # a DDPMPipeline takes no timesteps
    assert not (tmp_path / "unevenly" / "model_index.json").exists()
    assert "opens part by part" in (tmp_path / "unevenly" / "README.md").read_text()
    for scheduler in (diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        folder = tmp_path / type(scheduler).__name__
        diffusers.DDPMPipeline(denoiser.network, diffusers.DDPMScheduler()).save_pretrained(folder)
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").unlink()
        other = load_denoiser(folder)
        other.save(folder / "again")
        assert not (folder / "again" / "model_index.json").exists()


def test_an_adapter_alone_says_which_scheduler_goes_with_it(teachers, pictures, root, monkeypatch):
    changes = {"pairs": {"count": 4, "num_steps": 1}, "config.held_out": 2, "publish": {"name": "student"}}
    recipe = load_recipe("hipa", {**ALWAYS, "data": pictures, **changes, "teacher.path": str(teachers["sd"])})
    method, _ = build(recipe, tiny_context(root))
    torch.nn.init.normal_(next(value for name, value in method.student.lora.items() if "lora_B" in name))
    method.student.form = "adapter"
    folder = root / "adapter-alone"
    method.main.save(folder)
    assert not (folder / "unet").exists()
    code = code_of(folder).replace("BASE", str(teachers["sd"]))
    monkeypatch.chdir(folder)
    variables: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), variables)
    spec, z = method.student.sampler, variables["latents"]
    with torch.no_grad():
        cond = method.student.encode_prompts(["a photograph"])
        x0 = method.student(z * spec.noise_scale, torch.tensor(spec.sigmas), cond)
        wanted = (method.student.decode(x0)[0].clamp(-1, 1) + 1) * 127.5
    made = torch.from_numpy(np.array(variables["picture"])).permute(2, 0, 1)
    assert float((made - wanted).abs().mean()) <= 0.6  # rounded to whole numbers


def test_the_expert_of_a_routed_model_is_opened_as_its_card_says(teachers, pictures, root, monkeypatch):
    changes = {"student": {}, "config.parts": 1}
    folder = student_of("msd", teachers["sdxl"], pictures, root, **changes)
    assert run_card(folder, monkeypatch)["picture"].size == (16, 16)
    assert not (folder / "experts" / "0" / "README.md").exists()


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscrete", "DPMSolverMultistep", "FlowMatchEulerDiscrete", "UniPCMultistep"]
)
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "UNet2DModel"])
def test_the_code_of_a_card_is_the_loop_of_a_foreign_folders_scheduler(
    name, scheduler, tmp_path, monkeypatch
):
    torch.manual_seed(1)
    flows = scheduler == "FlowMatchEulerDiscrete"
    denoiser = build_denoiser(
        NetworkConfig(name=name, args=NETWORKS[name]),
        parameterisation="flow" if flows else "eps",
        shape=(1, 8, 8),
        num_classes=3,
    )
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    slot = "transformer" if "Transformer" in name else "unet"
    denoiser.network.save_pretrained(tmp_path / "foreign" / slot)
    getattr(diffusers, f"{scheduler}Scheduler")().save_pretrained(tmp_path / "foreign" / "scheduler")
    foreign = load_denoiser(tmp_path / "foreign")
    assert foreign.sampler.kind == "scheduler"
    foreign.save(tmp_path / "again")
    variables = run_card(tmp_path / "again", monkeypatch)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"class_label": torch.arange(4) % foreign.cond.num_classes}

    with torch.no_grad():
        wanted = sample(foreign.bound(cond, 1.0), foreign.sampler, lambda k: z, foreign.sampler.num_steps)
    torch.testing.assert_close(variables["x0"], wanted, atol=2e-3, rtol=2e-3)
