"""Small layers that models share.

Every module initialises the parameters that it owns in its own constructor: what a parent sets later is gathered for it
where DeepSpeed has partitioned them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02

CheckpointingMode = Literal["none", "block", "selective"]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are, for results that are compared with each other."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any float dtype -> fp32."""
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class PooledNorm(nn.LayerNorm):
    """A final norm behind the pooling: tokens, (B, L, D), it lets through, and their mean, (B, D), it normalises."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x) if x.dim() == 2 else x


class ResidualBlock(nn.Module, ABC):
    """A transformer block in two parts, either of which the backward pass may compute again.

    The parts read no random numbers and no shared module: drop path and a shared bias are handed in, so that
    recomputation sees them again.

    Attributes:
        checkpointing: "none" keeps all that the backward pass needs; "block" keeps the block's inputs;
            "selective" keeps also what `attend` needs, and computes `finish` again.
    """

    checkpointing: CheckpointingMode = "none"

    @abstractmethod
    def attend(self, x: Tensor, bias_hNN: Tensor | None) -> Tensor:
        """Returns the attention's result, projected, in the shape of `x`."""

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor, drop_path_scale_2B: Tensor | None) -> Tensor:
        """Returns the block's result from its input and what `attend` returned."""

    def compile_parts(self) -> None:
        """Compiles both parts; what lies between them, recomputation and ZeRO-3's gathering, stays as it is."""
        for name in ("attend", "finish"):
            # Shapes of a run are few, and those of each stage its own.
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def run(self, x: Tensor, bias_hNN: Tensor | None, drop_path_scale_2B: Tensor | None) -> Tensor:
        """Computes the block as `checkpointing` says; a forward is a call of it."""
        if self.checkpointing == "block":
            return _recomputed(self._whole, x, bias_hNN, drop_path_scale_2B)
        attended = self.attend(x, bias_hNN)
        if self.checkpointing == "selective":
            return _recomputed(self.finish, x, attended, drop_path_scale_2B)
        return self.finish(x, attended, drop_path_scale_2B)

    def _whole(self, x: Tensor, bias_hNN: Tensor | None, drop_path_scale_2B: Tensor | None) -> Tensor:
        return self.finish(x, self.attend(x, bias_hNN), drop_path_scale_2B)


def _recomputed(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    # Reentrant recomputation, and DeepSpeed's, fail where blocks share a parameter.
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """Linear layer with truncated normal weights (std 0.02) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BranchEnd(Linear):
    """The last linear layer of a residual branch of block `layer_id`, from 1: weights smaller by sqrt(2 * layer_id).

    Source: Bao et al. 2021 (arXiv:2106.08254), section 2.5; the released code of feature distillation.
    """

    def __init__(self, in_features: int, out_features: int, layer_id: int) -> None:
        super().__init__(in_features, out_features)
        with torch.no_grad():
            self.weight.div_(math.sqrt(2 * layer_id))


class PostNorm(nn.LayerNorm):
    """LayerNorm that ends a residual branch; its gain starts at `gain_init`, so the branch starts small."""

    def __init__(self, dim: int, gain_init: float) -> None:
        super().__init__(dim)
        nn.init.constant_(self.weight, gain_init)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; of block `layer_id`."""

    def __init__(self, dim: int, hidden_dim: int, layer_id: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = BranchEnd(hidden_dim, dim, layer_id)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
