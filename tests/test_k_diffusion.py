"""Our methods as k-diffusion's samplers, run against its own code, and its denoisers as our models."""

import importlib.util
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torchdiffeq  # noqa: F401  what k-diffusion imports is imported before it, and stays
import torchsde  # noqa: F401
import tqdm.auto  # noqa: F401
from scipy import integrate  # noqa: F401
from torch.testing import assert_close

import solvers as sv
from reference import row_order, rows, trace
from solvers.adapters import from_denoiser, sampler
from solvers.methods import BUILDS

EXACT = {"rtol": 1e-12, "atol": 1e-12}
EDM = sv.EDM()
SHAPE = (3, 2, 5)
MIXING = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
SINGLESTEP = partial(sv.dpm_solver_pp, kind="singlestep")
DPM_2 = partial(sv.dpm_solver, order=2)


def append_dims(x, target_dims):
    return x[(..., *[None] * (target_dims - x.ndim))]


@pytest.fixture(scope="module")
def peer():
    """sampling.py, external.py and layers.py of the installed k-diffusion, without the rest of it; sys.modules is left as it was.

    Its package imports CLIP, Accelerate and more, and is not executed; of what the three files themselves import, what sampling has no use for is a
    stand-in.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.append_dims = append_dims
    dctorch, einops = ModuleType("dctorch"), ModuleType("einops")
    dctorch.functional = einops.rearrange = einops.repeat = None
    found, before = SimpleNamespace(), dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, utils, dctorch, einops):
            patch.setitem(sys.modules, module.__name__, module)
        for name in ("sampling", "external", "layers"):
            path = f"{package.__path__[0]}/{name}.py"
            of_file = importlib.util.spec_from_file_location(f"k_diffusion.{name}", path)
            module = importlib.util.module_from_spec(of_file)
            patch.setitem(sys.modules, of_file.name, module)
            of_file.loader.exec_module(module)
            setattr(found, name, module)
    found.left_behind = [name for name, module in sys.modules.items() if before.get(name) is not module]
    return found


def denoiser(x, sigma, shift=0.0):
    """Not linear in x, and mixing its elements."""
    sigma = append_dims(sigma, x.ndim)
    return x / (1 + sigma**2) + torch.tanh(x @ MIXING.to(x) / (1 + sigma) + shift) / 2


def start(sigmas, shape=SHAPE):
    normals = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return normals.to(sigmas) * sigmas[0]


def normals_over(like):
    """A noise_sampler that knows which interval it is asked for, to the last digit."""

    def noise_sampler(sigma, sigma_next):
        seed = hash((float(sigma), float(sigma_next))) % 2**63
        return torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
            like
        )

    return noise_sampler


def listed(peer, spacing, to_zero=True, dtype=torch.float64):
    """A list of sigmas as users of k-diffusion have it."""
    sigmas = {
        "karras": lambda: peer.sampling.get_sigmas_karras(7, 0.03, 14.6),
        "exponential": lambda: peer.sampling.get_sigmas_exponential(7, 0.03, 14.6),
        "uneven": lambda: torch.tensor([14.6, 9.0, 8.7, 2.0, 0.4, 0.35, 0.03, 0.0]),
    }[spacing]().to(dtype)
    return sigmas if to_zero else sigmas[:-1]


every_list = pytest.mark.parametrize("to_zero", [True, False], ids=["to 0", "above 0"])
every_spacing = pytest.mark.parametrize("spacing", ["karras", "exponential", "uneven"])

ODES = {
    "sample_euler": sv.ddim,
    "sample_heun": sv.heun,
    "sample_dpm_2": DPM_2,
    "sample_lms": sv.lms,
    "sample_dpmpp_2m": sv.dpm_solver_pp,
}
SDES = {
    "sample_euler_ancestral": sv.ddim,
    "sample_dpm_2_ancestral": partial(sv.ancestral, method=DPM_2),
    "sample_dpmpp_2s_ancestral": partial(sv.ancestral, method=SINGLESTEP),
    "sample_dpmpp_2m_sde": sv.dpm_solver_pp_sde,
}


def theirs(peer, name, x, sigmas, **options):
    return getattr(peer.sampling, name)(denoiser, x, sigmas, disable=True, **options)


def ours(method, x, sigmas, **options):
    return sampler(method)(denoiser, x, sigmas, disable=True, **options)


def test_loading_k_diffusion_leaves_no_module_behind(peer):
    assert peer.left_behind == []
    assert "k_diffusion" not in sys.modules
    assert peer.sampling.utils.append_dims is append_dims


# --- the samplers ------------------------------------------------------------------------------------------------


@every_list
@every_spacing
@pytest.mark.parametrize("name", ODES)
def test_an_ode_sampler_is_our_method(peer, name, spacing, to_zero):
    sigmas = listed(peer, spacing, to_zero)
    x = start(sigmas)
    assert_close(ours(ODES[name], x, sigmas), theirs(peer, name, x, sigmas), **EXACT)


def test_each_ode_sampler_is_its_own_method_and_none_of_the_others(peer):
    """So that agreement to 1e-12 means something: any two methods differ by more than 1e-4."""
    sigmas = listed(peer, "karras")
    x = start(sigmas)
    for name in ODES:
        for other, method in ODES.items():
            gap = (ours(method, x, sigmas) - theirs(peer, name, x, sigmas)).abs().max()
            assert gap < 1e-12 if name == other else gap > 1e-4, (name, other)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_options_of_a_method_are_passed_on_by_name(peer, order):
    sigmas = listed(peer, "karras")
    x = start(sigmas)
    found = ours(sv.lms, x, sigmas, order=order)
    assert_close(found, theirs(peer, "sample_lms", x, sigmas, order=order), **EXACT)


@every_list
@every_spacing
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SDES)
def test_an_sde_sampler_is_our_method_and_asks_for_the_same_noise(peer, name, eta, spacing, to_zero):
    """The noise depends on the two sigmas that noise_sampler is given: those of another interval would be other noise."""
    sigmas = listed(peer, spacing, to_zero)
    x = start(sigmas)
    options = {"eta": eta, "noise_sampler": normals_over(x)}
    found, expected = ours(SDES[name], x, sigmas, **options), theirs(peer, name, x, sigmas, **options)
    assert_close(found, expected, **EXACT)
    quieter = ours(SDES[name], x, sigmas, **options | {"eta": 0.999 * eta})
    assert eta == 0 or (quieter - expected).abs().max() > 1e-5


@every_list
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2m_sde_of_heun_type_is_the_predictor_of_sa_solver(peer, eta, to_zero):
    sigmas = listed(peer, "karras", to_zero)
    x = start(sigmas)
    expected = theirs(
        peer, "sample_dpmpp_2m_sde", x, sigmas, eta=eta, solver_type="heun", noise_sampler=normals_over(x)
    )
    options = {"order": 2, "corrector": 0, "tau": eta**0.5, "noise_sampler": normals_over(x)}
    assert_close(ours(sv.sa_solver, x, sigmas, **options), expected, **EXACT)


@every_list
@pytest.mark.parametrize(
    ("name", "method"), [("sample_euler", sv.ddim), ("sample_heun", sv.heun), ("sample_dpm_2", DPM_2)]
)
@pytest.mark.parametrize("churned", ["all", "some"])
def test_churn_is_our_churn(peer, name, method, churned, to_zero, monkeypatch):
    """Its noise is torch.randn_like, once a step, whether the step is churned or not."""
    sigmas = listed(peer, "karras", to_zero)
    x, count = start(sigmas), len(sigmas) - 1
    low, high = (0.0, float("inf")) if churned == "all" else (0.1, 10.0)
    normals = torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_each_step = iter(normals)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: next(one_each_step))
        expected = theirs(peer, name, x, sigmas, s_churn=2.0, s_tmin=low, s_tmax=high, s_noise=1.003)
    churn, options = partial(sv.churn, method=method), {"amount": 2.0, "low": low, "high": high}

    def of_step(sigma, sigma_next):
        return normals[sigmas.tolist().index(float(sigma))]

    found = ours(churn, x, sigmas, **options, noise_scale=1.003, noise_sampler=of_step)
    assert_close(found, expected, **EXACT)
    quieter = ours(churn, x, sigmas, **options, noise_scale=1.0, noise_sampler=of_step)
    assert (quieter - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ODES | SDES)
def test_in_float32_they_agree_to_its_rounding(peer, name):
    sigmas = listed(peer, "karras", dtype=torch.float32)
    x = start(sigmas)
    options = {"noise_sampler": normals_over(x)} if name in SDES else {}
    options |= {"eta": 1.0} if name in SDES else {}
    found = ours((ODES | SDES)[name], x, sigmas, **options)
    assert found.dtype == x.dtype == torch.float32
    assert_close(found, theirs(peer, name, x, sigmas, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_returned_but_not_kept_between_steps(peer, dtype):
    sigmas = listed(peer, "karras", dtype=torch.float32)
    x, given = start(sigmas).to(dtype), []

    def model(x, sigma):
        given.append((x.dtype, sigma.dtype))
        return denoiser(x.float(), sigma).to(dtype)

    found = sampler(sv.dpm_solver_pp)(model, x, sigmas)
    assert found.dtype == dtype
    assert set(given) == {(dtype, torch.float32)}
    in_float32 = sampler(sv.dpm_solver_pp)(lambda x, sigma: model(x.to(dtype), sigma), x.float(), sigmas)
    assert torch.equal(found, in_float32.to(dtype))


def test_noise_of_a_brownian_tree_is_the_same_noise(peer):
    """Its trees have no path outside of their ends, so none may be asked for the step to sigma = 0.

    Their ends are a little outside of the sigmas, as torchsde rounds them to seven digits and then warns.
    """
    sigmas = listed(peer, "karras")
    x, ends = start(sigmas), (0.999 * sigmas[-2], 1.001 * sigmas[0])
    tree = partial(peer.sampling.BrownianTreeNoiseSampler, x, *ends, seed=[5, 6, 7])
    expected = theirs(peer, "sample_dpmpp_2m_sde", x, sigmas, noise_sampler=tree())
    assert_close(ours(sv.dpm_solver_pp_sde, x, sigmas, noise_sampler=tree()), expected, **EXACT)


def test_a_method_of_several_draws_per_step_asks_for_noise_over_each_part_of_it(peer):
    sigmas, asked = listed(peer, "karras"), []

    def noise_sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(SHAPE, dtype=torch.float64)

    ours(partial(sv.seeds, order=2), start(sigmas), sigmas, noise_sampler=noise_sampler)
    assert len(asked) == 2 * (len(sigmas) - 2)
    assert (asked[0][0], asked[-1][1]) == (float(sigmas[0]), float(sigmas[-2]))
    assert all(before[1] == behind[0] for before, behind in pairwise(asked))


def of_third_order(sample):
    """A sampler of k-diffusion as one of our methods: traced on the times it is given, and folded to rows."""

    def build(schedule, times):
        steps, sigmas = len(times) - 1, schedule.sigma(times)
        weights = trace(
            lambda model, x, noise: sample(model, x, sigmas, disable=True, eta=0.0, noise_sampler=noise),
            steps,
        )
        a, b, _ = rows(weights, steps)
        return sv.Plan(times, schedule.alpha(times), sigmas, a, b.round(decimals=14), predicts="data")

    return build


def test_dpmpp_3m_sde_without_noise_is_of_second_order_and_ours_of_third(peer):
    """Half of its second difference is missing, from the third step on; `test_published` has the formula."""
    sigmas = listed(peer, "karras", to_zero=False)
    x, adams = start(sigmas), partial(sv.exponential_adams, order=3, predicts="data")
    options = {"eta": 0.0, "noise_sampler": normals_over(x)}
    for steps in range(1, len(sigmas)):
        expected = theirs(peer, "sample_dpmpp_3m_sde", x, sigmas[: steps + 1], **options)
        gap = (ours(adams, x, sigmas[: steps + 1]) - expected).abs().max()
        assert gap < 1e-12 if steps < 3 else gap > 1e-4, steps
    third = ours(partial(sv.dpm_solver_pp, order=3), x, sigmas)
    assert (third - theirs(peer, "sample_dpmpp_3m_sde", x, sigmas, **options)).abs().max() > 1e-3
    even = {"half_logsnr": 0.5, "steps": [1.0, 2.0, 1.5, 0.8], "h": 0.02}
    released = row_order(of_third_order(peer.sampling.sample_dpmpp_3m_sde), EDM, *even.values(), degree=3)
    assert released == pytest.approx(2, abs=0.1)
    assert row_order(adams, EDM, *even.values(), degree=3) == pytest.approx(3, abs=0.1)


def test_dpm_fast_is_our_table(peer):
    """It counts calls and not sigmas, and its numbers are float32."""
    x = start(torch.tensor([14.6], dtype=torch.float64))
    for nfe in (4, 5, 6, 9):
        expected = peer.sampling.sample_dpm_fast(denoiser, x, 0.03, 14.6, nfe, disable=True)
        plan = sv.dpm_solver_fast(sv.EDM(0.03, 14.6), nfe)
        assert_close(sv.run(plan, sv.Model(denoiser, "data"), x), expected, rtol=0, atol=2e-5)


# --- the interface -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_every_method_of_the_table_runs_as_it_does_on_its_own(peer, name):
    """To the last bit; and calls back at the first call of each step, whatever the method does there."""
    sigmas, steps = listed(peer, "uneven", to_zero=False), []
    plan = BUILDS[name](EDM, sigmas)
    found = ours(BUILDS[name], start(sigmas), sigmas, noise=3, callback=lambda info: steps.append(info["i"]))
    expected = sv.run(plan, sv.Model(denoiser, "data"), start(sigmas), noise=3)
    assert torch.equal(found, expected)
    assert steps == list(range(len(sigmas) - 1))


def told(call, keep=torch.Tensor.clone):
    """What a sampler calls back with."""
    infos = []
    call(
        lambda info: infos.append({k: keep(v) if isinstance(v, torch.Tensor) else v for k, v in info.items()})
    )
    return infos


@every_list
@pytest.mark.parametrize("name", ODES | SDES)
def test_the_callback_is_told_the_same(peer, name, to_zero):
    sigmas = listed(peer, "karras", to_zero)
    x, method = start(sigmas), (ODES | SDES)[name]
    kept = x.clone()
    options = {} if name in ODES else {"eta": 1.0, "noise_sampler": normals_over(x)}
    expected = told(lambda callback: theirs(peer, name, x, sigmas, callback=callback, **options))
    found = told(lambda callback: ours(method, x, sigmas, callback=callback, **options))
    assert torch.equal(x, kept)
    assert [info.keys() for info in found] == [info.keys() for info in expected]
    assert [info["i"] for info in found] == [info["i"] for info in expected] == list(range(len(sigmas) - 1))
    for mine, other in zip(found, expected, strict=True):
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert_close(mine[key], other[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def test_the_callback_is_told_sigma_and_sigma_hat_of_a_churned_step(peer, monkeypatch):
    sigmas = listed(peer, "karras")
    x, z = start(sigmas), torch.ones(SHAPE, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: z)
        expected = told(
            lambda f: theirs(peer, "sample_heun", x, sigmas, callback=f, s_churn=2.0, s_tmax=10.0)
        )
    found = told(
        lambda f: ours(sv.churn, x, sigmas, callback=f, amount=2.0, high=10.0, noise=lambda draw, like: z)
    )
    assert any(info["sigma_hat"] > 1.2 * info["sigma"] for info in expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine["i"] == other["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert_close(mine[key], other[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("key", ["denoised", "x"])
@pytest.mark.parametrize("name", ["sample_heun", "sample_dpmpp_2m", "sample_lms"])
def test_what_a_callback_keeps_is_not_overwritten(peer, name, key):
    """A list of what came by, for a preview or a film, is made without copies: k-diffusion's tensors are new in each step."""
    sigmas = listed(peer, "karras")
    x = start(sigmas)
    run = partial(ours, ODES[name], x, sigmas)
    copied = told(lambda callback: run(callback=callback))
    kept = told(lambda callback: run(callback=callback), keep=lambda tensor: tensor)
    for mine, other in zip(kept, copied, strict=True):
        assert torch.equal(mine[key], other[key])


