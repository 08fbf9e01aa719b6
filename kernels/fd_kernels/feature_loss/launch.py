"""How the kernel of the feature loss is started: tiles, loss and gradient, and what is compiled ahead."""

# Shape suffix legend: B = images, L = tokens, D = channels; R = rows of a tile, C = channels padded to 2^n

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fd_kernels.aot import Configuration, triton_dtype
from fd_kernels.feature_loss.triton_kernel import whitened_smooth_l1_kernel

# Channels, at most -> (rows of a program, warps). A thread holds some 16 elements of each side: the fastest on an
# H200 at 256, 768, 1024, 2048 and 4096 channels, of 1 to 16 rows and 1 to 16 warps.
TILES = {256: (4, 2), 512: (2, 2), 768: (1, 1), 1024: (1, 2), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}


def tile(num_channels: int) -> tuple[int, int, int]:
    """Rows of a program, channels padded to a power of two, and warps, for a width of at most 8192."""
    rows, warps = next(shape for widest, shape in TILES.items() if num_channels <= widest)
    return rows, triton.next_power_of_2(num_channels), warps


def _launch(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    token_weight_BL: Tensor | None,
    upstream: Tensor | None,
    out: Tensor,
    beta: float,
    eps: float,
) -> None:
    """Write token losses to `out`, or, where an upstream gradient is given, the gradient of `pred_BLD`."""
    B, L, D = pred_BLD.shape
    block_R, block_C, warps = tile(D)
    gradient = upstream is not None
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(out):
        whitened_smooth_l1_kernel[(triton.cdiv(B * L, block_R),)](
            pred_BLD,
            target_BLD,
            token_weight_BL,
            upstream,
            None if gradient else out,
            out if gradient else None,
            B * L,
            L,
            *pred_BLD.stride()[:2],
            *target_BLD.stride()[:2],
            *((0, 0) if token_weight_BL is None else token_weight_BL.stride()),
            beta,
            eps,
            D=D,
            BLOCK_R=block_R,
            BLOCK_C=block_C,
            GRADIENT=gradient,
            num_warps=warps,
        )


def token_losses(
    pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None, beta: float, eps: float
) -> Tensor:
    """Loss of each token, weighted, (B, L), fp32; arguments as of `fd_kernels.whitened_smooth_l1`."""
    loss_BL = torch.empty(pred_BLD.shape[:2], dtype=torch.float32, device=pred_BLD.device)
    _launch(pred_BLD, target_BLD, token_weight_BL, None, loss_BL, beta, eps)
    return loss_BL


def pred_gradient(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    token_weight_BL: Tensor | None,
    upstream: Tensor,
    beta: float,
    eps: float,
) -> Tensor:
    """Gradient of `pred_BLD`, its shape and dtype, contiguous, for the upstream gradient of the sum, fp32."""
    grad_BLD = torch.empty(pred_BLD.shape, dtype=pred_BLD.dtype, device=pred_BLD.device)
    _launch(pred_BLD, target_BLD, token_weight_BL, upstream, grad_BLD, beta, eps)
    return grad_BLD


def aot_configurations(architecture: int) -> Iterator[Configuration]:
    """The published widths in each dtype, forward and backward, with token weights: what `make aot` compiles."""
    strides = {f"{side}_stride_{axis}": "i32" for side in ("pred", "target", "weight") for axis in "BL"}
    scalars = {"num_rows": "i32", "num_tokens": "i32", "beta": "fp32", "eps": "fp32"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        features = dict.fromkeys(("pred_ptr", "target_ptr", "grad_ptr"), f"*{triton_dtype(dtype)}")
        others = dict.fromkeys(("weight_ptr", "upstream_ptr", "token_loss_ptr"), "*fp32")
        arguments = {**features, **others, **strides, **scalars}
        for channels in (768, 1024, 1536, 2048, 4096, 8192):
            block_R, block_C, warps = tile(channels)
            for gradient in (False, True):
                unused = {"token_loss_ptr"} if gradient else {"upstream_ptr", "grad_ptr"}
                shape = {"D": channels, "BLOCK_R": block_R, "BLOCK_C": block_C, "GRADIENT": gradient}
                yield Configuration(
                    name=f"feature_loss {'backward' if gradient else 'forward'} D={channels}",
                    kernel=whitened_smooth_l1_kernel,
                    dtype=dtype,
                    signature={name: kind for name, kind in arguments.items() if name not in unused},
                    constants={**dict.fromkeys(unused), **shape},
                    divisible_by_16=frozenset(strides) - {"weight_stride_B", "weight_stride_L"},
                    num_warps=warps,
                )
