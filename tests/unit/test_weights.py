"""Files of weights: what is read, what is refused and in which words, and the mean of two."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor

from fd_scale import cli
from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models import SwinTransformerV2, interpolate, load_weights, resolved_model, weights_sha256
from fd_scale.models.weights import read_state
from fd_scale.verbs import export
from fd_scale.verbs.export import convert
from fd_scale.verbs.export import interpolate as write_mean

SHAPE: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}


def build(seed: int = 0, **overrides: Any) -> SwinTransformerV2:
    torch.manual_seed(seed)
    return SwinTransformerV2(img_size=32, **(SHAPE | overrides))


def loads(path: Path, **overrides: Any) -> SwinTransformerV2:
    model = build(seed=1, **overrides)
    load_weights(model, str(path))
    return model


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def shards(folder: Path, state: dict[str, Tensor]) -> list[str]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder.mkdir()
    weight_map = {name: names[index % 2] for index, name in enumerate(state)}
    for shard in names:
        save_file({name: state[name] for name in state if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "old.pth"])
def test_files(tmp_path: Path, name: str) -> None:
    state = build().state_dict()
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name != "old.pth")
    assert same(loads(tmp_path / name), state)
    with torch.device("meta"):
        load_weights(build(), str(tmp_path / name))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_folders(tmp_path: Path, file: str) -> None:
    state = build().state_dict()
    save: Callable[[Any, Path], None] = save_file if file == "model.safetensors" else torch.save
    save(state, tmp_path / file)
    assert same(loads(tmp_path), state)
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    assert weights_sha256(str(tmp_path)) == weights_sha256(str(tmp_path / file)) == digest


def test_shards(tmp_path: Path) -> None:
    state = build().state_dict()
    names = shards(tmp_path / "hub", state)
    assert same(loads(tmp_path / "hub"), state)
    assert same(loads(tmp_path / "hub" / "model.safetensors.index.json"), state)
    before = weights_sha256(str(tmp_path / "hub"))
    second = tmp_path / "hub" / names[1]
    changed = bytearray(second.read_bytes())
    changed[-1] ^= 1
    second.write_bytes(changed)
    assert weights_sha256(str(tmp_path / "hub")) != before, "every shard counts"
    second.unlink()
    with pytest.raises(UserError, match=rf"index.json names {second}, which does not exist; fetch all 2"):
        loads(tmp_path / "hub")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json is not an index of shards"):
        loads(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {"model": {"student": state}},
        lambda state: {"teacher": state},
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        lambda state: {"model": {"module." + name: tensor for name, tensor in state.items()}},
    ],
)
def test_wrappers(tmp_path: Path, wrap: Any) -> None:
    state = build().state_dict()
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    assert same(loads(tmp_path / "wrapped.pth"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in build().state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    model = loads(tmp_path / "half.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert same(model, {name: tensor.float() for name, tensor in state.items()})


def test_on_meta_only_names_and_shapes_are_compared(tmp_path: Path) -> None:
    torch.save({"model": build(shared_bias=False).state_dict()}, tmp_path / "a.pth")
    with torch.device("meta"):
        load_weights(build(shared_bias=True), str(tmp_path / "a.pth"))
        with pytest.raises(
            UserError, match=r"patch_embed.proj.weight is \(8, 3, 4, 4\), expected \(16, 3, 4, 4\)"
        ):
            load_weights(build(embed_dim=16), str(tmp_path / "a.pth"))


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "code": ("a.pth", lambda file: torch.save(SimpleNamespace(a=1), file), "types.SimpleNamespace, and only tensors"),
    "no torch file": ("a.pth", lambda file: file.write_bytes(pickle.dumps(Path("a"), 2)), "and only tensors are read"),
    "text": ("a.pth", lambda file: file.write_text("<html>404</html>"), "is no file of tensors; save the state dict"),
    "empty file": ("a.pth", lambda file: file.touch(), "is not a whole file of torch.save"),
    "truncated": ("a.pth", lambda file: truncated(file), "is not a whole file of torch.save"),
    "no tensors": ("a.pth", lambda file: torch.save({"epoch": 3}, file), "holds no tensors by name"),
    "list": ("a.pth", lambda file: torch.save([torch.zeros(1)], file), "holds no tensors by name"),
    "numbers": ("a.pth", lambda file: torch.save({"w": torch.zeros(1), "step": 3}, file), "step is no tensor"),
    "two models": ("a.pth", lambda file: torch.save({"student": ONE, "teacher": ONE}, file), "a student and a teacher"),
    "damaged": ("a.safetensors", lambda file: file.write_bytes(b"\xff" * 64), "is not a whole safetensors file"),
    "kind of file": ("a.npz", lambda file: file.touch(), "ends in '.npz', expected .safetensors, .pth, .pt or .bin"),
    "TorchScript": ("a.pt", lambda file: scripted(file), "archive, which holds code; where you trust it"),
    "nothing": ("none.pth", lambda file: None, "none.pth does not exist; give a .safetensors or .pth file"),
}  # fmt: skip
ONE = {"weight": torch.zeros(1)}


def scripted(file: Path) -> None:
    """Writes what tells torch such an archive."""
    writer = torch._C.PyTorchFileWriter(str(file))
    writer.write_record("constants.pkl", b"", 0)
    writer.write_end_of_file()


def truncated(file: Path) -> None:
    torch.save(build().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-500])


@pytest.mark.parametrize(("name", "write", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_weights(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str, device: str
) -> None:
    write(tmp_path / name)
    with torch.device(device), pytest.raises(UserError, match=re.escape(message)) as refused:
        load_weights(build(), str(tmp_path / name))
    assert str(refused.value).startswith(f"weights: {tmp_path / name}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantised_weights_are_refused(tmp_path: Path, name: str, device: str) -> None:
    """Their integers would be taken for the weights."""
    state = build().state_dict()
    state["norm.weight"] = (state["norm.weight"] * 100).to(torch.int8)
    if name.endswith(".pth"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    with (
        torch.device(device),
        pytest.raises(UserError, match=r": norm\.weight holds integers, expected float"),
    ):
        load_weights(build(), str(tmp_path / name))


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": {"w": torch.zeros(1)}, "config": Malicious()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="only tensors are read"):
        loads(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_another_architecture_is_named_with_the_layout(tmp_path: Path) -> None:
    torch.save({"encoder." + name: tensor for name, tensor in build_official().items()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"another architecture \(read as Swin V2, layout official\)"
    ) as refused:
        loads(tmp_path / "a.pth", depths=[1, 3])
    assert "layers.1.blocks.2.attn.logit_scale is missing" in str(refused.value)
    assert str(refused.value).endswith("more")
    torch.save(build().state_dict() | {"queue": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"another architecture .*: queue is unknown$"):
        loads(tmp_path / "more.pth")
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "vit.pth")
    with pytest.raises(
        UserError, match=r"another architecture: patch_embed.proj.weight is missing"
    ) as refused:
        loads(tmp_path / "vit.pth")
    assert "read as" not in str(refused.value)


def build_official() -> dict[str, Tensor]:
    model = build()
    return model.to_layout(model.state_dict(), "official")


def test_different_biases_name_the_file(tmp_path: Path) -> None:
    torch.save(build(shared_bias=False).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"weights: {tmp_path / 'a.pth'}: the blocks of stage 1"):
        loads(tmp_path / "a.pth", shared_bias=True)


def test_interpolation_is_linear_in_fp32(tmp_path: Path) -> None:
    first, second = build(seed=1).state_dict(), build(seed=2).half().state_dict()
    save_file(first, tmp_path / "a.safetensors")
    torch.save({"model": second}, tmp_path / "b.pth")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth")
    mean = interpolate(a, b, 0.25)
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float32
        expected = 0.75 * first[name].double() + 0.25 * second[name].double()
        # fp32: three roundings of 6e-8 on values below 2.4
        torch.testing.assert_close(tensor.double(), expected, rtol=2e-7, atol=2e-7)
    assert all(torch.equal(tensor, first[name]) for name, tensor in interpolate(a, b, 0.0).items())
    assert all(torch.equal(tensor, second[name].float()) for name, tensor in interpolate(a, b, 1.0).items())


def test_interpolation_of_different_models(tmp_path: Path) -> None:
    state = build().state_dict()
    paths = {}
    for name, other in {
        "a": state,
        "longer": state | {"head.weight": torch.zeros(3)},
        "wider": state | {"norm.bias": torch.zeros(3)},
    }.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file(other, paths[name])
    with pytest.raises(UserError, match=rf"{paths['a']} has no head.weight"):
        interpolate(paths["a"], paths["longer"], 0.5)
    with pytest.raises(UserError, match=rf"{paths['a']} has no head.weight"):
        interpolate(paths["longer"], paths["a"], 0.5)
    with pytest.raises(UserError, match=r"norm.bias is \(16,\) in .*a.safetensors, \(3,\) in .*wider"):
        interpolate(paths["a"], paths["wider"], 0.5)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"alpha is .*; expected a number in 0..1"):
            interpolate(paths["a"], paths["a"], alpha)


def test_the_command_line_converts_and_interpolates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    settings = ["embed_dim=8", "depths=[1,2]", "num_heads=[1,2]", "window_size=4"]
    model = ["--model", "swin_v2_tiny", "--img-size", "32", "--set", *settings[:3], "--set", settings[3]]
    cli.main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "fd"), *model, "--format", "fd"])
    cli.main(["convert", str(tmp_path / "fd"), str(tmp_path / "ours"), *model])
    assert capsys.readouterr().out.split() == [str(tmp_path / "fd"), str(tmp_path / "ours")]
    assert same(loads(tmp_path / "ours"), state)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["model"]
    assert config["overrides"] == SHAPE
    assert config["weights"] is None

    zero = copy.deepcopy(state)
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in zero.items()}, tmp_path / "zero.safetensors"
    )
    out = tmp_path / "mean"
    cli.main(
        [
            "interpolate",
            str(tmp_path / "ours"),
            str(tmp_path / "zero.safetensors"),
            str(out),
            "--alpha",
            "0.5",
        ]
    )
    # Halving is exact.
    assert all(
        torch.equal(mean, state[name] / 2) for name, mean in load_file(out / "model.safetensors").items()
    )
    assert (out / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()


@pytest.mark.parametrize("layout", ["ours", "hf", "official"])
def test_what_an_export_says_of_its_images_goes_with_its_weights(tmp_path: Path, layout: str) -> None:
    """As a folder and as the file in it, through conversions and means."""
    model = ModelConfig(name="swin_v2_tiny", img_size=32, overrides=SHAPE)
    save_file(build().state_dict(), tmp_path / "a.safetensors")
    first = convert(str(tmp_path / "a.safetensors"), tmp_path / "first", model, layout)
    described = json.loads((first / "config.json").read_text())
    described["model"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "license": "MIT"}
    (first / "config.json").write_text(json.dumps(described))
    [file] = [first / name for name in ("model.safetensors", "model.pth") if (first / name).is_file()]
    converted = convert(str(file), tmp_path / "converted", model, "hf")
    assert tuple(AutoImageProcessor.from_pretrained(converted).image_mean) == (0.1, 0.2, 0.3)
    mean = write_mean(str(converted / "model.safetensors"), str(converted), tmp_path / "mean", 0.5)
    assert tuple(AutoImageProcessor.from_pretrained(mean).image_std) == (0.4, 0.5, 0.6)
    for weights in (first, file, converted, mean, mean / "model.safetensors"):
        own = resolved_model(replace(model, weights=str(weights)))
        assert (own.mean, own.std, own.license) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "MIT"), weights


def test_weights_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an export that is killed no weights remain that would be read with the mean of others."""

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    save_file(build().state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setattr(export, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(
            str(tmp_path / "a.safetensors"),
            tmp_path / "out",
            ModelConfig(name="swin_v2_tiny", img_size=32, overrides=SHAPE),
            "ours",
        )
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "no.pth", "out", "--model", "swin_v2_tiny"], "weights: no.pth does not exist"),
        (["convert", "no.pth", "out", "--model", "swin_v2_tny"], "unknown model 'swin_v2_tny'"),
        (
            ["convert", "a", "out", "--model", "swin_v2_tiny", "--set", "depths=[1"],
            "--set depths=[1: not YAML",
        ),
        (["interpolate", "no.pth", "no.pth", "out"], "weights: no.pth does not exist"),
    ],
)
def test_the_command_line_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"fd-scale: {message}")
    assert not (tmp_path / "out").exists()


def test_settings_beside_the_tensors_are_read_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published checkpoints hold yacs' and argparse's objects; neither library needs to be there."""
    yacs = ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        settings = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="swin_v2"))
        settings.__dict__["__immutable__"] = True  # as yacs keeps it
        state = {"model": {"w": torch.ones(2)}, "config": settings, "args": argparse.Namespace(lr=1.0)}
        torch.save(state, tmp_path / "a.pth")
    assert torch.equal(read_state(str(tmp_path / "a.pth"))["w"], torch.ones(2))
