"""A row in one pass over memory: the same bits as torch's own operations, the same errors, and no more memory than promised."""

import ctypes
import gc
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import solvers as sv
from problems import MODELS, VP, generator
from solvers import kernels
from solvers.kernels import InC
from solvers.methods import BUILDS
from solvers.rows import Stepper

LOOP = sys.modules["solvers.loop"]
KINDS = ("noise", "data", "velocity")
WAYS = {"fused": True, "eager": False}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPREAD = (  # one of each make: one step, several, stages, corrected, with noise, noise of older rows, rows of noise alone
    "ddim",
    "adams_data_4",
    "etdrk4",
    "unipc_angle_4",
    "pndm",
    "sa_solver",
    "ancestral_3s",
)

pytestmark = pytest.mark.skipif(
    not INTERPRETED and bool(kernels._compiled(torch.float32)[1]),
    reason=f"no kernel: {kernels._compiled(torch.float32)[1]}",
)


@cache
def plan_of(name, steps=4):
    return BUILDS[name](VP, sv.logsnr(VP, steps))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def wavy(x, t):
    """A nonlinear network, element by element, that reads t."""
    return torch.tanh(1.3 * x) + 0.2 * torch.sin(3 * x + t.reshape(-1, *[1] * (x.ndim - 1)))


def linear(x, t):
    """One operation, whose bits do not depend on the layout."""
    return 0.3 * x


def random_network(seed):
    a, b, c, d = randn(4, seed=seed).tolist()
    return lambda x, t: a * torch.tanh(b * x + c) + d * torch.cos(x + t.reshape(-1, *[1] * (x.ndim - 1)))


def both(plan, net, x, noise=0, **options):
    """What the kernel gives, and what torch's own operations give."""
    return [sv.run(plan, net, x, noise, fused=fused, **options) for fused in (True, False)]


# The same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILDS)
def test_fused_and_eager_are_the_same_bits(name, dtype):
    """At the end, and in all that a callback sees, which nothing overwrites."""
    plan, x = plan_of(name), randn(3, 7, 29, dtype=dtype)
    if plan.element_shape or plan.shift.numel():
        with pytest.raises(ValueError, match="fused = True with coefficients per element"):
            sv.run(plan, wavy, x, fused=True)
        return
    for seed, kind in enumerate(KINDS if dtype == torch.float32 else KINDS[-1:]):
        model = sv.Model(random_network(seed), predicts=kind)
        fused, eager = both(plan, model, x)
        assert torch.equal(fused, eager), kind
    seen = {True: [], False: []}
    for way in (True, False):
        assert torch.equal(sv.run(plan, model, x, 0, callback=seen[way].append, fused=way), eager)
    for a, b in zip(*seen.values(), strict=True):
        held = [(s.x, *s.outputs.values(), *s.draws.values()) for s in (a, b)]
        assert all(map(torch.equal, *held)), a.call


def test_a_row_is_one_call_of_the_kernel_where_it_is_asked_for_and_by_itself(monkeypatch):
    calls, through = [], InC.__call__
    monkeypatch.setattr(InC, "__call__", lambda *given: calls.append(given[2]) or through(*given))
    for fused, times in ((True, 1), (None, 1), (False, 0)):
        calls.clear()
        sv.run(plan_of("unipc_4"), wavy, randn(2, 3), fused=fused)
        assert calls == list(range(plan_of("unipc_4").rows)) * times
    sv.run(plan_of("unipc_4"), wavy, randn(2, 3), grad=True)  # a formula
    assert calls == []


def test_a_wrong_weight_is_seen(monkeypatch):
    """A planted error of one rounding in one weight of one row: what is compared has power."""
    through = InC.__call__

    def planted(self, table, row, *given):
        if row == 2:
            table = table.clone()
            table[2, 1] = torch.nextafter(table[2, 1], table.new_tensor(9.0))
        return through(self, table, row, *given)

    monkeypatch.setattr(InC, "__call__", planted)
    fused, eager = both(plan_of("dpm_solver_pp_2m"), wavy, randn(3, 57))
    assert not torch.equal(fused, eager)
    assert_close(fused, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPREAD)
def test_a_run_goes_on_from_every_state_to_the_same_bits(name):
    plan, x, states = plan_of(name), randn(3, 5, 7), []
    end = sv.run(plan, wavy, x, 5, callback=states.append, fused=True)
    kept = [state.clone() for state in states]
    for state, before in zip(states, kept, strict=True):
        for fused in (True, False, None):
            assert torch.equal(sv.run(plan, wavy, state, 5, fused=fused), end)
        assert all(map(torch.equal, (state.x, *state.outputs.values()), (before.x, *before.outputs.values())))
    assert torch.equal(sv.trajectory(plan, wavy, x, 5)[1:], torch.stack([s.x for s in kept]))


