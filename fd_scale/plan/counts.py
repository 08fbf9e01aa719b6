"""What a step of a recipe computes and keeps, counted on the real modules on the meta device.

Nothing is allocated and no weights are read: shapes alone decide.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fd_kernels.dispatch import NotServedError, implementation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fd_scale import distributed
from fd_scale.config import ModelConfig, Recipe
from fd_scale.data import Batch, Source
from fd_scale.data.instances import Instances
from fd_scale.distill import DistillationTask, codec_of
from fd_scale.errors import UserError
from fd_scale.finetune import FineTuningTask, fine_tuning_task
from fd_scale.models import Backbone, dtype_of, resolved
from fd_scale.pretrain import ContrastiveTask, MaskedTask
from fd_scale.teachers import Teacher

logger = logging.getLogger(__name__)


class NotCountedError(UserError):
    """A model that cannot be followed on the meta device: no plan of it can be made."""


Task = DistillationTask | ContrastiveTask | MaskedTask | FineTuningTask

# What is kept is a line in the images of a micro-batch, from two on: one alone saves copies. What is worked with is a
# maximum of lines: between these two sizes its chord lies above it.
_SIZES = (2, 64)
# A detector goes over images one by one, each some thousand ops; and its micro-batches are small.
_SIZES_OF_OBJECTS = (2, 8)


@dataclass(frozen=True)
class Policy:
    """A setting of activation checkpointing."""

    mode: str
    period: int = 1

    def __str__(self) -> str:
        return self.mode if self.period == 1 else f"{self.mode}/{self.period}"


@dataclass(frozen=True)
class Line:
    """What grows with the micro-batch: constant + an_image * images."""

    constant: float
    an_image: float

    def at(self, images: int) -> float:
        """Returns the value at a micro-batch of so many images."""
        return self.constant + self.an_image * images


@dataclass(frozen=True)
class Activations:
    """What a policy costs on a GPU.

    `kept` is what the forward pass keeps for the backward pass; `working` is the most that is held besides at
    any time: a block that is computed again, gradients on their way back, results of single ops.
    """

    kept: Line
    working: Line
    recomputed_flops: float
    """FLOPs an image that are computed a second time."""


@dataclass(frozen=True)
class Counts:
    """All that the plan knows of a recipe's models."""

    parameters: tuple[int, ...]
    """Numbers of elements of the trained parameters."""
    teacher_bytes: int
    """Weights of the teachers that are whole on each GPU."""
    teacher_working: Line
    """The most that the teachers' forward passes hold."""
    student_flops: float
    """FLOPs of a forward pass of the trained module, an image."""
    teacher_flops: float
    """FLOPs of the teachers' forward passes, an image."""
    activations: dict[Policy, Activations]
    refused: dict[Policy, str]
    """Policies that the model does not have, and why."""
    kernels: str
    """Which path of the ops was counted."""
    partitioned_teacher_bytes: int = 0
    """Weights of the teachers of which each GPU holds a part."""
    frozen_bytes: int = 0
    """Weights of the trained module that are not trained themselves, a probe's backbone: as those of teachers, which
    ZeRO-3 partitions."""

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(self.parameters)


def count(recipe: Recipe, source: Source | None = None) -> Counts:
    """Counts a recipe's models, as a GPU runs them: with the Triton kernels where they serve the model.

    Args:
        recipe: any task; weights are not read.
        source: training images, which fine-tuning asks for its number of classes.

    Raises:
        UserError: a model cannot be built.
    """
    try:
        return _counted(resolved(recipe), source)
    except RuntimeError as error:
        # An op that needs values, or (NotImplementedError) has no shapes of its own.
        raise NotCountedError(
            f"plan: {recipe.model.name} or a teacher of it cannot be followed without values: "
            f"{' '.join(str(error).split())[:200]}; plan another model, or another head"
        ) from None


def _counted(recipe: Recipe, source: Source | None) -> Counts:
    shares = []
    if recipe.distill is not None and recipe.distill.features is None:
        shares = [teacher.share for teacher in recipe.distill.teachers]
    with torch.device("meta"):
        task = _build(_without_weights(recipe), source)
        task.module.to(dtype_of(recipe.train.precision))
    if recipe.train.kernels == "reference":
        with implementation("reference"):
            return _count(task, recipe, shares, "PyTorch reference, as train.kernels says")
    try:
        with implementation("triton"):
            return _count(task, recipe, shares, "Triton kernels")
    except NotServedError as error:  # on a GPU the op runs its reference then
        with implementation("reference"):
            return _count(task, recipe, shares, f"PyTorch reference, for {error.op}: {error.obstacle}")


