"""On a GPU: the same run as on the CPU. `make gpu-check` runs these and demands a GPU.

The models' heads have 32 channels, which the Triton kernels serve; on the GPU whatever they do not serve is an error.
"""

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.gpu

SHAPE = {"patch_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
MODEL = {"name": "swin_v2_tiny", "img_size": 24, "overrides": SHAPE | {"drop_path_rate": 0.2}}
TEACHER = MODEL | {"overrides": SHAPE | {"embed_dim": 64, "num_heads": [2, 4]}}
SERVED: dict[str, Any] = {"model": MODEL, "distill": {"teachers": [{"model": TEACHER}]}}
ON_GPU: dict[str, Any] = SERVED | {"train__device": "cuda", "train__kernels": "triton"}

# fp32: other kernels sum in another order. bf16 and fp16: eps is 2^-8 and 2^-11, and the loss averages many tokens.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (stage, precision)
        for stage in range(4)
        for precision in TOLERANCES
        if (stage, precision) != (0, "fp16")
    ],
)
def test_losses_are_those_of_the_cpu(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Any, stage: int, precision: str
) -> None:
    on_cpu = recipe_values(run_dir=str(tmp_path / "cpu"), **SERVED)
    run_ranks(cases.train, 1, on_cpu)
    on_gpu = recipe_values(
        run_dir=str(tmp_path / "gpu"), train__precision=precision, train__ds_config=f"zero{stage}", **ON_GPU
    )
    run_ranks(cases.train, 1, on_gpu)
    tolerance = TOLERANCES[precision]
    np.testing.assert_allclose(
        cases.losses(on_gpu["run_dir"]), cases.losses(on_cpu["run_dir"]), rtol=tolerance
    )


def test_a_landscape_is_seen_where_blocks_are_recomputed(
    recipe_values: Callable[..., dict[str, Any]],
) -> None:
    """The kernels have no second derivatives, and autograd recomputes in a thread of its own."""
    values = recipe_values(
        data__evaluation="digits:test", train__steps=2, train__activation_checkpointing="block", **ON_GPU
    )
    run_ranks(cases.train, 1, values)
    [found] = run_ranks(cases.landscape, 1, values["run_dir"], 3)
    assert np.isfinite(found["top_eigenvalue"])
    assert len({point["loss"] for row in found["rows"] for point in row}) == 9


@pytest.mark.parametrize("stage", [0, 3])
def test_states_on_the_gpu_are_as_predicted(recipe_values: Callable[..., dict[str, Any]], stage: int) -> None:
    values = recipe_values(
        train__precision="bf16", train__ds_config=f"zero{stage}", train__micro_batch=4, **ON_GPU
    )
    [found] = run_ranks(cases.measured_state, 1, values)
    predicted, measured = np.array(found).T
    np.testing.assert_allclose(predicted, measured, rtol=0.05)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {"train__micro_batch": 16}),
        (1, {"train__micro_batch": 16}),
        (1, {"train__micro_batch": 16, "train__activation_checkpointing": "block"}),
        (1, {"train__micro_batch": 16, "train__compile": True}),
        (2, {"train__micro_batch": 8}),
        (3, {"train__micro_batch": 8}),
    ],
    ids=str,
)
def test_losses_are_the_same_with_cuda_graphs(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Any, stage: int, changes: dict[str, Any]
) -> None:
    """A gradient of the step before, or of a micro-batch that counts twice, would show in the norm."""

    def curve(graphs: bool) -> list[tuple[float, float]]:
        values = recipe_values(
            run_dir=str(tmp_path / f"graphs_{graphs}"),
            train__ds_config=f"zero{stage}",
            train__cuda_graphs=graphs,
            **ON_GPU,
            **changes,
        )
        run_ranks(cases.train, 1, values)
        return cases.curve(values["run_dir"])

    # The same kernels, in fp32, where a micro-batch that counts twice changes the norm by more than a hundredth; cuBLAS
    # may take another algorithm where it has another workspace.
    np.testing.assert_allclose(curve(True), curve(False), rtol=1e-4)
