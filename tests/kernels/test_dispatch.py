"""Which path an op takes, and what is said about it."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from fd_kernels import dispatch, whitened_smooth_l1
from fd_kernels.dispatch import implementation, set_implementation, use_triton
from torch import Tensor
from torch._subclasses import FakeTensorMode


@pytest.fixture(autouse=True)
def _fresh_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caplog.set_level(logging.INFO, logger="fd_kernels.dispatch")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """A tensor that says that it is on a CUDA device of compute capability 9.0; there need be none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.empty(2, device="cuda:0")


def test_cpu_runs_the_reference() -> None:
    assert not use_triton("loss", torch.ones(2), served=None)


def test_cuda_runs_the_kernel(on_cuda: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    assert use_triton("loss", on_cuda, on_cuda, served=None)
    assert use_triton("loss", on_cuda, on_cuda, served=None)
    assert caplog.messages == ["loss runs the Triton kernel"]


def test_interpreter_runs_the_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("loss", torch.ones(2), served=None)


def test_meta_tensors_take_a_kernel_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    on_meta = torch.empty(2, device="meta")
    assert not use_triton("loss", on_meta, served=None)
    with implementation("triton"):
        assert use_triton("loss", on_meta, served=None)
        with pytest.raises(ValueError, match="does not serve this call: it is odd"):
            use_triton("loss", on_meta, served="it is odd")
        with pytest.raises(ValueError, match="expected one CUDA device"):
            use_triton("loss", on_meta, torch.ones(2), served=None)
    assert caplog.messages == [], "nothing runs"


def test_reference_on_cuda_says_why(on_cuda: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    assert not use_triton("loss", on_cuda, served="x has dtype torch.float64; expected torch.float32")
    assert caplog.messages == [
        "loss runs the PyTorch reference: x has dtype torch.float64; expected torch.float32"
    ]


def test_each_op_and_path_is_logged_once(on_cuda: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    for op in ("loss", "attention"):
        for _ in range(2):
            use_triton(op, torch.ones(2), served=None)
            use_triton(op, on_cuda, served=None)
    assert caplog.messages == [
        f"{op} runs the {path}"
        for op in ("loss", "attention")
        for path in ("PyTorch reference", "Triton kernel")
    ]


def test_tensors_of_two_devices_run_the_reference(on_cuda: Tensor) -> None:
    assert not use_triton("loss", on_cuda, torch.empty(2, device="cuda:1"), served=None)
    assert not use_triton("loss", on_cuda, torch.ones(2), served=None)


def test_old_device_runs_the_reference(
    on_cuda: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not use_triton("loss", on_cuda, served=None)
    assert "compute capability (7, 5); expected (8, 0)" in caplog.messages[0]


def test_the_oldest_device_runs_the_kernel(on_cuda: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert use_triton("loss", on_cuda, served=None)


def test_amd_runs_the_reference(
    on_cuda: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not use_triton("loss", on_cuda, served=None)
    assert "AMD GPU; expected one of NVIDIA" in caplog.messages[0]


def test_missing_triton_runs_the_reference(
    on_cuda: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it raises ImportError
    assert not use_triton("loss", on_cuda, served=None)
    assert "triton cannot be imported" in caplog.messages[0]


@pytest.mark.slow
def test_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, fd_kernels; "
        "x = torch.zeros(1, 1, 8, requires_grad=True); fd_kernels.whitened_smooth_l1(x, x).backward()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reference_by_choice(on_cuda: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with implementation("reference"):
        assert not use_triton("loss", on_cuda, served=None)
    assert use_triton("loss", on_cuda, served=None)
    assert caplog.messages[0] == "loss runs the PyTorch reference: set_implementation('reference')"


def test_kernel_by_choice_runs_or_raises(on_cuda: Tensor) -> None:
    with implementation("triton"):
        assert use_triton("loss", on_cuda, served=None)
        with pytest.raises(ValueError, match=r"loss: .* on cpu; expected one CUDA device"):
            use_triton("loss", torch.ones(2), served=None)
        with pytest.raises(ValueError, match="x has 9000 channels; expected 8192"):
            use_triton("loss", on_cuda, served="x has 9000 channels; expected 8192")


def test_context_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), implementation("triton"):
        raise RuntimeError("inside")
    assert not use_triton("loss", torch.ones(2), served=None)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="implementation is 'cuda'; expected one of auto, reference, triton"):
        set_implementation("cuda")  # type: ignore[arg-type]


def test_choice_does_not_break_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(whitened_smooth_l1, backend="aot_eager", fullgraph=True)
    features_BLD = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled(features_BLD, features_BLD), whitened_smooth_l1(features_BLD, features_BLD))
    assert caplog.messages == ["whitened_smooth_l1 runs the PyTorch reference"]
