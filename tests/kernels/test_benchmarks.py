"""The benchmark runner without a GPU: equal results of all peers, records, resume, errors, floors, goals, table."""

import dataclasses
import functools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

from fd_kernels.benchmarks import measure, report
from fd_kernels.benchmarks.__main__ import main
from fd_kernels.benchmarks.measure import DeviceLostError, Gpu, _exact_results, _results, run
from fd_kernels.benchmarks.peers import Variant, reference, variants
from fd_kernels.benchmarks.records import PASSES, Environment, Key, Record, Records, source_digest
from fd_kernels.benchmarks.roofline import H200, Rates, floors
from fd_kernels.benchmarks.shapes import SHAPES, Shape, make_inputs
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

from fd_scale import cli

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = {
    "whitened_smooth_l1": Shape(name="loss", op="whitened_smooth_l1", images=5, tokens=3, channels=16),
    "window_attention": Shape(
        name="swin", op="window_attention", images=5, tokens=64, channels=64, heads=2, window=4
    ),
    "biased_attention": Shape(name="vit", op="biased_attention", images=5, tokens=7, channels=32, heads=2),
    "block": Shape(name="block", op="block", images=5, tokens=64, channels=64, heads=2, window=4),
}
LOSS = TINY["whitened_smooth_l1"]
BY_NAME = {shape.name: shape for shape in SHAPES}


class CpuInPlaceOfGpu:
    """As `measure.Gpu`, with the wall clock."""

    device = CPU
    l2_bytes = 0

    def mark(self) -> float:
        return time.perf_counter()

    def microseconds(self, start: float, end: float) -> float:
        return 1e6 * (end - start)

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 3 * 2**20

    def synchronize(self) -> None: ...

    def keep_busy(self, seconds: float) -> None: ...

    def clear(self) -> None: ...


def environment(**changes: Any) -> Environment:
    values: dict[str, Any] = {
        "gpu": "Fake GPU", "driver": "1.2", "torch": "2.13.0+x", "triton": "3.7", "commit": None,
        "source": "abc", "peer_source": "def", "time": "2026-01-01T00:00:00+00:00", "rates": H200,
    }  # fmt: skip
    return Environment(**values | changes)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Records]]:
    """Runs variants of the loss at a tiny shape, with the records of earlier runs."""
    monkeypatch.setattr(measure, "REPEATS", (3, 4))

    def go(functions: dict[str, Variant], **options: Any) -> tuple[int, Records]:
        monkeypatch.setattr(measure, "variants", lambda shape, device: functions)
        gpu = options.pop("gpu", CpuInPlaceOfGpu())
        now = options.pop("environment", environment())
        given = {"match": "", "end": time.monotonic() + 1e6} | options
        left = run([LOSS], Records.read(tmp_path / "records.json"), gpu, now, **given)
        return left, Records.read(tmp_path / "records.json")

    return go


class Counted:
    """The loss, and which inputs it was called on."""

    def __init__(self) -> None:
        self.inputs: list[int] = []

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.inputs.append(tensors[0].data_ptr())
        return reference(LOSS)(*tensors)


# --- results