def test_extra_args_reach_the_model(peer):
    sigmas = listed(peer, "karras")
    x, given = start(sigmas), {"shift": 0.3}
    expected = theirs(peer, "sample_dpmpp_2m", x, sigmas, extra_args=given)
    assert_close(ours(sv.dpm_solver_pp, x, sigmas, extra_args=given), expected, **EXACT)
    assert (ours(sv.dpm_solver_pp, x, sigmas) - expected).abs().max() > 0.01
    assert given == {"shift": 0.3}


def test_arguments_are_in_the_order_that_k_diffusion_has_them(peer):
    sigmas = listed(peer, "karras")
    x, counts = start(sigmas), []
    expected = peer.sampling.sample_dpmpp_2m(denoiser, x, sigmas, {"shift": 0.3}, counts.append, True)
    found = sampler(sv.dpm_solver_pp)(denoiser, x, sigmas, {"shift": 0.3}, counts.append, True)
    assert_close(found, expected, **EXACT)
    assert len(counts) == 2 * (len(sigmas) - 1)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("disable", [True, False, None])
def test_disable_is_of_the_progress_bar_and_none_shows_it_on_a_terminal(
    peer, disable, terminal, capsys, monkeypatch
):
    sigmas = listed(peer, "karras")
    shown = {}
    for name, sample in {"ours": sampler(sv.ddim), "theirs": peer.sampling.sample_euler}.items():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        sample(denoiser, start(sigmas), sigmas, disable=disable)
        shown[name] = bool(capsys.readouterr().err)
    assert shown["ours"] == shown["theirs"] == (not disable if disable is not None else terminal)