def test_what_a_callback_changes_is_what_the_next_row_reads():
    def halve(state):
        state.x.mul_(0.5)

    fused, eager = both(plan_of("adams_data_4"), wavy, randn(3, 5), callback=halve)
    assert torch.equal(fused, eager)
    assert not torch.equal(fused, both(plan_of("adams_data_4"), wavy, randn(3, 5))[0])


def test_x_itself_is_never_changed():
    for x in (randn(3, 5), randn(3, 5, dtype=torch.float64), randn(3, 5).half()):
        before = x.clone()
        both(plan_of("unipc_4"), lambda x, t: x, x)
        assert torch.equal(x, before)


LAYOUTS = {
    "in order": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPREAD)
def test_layouts_give_the_same_bits(name, layout):
    plan, x = plan_of(name), LAYOUTS[layout](randn(3, 4, 5, 6))
    fused, eager = both(plan, linear, x)
    assert torch.equal(fused, eager)
    assert torch.equal(fused, sv.run(plan, linear, x.contiguous(), 0, fused=True))
    assert fused.stride() == x.clone().stride()


class Buffer:
    """A network that gives its one buffer each call, so that its last output is gone."""

    def __init__(self):
        self.out = None

    def __call__(self, x, t):
        self.out = torch.empty_like(x) if self.out is None else self.out
        return torch.sin(x, out=self.out)


NETWORKS = {
    "another layout": lambda: lambda x, t: wavy(x, t).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strides": lambda: lambda x, t: torch.stack([wavy(x, t), x], -1)[..., 0],
    "expanded": lambda: lambda x, t: wavy(x, t)[:1].expand_as(x),
    "expanded innermost": lambda: lambda x, t: wavy(x, t)[..., :1].expand_as(x),
    "float16": lambda: lambda x, t: wavy(x, t).half(),
    "bfloat16": lambda: lambda x, t: wavy(x, t).bfloat16(),
    "float64": lambda: lambda x, t: wavy(x.double(), t),
    "its input": lambda: lambda x, t: x,
    "a view of its input": lambda: lambda x, t: x.flatten(1).view_as(x),
    "a flipped view of its input": lambda: lambda x, t: x.transpose(2, 3),
    "its buffer": Buffer,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SPREAD)
