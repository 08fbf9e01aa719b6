"""Where the files of a checkpoint's ranks hold each parameter, and how to read it piece by piece.

ZeRO-1 and 2 lay the parameters of a group in a row and cut the row into one part a rank. ZeRO-3 cuts each
parameter into one part a rank and lays the parts of a group in a row. Both rows are padded at their end.
Stage 0 has whole tensors in one file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fd_scale.errors import UserError

MASTERS = "fp32"
AVERAGE = "weight_average"
"""Key of the weights' moving average among an optimizer's states of a parameter."""
# DeepSpeed's keys, by ZeRO stage
FLAT_MASTERS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_flat_groups",
}
BASE_OPTIMIZER = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
_CHUNK = 2**22
"""Elements that are read and written at once."""
_NEIGHBOURS = 2**21
"""Bytes that Linux may map beside those that are read: a huge page."""
_FEW_BYTES = 2**25
"""A checkpoint of at most so many stays mapped while it is read."""
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Consecutive elements of one flattened parameter, as a rank holds them."""

    rank: int
    group: int | str
    """Index of the rank's flat tensor; a frozen parameter's own name."""
    offset: int
    """First element in the flat tensor."""
    start: int
    """First element in the flattened parameter."""
    numel: int


def layout(
    groups: Mapping[Any, Mapping[str, torch.Size]],
    world_size: int,
    stage: int,
    paddings: list[list[int]] | None = None,
) -> dict[str, list[Piece]]:
    """Returns where ranks hold each parameter, its pieces in the order of its elements.

    Args:
        groups: flat tensor -> names and shapes of its parameters, in their order.
        world_size: number of ranks.
        stage: ZeRO stage, 1..3.
        paddings: stages 1 and 2: elements left free behind each parameter of each group; none: none.
    """
    pieces: dict[str, list[Piece]] = {}
    for group, shapes in groups.items():
        behind = paddings[group] if paddings is not None and isinstance(group, int) else [0] * len(shapes)
        row = sum(shape.numel() for shape in shapes.values()) + sum(behind)
        part = 2 * -(-row // (2 * world_size))  # DeepSpeed starts each part at an even element, for NCCL
        offset = 0
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            numel = shape.numel()
            if stage == 3:
                share = -(-numel // world_size)
                cuts = [min(rank * share, numel) for rank in range(world_size + 1)]
                starts = [offset] * world_size
                offset += share
            else:
                cuts = [min(max(rank * part - offset, 0), numel) for rank in range(world_size + 1)]
                starts = [offset + cuts[rank] - rank * part for rank in range(world_size)]
                offset += numel + padding
            pieces[name] = [
                Piece(rank=rank, group=group, offset=starts[rank], start=start, numel=end - start)
                for rank, (start, end) in enumerate(pairwise(cuts))
                if end > start
            ]
    return pieces


class Shards:
    """A checkpoint's tensors by the names of its parameters, read when they are asked for.

    Args:
        folder: what an engine wrote, its checksums verified: pickles are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.optimizer_files = _by_rank(folder.glob("*_optim_states.pt"))
        self.model_files = _by_rank(folder.glob("*_model_states.pt"))
        self.world_size = len(self.optimizer_files)
        """Ranks that have parts of their own; 0 at stage 0, where one file has all."""
        self.mapped: dict[Path, Any] = {}
        self.touched = 0
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self.averages: dict[str, tuple[str | int, ...]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.stage = int(self.optimizer_states(0)["zero_stage"]) if self.world_size else 0
        self.zero: dict[str, Any] = self.model_states(0)["ds_config"].get("zero_optimization", {})
        """That section of the DeepSpeed JSON it was written with."""
        self.weights = MASTERS
        """What counts as the weights: their average, where the run kept one."""
        self._find(self.model_states(0))
        # Mapped pages count as resident memory: they are let go after so many bytes, unless all of them are few. To
        # open a file takes a while for each tensor in it.
        files = (*self.optimizer_files, *self.model_files)
        largest = max(4 * shape.numel() for shape in self.shapes.values())
        few = sum(file.stat().st_size for file in files) <= _FEW_BYTES
        self.most_touched = math.inf if few else largest

    def _find(self, model: dict[str, Any]) -> None:
        whole = model["buffer_names"] if self.stage == 3 else list(model["module"])
        for name in whole:
            self._add_whole(name, model["module"][name].shape, ("module", name))
        if self.stage == 0:
            self._find_masters(model)
            return
        if AVERAGE in self.optimizer_states(0)[BASE_OPTIMIZER[self.stage]]["state"][0]:
            self.weights = AVERAGE
        groups: dict[int | str, dict[str, torch.Size]] = dict(enumerate(model["param_shapes"]))
        if self.stage == 3:
            for name, shape in model["frozen_param_shapes"].items():
                groups[name] = {name: shape}
                self.paths[name] = ("frozen_param_fragments", name)
        paddings = self.optimizer_states(0).get("param_alignment_paddings")
        self.pieces |= layout(groups, self.world_size, self.stage, paddings)
        self.shapes |= {name: shape for shapes in groups.values() for name, shape in shapes.items()}
        for alias, name in model["shared_params"].items():
            self.pieces[alias], self.shapes[alias] = self.pieces[name], self.shapes[name]

    def _find_masters(self, model: dict[str, Any]) -> None:
        """Of stage 0: where masters are, if the module's weights have 16 bits, and averages, if there are any."""
        optimizer, number = model["optimizer"], 0
        in_16_bits = "fp32_groups" in optimizer
        base = ("optimizer", "optimizer_state_dict", "state") if in_16_bits else ("optimizer", "state")
        states = optimizer["optimizer_state_dict"]["state"] if in_16_bits else optimizer["state"]
        for group, names in enumerate(model["group_names"]):
            for index, name in enumerate(names):
                if in_16_bits:
                    self.paths[name] = ("optimizer", "fp32_groups", group, index)
                if AVERAGE in states.get(number, {}):
                    self.averages[name], self.weights = (*base, number, AVERAGE), AVERAGE
                number += 1

    def _add_whole(self, name: str, shape: torch.Size, path: tuple[str | int, ...]) -> None:
        self.paths[name], self.shapes[name] = path, shape
        self.pieces[name] = [Piece(rank=0, group=name, offset=0, start=0, numel=shape.numel())]

    def model_states(self, rank: int) -> dict[str, Any]:
        """Returns a rank's file of the module: buffers, counters, and below stage 3 the weights."""
        return self._open(self.model_files[rank % len(self.model_files)])

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """Returns a rank's state of DeepSpeed's optimizer: flat masters, moments, loss scale."""
        return self._open(self.optimizer_files[rank])["optimizer_state_dict"]

    def chunks(
        self, name: str, kind: str | None = None, start: int = 0, end: int | None = None
    ) -> Iterator[Tensor]:
        """Yields elements `start` to `end` of a flattened parameter, a few at a time; each lives until the next.

        Args:
            name: a key of `shapes`.
            kind: `fp32`, or a state of the optimizer; none: `weights`.
            start: first element.
            end: the element behind the last; none: all.
        """
        end = self.shapes[name].numel() if end is None else end
        for piece in self.pieces[name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.numel)
            for begin in range(first, last, _CHUNK):
                size = min(_CHUNK, last - begin)
                flat = self._flat(piece, kind or self.weights, size)
                yield flat.narrow(0, piece.offset + begin - piece.start, size)

    def fill_part(
        self, flat: Tensor, rank: int, group: int | str, pieces: Mapping[str, list[Piece]], kind: str
    ) -> None:
        """Fills a flat tensor of a rank as another `layout` has it; padding stays as it is.

        Args:
            flat: tensor to fill, on the host.
            rank: whose it is.
            group: which of its flat tensors it is.
            pieces: what `layout` returned.
            kind: as in `chunks`.
        """
        for name, of_name in pieces.items():
            for piece in of_name:
                if (piece.rank, piece.group) == (rank, group):
                    end = piece.start + piece.numel
                    fill(flat.narrow(0, piece.offset, piece.numel), self.chunks(name, kind, piece.start, end))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype that a tensor is exported in: fp32, or a buffer's own where it counts."""
        dtype = next((chunk.dtype for chunk in self.chunks(name)), torch.float32)
        return torch.float32 if dtype.is_floating_point else dtype

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor, in `dtype(name)`."""
        whole = torch.empty(self.shapes[name], dtype=self.dtype(name))
        fill(whole.view(-1), self.chunks(name))
        return whole

    def copy_into(self, module: nn.Module, prefix: str = "") -> None:
        """Gives a module on the host the weights whose names are its own behind `prefix`, one by one.

        Raises:
            UserError: the checkpoint holds no such weight, or one of another shape.
        """
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                if prefix + name not in self.shapes:
                    raise UserError(
                        f"{self.folder}: the checkpoint holds no {prefix}{name}; give the settings that it was trained "
                        "with, or, of a linear probe, whose checkpoints hold no backbone, name its weights instead: an "
                        "exported folder or NAME@PATH (model.name and model.weights in the run's recipe.yaml)"
                    )
                if self.shapes[prefix + name] != tensor.shape:
                    raise UserError(
                        f"{self.folder}: {prefix}{name} is {tuple(self.shapes[prefix + name])} there, and "
                        f"{tuple(tensor.shape)} in the model; leave out the settings that change the model"
                    )
                tensor.copy_(self.read(prefix + name))

    def _flat(self, piece: Piece, kind: str, numel: int) -> Tensor:
        num_bytes = 4 * numel + _NEIGHBOURS
        self.touched += num_bytes
        if self.touched > self.most_touched:
            self.mapped.clear()
            self.touched = num_bytes
        value: Any
        if isinstance(piece.group, str):
            value, path = self.model_states(piece.rank), self.paths[piece.group]
            for key in self.averages.get(piece.group, path) if kind == AVERAGE else path:
                value = value[key]
            return value.detach().reshape(-1)
        state = self.optimizer_states(piece.rank)
        if kind == MASTERS:
            return state[FLAT_MASTERS[self.stage]][piece.group].detach()
        return state[BASE_OPTIMIZER[self.stage]]["state"][piece.group][kind]

    def _open(self, file: Path) -> Any:
        if file not in self.mapped:
            self.mapped[file] = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        return self.mapped[file]


def fill(flat: Tensor, chunks: Iterable[Tensor]) -> None:
    """Copies chunks into a flat tensor, one behind the other."""
    offset = 0
    for chunk in chunks:
        flat.narrow(0, offset, chunk.numel()).copy_(chunk)
        offset += chunk.numel()
    assert offset == flat.numel(), "the chunks are as long as their place"


def write_safetensors(file: Path, shards: Shards, names: Mapping[str, str]) -> None:
    """Writes weights chunk by chunk, as Hugging Face's safetensors lays them out.

    Args:
        file: file to write.
        shards: where they are.
        names: the name of each tensor in the file -> its name in `shards`.

    Source: https://github.com/huggingface/safetensors, "Format": length of the header in 8 bytes, header in JSON,
    tensors without gaps.
    """
    dtypes = {name: shards.dtype(names[name]) for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names, key=lambda name: (-dtypes[name].itemsize, name)):  # each starts aligned
        shape = shards.shapes[names[name]]
        start, end = end, end + shape.numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            for chunk in shards.chunks(names[name]):
                stream.write(chunk.to(dtypes[name]).contiguous().view(torch.uint8).numpy().data)


def _by_rank(files: Iterable[Path]) -> list[Path]:
    def rank(file: Path) -> int:
        found = re.search(r"pp_rank_(\d+)", file.name)
        return int(found[1]) if found else 0  # below stage 3 one rank alone writes the module

    return sorted(files, key=rank)
