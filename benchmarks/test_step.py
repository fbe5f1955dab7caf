"""The loops of step.py under pytest-benchmark: pytest benchmarks/test_step.py --benchmark-enable.

A time is that of a whole run; `microseconds_per_call` in the saved JSON has the bare network loop taken off. The ratios to
quote are those of step.py, which takes all loops in turn.
"""

from statistics import median
from time import perf_counter

import pytest
import torch
from step import ADD, ADDCMUL, BARE, CASES, loops

RUNS = [
    (shape, name)
    for shape, (_, _, names) in CASES.items()
    for name in (ADD, ADDCMUL, *names)
    if not name.endswith("tree")  # seconds a run
]


@pytest.mark.filterwarnings("ignore")  # of peers
@pytest.mark.parametrize(("shape", "name"), RUNS)
def test_step(benchmark, shape, name):
    calls, rounds, _ = CASES[shape] if benchmark.enabled else (4, 1, ())
    _, made = loops(shape, calls, [] if name in (ADD, ADDCMUL) else [name], seed=0)
    if name not in made:
        pytest.skip("not installed, or no step within so few calls")
    benchmark.group = f"{list(shape)}, a run of {calls} calls"
    with torch.no_grad():
        benchmark.pedantic(made[name].run, rounds=rounds, warmup_rounds=1)
        bare = [_seconds(made[BARE].run) for _ in range(rounds)]
    if benchmark.enabled:
        seconds = benchmark.stats.stats.median / made[name].calls - median(bare) / calls
        benchmark.extra_info["microseconds_per_call"] = round(1e6 * seconds, 2)


def _seconds(run):
    start = perf_counter()
    run()
    return perf_counter() - start