def test_outputs_of_any_layout_dtype_and_memory_give_the_same_bits(name, network):
    """But for one that is expanded in its innermost dimension, where torch itself rounds now once, now twice."""
    plan, x = plan_of(name), randn(3, 4, 6, 6)
    for kind in KINDS:
        for layout in ("in order", "channels last"):
            given = LAYOUTS[layout](x)
            fused, eager = (
                sv.run(plan, sv.Model(NETWORKS[network](), predicts=kind), given, 0, fused=way)
                for way in (True, False)
            )
            if network == "expanded innermost":
                assert_close(fused, eager, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(fused, eager), (kind, layout)
    if network == "its buffer":
        assert torch.equal(fused, sv.run(plan, sv.Model(lambda x, t: x.sin(), predicts=kind), given, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_given_in_half_precision(dtype):
    for name in SPREAD:
        fused, eager = both(plan_of(name), wavy, randn(3, 57).to(dtype))
        assert fused.dtype == torch.float32
        assert torch.equal(fused, eager)


SOURCES = {
    "float16": lambda z: z.half(),
    "bfloat16": lambda z: z.bfloat16(),
    "channels last": lambda z: z.float().to(memory_format=torch.channels_last),
    "float16 of another layout": lambda z: z.half().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda z: z.float()[:1].expand_as(z),
    "float64": lambda z: z,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["ddpm", "sa_solver", "ancestral_3s", "seeds_3", "er_sde_3"])
def test_noise_of_any_dtype_and_layout(name, source):
    def noise(draw, like):
        return SOURCES[source](randn(*like.shape, seed=draw, dtype=torch.float64))

    for dtype in (torch.float32, torch.float64):
        fused, eager = both(plan_of(name), linear, randn(3, 4, 5, 6, dtype=dtype), noise)
        assert torch.equal(fused, eager)


def correlated():
    """A plan whose rows read the draw before, too."""
    plan = sv.ddim(VP, sv.logsnr(VP, 6), eta=1.0)
    before = torch.cat([plan.c[:1] * 0, plan.c[1:]])
    return replace(plan, c=torch.cat([0.8 * plan.c, 0.6 * before], 1))


def test_draws_that_later_rows_read():
    assert torch.equal(*both(correlated(), wavy, randn(3, 57)))


@pytest.mark.parametrize(
    "shape", [(1,), (3,), (513,), (1, 1), (1, 511), (1, 512), (512, 1), (1, 513), (5, 0)]
)
def test_sizes_around_a_block(shape):
    for name in SPREAD:
        for dtype in (torch.float32, torch.float64):
            fused, eager = both(plan_of(name), wavy, randn(*shape, dtype=dtype))
            assert fused.shape == shape
            assert torch.equal(fused, eager)


def test_samples_without_elements_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(LOOP, "_is_read_late", lambda x: True)
    assert sv.run(plan_of("ddim"), wavy, randn(5, 0)).shape == (5, 0)


def test_other_schedules_scaled_inputs_and_second_outputs():
    edm, x = sv.EDM(), 80 * randn(3, 57)
    for kind in ("noise", "data", "edm"):
        model = sv.Model(random_network(1), predicts=kind)
        assert torch.equal(*both(BUILDS["unipc_4"](edm, sv.karras(edm, 5)), model, x))
    flow = sv.Flow()
    plan = BUILDS["adams_data_4"](flow, sv.uniform(flow, 5))
    assert torch.equal(*both(plan, sv.Model(wavy, predicts="flow"), randn(3, 57)))
    learned = sv.Model(lambda x, t: (wavy(x, t), torch.sin(x)), variance="range")
    assert torch.equal(*both(sv.ddpm(VP, sv.logsnr(VP, 5), variance="learned"), learned, randn(3, 57)))


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_around_a_run(outer):
    expected = sv.run(plan_of("unipc_4"), wavy, randn(3, 57), fused=False)
    with outer():
        for end in both(plan_of("unipc_4"), wavy, randn(3, 57)):
            assert torch.equal(end, expected)


# Threads


@pytest.fixture
def shared_out(monkeypatch):
    """A small state shared out among four threads, as a large one is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(kernels, "SHARE", 100)


@pytest.mark.parametrize("size", [199, 200, 401, 2049])
def test_threads_that_share_a_state(shared_out, size):
    x = randn(1, size)
    spans = InC(None, x, check=True).spans
    assert (spans[0][0], spans[-1][1], len(spans)) == (0, size, min(size // 100, 4))
    assert all(end == begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    for name in SPREAD:
        assert torch.equal(*both(plan_of(name), wavy, x))


@pytest.mark.parametrize("at", [0, 512, 1023, 1024, 2047, 2048])
def test_every_thread_finds_what_is_not_finite(shared_out, at):
    net = spoiling(math.nan, at, 0)
    with pytest.raises(sv.NonFiniteError, match=r"call 0 of 4 .*samples \[0\]; the x it was given is finite"):
        sv.run(plan_of("ddim"), net, randn(1, 2049), fused=True)


def test_threads_end_with_the_run(shared_out):
    def broken(x, t):
        return torch.full_like(x, math.nan)

    before = threading.active_count()
    for _ in range(5):
        sv.run(plan_of("adams_data_4"), wavy, randn(1, 2049), fused=True)
        with pytest.raises(sv.NonFiniteError):
            sv.run(plan_of("ddim"), broken, randn(1, 2049), fused=True)
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_32_threads_at_once():
    barrier = threading.Barrier(32)

    def ended(k, fused):
        return sv.run(plan_of(SPREAD[k % len(SPREAD)]), wavy, randn(2, 57 + k, seed=k), k, fused=fused)

    def at_once(k):
        barrier.wait()
        return [ended(k, True) for _ in range(3)]

    alone = [ended(k, False) for k in range(32)]
    with ThreadPoolExecutor(32) as pool:
        for ends, expected in zip(pool.map(at_once, range(32)), alone, strict=True):
            assert all(torch.equal(end, expected) for end in ends)


# What is not finite


def spoiling(value, place, call):
    """A network whose output holds a value at one place of the flat output in one call."""
    count = iter(range(10**6))

    def net(x, t):
        out = wavy(x, t).contiguous()
        if next(count) == call:
            out.view(-1)[place] = value
        return out

    return net


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("place", "sample"), [(0, 0), (511, 0), (512, 0), (513, 1), (1537, 2), (-1, 2)])
def test_fused_and_eager_raise_the_same_error(value, place, sample):
    for name, call in (("adams_data_4", 3), ("ddim", 0), ("unipc_angle_4", 5), ("sa_solver", 3)):
        for dtype in (torch.float32, torch.float64):
            caught = []
            for fused in (True, False):
                with pytest.raises(sv.NonFiniteError, match="the x it was given is finite") as error:
                    sv.run(
                        plan_of(name),
                        spoiling(value, place, call),
                        randn(3, 513, dtype=dtype),
                        0,
                        fused=fused,
                    )
                caught.append(error.value)
            one, other = caught
            assert str(one) == str(other)
            assert (one.call, one.samples) == (call, [sample])


def test_no_weight_hides_what_is_not_finite():
    """Where the row itself does not read its call, and 0 NaN would be seen by the next only."""
    plan = sv.dpm_solver_pp(VP, sv.logsnr(VP, 4))
    b = plan.b.clone()
    b[1] = torch.stack([0 * b[1, 0], b[1].sum()])
    hidden = replace(plan, b=b, consistent=False)
    assert hidden.nfe == 4
    for fused in (True, False):
        model = sv.Model(spoiling(math.nan, 4, 1), "data")
        with pytest.raises(sv.NonFiniteError, match="call 1 of 4"):
            sv.run(hidden, model, randn(3, 5), fused=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_and_the_least_numbers_are_finite(dtype, sign):
    plan = sv.ddim(VP, sv.logsnr(VP, 1))
    for value in (sign * torch.finfo(dtype).max, sign * torch.finfo(dtype).tiny / 4):
        model = sv.Model(lambda x, t, value=value: torch.full_like(x, value), "data")
        fused, eager = both(plan, model, randn(3, 513, dtype=dtype))
        assert torch.equal(fused, eager)
        assert fused.isfinite().all()


def spoiled(name, call, fused):
    """What is said where a callback makes a state infinite."""

    def spoil(state):
        if state.call == call:
            state.x[1].fill_(math.inf)

    try:
        return sv.run(
            plan_of(name, 3), lambda x, t: x.sin(), randn(3, 5), 0, callback=spoil, fused=fused
        ).tolist()
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_state_that_is_not_finite_is_told_alike(call):
    """Also before rows that only add noise."""
    fused, eager = (str(spoiled("ancestral_2s", call, way)) for way in (True, False))
    assert fused == eager


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_that_is_not_finite_takes_the_blame(fused):
    assert "the x it was given is not finite either" in spoiled("ddim", 1, fused)


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("fused", [True, False])
def test_unchecked_what_is_not_finite_goes_through(name, fused):
    end = sv.run(plan_of(name), spoiling(math.nan, 7, 1), randn(3, 5), 0, fused=fused, check=False)
    assert end.isnan()[1].any()
    assert end[[0, 2]].isfinite().all()


class Reads(TorchDispatchMode):
    """Counts what reads a value back to Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def reads_of(name, **options):
    """How often values are read from the first call on, which is behind the check of x."""
    start = []
    with Reads() as reads:

        def net(x, t):
            if not start:
                start.append(reads.count)
            return linear(x, t)

        sv.run(plan_of(name), net, randn(3, 5), 0, **options)
    return reads.count - start[0]


@pytest.mark.parametrize("name", SPREAD)
def test_nothing_is_read_back_unchecked(name):
    """By torch's own operations; checked, it is once a call, which shows that reads are seen. The kernel looks by itself."""
    assert reads_of(name, fused=False, check=False) == 0
    assert reads_of(name, fused=False) == plan_of(name).nfe
    assert reads_of(name, fused=True) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fused": 1}, "fused = 1: expected True, False or None"),
        ({"fused": "triton"}, "fused = 'triton': expected True, False or None"),
        ({"check": None}, "check = None: expected True or False"),
        ({"check": 1}, "check = 1: expected True or False"),
        ({"history": "bfloat16"}, "history = 'bfloat16': expected a floating-point dtype"),
        ({"history": torch.int8}, "history = torch.int8: expected a floating-point dtype"),
        ({"history": torch.complex64}, "history = torch.complex64: expected a floating-point dtype"),
    ],
    ids=str,
)
def test_options_are_refused_by_name_and_value(options, said):
    calls = []
    with pytest.raises(TypeError) as caught:
        sv.run(plan_of("ddim"), lambda x, t: calls.append(t) or x, randn(2, 3), **options)
    assert said in str(caught.value)
    assert calls == []


def test_what_formulas_cannot_have_is_refused():
    per_element = plan_of("dpm_solver_v3_2")
    for options in ({"fused": True}, {"history": torch.bfloat16}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} = .* with grad=True, whose rows are formulas of torch"):
            sv.run(plan_of("ddim"), wavy, randn(2, 3), grad=True, **options)
        with pytest.raises(ValueError, match=f"{name} = .* with coefficients per element"):
            sv.run(per_element, wavy, randn(2, 3), **options)


# No compiler


@pytest.fixture
def recompiled(monkeypatch):
    """Sets CC, and has everything compiled anew in the test and behind it."""

    def forget(cc):
        if cc is None:
            monkeypatch.delenv("CC", raising=False)
        else:
            monkeypatch.setenv("CC", str(cc))
        kernels._compiled.cache_clear()

    yield forget
    kernels._compiled.cache_clear()


def script(text):
    """A compiler that is a shell script; $out is the file it should write."""
    return f'#!/bin/sh\nfor out in "$@"; do :; done\n{text}\n'


COMPILERS = {  # what the file named by CC holds, and what must be said
    "fails": (script("echo no luck today >&2; exit 1"), "does not compile rows.c: no luck today"),
    "writes nothing": (script("exit 0"), "rows.c is not compiled or not loaded: "),
    "writes no library": (script('echo junk > "$out"'), "rows.c is not compiled or not loaded: "),
    "writes another library": (script('echo "int x;" | cc -x c - -shared -o "$out"'), ""),
    "is no program": ("\0\1\2\3", ""),
    "speaks Latin-1": (script(r"printf '\351' >&2; exit 1"), "does not compile rows.c"),
}


def refused_softly(said):
    """Torch's own operations are taken without a word, and who insists is told why."""
    x = randn(3, 57)
    expected = sv.run(plan_of("unipc_4"), wavy, x, fused=False)
    assert torch.equal(sv.run(plan_of("unipc_4"), wavy, x), expected)
    with pytest.raises(RuntimeError, match=r"fused = True, but .*: leave it out for torch's own") as caught:
        sv.run(plan_of("unipc_4"), wavy, x, fused=True)
    assert said in str(caught.value)


@pytest.mark.parametrize("how", COMPILERS)
def test_a_compiler_that_does_not_do_it(how, tmp_path, recompiled):
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILERS[how][0])
    compiler.chmod(0o755)
    recompiled(compiler)
    refused_softly(COMPILERS[how][1])


