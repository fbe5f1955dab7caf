"""Pipelines of diffusers with tiny random networks: SolversScheduler in them is from_diffusers and run, and diffusers' own where theirs is right."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

import solvers as sv

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from solvers.adapters.diffusers import SolversScheduler, from_diffusers

pytestmark = pytest.mark.filterwarnings(
    # diffusers converts 0-d arrays, passes on deprecated arguments, and names its own deprecations
    "ignore::FutureWarning",
    "ignore:.*__array__.*:DeprecationWarning",
    "ignore:Conversion of an array:DeprecationWarning",
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = BETAS | {"prediction_type": "v_prediction"}
METHODS = ("ddim", "dpm_solver_pp_2m", "unipc_2", "heun", "recommended")
ROUNDING = 2e-5  # of states of order 1 after ten steps in float32 of networks that double an error at most


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def made(network, **config):
    """A random network, the same every time, and the global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network(**config).eval()
        for weight in network.parameters():  # no layer begins at zero
            torch.nn.init.normal_(weight, std=0.15) if weight.ndim > 1 else weight.data.add_(
                0.02 * torch.randn_like(weight)
            )
    return network.requires_grad_(False)


def unet():
    return made(
        UNet2DModel,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


def dit():
    return made(
        DiTTransformer2DModel,
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        attention_bias=True,
        num_embeds_ada_norm=1000,
    )


def conditional_unet():
    return made(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def autoencoder(**config):
    return made(
        AutoencoderKL,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler
    return pipe


def ours(method, grid="trailing", **config):
    return SolversScheduler(method=method, grid=grid, **(V | config))


def differ(a, b, least=1e-2):
    """Two results are not the same within some ten thousand roundings."""
    return float((a - b).abs().max()) > least


# --- DDIMPipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    return quiet(DDIMPipeline(unet(), DDIMScheduler(**V)))


def image_of(x):
    return (x / 2 + 0.5).clamp(0, 1)


def pixel_run(pipe, scheduler, steps=10, **options):
    with_scheduler(pipe, scheduler)
    return pipe(2, seeded(), num_inference_steps=steps, output_type="pt", **options).images


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_pipeline_is_run(pixels, method, prediction):
    scheduler = ours(method, prediction_type=prediction)
    image = pixel_run(pixels, scheduler)
    model, _ = from_diffusers(pixels.unet, scheduler.config)
    x = sv.run(scheduler.plan, model, normals(2, 3, 8, 8))
    assert_close(image, image_of(x), rtol=0, atol=ROUNDING)
    inside = ((image > 0) & (image < 1)).float().mean()
    assert inside > 0.4  # it is not the clipping that makes them equal
    fewer = pixel_run(pixels, ours(method, prediction_type=prediction), steps=9)
    assert differ(image, fewer, 1e-4)


def test_ddim_pipeline_by_default_is_sample(pixels):
    scheduler = SolversScheduler.from_config(DDIMScheduler(**V).config, clip_sample=True)
    image = pixel_run(pixels, scheduler)
    model, schedule = from_diffusers(pixels.unet, scheduler.config)
    x = sv.sample(model, normals(2, 3, 8, 8), schedule, 10)
    assert_close(image, image_of(x), rtol=0, atol=ROUNDING)


PEERS = [
    (DDIMScheduler, {"clip_sample": False}, "ddim", {}),
    (DPMSolverMultistepScheduler, {"solver_order": 2, "lower_order_final": False}, "dpm_solver_pp_2m", {}),
    (UniPCMultistepScheduler, {"solver_order": 2}, "unipc_2", {"final": "lower"}),
]


def test_ddim_pipeline_with_their_scheduler_on_the_same_grid(pixels):
    """It passes eta on, which no other scheduler of theirs takes."""
    theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **V)
    image, reference = pixel_run(pixels, ours("ddim")), pixel_run(pixels, theirs)
    assert_close(image, reference, rtol=0, atol=ROUNDING)
    assert differ(image, pixel_run(pixels, ours("heun")), 1e-3)


def test_ddim_pipeline_clips_and_passes_its_generator_on(pixels):
    theirs = DDIMScheduler(timestep_spacing="trailing", **V, clip_sample=True)
    image = pixel_run(
        pixels, SolversScheduler.from_config(theirs.config, method="ddim", grid="trailing", clip_sample=True)
    )
    assert_close(image, pixel_run(pixels, theirs, use_clipped_model_output=True), rtol=0, atol=ROUNDING)

    theirs = DDIMScheduler(timestep_spacing="trailing", **V, clip_sample=False)
    image = pixel_run(pixels, ours("ddim", options={"eta": 0.7}))
    assert_close(image, pixel_run(pixels, theirs, eta=0.7), rtol=0, atol=5e-5)
    assert differ(image, pixel_run(pixels, ours("ddim")))
    with pytest.raises(ValueError, match="the noise belongs to the method"):
        pixel_run(pixels, ours("ddim"), eta=0.7)


def test_ddim_pipeline_takes_a_generator_per_sample(pixels):
    with_scheduler(pixels, ours("ddpm"))
    both = pixels(2, [seeded(1), seeded(2)], num_inference_steps=8, output_type="pt").images
    alone = pixels(1, [seeded(2)], num_inference_steps=8, output_type="pt").images
    assert_close(both[1:], alone, rtol=0, atol=ROUNDING)


def test_a_pipeline_in_half_precision_is_run_with_a_network_in_half_precision(pixels):
    """The pipeline hands back the tensor it got, and the state stays in float32: 100 steps lose no more than their network does."""
    half = quiet(DDIMPipeline(unet().to(torch.bfloat16), DDIMScheduler(**V)))
    with_scheduler(half, scheduler := ours("unipc_2"))
    images = half(2, seeded(), num_inference_steps=100, output_type="pt").images
    x = normals(2, 3, 8, 8, dtype=torch.bfloat16)
    model, _ = from_diffusers(half.unet, scheduler.config)
    expected = sv.run(scheduler.plan, model, x)
    assert images.dtype == torch.bfloat16
    assert_close(images, image_of(expected.to(torch.bfloat16)), rtol=0, atol=1e-2)


def test_a_pipeline_in_inference_mode(pixels):
    expected = pixel_run(pixels, ours("unipc_2"))
    with torch.inference_mode():
        image = pixel_run(pixels, ours("unipc_2"))
    assert torch.equal(image, expected)


def test_the_pipeline_that_makes_every_scheduler_a_ddim_keeps_our_settings():
    """In the part of its config that DDIMScheduler does not know."""
    scheduler = ours("heun", seed=4)
    pipe = quiet(DDIMPipeline(unet(), scheduler))
    assert type(pipe.scheduler) is DDIMScheduler
    assert (pipe.scheduler.config["method"], pipe.scheduler.config["grid"]) == ("heun", "trailing")
    back = SolversScheduler.from_config(pipe.scheduler.config)
    assert {name: back.config[name] for name in V} == V
    assert (back.config.method, back.config.grid, back.config.seed) == ("heun", "trailing", 4)
    assert torch.equal(pixel_run(pipe, back), pixel_run(pipe, scheduler))


# --- DiTPipeline -----------------------------------------------------------------------------------------------------

LABELS = [3, 721]


@pytest.fixture(scope="module")
def classes():
    return quiet(DiTPipeline(dit(), autoencoder(), DDIMScheduler(**V, clip_sample=False)))


def class_run(pipe, scheduler, guidance=1.0, steps=10):
    with_scheduler(pipe, scheduler)
    return pipe(LABELS, guidance, seeded(), steps, output_type="pt").images


def decoded(vae, latents):
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def guide(scale):
    """Classes against none, as the pipeline has it."""
    condition, null = ({"class_labels": torch.tensor(labels)} for labels in (LABELS, [1000, 1000]))
    return lambda model: sv.guidance.classifier_free(model, condition, null, scale)


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("method", METHODS)
def test_dit_pipeline_is_run(classes, method, guidance):
    """With learned variances, which the pipeline cuts off and from_diffusers knows for what they are."""
    scheduler = ours(method)
    image = class_run(classes, scheduler, guidance)
    model, _ = from_diffusers(classes.transformer, scheduler.config, guide=guide(guidance))
    assert model.variance == "range"
    x = sv.run(scheduler.plan, model, normals(2, 4, 8, 8))
    assert_close(image, decoded(classes.vae, x), rtol=0, atol=ROUNDING)
    unguided, _ = from_diffusers(classes.transformer, scheduler.config, guide=guide(1.02 * guidance))
    assert differ(x, sv.run(scheduler.plan, unguided, normals(2, 4, 8, 8)), 1e-3)


@pytest.mark.parametrize(
    ("theirs", "config", "method", "options"), PEERS, ids=lambda v: getattr(v, "__name__", "")
)
def test_dit_pipeline_with_their_scheduler_on_the_same_grid(classes, theirs, config, method, options):
    theirs = theirs(timestep_spacing="trailing", **V, **config)
    image = class_run(classes, ours(method, options=options), 4.0)
    assert_close(image, class_run(classes, theirs, 4.0), rtol=0, atol=ROUNDING)


def test_dit_pipeline_bounds_what_is_guided(classes):
    """And does not guide what is bounded."""
    scheduler = ours("unipc_2", clip_sample=True, clip_sample_range=0.5)
    image = class_run(classes, scheduler, 4.0)
    model, _ = from_diffusers(classes.transformer, scheduler.config, guide=guide(4.0))
    x = sv.run(scheduler.plan, model, normals(2, 4, 8, 8))
    assert_close(image, decoded(classes.vae, x), rtol=0, atol=ROUNDING)
    assert x.abs().max() <= 0.5 + 1e-6
    free, _ = from_diffusers(classes.transformer, V, guide=guide(4.0))
    assert differ(x, sv.run(scheduler.plan, free, normals(2, 4, 8, 8)))


def test_dit_pipeline_passes_no_generator_on(classes):
    """So noise has to come of a seed."""
    with pytest.raises(ValueError, match=r"make the scheduler with seed=0"):
        class_run(classes, ours("ddpm"))
    image = class_run(classes, ours("ddpm", seed=0))
    assert torch.equal(class_run(classes, ours("ddpm", seed=0)), image)
    assert differ(class_run(classes, ours("ddpm", seed=1)), image)


def test_pipelines_in_threads_share_a_scheduler(classes):
    """At once, with numbers of steps of their own: theirs raise IndexError (failures.md H1)."""
    expected = {n: class_run(classes, ours("unipc_2"), steps=n) for n in (5, 6, 7, 8)}
    shared, results = ours("unipc_2"), {}
    with_scheduler(classes, shared)
    barrier = threading.Barrier(4)

    def work(n):
        pipe = quiet(DiTPipeline(classes.transformer, classes.vae, shared))
        barrier.wait()
        results[n] = pipe(LABELS, 1.0, seeded(), n, output_type="pt").images

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[n], image) for n, image in expected.items())