def comfy(x, sigma, seed=None, model_options=None, seen=None):
    """A model as ComfyUI calls it."""
    if seen is not None:
        seen.append((seed, model_options))
    return denoiser(x, sigma)


def test_the_seed_that_comfyui_gives_is_of_the_noise_and_each_sample_has_its_own_stream(peer):
    sigmas, seen = listed(peer, "karras"), []
    x, sample = start(sigmas), sampler(sv.dpm_solver_pp_sde)
    extra = {"seed": 11, "model_options": {"a": 1}}
    found = sample(comfy, x, sigmas, extra_args=extra | {"seen": seen}, disable=True)
    assert set(map(str, seen)) == {str((11, {"a": 1}))}
    assert torch.equal(found, ours(sv.dpm_solver_pp_sde, x, sigmas, noise=sv.noise.per_sample(11, range(3))))
    assert torch.equal(found, sample(comfy, x, sigmas, extra_args=extra))
    assert_close(sample(comfy, x[:1], sigmas, extra_args=extra), found[:1], **EXACT)
    other = sample(comfy, x, sigmas, extra_args=extra | {"seed": 12})
    assert (other - found).abs().amax((1, 2)).min() > 0.01
    assert (found[0] - sample(comfy, x[:1].expand(3, -1, -1), sigmas, extra_args=extra)[1]).abs().max() > 0.01


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_that_comfyui_knows_is_one(peer, seed):
    """Its nodes take 0 to 2^64 - 1."""
    sigmas = listed(peer, "karras")
    sampler(sv.dpm_solver_pp_sde)(comfy, start(sigmas), sigmas, extra_args={"seed": seed})