@pytest.mark.parametrize("cc", ["no-such-compiler", "/no/such/cc", ""])
def test_no_compiler(cc, recompiled):
    recompiled(cc)
    refused_softly(f"no C compiler {cc!r} is found")


def test_a_folder_from_which_nothing_is_loaded(recompiled, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    recompiled(None)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    refused_softly("failed to map segment")


def test_no_folder_to_compile_in(recompiled, monkeypatch, tmp_path):
    recompiled(None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    refused_softly("")


@pytest.fixture
def compilations(recompiled, monkeypatch):
    """The commands that are run, from none on."""
    recompiled(None)
    commands, go = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: commands.append(a) or go(*a, **k))
    return commands


def test_it_is_compiled_once_in_a_process(compilations):
    for _ in range(3):
        sv.run(plan_of("ddim"), wavy, randn(3, 5), fused=True)
    assert 1 <= len(compilations) <= len(kernels.TUNED)
    compilations.clear()
    sv.run(plan_of("ddim"), wavy, randn(3, 5), fused=True)
    sv.run(plan_of("ddim"), wavy, randn(3, 5, dtype=torch.float64), fused=False)
    assert compilations == []


def test_it_is_compiled_once_for_all_threads(compilations):
    barrier = threading.Barrier(4)

    def at_once(k):
        barrier.wait()
        return sv.run(plan_of("ddim"), wavy, randn(3, 5), fused=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(at_once, range(4)))
    assert len(compilations) <= len(kernels.TUNED)


def test_a_compiler_that_knows_no_tuning_gives_the_same_to_rounding(tmp_path, recompiled):
    """And so one without fused multiply-add."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-march*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    recompiled(compiler)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        fused, eager = both(plan_of("unipc_angle_4"), wavy, randn(3, 513, dtype=dtype))
        assert_close(fused, eager, rtol=tolerance, atol=tolerance * float(eager.abs().max()))


# Memory


class Allocations(TorchDispatchMode):
    """What torch's operations allocate, in bytes: held now, at the peak, and how many are as large as `least`."""

    def __init__(self, least=0):
        super().__init__()
        self.held, self.peak, self.least, self.large, self.known = 0, 0, least, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tensors((args, kwargs)):
            self.meet(t.untyped_storage(), 0)  # it was there before
        out = func(*args, **(kwargs or {}))
        for t in tensors(out):
            self.meet(t.untyped_storage(), t.untyped_storage().nbytes())
        return out

    def meet(self, storage, size):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            self.large += 0 < self.least <= size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.held -= size


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


SIZE = 4 * 4096 * 4  # bytes of a state: all else is small beside it
STATE = randn(4, 4096)


def peak(plan, net, noise=None, x=STATE, **options):
    """The most memory that a run holds beside its x, in states."""
    with Allocations() as made:
        sv.run(plan, net, x, noise, **options)
    return made.peak / SIZE


def test_allocations_are_seen_and_so_are_their_ends():
    with Allocations(SIZE) as made:
        y = STATE.clone()
        z = (y + 1)[:2].T
        assert (made.held, made.peak, made.large) == (2 * SIZE, 2 * SIZE, 2)
        del y
        assert (made.held, made.peak) == (SIZE, 2 * SIZE)
        z.add_(1)
        STATE.view(-1)
        torch.mul(z, 2, out=z)
        assert (made.held, made.peak, made.large) == (SIZE, 2 * SIZE, 2)
        del z
        assert made.held == 0
        sum(STATE.clone() for _ in range(3))
        assert (made.held, made.peak) == (0, 3 * SIZE)


def live(plan):
    """The most outputs that rows to come read, of which a run cannot do with fewer."""
    last = plan.pattern.last
    return max(sum(last[j] > i for j in range(i + 1)) for i in range(plan.rows))


WINDOWS = {f"adams {p}": partial(sv.exponential_adams, order=p) for p in (1, 2, 3, 4, 5)} | {
    "unipc 3 singlestep": partial(sv.unipc, order=3, start="singlestep"),
    "heun": sv.heun,
    "hochbruck_ostermann": BUILDS["hochbruck_ostermann"],
    "recommended": sv.recommended,
}


def test_windows_of_one_to_six_are_looked_at():
    assert {method(VP, sv.logsnr(VP, 12)).window for method in WINDOWS.values()} >= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_run_holds_its_window_and_two_states(name, way):
    """The state, the outputs that rows to come read, and the network's: the kernel needs no more; torch's operations one to write to."""
    plan = WINDOWS[name](VP, sv.logsnr(VP, 12))
    for kind in KINDS:
        held = peak(plan, sv.Model(linear, predicts=kind), fused=WAYS[way])
        assert held < plan.window + 2.1
        assert live(plan) + 1.9 < held < live(plan) + 2.1 + (way == "eager")


@pytest.mark.parametrize("way", ["fused", "eager"])
def test_a_converted_input_is_within_that(way):
    """Of a network in half precision, and of one that reads a scaled x; torch's own operations need one state more."""
    plan, edm = sv.exponential_adams(VP, sv.logsnr(VP, 12), 3), sv.EDM()
    scaled = sv.exponential_adams(edm, sv.karras(edm, 12), 3)
    half = STATE.bfloat16()
    for held in (
        peak(plan, linear, x=half, fused=WAYS[way]),
        peak(scaled, sv.Model(linear, predicts="edm"), fused=WAYS[way]),
    ):
        assert held < plan.window + 2.1 + (way == "eager")


@pytest.mark.parametrize("way", WAYS)
def test_one_state_more_is_seen(way, monkeypatch):
    """Planted: a network that copies its output, and an executor that keeps copies of x."""
    plan = sv.exponential_adams(VP, sv.logsnr(VP, 12), 3)
    least = peak(plan, linear, fused=WAYS[way])

    def copies(x, t):
        first = linear(x, t)
        return first.clone()

    assert peak(plan, copies, fused=WAYS[way]) - least == pytest.approx(1, abs=0.1)
    kept, memory = [], Stepper._memory
    monkeypatch.setattr(Stepper, "_memory", lambda self, x: kept.append(x.clone()) or memory(self, x))
    assert peak(plan, linear, fused=WAYS[way]) - least > 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ddpm", "sa_solver", "er_sde_3", "ancestral_3s", "seeds_3"])
def test_a_stochastic_run_holds_its_draws_besides(name, way):
    plan = plan_of(name, 6)
    held = peak(plan, linear, generator(1), fused=WAYS[way])
    assert held < plan.window + 2 + plan.c.shape[1] + 1.1


def allocated_by_row(plan, fused, noise=None):
    """How many allocations as large as a state there are from each call of the network to the next."""
    marks = []
    with Allocations(SIZE) as made:

        def net(x, t):
            marks.append(made.large)
            return linear(x, t)

        sv.run(plan, net, STATE, noise, fused=fused)
    return [b - a for a, b in zip(marks, [*marks[1:], made.large], strict=True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_row_allocates_nothing_once_the_history_is_full(name, way):
    """But the network its output."""
    plan = WINDOWS[name](VP, sv.logsnr(VP, 12))
    rows = allocated_by_row(plan, WAYS[way])
    assert rows[plan.window :] == [1] * (plan.rows - plan.window)
    assert sum(rows) <= plan.rows + plan.window


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_allocates_is_seen(way, monkeypatch):
    monkeypatch.setattr(Stepper, "_memory", lambda self, x: torch.empty_like(x, dtype=self.history))
    plan = sv.exponential_adams(VP, sv.logsnr(VP, 12), 3)
    assert set(allocated_by_row(plan, WAYS[way])[3:-1]) == {2}


@pytest.mark.parametrize("way", WAYS)
def test_a_stochastic_row_allocates_its_draw(way):
    rows = allocated_by_row(plan_of("sa_solver", 12), WAYS[way], generator(1))
    assert set(rows[4:-1]) == {2}


def test_a_history_in_half_precision_holds_less():
    plan = sv.exponential_adams(VP, sv.logsnr(VP, 12), 5)
    whole = peak(plan, linear, fused=False)
    assert peak(plan, linear, fused=False, history=torch.bfloat16) < whole - 1


# The dtype of what is kept

HALVES = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # and the largest rounding, relative
MULTISTEP = ("adams_data_2", "adams_noise_4", "unipc_3", "unipc_angle_4", "ipndm", "sa_solver")
START = randn(16, 8)


def apart(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", MULTISTEP)
def test_outputs_are_kept_in_the_dtype_asked_for_and_summed_in_the_state_s(name, half):
    """One rounding of each output is all that is lost."""
    plan, states = plan_of(name, 24), []
    exact = sv.run(plan, MODELS["eight"], START, 3)
    end = sv.run(plan, MODELS["eight"], START, 3, callback=states.append, history=half)
    assert {v.dtype for s in states for v in s.outputs.values()} == {half}
    assert {s.x.dtype for s in states} | {end.dtype} == {torch.float32}
    for x in (START, states[len(states) // 2]):
        for fused in (None, False):
            assert torch.equal(sv.run(plan, MODELS["eight"], x, 3, fused=fused, history=half), end)
    assert HALVES[half] / 20 < apart(end, exact) < 3 * HALVES[half]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["adams_data_2", "unipc_angle_4"])
def test_that_is_far_less_than_a_state_in_half_precision_loses(name, half):
    """Which is rounded in each row."""

    def rounded(state):
        state.x.copy_(state.x.to(half))

    plan = plan_of(name, 48)
    exact, kept, accumulated = (
        sv.run(plan, MODELS["eight"], START, **options)
        for options in ({}, {"history": half}, {"callback": rounded})
    )
    assert apart(kept, exact) < apart(accumulated, exact) / 5


def test_a_wider_history_is_the_same_run():
    """To rounding where torch sums float64."""
    same, single, double = (
        sv.run(plan_of("unipc_4"), wavy, randn(3, 57), fused=False, history=kept)
        for kept in (None, torch.float32, torch.float64)
    )
    assert torch.equal(same, single)
    assert_close(same, double, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float64], ids=str)
def test_the_kernel_on_a_cpu_keeps_no_other_dtype(kept):
    """Nothing is called, and what is not asked for is not taken."""
    calls = []
    with pytest.raises(
        RuntimeError, match=r"fused = True, but rows.c keeps outputs in the state's dtype: leave"
    ):
        sv.run(plan_of("unipc_4"), lambda x, t: calls.append(t) or x, randn(3, 5), fused=True, history=kept)
    assert calls == []


@pytest.mark.parametrize(
    ("before", "after", "fused"),
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, None, False),
        (None, torch.bfloat16, False),
        (None, torch.bfloat16, None),
    ],
    ids=str,
)
def test_the_dtype_of_a_state_s_outputs_is_not_that_of_the_next(before, after, fused):
    """Seen by a callback, or not, as then memory is used again."""
    plan, states = plan_of("dpm_solver_pp_3m", 8), []
    sv.run(plan, wavy, randn(3, 57), callback=states.append, history=before)
    for state in states:
        seen = sv.run(plan, wavy, state, callback=lambda state: None, history=after, fused=fused)
        assert torch.equal(sv.run(plan, wavy, state, history=after, fused=fused), seen)


@pytest.mark.parametrize("fused", [True, False])
def test_outputs_of_a_state_may_lie_in_another_layout(fused):
    plan, states = plan_of("dpm_solver_pp_3m", 8), []
    end = sv.run(plan, linear, randn(3, 4, 5, 6), callback=states.append)
    for state in states:
        outputs = {n: v.to(memory_format=torch.channels_last) for n, v in state.outputs.items()}
        assert torch.equal(sv.run(plan, linear, replace(state, outputs=outputs), fused=fused), end)


@pytest.mark.parametrize("fused", [True, False])
def test_draws_of_a_state_may_lie_in_another_layout(fused):
    plan, states = correlated(), []
    end = sv.run(plan, linear, randn(3, 4, 5, 6), 5, callback=states.append)
    assert any(state.draws for state in states)
    for state in states:
        draws = {n: v.to(memory_format=torch.channels_last) for n, v in state.draws.items()}
        assert torch.equal(sv.run(plan, linear, replace(state, draws=draws), 5, fused=fused), end)


# Labels


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_labels_are_a_tensor_for_each_call(batch, dtype):
    """Of the state's dtype, in their own memory, begun at multiples of 16 bytes."""
    plan, seen = plan_of("unipc_4"), []
    sv.run(plan, lambda x, t: seen.append(t) or x, randn(batch, 3).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    about = [(t.dtype, t.shape, t.data_ptr() % 16, t.is_contiguous()) for t in seen]
    assert about == [(wide, (batch,), 0, True)] * plan.nfe
    expected = plan.times[:-1].to(wide)[:, None].expand(-1, batch)
    assert torch.equal(torch.stack(seen), expected)  # also now that all are made
    reach = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in seen)
    assert all(end <= begin for (_, end), (begin, _) in zip(reach, reach[1:], strict=False))


def test_whole_labels_are_whole_in_every_call():
    schedule, seen = sv.Discrete.linear(1000), []
    model = sv.Model(lambda x, n: seen.append(n) or x, label=schedule.step)
    sv.run(sv.ddim(schedule, sv.trailing(schedule, 4)), model, randn(3, 5))
    assert [n.tolist() for n in seen] == [[999] * 3, [749] * 3, [499] * 3, [249] * 3]
    assert {(n.dtype, n.data_ptr() % 16) for n in seen} == {(torch.long, 0)}


@pytest.mark.parametrize("name", ["unipc_4", "ancestral_3s"])
@pytest.mark.parametrize(("fused", "grad"), [(True, False), (False, False), (None, True)])
def test_a_network_may_edit_its_label(name, fused, grad):
    plan = plan_of(name)

    def edits(x, t):
        t.mul_(1000).add_(1)
        return wavy(x, t)

    ends = [sv.run(plan, edits, randn(3, 5), 0, grad=grad, fused=fused) for _ in range(3)]
    clean = sv.run(plan, lambda x, t: wavy(x, 1000 * t + 1), randn(3, 5), 0, grad=grad, fused=fused)
    assert all(torch.equal(end, clean) for end in ends)


def test_a_learned_scale_may_edit_the_label_in_place():
    scale = torch.ones((), requires_grad=True)

    def edits(x, t):
        t *= scale
        return wavy(x, t)

    end = sv.run(plan_of("ddim"), edits, randn(3, 5), grad=True)
    assert torch.autograd.grad(end.sum(), scale)[0].isfinite()


# Triton


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is what runs these tests")
def test_the_triton_kernel_in_its_interpreter():
    """The tests below, in a process in which Triton interprets its kernels on the CPU."""
    pytest.importorskip("triton")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-k", "on_triton", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
    assert " skipped" not in ended.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_triton_kernel_in_its_interpreter")
quietly = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy, which computes there, warns of inf - inf


@pytest.fixture
def in_triton(monkeypatch):
    """fused=True takes the Triton kernel for a state on the CPU, and outputs are read late, as on CUDA."""
    from solvers.rows_triton import InTriton

    monkeypatch.setattr(LOOP, "kernel_for", lambda x, fused, *others: InTriton(x) if fused else None)
    monkeypatch.setattr(LOOP, "_is_read_late", lambda x: True)


@interpreted
@pytest.mark.parametrize("name", [*SPREAD, "dpm_solver_pp_2m", "heun", "ddpm", "seeds_3"])
def test_rows_on_triton_are_the_same_to_rounding(name, in_triton):
    ways = list(zip(KINDS, ("in order", "channels last", "permuted"), strict=True))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        for kind, layout in ways:
            x = LAYOUTS[layout](randn(3, 2, 37, 5, dtype=dtype))
            fused, eager = both(plan_of(name, 3), sv.Model(linear, predicts=kind), x)
            assert apart(fused, eager) < tolerance, (dtype, kind, layout)


@interpreted
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1023), (1, 1024), (1, 1025), (1025, 1)])
def test_sizes_around_a_block_on_triton(shape, in_triton):
    fused, eager = both(plan_of("unipc_4"), wavy, randn(*shape))
    assert apart(fused, eager) < 1e-5


