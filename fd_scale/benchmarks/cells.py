"""What is measured: models, checkpointing policies, micro-batches, and the ways to take a step.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

RECIPE = "imagenet/swin_v2_giant"

STEPS_ALONE = (
    "data.evaluation=null", "data.num_workers=0", "optim.lr=1e-5", "optim.warmup_lr=0", "optim.min_lr=0",
    "optim.warmup_epochs=0", "train.epochs=null", "train.steps=1000", "log.images_every_steps=0",
)  # fmt: skip
"""Settings of steps that are measured. A run's learning rate without its warm-up might end in steps that are skipped,
and those cost less."""
# Random weights, and one teacher that is whole: there is one GPU.
_ONE_GPU = (*STEPS_ALONE, "distill.teachers.0.model.weights=null", "distill.teachers.0.partitioned=false")


def _size(name: str) -> tuple[str, ...]:
    """Student and teacher of a smaller Swin V2, at the image and window of the recipe's."""
    places = ("model", "distill.teachers.0.model")
    return tuple(
        setting
        for place in places
        for setting in (f"{place}.name={name}", f"{place}.overrides.window_size=12")
    )


MODELS = {"G": (), "L": _size("swin_v2_large"), "B": _size("swin_v2_base")}
"""SwinV2-G, -L and -B, each its own teacher, at 192 px: letter -> settings."""

TIMM, TIMM_COMPILED, FSDP2 = "timm", "timm-compiled", "fsdp2-compiled"
WAYS: dict[str, tuple[str, ...]] = {
    "zero3": ("train.ds_config=zero3",),
    "zero1": ("train.ds_config=zero1",),
    "zero0": ("train.ds_config=zero0",),
    "zero3-compiled": ("train.ds_config=zero3", "train.compile=true"),
    "zero1-compiled": ("train.ds_config=zero1", "train.compile=true"),
    "zero3-graphs": ("train.ds_config=zero3", "train.cuda_graphs=true"),
    "zero1-graphs": ("train.ds_config=zero1", "train.cuda_graphs=true"),
    "zero1-compiled-graphs": ("train.ds_config=zero1", "train.compile=true", "train.cuda_graphs=true"),
    "zero3-reference": ("train.ds_config=zero3", "train.kernels=reference"),
    "zero1-reference": ("train.ds_config=zero1", "train.kernels=reference"),
    TIMM: (),
    TIMM_COMPILED: (),
    FSDP2: (),
}
"""Ours by its engine and kernels, then the peers: name -> settings."""
PEERS = (TIMM, TIMM_COMPILED, FSDP2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One measurement."""

    model: str
    """Key of `MODELS`."""
    policy: str
    """Checkpointing: none, selective or block."""
    micro_batch: int
    """Images of a step, too: nothing is accumulated."""
    way: str
    """Key of `WAYS`."""
    settings: tuple[str, ...] = ()
    """More settings, after the others."""

    @property
    def name(self) -> str:
        """As --match sees it."""
        return f"{self.model} {self.policy} {self.micro_batch} {self.way}"

    @property
    def is_ours(self) -> bool:
        """Whether the trainer takes its steps."""
        return self.way not in PEERS

    @property
    def overrides(self) -> list[str]:
        """Settings that make the cell of `RECIPE`."""
        batch = (f"train.global_batch={self.micro_batch}", f"train.micro_batch={self.micro_batch}")
        policy = f"train.activation_checkpointing={self.policy}"
        return [*_ONE_GPU, *MODELS[self.model], *WAYS[self.way], *batch, policy, *self.settings]


def _cell(name: str) -> Cell:
    model, policy, micro_batch, way = name.split()
    return Cell(model=model, policy=policy, micro_batch=int(micro_batch), way=way)


# Most wanted first: each goal has its numbers after eight cells.
CELLS = tuple(
    _cell(name)
    for name in (
        "G none 128 zero3", "G none 64 zero3", "B none 128 zero1", "B none 128 timm-compiled",
        "B none 128 zero1-compiled", "B none 128 zero1-graphs", "B none 128 zero1-compiled-graphs",
        "G none 96 zero1-graphs", "G none 64 zero3-graphs", "G none 64 zero1-graphs", "G none 64 zero3-compiled",
        "G block 64 zero3", "G selective 64 zero3", "B none 128 timm", "G block 64 zero3-reference",
        "B none 128 zero1-reference", "B none 128 fsdp2-compiled", "G selective 192 zero3", "G block 256 zero3",
        "L none 64 zero1", "B none 128 zero0", "G none 64 fsdp2-compiled", "B none 256 zero1",
        "B none 256 timm-compiled", "L none 128 zero1", "L selective 128 zero1", "G none 32 zero3",
        "G block 16 zero3", "B selective 256 zero1", "L block 256 zero1",
    )
)  # fmt: skip