def test_noise_that_is_given_goes_before_the_seed_of_extra_args(peer):
    sigmas = listed(peer, "karras")
    x, sample = start(sigmas), sampler(sv.dpm_solver_pp_sde)
    found = sample(comfy, x, sigmas, extra_args={"seed": 11}, noise=5)
    assert torch.equal(found, sample(comfy, x, sigmas, noise=5))
    found = sample(comfy, x, sigmas, extra_args={"seed": 11}, noise_sampler=normals_over(x))
    assert torch.equal(found, sample(comfy, x, sigmas, noise_sampler=normals_over(x)))
    with pytest.raises(ValueError, match="noise and noise_sampler are both given"):
        sample(comfy, x, sigmas, noise=5, noise_sampler=normals_over(x))


def test_without_noise_a_stochastic_method_is_an_error_that_says_what_to_write(peer):
    sigmas = listed(peer, "karras")
    with pytest.raises(ValueError, match=r"stochastic and needs noise: .*noise=0"):
        ours(sv.dpm_solver_pp_sde, start(sigmas), sigmas)
    ours(sv.dpm_solver_pp_sde, start(sigmas), sigmas, eta=0.0)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp_sde", "churn"])
def test_no_global_generator_is_touched(peer, name):
    sigmas = listed(peer, "karras")

    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    ours(getattr(sv, name), start(sigmas), sigmas, extra_args={}, noise=0)
    assert states() == before
    theirs(peer, "sample_heun", start(sigmas), sigmas)
    assert states() != before


