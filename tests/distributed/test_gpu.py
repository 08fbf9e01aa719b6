"""On a GPU: the same run as on the CPU. `make gpu-check` runs these and demands a GPU."""

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.gpu

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
    on_cpu = recipe_values(run_dir=str(tmp_path / "cpu"))
    run_ranks(cases.train, 1, on_cpu)
    on_gpu = recipe_values(
        run_dir=str(tmp_path / "gpu"),
        train__device="cuda",
        train__precision=precision,
        train__ds_config=f"zero{stage}",
    )
    run_ranks(cases.train, 1, on_gpu)
    tolerance = TOLERANCES[precision]
    np.testing.assert_allclose(
        cases.losses(on_gpu["run_dir"]), cases.losses(on_cpu["run_dir"]), rtol=tolerance
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_states_on_the_gpu_are_as_predicted(recipe_values: Callable[..., dict[str, Any]], stage: int) -> None:
    values = recipe_values(
        train__device="cuda", train__precision="bf16", train__ds_config=f"zero{stage}", train__micro_batch=4
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
            train__device="cuda",
            train__ds_config=f"zero{stage}",
            train__cuda_graphs=graphs,
            **changes,
        )
        run_ranks(cases.train, 1, values)
        return cases.curve(values["run_dir"])

    # The same kernels, in fp32, where a micro-batch that counts twice changes the norm by more than a hundredth; cuBLAS
    # may take another algorithm where it has another workspace.
    np.testing.assert_allclose(curve(True), curve(False), rtol=1e-4)