@interpreted
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_of_any_layout_dtype_and_memory_on_triton(network, in_triton):
    for name in ("sa_solver", "unipc_4"):
        fused, eager = (
            sv.run(plan_of(name), NETWORKS[network](), randn(3, 4, 6, 6, dtype=torch.float64), 0, fused=way)
            for way in (True, False)
        )
        assert apart(fused, eager) < (1e-3 if "float16" in network else 1e-12)


@interpreted
@pytest.mark.parametrize("half", HALVES)
def test_a_history_in_half_precision_on_triton(half, in_triton):
    plan = plan_of("unipc_3", 20)
    ends = both(plan, MODELS["eight"], START, history=half)
    exact = sv.run(plan, MODELS["eight"], START)
    truncated = 4 if half == torch.bfloat16 else 1  # as the interpreter rounds to it
    for end in ends:
        assert HALVES[half] / 50 < apart(end, exact) < 2 * truncated * HALVES[half]
    assert apart(*ends) < 2 * truncated * HALVES[half]


@interpreted
@quietly
@pytest.mark.parametrize("layout", ["in order", "channels last", "permuted"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_flags_on_triton_name_call_and_samples(value, layout, in_triton):
    for name, call in (("adams_data_4", 0), ("ddim", 3), ("unipc_angle_4", 5), ("ancestral_3s", 4)):
        said = []
        for fused in (True, False):
            count = iter(range(100))

            def net(x, t, call=call, count=count):
                out = linear(x, t)
                if next(count) == call:
                    out[1, 0, 36, 4] = out[2, 0, 0, 0] = value
                return out

            x = LAYOUTS[layout](randn(4, 2, 37, 5))
            with pytest.raises(
                sv.NonFiniteError, match=r"samples \[1, 2\]; all outputs before it are finite"
            ) as caught:
                sv.run(plan_of(name), net, x, 0, fused=fused)
            said.append(str(caught.value))
        assert said[0] == said[1]
        row = plan_of(name).is_called.nonzero()[call].item()
        assert caught.value.call == row


@interpreted
@quietly
@pytest.mark.parametrize("call", [0, 2, 3])
def test_flags_on_triton_beside_a_second_output(call, in_triton):
    net = spoiling(math.nan, 7, call)
    model = sv.Model(lambda x, t: (net(x, t), torch.zeros_like(x)), variance="range")
    with pytest.raises(sv.NonFiniteError, match=rf"call {call} of 4 .*samples \[1\]"):
        sv.run(sv.ddpm(VP, sv.logsnr(VP, 4), variance="learned"), model, randn(3, 5), 0, fused=True)


@interpreted
@quietly
def test_unchecked_on_triton(in_triton):
    end = sv.run(plan_of("ddim"), spoiling(math.nan, 7, 1), randn(3, 5), fused=True, check=False)
    assert end.isnan().nonzero().tolist() == [[1, 2]]