def test_a_sampler_can_be_shared_by_threads_and_used_inside_itself(peer):
    sample, lists = sampler(sv.dpm_solver_pp_sde), [listed(peer, name) for name in ("karras", "uneven")]

    def work(k):
        sigmas, steps = lists[k % 2][k % 3 :], []
        x = sample(
            denoiser, start(sigmas), sigmas, {"shift": k / 10}, lambda info: steps.append(info["i"]), noise=k
        )
        return x, steps

    alone = [work(k) for k in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(12)))
    for (x, steps), (expected, in_order) in zip(together, alone, strict=True):
        assert torch.equal(x, expected)
        assert steps == in_order == list(range(len(steps)))

    def nested(x, sigma):
        work(1)
        return denoiser(x, sigma)

    steps = []
    found = sample(nested, start(lists[0]), lists[0], None, lambda info: steps.append(info["i"]), noise=0)
    assert torch.equal(found, sample(denoiser, start(lists[0]), lists[0], noise=0))
    assert steps == list(range(len(lists[0]) - 1))


def test_under_inference_mode_which_comfyui_samples_in_it_is_the_same(peer):
    sigmas = listed(peer, "karras")
    expected = ours(sv.dpm_solver_pp_sde, start(sigmas), sigmas, noise=0)
    with torch.inference_mode():
        found = ours(sv.dpm_solver_pp_sde, start(sigmas), sigmas, noise=0)
    assert torch.equal(found, expected)