FRESH = """
import sys, torch
torch.set_num_threads(1)
import solvers.adapters.diffusers  # diffusers imports no module only because a file names it
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
assert type(pipe.scheduler).__name__ == "SolversScheduler", pipe.scheduler
torch.save(pipe([3, 721], 4.0, torch.Generator().manual_seed(0), 10, output_type="pt").images, sys.argv[2])
"""


def test_a_saved_pipeline_makes_the_same_images_in_a_new_process(tmp_path):
    """Bit by bit, with method, options, grid and seed as they were."""
    pipe = quiet(DiTPipeline(dit(), autoencoder(), ours("ddim", options={"eta": 0.5}, seed=2)))
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(DiTPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded.scheduler) is SolversScheduler
    first, image = (p(LABELS, 4.0, seeded(), 10, output_type="pt").images for p in (pipe, loaded))
    assert_close(first, image, rtol=0, atol=ROUNDING)  # weights lie elsewhere in memory once they are loaded
    result = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "pipe", tmp_path / "images.pt"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), image)


def test_swapping_schedulers_back_and_forth(classes):
    """By from_config, as pipelines are used; our settings come back with ours."""
    first = ours("dpm_solver_pp_2m")
    expected = class_run(classes, first)
    scheduler = first
    for other in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        theirs = other.from_config(scheduler.config, timestep_spacing="trailing")
        assert {name: theirs.config[name] for name in V} == V
        assert differ(class_run(classes, theirs), class_run(classes, other(timestep_spacing="trailing")))
        scheduler = SolversScheduler.from_config(theirs.config)
        assert torch.equal(class_run(classes, scheduler), expected)
    other = SolversScheduler.from_config(scheduler.config, method="ddim")
    assert (other.config.method, scheduler.config.method) == ("ddim", "dpm_solver_pp_2m")
    assert differ(class_run(classes, other), expected, 1e-4)


