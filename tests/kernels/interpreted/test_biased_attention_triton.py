"""Global attention with a bias through the window kernels, on the CPU, against fp64 and beside plain torch."""

import pytest
import torch
from attention_cases import assert_trains_alike, assert_vit_no_further_from_fp64_than_plain_torch

from fd_scale.models import create_model


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dtype"),
    [
        (1, 2, 32, torch.float32),
        (17, 2, 64, torch.float32),
        (50, 1, 32, torch.float32),  # one tile
        (145, 1, 64, torch.bfloat16),
        (65, 1, 128, torch.float16),
    ],
)
def test_no_further_from_fp64_than_plain_torch(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    assert_vit_no_further_from_fp64_than_plain_torch(tokens, heads, head_dim, dtype, torch.device("cpu"))


def test_a_vit_trains_alike_with_kernels_and_reference() -> None:
    """A CLS token and a shared table; the tokens, and the gradient of every parameter."""
    model = create_model(
        "fd_vit_tiny_patch16", img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=1
    )
    assert_trains_alike(model, 48)