RESTART = partial(
    sv.restart, intervals=[(0.35, 2.0, 2, 2)]
)  # from the sixth sigma of the uneven list to its fourth


def test_steps_are_called_back_in_their_order_where_a_restart_comes_by_a_sigma_again(peer):
    sigmas, steps = listed(peer, "uneven"), []
    ours(RESTART, start(sigmas), sigmas, noise=0, callback=lambda info: steps.append(info["i"]))
    assert steps == list(range(len(sigmas) - 1))


def test_no_noise_is_used_twice(peer):
    """A noise_sampler is a function of the interval alone: what restarts twice from one sigma has to ask otherwise, or be refused."""
    sigmas, asked = listed(peer, "uneven"), []

    def noise_sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(SHAPE, dtype=torch.float64)

    with suppress(ValueError):
        ours(RESTART, start(sigmas), sigmas, noise_sampler=noise_sampler)
    assert len(set(asked)) == len(asked)


# --- flow models, as ComfyUI has them ----------------------------------------------------------------------------

FLOW_SIGMAS = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.3, 0.12, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("sigmas", [FLOW_SIGMAS, FLOW_SIGMAS[1:-1]], ids=["ends", "inside"])
@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp_2m", "adams_velocity_2", "dpm_solver_pp_sde_2m"])
def test_on_a_flow_the_sampler_is_that_of_the_flow_schedule(peer, name, sigmas):
    """x = (1 - sigma) x_0 + sigma eps; Euler's step is the same there and for x_0 + sigma eps, other methods are not."""
    x, flow = start(sigmas), sv.Flow()
    found = sampler(BUILDS[name], schedule=flow)(denoiser, x, sigmas, noise=4)
    plan = BUILDS[name](flow, sigmas)
    assert torch.equal(found, sv.run(plan, sv.Model(denoiser, "data"), x, noise=4))
    velocity = sv.Model(lambda x, t: (x - denoiser(x, t)) / append_dims(t, x.ndim), "flow")
    assert_close(sv.run(plan, velocity, x, noise=4), found, rtol=1e-10, atol=1e-10)
    euler = theirs(peer, "sample_euler", x, sigmas)
    assert ((euler - found).abs().max() < 1e-12) == (name == "ddim")
    on_edm = sampler(BUILDS[name])(denoiser, x, sigmas, noise=4)
    assert ((on_edm - found).abs().max() < 1e-12) == (name == "ddim")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "error", "says"),
    [
        ([0.0, 1.0, 2.0], ValueError, "must decrease.*flip"),
        ([2.0, 1.0, float("nan")], ValueError, r"sigmas\[2\] = nan.*finite"),
        ([float("inf"), 1.0, 0.0], ValueError, r"sigmas\[0\] = inf.*finite"),
        ([2.0], ValueError, "at least one step"),
        ([], ValueError, "at least one step"),
        ([[2.0, 1.0]], ValueError, "at least one step"),
        (
            [2.0, 1.0, 1.0, 0.0],
            ValueError,
            r"sigmas must strictly decrease: sigmas\[1\] = 1 is followed by 1",
        ),
        ([2.0, 1.0, -0.1], ValueError, "outside the schedule"),
        ([2, 1, 0], None, ""),
    ],
    ids=["increasing", "nan", "inf", "one", "none", "two dimensions", "equal", "negative", "whole numbers"],
)
def test_sigmas_that_cannot_be_are_refused_before_the_model_is_called(sigmas, error, says):
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return denoiser(x, sigma)

    run = partial(sampler(sv.ddim), model, torch.zeros(SHAPE), torch.tensor(sigmas))
    if error is None:
        run()
        return
    with pytest.raises(error, match=says) as raised:
        run()
    assert "times" not in str(raised.value)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigmas_in_half_precision_are_refused(dtype):
    with pytest.raises(TypeError, match=f"sigmas has dtype {dtype}.*half precision"):
        sampler(sv.ddim)(denoiser, torch.zeros(SHAPE), torch.tensor([2.0, 1.0, 0.0], dtype=dtype))