# --- Stable Diffusion: text, image to image, inpainting --------------------------------------------------------------

PROMPT, NEGATIVE = normals(1, 5, 8, seed=1), normals(1, 5, 8, seed=2)
TEXT = {
    "prompt_embeds": PROMPT,
    "negative_prompt_embeds": NEGATIVE,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
STRENGTHS = (0.3, 0.8, 1.0)


@pytest.fixture(scope="module")
def parts():
    return {
        "vae": autoencoder(),
        "unet": conditional_unet(),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable(kind, parts, scheduler):
    return quiet(kind(scheduler=scheduler, **parts))


def prompted(parts, scheduler, guidance=3.0):
    condition, null = ({"encoder_hidden_states": embeds} for embeds in (PROMPT, NEGATIVE))
    model, schedule = from_diffusers(
        parts["unet"],
        scheduler.config,
        guide=lambda model: sv.guidance.classifier_free(model, condition, null, guidance),
    )
    return model, schedule


@pytest.mark.parametrize("method", METHODS)
def test_stable_diffusion_is_run(parts, method):
    scheduler = ours(method)
    latents = stable(StableDiffusionPipeline, parts, scheduler)(
        generator=seeded(), num_inference_steps=10, **TEXT
    ).images
    model, _ = prompted(parts, scheduler)
    assert_close(latents, sv.run(scheduler.plan, model, normals(1, 4, 8, 8)), rtol=0, atol=10 * ROUNDING)
    assert differ(
        latents, sv.run(scheduler.plan, prompted(parts, scheduler, 3.05)[0], normals(1, 4, 8, 8)), 1e-3
    )


@pytest.mark.parametrize(
    ("theirs", "config", "method", "options"), PEERS, ids=lambda v: getattr(v, "__name__", "")
)
def test_stable_diffusion_with_their_scheduler_on_the_same_grid(parts, theirs, config, method, options):
    theirs = theirs(timestep_spacing="trailing", steps_offset=1, **V, **config)
    if type(theirs) is DDIMScheduler:  # there the offset is taken for leading alone
        assert theirs.config.set_alpha_to_one
    pipe = stable(StableDiffusionPipeline, parts, theirs)
    reference = pipe(generator=seeded(), num_inference_steps=10, **TEXT).images
    with_scheduler(
        pipe, SolversScheduler.from_config(theirs.config, method=method, options=options, grid="trailing")
    )
    latents = pipe(generator=seeded(), num_inference_steps=10, **TEXT).images
    assert_close(latents, reference, rtol=0, atol=10 * ROUNDING)


def test_stable_diffusion_takes_timesteps_and_sigmas(parts):
    """As its callers may give them in place of a number of steps."""
    pipe = stable(StableDiffusionPipeline, parts, scheduler := ours("unipc_2"))
    pipe(generator=seeded(), timesteps=[999, 700, 300, 20], **TEXT)
    assert scheduler.timesteps.tolist() == [999, 700, 300, 20]
    steps = scheduler.plan
    pipe(generator=seeded(), sigmas=(steps.sigma / steps.alpha)[:-1].tolist(), **TEXT)
    assert scheduler.plan.allclose(steps, rtol=1e-9, atol=1e-9)


def test_a_stochastic_method_draws_from_the_pipelines_generator(parts):
    pipe = stable(StableDiffusionPipeline, parts, ours("ddpm"))
    text = TEXT | {"latents": normals(1, 4, 8, 8)}
    one, same, other = (pipe(generator=seeded(s), num_inference_steps=8, **text).images for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert differ(one, other)


def test_a_seed_gives_an_image_that_does_not_depend_on_its_batch(parts):
    pipe = stable(StableDiffusionPipeline, parts, ours("ddpm", seed=3))
    latents = normals(3, 4, 8, 8)
    three = pipe(latents=latents, num_images_per_prompt=3, num_inference_steps=8, **TEXT).images
    one = pipe(latents=latents[:1], num_inference_steps=8, **TEXT).images
    assert_close(three[:1], one, rtol=0, atol=10 * ROUNDING)


BUILDS = {
    "ddim": sv.ddim,
    "dpm_solver_pp_2m": lambda schedule, times: sv.dpm_solver_pp(schedule, times, order=2),
    "unipc_2": lambda schedule, times: sv.unipc(schedule, times, order=2),
    "heun": sv.heun,
    "recommended": sv.recommended,
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_image_to_image_is_a_run_from_a_later_time(parts, method, strength):
    """Of the same method on what is left of the grid, from the image noised to the level of its first call."""
    steps, scheduler = 10, ours(method)
    pipe = stable(StableDiffusionImg2ImgPipeline, parts, scheduler)
    image = 0.5 * normals(1, 4, 8, 8, seed=5)  # of as many channels as latents have, so taken for some
    latents = pipe(
        image=image, strength=strength, generator=seeded(), num_inference_steps=steps, **TEXT
    ).images

    model, schedule = prompted(parts, scheduler)
    times = sv.grids.trailing(schedule, steps)[steps - int(steps * strength) :]
    plan = BUILDS[method](schedule, times)
    assert scheduler.plan == plan
    x = sv.noised(image, schedule, times[0], normals(1, 4, 8, 8))
    assert_close(latents, sv.run(plan, model, x), rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize(
    "method", ["ddpm", "dpm_solver_pp_2s", "dpm_solver_3", "dpm_solver_pp_3m_ramp", "sa_solver"]
)
@pytest.mark.parametrize("grid", [None, "karras"])
def test_image_to_image_by_other_methods(parts, method, grid):
    scheduler = ours(method, grid=grid, seed=0)
    pipe = stable(StableDiffusionImg2ImgPipeline, parts, scheduler)
    for strength in STRENGTHS:
        latents = pipe(image=normals(1, 4, 8, 8), strength=strength, num_inference_steps=10, **TEXT).images
        assert latents.isfinite().all()
        assert scheduler.step_index == 10 * scheduler.order + 1 - scheduler.order


def test_image_to_image_is_theirs(parts):
    theirs = DDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False, **V)
    run = {"image": normals(1, 4, 8, 8), "strength": 0.6, "num_inference_steps": 10, **TEXT}
    pipe = stable(StableDiffusionImg2ImgPipeline, parts, theirs)
    reference = pipe(generator=seeded(), **run).images
    with_scheduler(pipe, ours("ddim"))
    assert_close(pipe(generator=seeded(), **run).images, reference, rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_inpainting_keeps_what_the_mask_keeps(parts, method, strength):
    """And repaints the rest as if there were no mask."""
    pipe = stable(StableDiffusionInpaintPipeline, parts, scheduler := ours(method))
    image, mask = torch.rand(1, 3, 16, 16, generator=seeded(7)), torch.zeros(1, 1, 16, 16)
    half = mask.clone()
    half[..., 8:] = 1
    run = {"image": image, "strength": strength, "num_inference_steps": 10, "height": 16, "width": 16, **TEXT}
    kept, mixed, repainted = (
        pipe(mask_image=m, generator=seeded(), **run).images for m in (mask, half, torch.ones_like(mask))
    )
    generator = seeded()
    encoded = (
        parts["vae"].encode(2 * image - 1).latent_dist.sample(generator) * parts["vae"].config.scaling_factor
    )
    assert_close(kept, encoded, rtol=1e-5, atol=1e-6)
    assert_close(mixed[..., :4], encoded[..., :4], rtol=1e-5, atol=1e-6)
    assert differ(mixed[..., 4:], encoded[..., 4:])

    noise = torch.randn(encoded.shape, generator=generator)
    model, schedule = prompted(parts, scheduler)
    first = scheduler.plan.times[0]
    x = noise if strength == 1 else sv.noised(encoded, schedule, first, noise)
    assert_close(repainted, sv.run(scheduler.plan, model, x), rtol=0, atol=10 * ROUNDING)


def test_a_saved_stable_diffusion_is_loaded_with_our_scheduler(parts, tmp_path):
    pipe = stable(StableDiffusionPipeline, parts, ours("heun"))
    latents = pipe(generator=seeded(), num_inference_steps=5, **TEXT).images
    pipe.save_pretrained(tmp_path)
    again = quiet(
        StableDiffusionPipeline.from_pretrained(
            tmp_path, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None
        )
    )
    assert type(again.scheduler) is SolversScheduler
    assert dict(again.scheduler.config)["method"] == "heun"
    assert_close(
        again(generator=seeded(), num_inference_steps=5, **TEXT).images, latents, rtol=0, atol=10 * ROUNDING
    )


# --- flow matching ---------------------------------------------------------------------------------------------------

SIGMAS = [1.0, 0.85, 0.6, 0.35, 0.15]


@pytest.fixture(scope="module")
def sd3():
    transformer = made(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
    )
    absent = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.0609),
        **absent,
    )
    return quiet(pipe)


SD3 = {
    "prompt_embeds": normals(1, 5, 12, seed=1),
    "negative_prompt_embeds": normals(1, 5, 12, seed=2),
    "pooled_prompt_embeds": normals(1, 10, seed=3),
    "negative_pooled_prompt_embeds": normals(1, 10, seed=4),
    "guidance_scale": 3.0,
    "output_type": "latent",
    "height": 16,
    "width": 16,
}


def sd3_run(pipe, scheduler, **options):
    with_scheduler(pipe, scheduler)
    return pipe(generator=seeded(), **SD3, **options).images


def flow_scheduler(method, **config):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SolversScheduler.from_config(theirs.config, method=method, **config)


def test_stable_diffusion_3_with_ddim_is_theirs_with_euler(sd3):
    """On the straight path they are one method."""
    reference = sd3_run(sd3, FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=SIGMAS)
    latents = sd3_run(sd3, flow_scheduler("ddim"), sigmas=SIGMAS)
    assert_close(latents, reference, rtol=0, atol=10 * ROUNDING)
    assert differ(latents, sd3_run(sd3, flow_scheduler("unipc_2"), sigmas=SIGMAS), 1e-3)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2s", "unipc_2", "recommended"])
def test_stable_diffusion_3_is_run(sd3, method):
    latents = sd3_run(sd3, scheduler := flow_scheduler(method), num_inference_steps=10)
    condition, null = (
        {
            "encoder_hidden_states": SD3[f"{kind}prompt_embeds"],
            "pooled_projections": SD3[f"{kind}pooled_prompt_embeds"],
        }
        for kind in ("", "negative_")
    )
    model, schedule = from_diffusers(
        sd3.transformer,
        scheduler.config,
        guide=lambda model: sv.guidance.classifier_free(model, condition, null, 3.0),
    )
    assert schedule == sv.Flow(3.0)
    expected = sv.run(scheduler.plan, model, normals(1, 4, 8, 8))
    assert_close(latents, expected, rtol=0, atol=10 * ROUNDING)
    if method == "recommended":
        assert torch.equal(sv.sample(model, normals(1, 4, 8, 8), schedule, 10), expected)


def test_a_flow_is_not_swapped_for_betas(sd3):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = SolversScheduler.from_config(theirs.config, method="unipc_2")
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert back.config.shift == 3.0
    again = SolversScheduler.from_config(back.config)
    assert (again.config.method, again.config.prediction_type) == ("unipc_2", "flow_prediction")
    latents = [sd3_run(sd3, s, num_inference_steps=6) for s in (ours, again)]
    assert torch.equal(*latents)
    multistep = UniPCMultistepScheduler.from_config(ours.config, use_flow_sigmas=True, flow_shift=3.0)
    assert torch.equal(
        sd3_run(sd3, SolversScheduler.from_config(multistep.config), num_inference_steps=6), latents[0]
    )


@pytest.fixture(scope="module")
def flux():
    transformer = made(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return quiet(pipe)


FLUX = {"prompt_embeds": normals(1, 5, 12, seed=1), "pooled_prompt_embeds": normals(1, 10, seed=2)}


def flux_run(pipe, scheduler):
    with_scheduler(pipe, scheduler)
    size = {"height": 16, "width": 16}
    return pipe(num_inference_steps=8, generator=seeded(), output_type="latent", **size, **FLUX).images


def test_flux_with_ddim_is_theirs_with_euler(flux):
    """With the shift of the image's size, whose mu the pipeline computes, and timesteps that it divides by 1000."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    reference = flux_run(flux, theirs)
    ours = SolversScheduler.from_config(theirs.config, method="ddim")
    assert_close(flux_run(flux, ours), reference, rtol=0, atol=10 * ROUNDING)
    assert_close(ours.plan.sigma.float(), theirs.sigmas, rtol=1e-6, atol=0)
    fixed = SolversScheduler.from_config(theirs.config, method="ddim", use_dynamic_shifting=False)
    assert differ(flux_run(flux, fixed), reference, 1e-3)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2s", "unipc_2", "recommended"])
def test_flux_is_run(flux, method):
    """On latents in packs of two by two, one after the other; the network reads sigma and not 1000 times it."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    latents = flux_run(flux, scheduler := SolversScheduler.from_config(theirs.config, method=method))
    place = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    inputs = {
        "encoder_hidden_states": FLUX["prompt_embeds"],
        "pooled_projections": FLUX["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(5, 3),
        "img_ids": place,
    }
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)
    model, schedule = from_diffusers(flux.transformer, theirs.config, inputs, mu=mu)
    assert scheduler.plan.times[0] == 1
    assert_close(scheduler.plan.sigma, schedule.sigma(scheduler.plan.times), rtol=1e-9, atol=0)
    noise = normals(1, 4, 8, 8).reshape(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)
    assert_close(latents, sv.run(scheduler.plan, model, noise), rtol=0, atol=10 * ROUNDING)
