"""The loops of step.py under pytest-benchmark: pytest benchmarks/test_step.py --benchmark-enable.

A time is that of a whole run; `microseconds_per_call` in the saved JSON has the bare network loop taken off. The ratios to
quote are those of step.py, which takes all loops in turn.
"""

from statistics import median
from time import perf_counter

import pytest
import torch
from step import ADD, BARE, CASES, DIFFUSERS, IDEAL, METHODS, loops

NAMES = [ADD, IDEAL, *METHODS, DIFFUSERS]


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, shape, name):
    if name == DIFFUSERS:
        pytest.importorskip("diffusers")
    calls, rounds = CASES[shape]
    _, found = loops(shape, calls, seed=0)
    benchmark.group = f"{list(shape)}, a run of {calls} calls"
    with torch.no_grad():
        benchmark.pedantic(found[name], rounds=rounds, warmup_rounds=1)
        bare = [_seconds(found[BARE]) for _ in range(rounds)]
    if benchmark.enabled:
        microseconds = 1e6 * (benchmark.stats.stats.median - median(bare)) / calls
        benchmark.extra_info["microseconds_per_call"] = round(microseconds, 2)


def _seconds(loop):
    start = perf_counter()
    loop()
    return perf_counter() - start