@pytest.mark.parametrize(
    "schedule", [sv.VP(), sv.VE(), sv.Flow(shift=3.0), sv.Cosine(), sv.Discrete.linear(100)]
)
def test_a_schedule_whose_t_is_not_sigma_is_refused(schedule):
    with pytest.raises(ValueError, match=r"whose t is sigma, EDM\(\) or Flow\(\)"):
        sampler(sv.ddim, schedule=schedule)


@pytest.mark.parametrize("method", ["dpmpp_2m", None, 3])
def test_a_method_that_is_none_is_refused_at_once(method):
    with pytest.raises(TypeError, match=r"expected .*Plan, e\.g\. sv\.dpm_solver_pp"):
        sampler(method)


def test_an_unknown_option_is_an_error():
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    with pytest.raises(TypeError, match="solver_type"):
        sampler(sv.dpm_solver_pp_sde)(denoiser, torch.zeros(SHAPE), sigmas, solver_type="heun", noise=0)
    with pytest.raises(TypeError, match="s_churn"):
        sampler(sv.heun)(denoiser, torch.zeros(SHAPE), sigmas, s_churn=1.0)


# --- its denoisers -----------------------------------------------------------------------------------------------


def net(x, number, shift=0.0):
    """A tiny network that reads a number from 0 to 1000."""
    return torch.tanh(x @ MIXING.to(x) + append_dims(number, x.ndim).to(x) / 500 - 1 + shift)


def cumprod(dtype):
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).to(
        dtype
    )


class CompVis(torch.nn.Module):
    """Stands for a loaded model of Stable Diffusion."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("alphas_cumprod", cumprod(dtype))

    def apply_model(self, x, t, cond):
        return net(x, t, cond)


def learned(x, n):
    """As of OpenAI's models: a variance beside the noise, in the channels."""
    return torch.cat([net(x, n), torch.ones_like(x)], 1)


DISCRETE = {
    "CompVisDenoiser": ("noise", lambda k, dtype: k.CompVisDenoiser(CompVis(dtype)), {"cond": 0.2}),
    "CompVisVDenoiser": ("velocity", lambda k, dtype: k.CompVisVDenoiser(CompVis(dtype)), {"cond": 0.2}),
    "DiscreteEpsDDPMDenoiser": (
        "noise",
        lambda k, dtype: k.DiscreteEpsDDPMDenoiser(net, cumprod(dtype), quantize=False),
        {},
    ),
    "quantized": (
        "noise",
        lambda k, dtype: k.DiscreteEpsDDPMDenoiser(net, cumprod(dtype), quantize=True),
        {},
    ),
    "DiscreteVDDPMDenoiser": (
        "velocity",
        lambda k, dtype: k.DiscreteVDDPMDenoiser(net, cumprod(dtype), quantize=False),
        {},
    ),
    "OpenAIDenoiser": (
        "noise",
        lambda k, dtype: k.OpenAIDenoiser(learned, SimpleNamespace(alphas_cumprod=cumprod(dtype).numpy())),
        {},
    ),
}


@pytest.mark.parametrize("method", [sv.ddim, sv.dpm_solver_pp, sv.heun], ids=["ddim", "2m", "heun"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # OpenAIDenoiser keeps its levels in float32
        *((name, torch.float64) for name in DISCRETE if name != "OpenAIDenoiser"),
        *((name, torch.float32) for name in DISCRETE),
    ],
)
def test_a_wrapped_discrete_network_is_the_network_on_its_levels(peer, name, dtype, method):
    """x of k-diffusion is x / alpha: a method of data, or of noise in sigma / alpha, has the same samples on either scale.

    Between levels k-diffusion interpolates log sigma in the step's number and this library log alpha: the calls are on levels.
    """
    predicts, wrapped, extra = DISCRETE[name]
    model, edm = from_denoiser(wrapped(peer.external, dtype), extra_args=extra)
    schedule = sv.Discrete.from_alphas_cumprod(cumprod(dtype))
    ends = torch.exp(-schedule.half_logsnr(torch.tensor([1 / 1000, 1.0], dtype=torch.float64)))
    assert_close(torch.tensor([edm.sigma_min, edm.sigma_max]).double(), ends, rtol=1e-6, atol=0)

    times = sv.angle_levels(schedule, 8)
    sigmas = torch.exp(-schedule.half_logsnr(times))
    x = start(torch.ones(1, dtype=dtype), (3, 4, 5))
    found = sv.run(method(edm, sigmas), model, x / float(schedule.alpha(times[0])))
    label = schedule.step if name == "quantized" else schedule.label
    shift = extra.get("cond", 0.0)
    own = sv.Model(lambda x, n: net(x, n, shift), predicts, label=label)
    expected = sv.run(method(schedule, times), own, x)
    assert found.dtype == dtype
    assert_close(found, expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 5e-5)
    off = sv.Model(own.net, predicts, label=lambda t: 0.99 * schedule.label(t))
    assert (expected - sv.run(method(schedule, times), off, x)).abs().max() > 1e-3


