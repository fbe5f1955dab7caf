"""Records: what a benchmark writes, one JSON object a line, and what report.py reads."""

import gzip
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import run
from typing import TextIO

import torch

from solvers import comparison

PEERS = ("diffusers", "k-diffusion", "torchdiffeq")


def versions() -> dict[str, str]:
    """What made a record: versions, threads, device and commit."""
    return comparison.versions() | {"threads": str(torch.get_num_threads())} | _machine()


@cache
def _machine() -> dict[str, str]:
    """The peers that are installed, the device, and the commit, with a + if something is not committed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    here = Path(__file__).parent
    git = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    commit = run(git, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    return found | {"device": device, "commit": commit or "none"}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """This many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Step:
    """The cost of one call outside the network; the cost of the bare network loop is taken off."""

    method: str
    shape: list[int]  # of x
    nfe: int  # calls in one run
    seconds: float  # per call: a whole run, its set-up included, divided by nfe; median over rounds
    best: float  # the same, minimum over rounds
    between: float  # from one call to the next inside a run, so without its set-up; median of a run, minimum over rounds
    rounds: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "step"


@dataclass(frozen=True)
class WorkPrecision:
    """The error that a number of calls buys, over starts drawn from the exact marginal at the schedule's start."""

    method: str
    order: int  # that the method declares
    grid: str
    schedule: str
    problem: str
    calls: int  # asked for
    nfe: int  # made: the most that the method can use of them
    rmse: float  # over starts and dimensions, against the exact flow
    median: float  # over starts, of one start's root mean square
    seconds: float  # of the run, the exact model included
    starts: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "work_precision"


@dataclass(frozen=True)
class Law:
    """How far the law of a sampler's output is from the exact marginal at the end of its grid."""

    method: str
    problem: str
    grid: str
    calls: int  # asked for
    nfe: int  # made
    kl: float | None  # KL(exact || sampler's) in nats; None where the law is known by samples alone
    distance: float  # Wasserstein-2 per element, or by samples sliced Wasserstein-2
    floor: float  # what two sets of exact samples have between them; 0 for an exact law
    samples: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "law"


@dataclass(frozen=True)
class Adaptive:
    """The calls that a tolerance costs, and the true error that it leaves."""

    solver: str
    problem: str
    tolerance: float | None  # rtol and atol; None for a fixed plan
    nfe: float  # mean over starts
    most: int  # the largest
    rejected: float  # steps, mean over starts
    rmse: float  # over starts and dimensions, against the exact flow
    median: float  # over starts, of one start's root mean square
    starts: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "adaptive"


@dataclass(frozen=True)
class Build:
    """The time to make a plan from a schedule and its times."""

    method: str
    steps: int
    rows: int
    seconds: float  # minimum over rounds
    rounds: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "build"


@dataclass(frozen=True)
class Growth:
    """The cost of a run against one quantity, the others held fixed."""

    quantity: str  # "steps" | "batch" | "dimension" | "history"
    value: int  # of the quantity
    method: str
    executor: str  # "eager" | "fused"
    shape: list[int]  # of x
    steps: int
    seconds: float  # of a run, less that of its bare network calls; minimum over rounds
    rounds: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "growth"


@dataclass(frozen=True)
class EndToEnd:
    """Sampling with a network of real size, against its bare calls."""

    network: str
    parameters: int
    method: str
    executor: str  # "eager" | "fused" | "graph"
    dtype: str  # of the network
    shape: list[int]  # of x
    nfe: int
    seconds: float  # of a run; median over rounds
    bare: float  # of nfe calls of the network alone, or of their graph; median over rounds
    ratio: float  # of a run and the bare calls next to it; median over rounds
    syncs: int | None  # times a run made the host wait for the device; None where that is not counted
    loop_syncs: int | None  # of them between the first call and the last; None also in a graph
    extra_states: float | None  # peak memory of a run beyond that of its network, in states
    rounds: int
    seed: int
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "end_to_end"


Record = Step | WorkPrecision | Law | Adaptive | Build | Growth | EndToEnd
KINDS = {
    "step": Step,
    "work_precision": WorkPrecision,
    "law": Law,
    "adaptive": Adaptive,
    "build": Build,
    "growth": Growth,
    "end_to_end": EndToEnd,
}


def arguments(
    about: str, out: str, choices: Mapping[str, Iterable[str]], calls: Sequence[int]
) -> ArgumentParser:
    """The options that the benchmarks of errors share."""
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    for option, names in choices.items():
        known = list(names)
        parser.add_argument(f"--{option}", nargs="+", choices=known, default=known, metavar=option[:-1])
    parser.add_argument("--calls", nargs="+", type=int, default=calls, metavar="n")
    parser.add_argument("--threads", type=int, default=1, help="default: 1; the problems are small")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a record, each on disk as soon as it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open(path, "wt") as file:
        for record in records:
            print(json.dumps(asdict(record), allow_nan=False), file=file, flush=True)


def read(path: Path) -> list[Record]:
    """The records of a file; a missing or unknown field is an error."""
    with _open(path, "rt") as file:
        return [KINDS[row["benchmark"]](**row) for row in map(json.loads, file)]


def _open(path: Path, mode: str) -> TextIO:
    """A file of text, compressed if it is named so."""
    return (
        gzip.open(path, mode, encoding="utf-8") if path.suffix == ".gz" else path.open(mode, encoding="utf-8")
    )  # type: ignore[return-value]