def test_tokens_are_those_of_the_kernel_notes() -> None:
    tokens = {name: shape.images * shape.tokens for name, shape in BY_NAME.items()}
    assert [tokens[f"swin_g_w{window}"] for window in (8, 12, 14, 16, 24)] == [
        16384,
        36864,
        50176,
        65536,
        147456,
    ]
    assert [tokens[f"swin_b_w{window}"] for window in (14, 16)] == [100352, 131072]
    for shape in SHAPES:
        if shape.window:
            assert (shape.side, shape.channels // shape.heads) == (2 * shape.window, 32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("op", TINY)
def test_every_variant_gives_the_result_of_the_reference(op: str) -> None:
    inputs = make_inputs(TINY[op], CPU, seed=0, dtype=torch.float32)
    exact = _results(reference(TINY[op]), inputs)
    for name, variant in variants(TINY[op], CPU).items():
        if not variant.checked:
            continue
        if name == "flex":  # has no backward pass on a CPU
            found = [variant.function(*(tensor.detach() for tensor in inputs.tensors))]
        else:
            found = _results(variant.function, inputs)
            assert len(found) == len(exact)
        for tensor, wanted in zip(found, exact, strict=False):
            # fp32 throughout; the scale's gradient nearly cancels and loses a digit more
            assert float((tensor - wanted).norm() / wanted.norm()) < 1e-5, name


def test_the_block_is_that_of_timm() -> None:
    shape = TINY["block"]
    torch.manual_seed(0)
    block = SwinTransformerV2Block(
        dim=64, input_resolution=(8, 8), num_heads=2, window_size=4, shift_size=2
    ).eval()  # fmt: skip
    for parameter in block.parameters():  # its norms begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    attention = block.attn
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, 2)
    bias_hNN = 16 * table[attention.relative_position_index.view(-1)].sigmoid().view(16, 16, 2).permute(
        2, 0, 1
    )
    scale_h = attention.logit_scale.clamp(max=math.log(100)).exp().flatten()
    qkv_bias = torch.cat([attention.q_bias, torch.zeros(64), attention.v_bias])
    modules = (attention.proj, block.norm1, block.mlp.fc1, block.mlp.fc2, block.norm2)
    weights = [
        attention.qkv.weight,
        qkv_bias,
        *(tensor for module in modules for tensor in module.parameters()),
    ]
    x_BHWC = make_inputs(shape, CPU, seed=0, dtype=torch.float32).batched[0].detach()
    for name in ("ours", "eager"):
        found = variants(shape, CPU)[name].function(x_BHWC, bias_hNN, scale_h, *weights)
        # fp32 sums in another order
        torch.testing.assert_close(found, block(x_BHWC), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", TINY)
def test_the_reference_image_by_image_is_that_of_all_images(op: str) -> None:
    inputs = make_inputs(TINY[op], CPU, seed=0, dtype=torch.float32)
    whole = _results(reference(TINY[op]), inputs)
    for part, wanted in zip(_exact_results(TINY[op], inputs, images=2), whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)  # sums of fp32 in another order


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (make_inputs(LOSS, CPU, seed).batched[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_copy_moves_the_bytes_of_the_loss_kernel() -> None:
    inputs = make_inputs(LOSS, CPU, seed=0)
    out = variants(LOSS, CPU)["copy"].function(*inputs.tensors)
    (kept,) = out.grad_fn.saved_tensors
    elements = inputs.batched[0].numel()
    # A copy reads and writes: 4 bytes an element forward (one row of the two), 6 backward.
    assert 2 * inputs.batched[1].nbytes == 4 * elements
    assert 2 * kept.nbytes == 6 * elements // 4 * 4
    assert torch.autograd.grad(out, inputs.leaves, inputs.upstream)[0].shape == inputs.batched[0].shape


# --- runner


def test_records_hold_what_was_measured(bench: Any) -> None:
    left, records = bench({"ours": Variant(Counted())})
    assert left == 0
    assert set(records.by_key) == {("loss", pass_name, "ours") for pass_name in PASSES}
    times = {}
    for (_, pass_name, _), record in records.by_key.items():
        assert record.error is None
        assert record.dtype == "bfloat16"
        assert 0 < record.p10_us <= record.median_us <= record.p90_us
        assert record.repeats in (3, 4)
        assert record.compile_s > 0
        assert record.peak_mib == 3
        assert 0 <= record.relative_error < measure.BOUND
        assert record.environment == environment()
        times[pass_name] = record.median_us
    assert times["forward"] < times["both"]
    items = json.loads(records.path.read_text())
    assert {"shape", "pass_name", "variant", "environment", "error"} <= set(items[0])
    assert list(records.path.parent.iterdir()) == [records.path], "no draft stays behind"


def test_measured_records_are_skipped(bench: Any) -> None:
    ours = Counted()
    bench({"ours": Variant(ours)}, match="forward")
    assert ours.inputs
    ours.inputs.clear()
    assert bench({"ours": Variant(ours)}, match="forward")[0] == 0
    assert not ours.inputs
    _, records = bench({"ours": Variant(ours)})
    assert ours.inputs, "the other passes were not measured yet"
    assert len(records.by_key) == 3
    ours.inputs.clear()
    peer = Counted()
    bench({"ours": Variant(ours), "eager": Variant(peer)})
    ours.inputs.clear(), peer.inputs.clear()
    bench({"ours": Variant(ours), "eager": Variant(peer)}, environment=environment(source="changed"))
    assert ours.inputs, "the kernels have changed"
    assert not peer.inputs, "the peers have not"
    bench({"eager": Variant(peer)}, environment=environment(peer_source="changed"))
    assert peer.inputs


def test_each_repeat_reads_other_inputs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, gpu = Counted(), CpuInPlaceOfGpu()
    gpu.l2_bytes = 3 * make_inputs(LOSS, CPU, 0).num_bytes
    bench({"ours": Variant(ours)}, gpu=gpu)
    assert len(set(ours.inputs[-3:])) == 3
    # Between two calls on the same inputs lie twice the L2 cache.
    found: list[Any] = []
    monkeypatch.setattr(measure._Bench, "_times", lambda bench, function: found.append(bench.sets) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench({"again": Variant(ours)}, gpu=gpu)
    assert sum(inputs.num_bytes for inputs in found[0][1:]) >= 2 * gpu.l2_bytes


def test_an_error_is_recorded_and_the_others_go_on(bench: Any) -> None:
    def broken(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of\n memory")

    def wrong(*tensors: Tensor) -> Tensor:
        return 1.1 * reference(LOSS)(*tensors)

    def not_a_number(*tensors: Tensor) -> Tensor:
        return torch.nan * reference(LOSS)(*tensors)

    functions = {"broken": broken, "wrong": wrong, "not_a_number": not_a_number, "ours": Counted()}
    _, records = bench({name: Variant(function) for name, function in functions.items()})
    found = {name: records.by_key["loss", "both", name] for name in functions}
    assert found["broken"].error == "OutOfMemoryError: out of memory"
    assert found["wrong"].error is not None
    assert found["wrong"].error.startswith("ValueError: relative errors of output and gradients 0.1,")
    assert "gradients nan" in str(found["not_a_number"].error)
    assert found["wrong"].median_us is None, "no time of a wrong result"
    assert found["ours"].median_us is not None


def test_a_lost_device_ends_the_run_after_its_record(bench: Any, tmp_path: Path) -> None:
    class Lost(CpuInPlaceOfGpu):
        lost = False

        def synchronize(self) -> None:
            if self.lost:
                raise RuntimeError("an illegal memory access was encountered")

    gpu, after = Lost(), Counted()

    def broken(*_: Tensor) -> Tensor:
        gpu.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    functions = {"broken": Variant(broken), "after": Variant(after)}
    with pytest.raises(DeviceLostError, match="loss broken broke the device"):
        bench(functions, gpu=gpu)
    assert not after.inputs
    assert {key[2] for key in Records.read(tmp_path / "records.json").by_key} == {"broken"}
    _, records = bench(functions)  # a new process: the device is whole again
    assert records.by_key["loss", "both", "after"].error is None


def test_nothing_is_started_after_the_end(bench: Any) -> None:
    late, compiled = Counted(), Counted()
    left, records = bench({"ours": Variant(late)}, end=time.monotonic() - 1)
    assert (left, records.by_key, late.inputs) == (3, {}, [])
    functions = {"ours": Variant(late), "compiled": Variant(compiled, compiled=True)}
    left, records = bench(functions, end=time.monotonic() + measure.COMPILE_S - 5)
    assert left == 3, "a compiled variant may need a minute"
    assert (len(records.by_key), compiled.inputs) == (3, [])


@pytest.mark.parametrize(
    ("words", "driver", "exp"),
    [("570.86, 1980", "570.86", 16 * 132 * 1.98e9), (None, None, None), ("570.86, [N/A]", None, None)],
)
def test_environment_and_rates(
    words: str | None, driver: str | None, exp: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ticking(CpuInPlaceOfGpu, Gpu):
        """A millisecond passes between two marks."""

        def __init__(self) -> None:
            self.properties = SimpleNamespace(name="Fake GPU", multi_processor_count=132)
            self.now = 0.0

        def mark(self) -> float:
            self.now += 1e-3
            return self.now

    first_line = measure._first_line
    monkeypatch.setattr(
        measure, "_first_line", lambda *command: words if command[0] == "nvidia-smi" else first_line(*command)
    )
    monkeypatch.setattr(Gpu, "_copy_rate", functools.partialmethod(Gpu._copy_rate, 1000))
    monkeypatch.setattr(Gpu, "_matmul_rate", functools.partialmethod(Gpu._matmul_rate, 8))
    found = Ticking().environment()
    assert (found.driver, found.rates.exp) == (driver, exp)
    assert found.rates.copy == pytest.approx(2 * 1000 / 1e-3)
    assert found.rates.matmul == pytest.approx(2 * 8**3 / 1e-3)
    assert found.commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found.commit)
    assert len(found.source) == len(found.peer_source) == 12
    assert measure._first_line("no-such-command") is None


def test_the_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "fd_kernels" / "benchmarks" / "records.py"
    module.parent.mkdir(parents=True)
    kernel = tmp_path / "fd_kernels" / "kernel.py"
    monkeypatch.setattr("fd_kernels.benchmarks.records.__file__", str(module))
    found = set()
    for text in ("a", "b", "a"):
        kernel.write_text(text)
        found.add(source_digest("**/*.py"))
        assert source_digest("benchmarks/*.py") == source_digest("benchmarks/*.py", "*/reference.py")
    assert len(found) == 2


# --- floors and goals


def test_floors_are_those_of_the_kernel_notes() -> None:
    notes = {
        "swin_g_w8": (64, 110), "swin_g_w12": (143, 248), "swin_g_w14": (195, 338), "swin_g_w16": (257, 443),
        "swin_g_w24": (1300, 2202), "swin_b_w14": (97, 168), "swin_b_w16": (128, 220),
    }  # fmt: skip
    for name, (forward, backward) in notes.items():
        found = floors(BY_NAME[name], H200)
        assert found is not None
        # 1%: the notes count the bias in bf16, the op takes it in fp32; they are rounded to 1 us
        assert found["forward"].us == pytest.approx(forward, rel=0.01)
        assert found["backward"].us == pytest.approx(backward, rel=0.01)
        assert found["both"].us == pytest.approx(found["forward"].us + found["backward"].us)
    bounds = {name: floors(BY_NAME[name], H200)["both"].bound for name in notes}  # type: ignore[index]
    assert bounds["swin_g_w8"] == "memory"
    assert bounds["swin_g_w24"] == "exp / tensor cores"


def test_floors_without_a_clock_or_of_a_block() -> None:
    unknown = Rates(copy=1e12, matmul=1e14, exp=None)
    assert floors(BY_NAME["swin_g_w8"], unknown) is None
    assert floors(BY_NAME["block_swin_g_w12"], H200) is None
    found = floors(BY_NAME["loss_16k_1024"], unknown)
    assert found is not None
    # 4 and 6 bytes for each of 16384 x 1024 elements, at 1 TB/s
    assert (found["forward"].us, found["backward"].us) == pytest.approx((67.108864, 100.663296))


def records_of(shape: str, **times: float | None) -> dict[Key, Record]:
    """Forward + backward of variants in us; None: it failed."""
    return {
        (shape, "both", name): Record(
            shape=shape, pass_name="both", variant=name, dtype="bfloat16", environment=environment(),
            median_us=us, p10_us=us, p90_us=us, peak_mib=7, kept_mib=5, compile_s=1,
            error="OutOfMemoryError: too much" if us is None else None,
        )
        for name, us in times.items()
    }  # fmt: skip


def test_goals_compare_with_the_best_peer_that_ran() -> None:
    shape = BY_NAME["swin_g_w8"]  # floor 173 us, memory-bound
    peers = {"eager": 900.0, "compiled": 500.0, "sdpa": None, "flex": 440.0}
    speed, share = report.goals(shape, records_of(shape.name, ours=200.0, **peers))
    assert (speed.least, speed.found) == (2.0, pytest.approx(2.2))
    assert (share.least, share.found) == (0.7, pytest.approx(0.87, abs=0.01))
    assert str(speed) == "best peer / ours >= 2: 2.20, met"
    speed, share = report.goals(shape, records_of(shape.name, ours=300.0, **peers))
    assert str(speed) == "best peer / ours >= 2: 1.47, missed"
    assert "missed" in str(share)
    half = environment(rates=Rates(copy=H200.copy / 2, matmul=H200.matmul / 2, exp=2e12))
    records = {
        key: dataclasses.replace(record, environment=half)
        for key, record in records_of(shape.name, ours=400.0).items()
    }
    assert report.goals(shape, records)[1].found == pytest.approx(0.87, abs=0.01), (
        "the rates of the run count"
    )
    share = report.goals(BY_NAME["swin_g_w24"], records_of("swin_g_w24", ours=7100.0))[1]
    assert (share.least, share.found) == (0.5, pytest.approx(0.493, abs=0.001))


def test_goals_wait_for_every_peer() -> None:
    records = records_of("vit_b_197", ours=100.0, eager=300.0, compiled=150.0, sdpa=120.0)
    shape = BY_NAME["vit_b_197"]
    assert str(report.goals(shape, records)[0]) == "best peer / ours >= 1: not measured"
    records |= records_of("vit_b_197", flex=99.0)
    assert str(report.goals(shape, records)[0]) == "best peer / ours >= 1: 0.99, missed"
    records |= records_of("vit_b_197", ours=None)
    assert "not measured" in str(report.goals(shape, records)[0])


def test_goals_of_loss_and_block() -> None:
    records = records_of("loss_16k_1024", ours=45.0, eager=200.0, compiled=60.0, copy=40.0)
    assert str(report.goals(BY_NAME["loss_16k_1024"], records)[0]) == "copy / ours >= 0.85: 0.89, met"
    records = records_of("block_swin_g_w12", ours=110.0, ours_compiled=100.0, eager=500.0, compiled=129.0)
    goal = report.goals(BY_NAME["block_swin_g_w12"], records)[0]
    assert str(goal) == "compiled eager / best of ours >= 1.3: 1.29, missed"


# --- table, plot, command line


def test_page_of_measurements(tmp_path: Path) -> None:
    records = Records(tmp_path / "fake.json")
    for record in records_of("swin_g_w8", ours=200.0, eager=None).values():
        records.add(record)
    old = records_of("swin_g_w8", sdpa=450.0)["swin_g_w8", "both", "sdpa"]
    records.add(dataclasses.replace(old, environment=environment(peer_source="old", time="2025")))
    text = report.page(Records.newest(tmp_path), "the command")
    row = next(line for line in text.splitlines() if line.startswith("| swin_g_w8 | both"))
    assert row.split(" | ")[2:7] == [
        "200 (200..200)",
        "error",
        "not measured",
        "450 (450..450)*",
        "not measured",
    ]
    assert "173, memory, 87%" in row
    assert "roofline / ours >= 0.7: 0.87, met" in row
    assert "| swin_g_w8 | 7 / 5 / 1.0 | error | not measured | 7 / 5 / 1.0* | not measured |" in text
    assert "- swin_g_w8 both eager: OutOfMemoryError: too much" in text
    assert "Fake GPU, driver 1.2, torch 2.13.0+x, triton 3.7" in text
    assert "measured with other code" in text
    assert "`the command`" in text


def test_the_newest_file_is_shown(tmp_path: Path) -> None:
    assert Records.newest(tmp_path) is None
    for gpu, when in (("A", "2026-02"), ("B", "2026-03"), ("C", "2026-01")):
        now = environment(gpu=gpu, time=when)
        record = records_of("swin_g_w8", ours=1.0)["swin_g_w8", "both", "ours"]
        Records(tmp_path / now.file_name).add(dataclasses.replace(record, environment=now))
    newest = Records.newest(tmp_path)
    assert newest is not None
    assert newest.path.name == "B_torch2.13.0_x_triton3.7.json"


def test_docs_page_is_what_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures anew writes the page anew."""
    written = (ROOT / "docs" / "kernel_benchmarks.md").read_text()
    command = shlex.split(re.findall("^Written by `(.+)`", written, re.MULTILINE)[0])
    assert command[:3] == ["python", "-m", "fd_kernels.benchmarks"]
    monkeypatch.chdir(ROOT)
    elsewhere = [item.replace("docs/", f"{tmp_path}/") for item in command[3:]]
    assert main(elsewhere) == 0
    assert (tmp_path / "kernel_benchmarks.md").read_text().replace(f"{tmp_path}/", "docs/") == written


@pytest.mark.slow
def test_command_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, "-m", "fd_kernels.benchmarks", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr
    assert "not measured" in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", "--report", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("not measured") > 100


def test_wrong_calls_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--match", "("], "is no regular expression"),
        (["--report", "--out", str(tmp_path), "--plot", "x.png"], "holds no measurements"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "fake.json")
    for record in records_of("swin_g_w8", ours=200.0, eager=None).values():
        records.add(record)
    arguments = [
        "--report",
        str(tmp_path / "page.md"),
        "--out",
        str(tmp_path),
        "--plot",
        str(tmp_path / "bars.svg"),
    ]
    assert main(arguments) == 0
    assert "<svg" in (tmp_path / "bars.svg").read_text()
    assert "![Forward + backward of all variants](bars.svg)" in (tmp_path / "page.md").read_text()
    records.by_key.pop(("swin_g_w8", "both", "ours"))
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot(records, tmp_path / "none.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--plot needs matplotlib" in capsys.readouterr().err