def _count(task: Task, recipe: Recipe, shares: list[float], kernels: str) -> Counts:
    backbone = task.module.backbone
    assert isinstance(backbone, Backbone)
    teachers = task.teachers if isinstance(task, DistillationTask) else []
    teacher_working, teacher_flops = Line(0, 0), 0.0
    together = recipe.crops_together
    least, most = _SIZES if recipe.detection is None else _SIZES_OF_OBJECTS
    sizes = (together * -(-least // together), together * max(2, -(-most // together)))
    line = partial(_through, sizes)
    batches = [_batch(recipe, size) for size in sizes]
    for teacher, share in zip(teachers, shares, strict=True):
        meters = [_measured_teacher(teacher, batch.images) for batch in batches]
        teacher_flops += share * line(*[meter.flops for meter in meters]).at(1)
        working = line(*[meter.peak for meter in meters])
        teacher_working = max(teacher_working, working, key=lambda line: line.an_image)
    with Meter([]):  # for the shapes that it remembers
        inputs = [task.inputs(batch) for batch in batches]

    activations, refused = {}, {}
    forward_flops = plain_flops = 0.0
    own = Policy(recipe.train.activation_checkpointing, recipe.train.checkpointing_period)
    for policy in dict.fromkeys([Policy("none"), Policy("selective"), Policy("block"), own]):
        try:
            backbone.set_activation_checkpointing(policy.mode, policy.period)  # type: ignore[arg-type]
        except UserError as error:
            refused[policy] = str(error)
            continue
        steps = [_measured_step(task.module, given) for given in inputs]
        flops = line(*[step.flops for step in steps]).at(1)
        if policy == Policy("none"):
            plain_flops, forward_flops = flops, line(*[step.forward_flops for step in steps]).at(1)
        activations[policy] = Activations(
            kept=line(*[step.kept for step in steps]),
            working=line(*[step.peak - step.kept for step in steps]),
            recomputed_flops=flops - plain_flops,
        )
    trained = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in task.module.parameters() if not parameter.requires_grad]
    if frozen:
        # What has no backward pass counts as a teacher's.
        teacher_flops += forward_flops - (plain_flops - forward_flops) / 2
        forward_flops = (plain_flops - forward_flops) / 2
    return Counts(
        parameters=tuple(parameter.numel() for parameter in trained),
        frozen_bytes=sum(parameter.nbytes for parameter in frozen),
        teacher_bytes=sum(_bytes_of(teacher.model) for teacher in teachers if not teacher.config.partitioned),
        partitioned_teacher_bytes=sum(
            _bytes_of(teacher.model) for teacher in teachers if teacher.config.partitioned
        ),
        teacher_working=teacher_working,
        student_flops=forward_flops,
        teacher_flops=teacher_flops,
        activations=activations,
        refused=refused,
        kernels=kernels,
    )


@contextmanager
def keeping(module: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects what forward passes in it keep for their backward pass.

    Args:
        module: what it owns does not count.

    Yields:
        The storages, once each, by number.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class Meter(TorchDispatchMode):
    """Counts the FLOPs of ops, and the bytes of the storages that they make, now and at the most.

    Args:
        outside: tensors that are there before; their storages do not count.

    Attributes:
        flops: those of matrix products, convolutions and attention, by torch's formulas and those of `fd_kernels`.
        now: bytes of the storages that live.
        peak: the most that `now` was.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.now = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _shaped(func, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, number, size)

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


# An op and its arguments -> shape, strides and dtype of what it returns.
_known_shapes: dict[Any, Any] = {}


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls an op on meta tensors; where all that it returns is new, torch's rules of shapes run once.

    They are Python, half a millisecond an op, and a giant has fifty blocks alike.
    """
    schema = func._schema
    if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return func(*args, **kwargs)
    key = (func, _signature(args), _signature(tuple(kwargs.items())))
    try:
        known = _known_shapes.get(key)
    except TypeError:  # an argument that has no hash
        return func(*args, **kwargs)
    if known is not None:
        return tree_map_only(_Shape, _Shape.empty, known)
    out = func(*args, **kwargs)
    shapes = tree_map_only(Tensor, lambda tensor: _Shape(tensor.shape, tensor.stride(), tensor.dtype), out)
    if _same_storages(out, tree_map_only(_Shape, _Shape.empty, shapes), outside=(args, kwargs)):
        _known_shapes[key] = shapes
    return out


class _Shape:
    """Shape, strides and dtype of a tensor on the meta device."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def empty(self) -> Tensor:
        """Makes one."""
        shape, strides, dtype = self.parts
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _signature(value: Any) -> Any:
    """What of an op's argument decides the shapes of its results."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    return type(value), value


def _same_storages(out: Any, made: Any, outside: Any) -> bool:
    """Whether `made`, on the meta device, can stand for `out`: storages alike, and none that is an argument's."""
    storages, others, given = (
        {
            leaf.untyped_storage()._cdata: (leaf.untyped_storage().nbytes(), leaf.device)
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor)
        }
        for tree in (out, made, outside)
    )
    return list(storages.values()) == list(others.values()) and storages.keys().isdisjoint(given)


@dataclass(frozen=True)
class _Step:
    """What a forward and backward pass takes; bytes and FLOPs."""

    kept: int
    peak: int
    forward_flops: int
    flops: int


def _measured_step(module: nn.Module, inputs: dict[str, Any]) -> _Step:
    """A forward and backward pass; gradients of parameters go as they come."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(drop)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    with Meter([*module.parameters(), *module.buffers(), *given]) as meter:
        with keeping(module) as storages:
            outputs = module(**inputs)
            losses = [value for value in outputs.values() if value.requires_grad]
        kept, forward_flops = sum(storage.nbytes() for storage in storages.values()), meter.flops
        storages.clear()
        torch.stack(losses).sum().backward()
    for hook in hooks:
        hook.remove()
    peak = meter.peak + sum(tensor.untyped_storage().nbytes() for tensor in given)
    return _Step(kept, peak, forward_flops, meter.flops)


def _measured_teacher(teacher: Teacher, images: Tensor) -> Meter:
    with Meter([*teacher.model.parameters(), *teacher.model.buffers(), images]) as meter:
        teacher.features(images)
    return meter


def _through(sizes: tuple[int, int], small: float, large: float) -> Line:
    an_image = (large - small) / (sizes[1] - sizes[0])
    return Line(constant=small - sizes[0] * an_image, an_image=an_image)


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _build(recipe: Recipe, source: Source | None) -> Task:
    if recipe.distill is not None:
        return DistillationTask(recipe, None)
    if recipe.contrastive is not None:
        distributed.start("cpu", recipe.train.timeout_s)  # its loss asks how many ranks there are
        return ContrastiveTask(recipe)
    if recipe.masked is not None:
        return MaskedTask(recipe, None)
    if recipe.linear_probe is not None:
        raise UserError(
            "plan: a linear probe trains a few classifiers on features that are computed once; no plan of it"
        )
    section = recipe.classification or recipe.segmentation or recipe.detection
    assert section is not None, "there are seven tasks"
    if source is None and section.num_classes is None:
        raise UserError(
            f"data.train: {recipe.data.train} cannot be opened here, and how many classes it has is not known; set "
            f"{recipe.task}.num_classes, or plan where the data is"
        )
    return fine_tuning_task(recipe, None, source)


def _batch(recipe: Recipe, size: int) -> Batch:
    views = (2,) if recipe.contrastive is not None else ()
    pixels = (3, recipe.model.size, recipe.model.size)
    with torch.device("meta"):
        images = torch.zeros(size, *views, *pixels, dtype=torch.uint8)
        labels: Tensor | list[Instances] = torch.zeros(size, dtype=torch.int64)
        if recipe.segmentation is not None:
            labels = torch.zeros(size, *pixels[1:], dtype=torch.uint8)
        if recipe.detection is not None:
            labels = [_objects(recipe.model.size)] * size
        features = None
        if recipe.distill is not None and recipe.distill.features is not None:
            features = torch.zeros(size, codec_of(recipe).record_bytes, dtype=torch.uint8)
    return Batch(images, labels, torch.arange(size), 0, features)


def _objects(side: int) -> Instances:
    """As many as an image of COCO has on average. What depends on how many match takes the most that can."""
    count = 7
    return Instances(
        boxes_N4=torch.zeros(count, 4),
        labels_N=torch.zeros(count, dtype=torch.int64),
        crowd_N=torch.zeros(count, dtype=torch.bool),
        masks_NHw=torch.zeros(count, side, -(-side // 8), dtype=torch.uint8),
        semantic_HW=torch.zeros(side, side, dtype=torch.uint8),
    )


def _without_weights(recipe: Recipe) -> Recipe:
    """And with teachers that see all images: one that sees some of them may see all of one micro-batch."""

    def bare(config: ModelConfig) -> ModelConfig:
        return replace(config, weights=None)

    recipe = replace(recipe, model=bare(recipe.model))
    if recipe.distill is None:
        return recipe
    teachers = [replace(teacher, model=bare(teacher.model), share=1.0) for teacher in recipe.distill.teachers]
    return replace(recipe, distill=replace(recipe.distill, teachers=teachers))