def test_between_levels_the_two_interpolations_differ_a_little(peer):
    wrapped = peer.external.DiscreteEpsDDPMDenoiser(net, cumprod(torch.float64), quantize=False)
    schedule = sv.Discrete.from_alphas_cumprod(cumprod(torch.float64))
    levels = torch.tensor([1.0, 200.0, 600.0, 998.0], dtype=torch.float64)
    for offset, least, most in ((0.0, 0.0, 1e-9), (0.5, 1e-6, 0.1)):
        t = (levels + offset + 1) / 1000
        gap = wrapped.sigma_to_t(torch.exp(-schedule.half_logsnr(t))) - schedule.label(t)
        assert least <= gap.abs().max() < most


def test_a_network_of_v_diffusion_reads_the_angle(peer):
    """t = (2 / pi) arctan(sigma / alpha)."""
    model, edm = from_denoiser(peer.external.VDenoiser(lambda x, t: net(x, 1000 * t)), 0.01, 100.0)
    assert (edm.sigma_min, edm.sigma_max) == (0.01, 100.0)
    vp = sv.VP()

    def angle(t):
        return 2000 / torch.pi * torch.atan2(vp.sigma(t), vp.alpha(t))

    times, x = sv.logsnr(vp, 8), start(torch.ones(1, dtype=torch.float64))
    expected = sv.run(sv.dpm_solver_pp(vp, times), sv.Model(net, "velocity", label=angle), x)
    plan = sv.dpm_solver_pp(edm, torch.exp(-vp.half_logsnr(times)))
    found = sv.run(plan, model, x / float(vp.alpha(times[0]))) * float(vp.alpha(times[-1]))
    assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_a_karras_denoiser_is_the_raw_network_of_edm(peer, sigma_data):
    def raw(x, sigma):
        return net(x, 500 + 100 * sigma.log())

    model, edm = from_denoiser(peer.layers.Denoiser(raw, sigma_data=sigma_data), 0.02, 50.0)
    own = sv.Model(raw, "edm", sigma_data=sigma_data)
    times = sv.karras(edm, 8)
    x, plan = start(times), sv.heun(edm, times)
    assert_close(sv.run(plan, model, x), sv.run(plan, own, x), rtol=1e-11, atol=1e-11)
    other = sv.Model(raw, "edm", sigma_data=1.001 * sigma_data)
    assert (sv.run(plan, model, x) - sv.run(plan, other, x)).abs().max() > 1e-5


def test_a_denoiser_goes_there_and_back(peer):
    """k-diffusion's own sampler with its own denoiser, and this library's run of the same."""
    wrapped = peer.external.CompVisDenoiser(CompVis(torch.float32))
    sigmas = wrapped.get_sigmas(9)
    x, extra = start(sigmas), {"cond": 0.2}
    expected = peer.sampling.sample_dpmpp_2m(wrapped, x, sigmas, extra_args=extra, disable=True)
    found = sampler(sv.dpm_solver_pp)(wrapped, x, sigmas, extra_args=extra)
    assert_close(found, expected, rtol=0, atol=1e-4)
    model, edm = from_denoiser(wrapped, extra_args=extra)
    assert torch.equal(sv.run(sv.dpm_solver_pp(edm, sigmas), model, x), found)


def test_a_denoiser_that_does_not_say_its_sigmas_is_refused_unless_you_do(peer):
    wrapped = peer.external.VDenoiser(net)
    with pytest.raises(ValueError, match=r"no sigma_min.*from_denoiser\(model, sigma_min="):
        from_denoiser(wrapped)
    with pytest.raises(ValueError, match="no sigma_max"):
        from_denoiser(wrapped, sigma_min=0.03)
    assert from_denoiser(wrapped, 0.03, 14.6)[1] == sv.EDM(0.03, 14.6)
    known = peer.external.CompVisDenoiser(CompVis(torch.float32))
    assert from_denoiser(known, sigma_max=10.0)[1] == sv.EDM(float(known.sigma_min), 10.0)
    with pytest.raises(ValueError, match="sigma_min"):
        from_denoiser(known, sigma_max=0.01)
