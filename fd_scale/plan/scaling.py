"""A model of step time on 8 to 4,096 GPUs: what a recipe gains from more of them, and what it runs into.

On top of a plan it adds what a plan leaves out: latency, what communication hides behind, stragglers, launches, input
and checkpoints. None of it is measured; each number that it takes on trust is a field of `Assumptions`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from fd_scale.config import Recipe, describe_fields
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS_PER_NODE, Gpu
from fd_scale.plan.counts import Counts, count
from fd_scale.plan.estimate import (
    LAUNCH_US,
    UTILISATION,
    Choice,
    Plan,
    Traffic,
    launch_seconds,
    plan,
    recorded_by,
)
from fd_scale.plan.memory import HIERARCHICAL

LARGEST = 4096
"""GPUs; further than that nothing here was thought through."""


_POSITIVE = ("utilisation", "link_efficiency", "worker_images_per_s", "host_copy_gb_per_s", "disk_gb_per_s")
_SHARES = ("utilisation", "link_efficiency", "overlap", "small", "tree")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What the model takes on trust."""

    utilisation: float = UTILISATION
    """Share of a GPU's dense bf16 peak at which it computes, recomputation counted as work. Assumed."""
    launch_us: float = LAUNCH_US
    """Microseconds that the host takes for each trained parameter tensor and micro-batch at ZeRO 0 to 2; 1.9 times that
    at 3, at most 0.4 times with train.cuda_graphs. Measured on the hosts of H200s, docs/measurements.md."""
    link_efficiency: float = 0.8
    """Share of the datasheets' rates of NVLink and InfiniBand that collectives reach. Assumed."""
    overlap: float = 0.9
    """Share of a computation behind which communication can hide; the first gather and the last reduction cannot.
    Assumed."""
    start_us: float = 8.4
    """Microseconds to start a collective. Source: NCCL's tuning model (NVIDIA/nccl, src/graph/tuning.cc, baseLat, ring,
    Simple)."""
    nvlink_hop_us: float = 3.4
    """Microseconds from a GPU to the next in its node. Source: as above, hwLat, NVLink, ring, Simple."""
    network_hop_us: float = 14.0
    """Microseconds from a node to the next. Source: as above, hwLat, network, ring and tree, Simple."""
    small: float = 0.2
    """Share of the hops' time that a collective of few bytes takes (a parameter that ZeRO-3 leaves whole). Source: as
    above, ring, LL: 0.6 and 2.7 us."""
    tree: float = 0.0
    """1: collectives between nodes take log2(nodes) hops; 0: a ring, nodes - 1, as NCCL gathers and reduce-scatters."""
    jitter: float = 0.02
    """Standard deviation of a GPU's time for a step, as a share of it: independent and normal, and the slowest decides.
    Assumed."""
    worker_images_per_s: float = 500.0
    """Images that a loader worker decodes a second; a node has 8 x data.num_workers. Source: docs/measurements.md, one
    core, ImageNet at 224 px, 503 to 693."""
    host_copy_gb_per_s: float = 20.0
    """GB/s at which a GPU copies its share of a checkpoint to the host, while the step waits. Assumed: PCIe 4.0 x16, 32
    GB/s at most."""
    disk_gb_per_s: float = 10.0
    """GB/s at which all ranks together write a checkpoint while training goes on; the next one waits for it.
    Assumed."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            least = "above 0" if item.name in _POSITIVE else "0 or more"
            most = " and at most 1" if item.name in _SHARES else ""
            enough = value > 0 if item.name in _POSITIVE else value >= 0
            if not (math.isfinite(value) and enough and (value <= 1 or not most)):
                raise UserError(f"--assume {item.name}={value:g}: expected a number, {least}{most}")

    @classmethod
    def given(cls, settings: Sequence[str]) -> Assumptions:
        """Returns the defaults with some replaced by `name=value`.

        Raises:
            UserError: no such assumption, or no such value.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        values = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise UserError(
                    f"--assume {setting}: expected NAME=VALUE of {', '.join(names)}; did you mean {nearest}"
                )
            try:
                values[name] = float(value)
            except ValueError:
                raise UserError(f"--assume {setting}: got {value!r}, expected a number") from None
        return cls(**values)

    def lines(self) -> list[str]:
        """Each assumption with its value and meaning."""
        return [
            f"{name} = {getattr(self, name):g}: {meaning}" for name, _, meaning in describe_fields(type(self))
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A step on one number of GPUs; seconds."""

    num_gpus: int
    global_batch: int
    choice: Choice
    """Micro-batch, traffic and memory, as planned."""
    fits: bool
    """Whether it fits into a GPU's memory."""
    flops_s: float
    """Computation at the assumed utilisation."""
    launch_s: float
    """Least that launching it takes."""
    links_s: float
    """Communication by its volume, at the links' assumed rate."""
    latency_s: float
    """Communication by its hops."""
    exposed_s: float
    """Of both, what hides behind nothing."""
    overflows: bool
    """Whether communication is more than there is to hide it behind, what follows the optimizer step apart."""
    waiting_s: float
    """For the slowest GPU."""
    input_s: float
    """Loading the images; it goes on beside all else."""
    checkpoint_s: float
    """Checkpoints, shared among the steps from one to the next."""

    @property
    def compute_s(self) -> float:
        """A GPU is busy, or waits for launches."""
        return max(self.flops_s, self.launch_s)

    @property
    def training_s(self) -> float:
        """A step with images at hand, and no checkpoint."""
        return self.compute_s + self.exposed_s + self.waiting_s

    @property
    def step_s(self) -> float:
        """All in all."""
        return max(self.training_s, self.input_s) + self.checkpoint_s

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.global_batch / self.step_s

    @property
    def bound(self) -> str:
        """What a step would gain most from."""
        if self.input_s > self.training_s:
            return "input"
        parts = {
            "computation" if self.flops_s >= self.launch_s else "launches": self.compute_s,
            "bandwidth" if self.links_s >= self.latency_s else "latency": (
                self.links_s + self.latency_s if self.overflows else self.exposed_s
            ),
            "stragglers": self.waiting_s,
            "checkpoints": self.checkpoint_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Curve:
    """One way to use more and more GPUs."""

    kind: Literal["strong", "weak"]
    """Strong: the recipe's global batch, shared among more. Weak: the recipe's micro-batch on each, a larger batch."""
    stage: str
    """One of `memory.STAGES`."""
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """For tables and legends."""
        return f"{self.kind}, {self.stage if self.stage == HIERARCHICAL else f'ZeRO-{self.stage}'}"

    def efficiency(self, point: Point) -> float:
        """Images a second and GPU, as a share of those on the curve's fewest GPUs."""
        first = self.points[0]
        return (point.images_per_s / point.num_gpus) / (first.images_per_s / first.num_gpus)

    def reaches(self, least: float) -> int:
        """The most GPUs up to which the efficiency never falls below `least`."""
        held = self.points[0]
        for point in self.points:
            if self.efficiency(point) < least:
                break
            held = point
        return held.num_gpus


@dataclass(frozen=True, slots=True)
class Scaling:
    """The curves of a recipe."""

    name: str
    recipe: Recipe
    counts: Counts
    gpu: Gpu
    assumed: Assumptions
    curves: tuple[Curve, ...]


def parse_sizes(text: str) -> list[int]:
    """Returns the numbers of GPUs that `FIRST..LAST` means: FIRST, twice as many, and so on up to LAST.

    Raises:
        UserError: it is nothing of the kind.
    """
    first, dots, last = text.partition("..")
    if not (dots and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last) <= LARGEST):
        raise UserError(f"--scaling: got {text}, expected FIRST..LAST GPUs up to {LARGEST}, as 8..{LARGEST}")
    return [int(first) << doubled for doubled in range((int(last) // int(first)).bit_length())]


def scaling(
    name: str,
    recipe: Recipe,
    gpu: Gpu,
    sizes: Sequence[int],
    assumed: Assumptions | None = None,
    counts: Counts | None = None,
) -> Scaling:
    """Models a recipe's step on several numbers of GPUs.

    Strong scaling ends where the global batch has no image left for a GPU. A recipe at ZeRO-3 is shown with and without
    replicas.

    Args:
        name: of the recipe, for titles.
        recipe: any task; weights are not read.
        gpu: what to run on.
        sizes: numbers of GPUs, rising.
        assumed: none: the defaults.
        counts: those of the recipe, where they are known.

    Raises:
        UserError: the recipe does not allow it.
    """
    assumed = assumed or Assumptions()
    counts = counts or count(recipe)
    train = recipe.train
    if sizes[0] > train.global_batch:
        raise UserError(
            f"--scaling: {sizes[0]} GPUs, but train.global_batch={train.global_batch} has an image for no more than "
            f"{train.global_batch}; begin with fewer"
        )
    larger = [replace(train, global_batch=train.micro_batch * size) for size in sizes]
    plans: dict[Literal["strong", "weak"], list[Plan]] = {
        "strong": [
            _plan(name, recipe, gpu, size, assumed, counts) for size in sizes if size <= train.global_batch
        ],
        "weak": [
            _plan(name, replace(recipe, train=settings), gpu, size, assumed, counts)
            for size, settings in zip(sizes, larger, strict=True)
        ],
    }
    own = plans["strong"][0].own.stage
    stages = ("3", HIERARCHICAL) if own in ("3", HIERARCHICAL) else (own,)
    curves = tuple(
        Curve(kind, stage, tuple(predict(planned, assumed, stage) for planned in each))
        for kind, each in plans.items()
        for stage in stages
    )
    return Scaling(name, recipe, counts, gpu, assumed, curves)


def _plan(name: str, recipe: Recipe, gpu: Gpu, size: int, assumed: Assumptions, counts: Counts) -> Plan:
    return plan(name, recipe, gpu, size, images=0, utilisation=assumed.utilisation, counts=counts)


def predict(planned: Plan, assumed: Assumptions, stage: str | None = None) -> Point:
    """Models the step of a plan.

    Args:
        planned: as the recipe is, on a number of GPUs.
        assumed: what is not known.
        stage: one of `memory.STAGES`, with the recipe's micro-batch and policy; none: the recipe's.
    """
    own = planned.own
    way = (stage or own.stage, own.policy, own.micro_batch)
    choice = next(choice for choice in planned.choices if choice.way == way)
    counts, sent, train = planned.counts, choice.traffic, planned.recipe.train
    launch_s = launch_seconds(planned.recipe, counts, choice.stage, choice.accumulation, assumed.launch_us)
    compute_s = max(choice.compute_seconds, launch_s)
    exchanging = _exchange_latency(choice, planned.num_gpus, assumed)
    during, after = _latency(choice, planned.num_gpus, assumed)
    links_s = sent.seconds / assumed.link_efficiency
    hideable = links_s * (1 - sent.settling) + during + exchanging
    exchange_s = sent.exchange_seconds / assumed.link_efficiency + exchanging
    room, room_for_exchange = (
        assumed.overlap * _room(planned, choice, behind) * compute_s
        for behind in (sent.behind, "last backward" if sent.behind == "step" else sent.behind)
    )
    too_much = max(0.0, hideable - room, exchange_s - room_for_exchange)
    nodes = -(-planned.num_gpus // GPUS_PER_NODE)
    workers = min(planned.num_gpus, GPUS_PER_NODE) * max(planned.recipe.data.num_workers, 1)
    point = Point(
        num_gpus=planned.num_gpus,
        global_batch=train.global_batch,
        choice=choice,
        fits=planned.fits(choice),
        flops_s=choice.compute_seconds,
        launch_s=launch_s,
        links_s=links_s,
        latency_s=during + exchanging + after,
        exposed_s=too_much + links_s * sent.settling + after,
        overflows=too_much > 0,
        waiting_s=compute_s * assumed.jitter * expected_maximum(planned.num_gpus),
        input_s=train.global_batch / (nodes * workers * assumed.worker_images_per_s),
        checkpoint_s=0.0,
    )
    return replace(point, checkpoint_s=_checkpoint(planned, point, assumed))


def expected_maximum(count: int) -> float:
    """Expected largest of so many independent standard normal numbers, within 5%.

    Source: Blom 1958, Statistical Estimates and Transformed Beta-Variables: the median rank with alpha 0.375.
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _room(planned: Plan, choice: Choice, behind: str) -> float:
    """Share of a step's computation that `behind`, as in `Traffic`, stands for."""
    if recorded_by(planned.recipe, choice.stage, choice.accumulation) == "all":
        return 0.0  # a recorded backbone gives its gradients all at once, in the end
    counts = planned.counts
    recomputed = counts.activations[choice.policy].recomputed_flops
    backward = 2 * counts.student_flops + recomputed
    # Gathers for the student begin with its forward pass; a teacher in parts has gathers of its own.
    teacher = counts.teacher_flops if counts.partitioned_teacher_bytes else 0
    room = {
        "step": counts.student_flops + backward + teacher,
        "backward": backward,
        "last backward": backward / choice.accumulation,
        "nothing": 0.0,
    }[behind]
    return room / (3 * counts.student_flops + counts.teacher_flops + recomputed)


def _latency(choice: Choice, num_gpus: int, assumed: Assumptions) -> tuple[float, float]:
    """Seconds of hops before the optimizer step, and behind it."""
    if num_gpus == 1:
        return 0.0, 0.0
    sent: Traffic = choice.traffic
    if choice.stage == HIERARCHICAL:
        num_gpus = min(num_gpus, choice.replica)
    nodes = -(-num_gpus // GPUS_PER_NODE)
    rings = 1 if assumed.tree else nodes  # a tree of nodes, a chain in each; or one ring through all
    within = assumed.nvlink_hop_us * (num_gpus - nodes) / nodes
    between = assumed.network_hop_us * (math.ceil(math.log2(nodes)) if assumed.tree else nodes - 1)
    hops = within * rings + between
    share = assumed.small if choice.stage in ("3", HIERARCHICAL) else 1.0
    during = sent.passes * (assumed.start_us + hops)
    return 1e-6 * during, 1e-6 * sent.settling_passes * (assumed.start_us + share * hops)


def _exchange_latency(choice: Choice, num_gpus: int, assumed: Assumptions) -> float:
    """Seconds of hops between replicas."""
    count = num_gpus / choice.replica
    if not choice.traffic.exchanges:
        return 0.0
    hop = assumed.nvlink_hop_us if num_gpus <= GPUS_PER_NODE else assumed.network_hop_us
    hops = hop * (math.ceil(math.log2(count)) if assumed.tree else count - 1)
    return 2e-6 * choice.traffic.exchanges * (assumed.start_us + hops)  # there and back


def _checkpoint(planned: Plan, point: Point, assumed: Assumptions) -> float:
    """Seconds that a step waits for checkpoints, their sum spread over the steps from one to the next."""
    every = planned.recipe.checkpoint.save_every_steps
    held = point.choice.memory.state
    copied = (held.parameters + held.optimizer) / (1e9 * assumed.host_copy_gb_per_s)
    size = 4 if planned.recipe.train.precision == "fp32" else 2
    per_parameter = planned.recipe.optim.state_bytes + 4 + size
    written = per_parameter * planned.counts.num_parameters / (1e9 * assumed.disk_gb_per_s)
    interval = every * max(point.training_s, point.input_s)
    return (copied + max(0.0, written - interval)) / every
