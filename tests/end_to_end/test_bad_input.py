"""Whatever is wrong with what a user gives: one sentence that says so, exit code 2, no traceback."""

import json
import logging
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fd_scale import cli
from fd_scale.models import create_model
from fd_scale.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Saved = Callable[[dict[str, Any]], str]
Refused = Callable[..., str]

VERBS = {
    "distill": "distill", "contrastive": "pretrain", "masked": "pretrain", "classification": "finetune",
    "linear_probe": "finetune", "segmentation": "finetune", "detection": "finetune",
}  # fmt: skip


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """A run sets up logging and signal handlers for its whole process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler_before in signals.items():
        signal.signal(number, handler_before)


def test_ctrl_c_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_recipes", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes"])
    assert ended.value.code == 130
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("fd-scale: interrupted; ")


def test_a_model_that_is_no_run_has_no_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["diagnose", "--help"])
    [example] = [line for line in capsys.readouterr().out.splitlines() if "@pretrained --images" in line]
    assert cli.parsed(shlex.split(example)[1:]).out is not None, "as the example has it"
    for given, missing in ((["--images", "digits:test"], "--out DIR"), (["--out", "out"], "--images SOURCE")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["diagnose", "vit_tiny_patch16_224@none", *given])
        assert f"so there is no default: give {missing}\n" in capsys.readouterr().err


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused; returns its sentence."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        *before, sentence = capsys.readouterr().err.splitlines()
        log_line = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")
        assert all(log_line.match(line) for line in before), before
        assert sentence.startswith("fd-scale: ")
        return sentence

    return run


@pytest.mark.parametrize(
    ("task", "overrides", "facts"),
    [
        pytest.param("distill", overrides, facts, id=name)
        for name, overrides, facts in [
            ("unknown key", ["train.global_bach=8"], ["train.global_bach", "Did you mean: 'global_batch'"]),
            ("unknown section", ["optimizer.lr=1"], ["Key 'optimizer' not in 'Recipe'", "Did you mean: 'optim'"]),
            ("wrong type", ["train.global_batch=many"], ["train.global_batch", "'many'", "Integer"]),
            ("not one of", ["train.precision=fp8"], ["train.precision", "'fp8'", "'fp32', 'bf16', 'fp16'"]),
            ("out of range", ["optim.lr=-1"], ["optim.lr: got -1.0, expected a positive number"]),
            ("wrong length", ["model.mean=[0.5]"], ["model.mean: expected 3 values, got 1: [0.5]"]),
            ("task without section", ["distill=null"], ["task distill needs a section", "`distill: {}`"]),
            ("section of another task", ["contrastive={}"], ["belongs to task contrastive", "remove it"]),
            ("not key=value", ["optim.lr"], ["'optim.lr'", "key=value"]),
            ("no such entry", ["distill.teachers.3.model.name=a"], ["distill.teachers.3.model.name=a", "range"]),
            ("not YAML", ["optim.betas=[1"], ["optim.betas=[1", "cannot be set"]),
            ("unknown name of a reference", ["optim.lr=${rate}"], ["optim.lr=${rate}", "'rate' not found"]),
            ("data set that is not there", ["data.train=imagefolder:/nowhere"], ["/nowhere is not a folder"]),
            ("no such file", ["data.train=parquet:/no/*.parquet"], ["/no/*.parquet matches no file"]),
            ("kind of source", ["data.train=imagefoldr:x"], ["'imagefoldr:x'", "nearest: 'imagefolder:...'"]),
            ("no kind", ["data.train=digits"], ["'digits' must be KIND:REST"]),
            ("part of digits", ["data.train=digits:trian"], ["'trian'", "digits:train or digits:test"]),
            ("evaluation data", ["data.evaluation=imagefolder:/nowhere"], ["/nowhere is not a folder"]),
            ("image size", ["model.img_size=25"], ["25 x 25 px", "patch size 4"]),
            ("model", ["model.name=swin_v2_tny"], ["'swin_v2_tny'", "did you mean swin_v2_tiny"]),
            ("override", ["model.overrides.embed_dims=8"], ["'embed_dims'", "did you mean embed_dim"]),
            ("type of an override", ["model.overrides.depths=2"], ["model.overrides.depths", "2", "Sequence[int]"]),
            ("img_size as override", ["model.overrides.img_size=32"], ["the input size is model.img_size"]),
            ("heads", ["model.overrides.num_heads=[3,6]"], ["stage 0 has 16 channels and 3 heads"]),
            ("batch", ["train.global_batch=1504"], ["1504 is larger", "1497 samples", "take at most 1497"]),
            ("DeepSpeed JSON", ["train.ds_config=zero7"], ["zero7", "zero0, zero1, zero2, zero3"]),
            ("fp16", ["train.precision=fp16"], ["no fp16 on a CPU", "train.precision=bf16"]),
            ("weights", ["model.weights=/no.safetensors"], ["/no.safetensors does not exist", "fd-scale export"]),
            ("kernels", ["train.kernels=triton"], ["train.kernels: triton needs a CUDA device", "set it to auto"]),
            ("compile", ["train.compile=true", "model.name=test_vit", "model.img_size=32", "model.overrides={}"],
             ["train.compile", "TimmBackbone has no blocks of ours", "swin_v2_* or fd_vit_*"]),
            ("graphs", ["train.cuda_graphs=true"], ["train.cuda_graphs", "none on a CPU", "false"]),
            ("cls", ["distill.teachers.0.cls_weight=1"], ["cls_weight", "swin_v2_tiny has no CLS token"]),
            ("logits", ["distill.teachers.0.target=logits"], ["has no classifier", "feature_map or pooled"]),
        ]
    ]
    + [
        pytest.param("contrastive", ["data.erasing=0.5", "train.micro_batch=16"],
                     ["data.erasing", "cuts its views otherwise", "remove them"], id="augmentation of another task"),
        pytest.param("linear_probe", [], ["optim.grad_clip", "set grad_clip to 0"], id="clipping of a probe"),
        pytest.param("linear_probe", ["optim.grad_clip=0", "data.erasing=0.1"],
                     ["data.erasing", "task linear_probe cuts"], id="augmented probe"),
        pytest.param("linear_probe", ["optim.grad_clip=0", "train.compile=true"],
                     ["train.compile", "runs its model once"], id="compiled probe"),
        pytest.param("contrastive", ["train.cuda_graphs=true", "train.micro_batch=16"],
                     ["train.cuda_graphs", "task contrastive", "set it to false"], id="graphs of another task"),
        pytest.param("classification", ["classification.num_classes=1000"],
                     ["classification.num_classes: got 1000", "digits:train has 10"], id="class count"),
        pytest.param("classification", ["classification.cutmix=1.0", "train.micro_batch=1"],
                     ["train.micro_batch", "at most 1 that are multiples of 2", "Mixup or CutMix"], id="pairs"),
        pytest.param("segmentation", [], ["data.train: digits:train has no masks", "masks:PATH"], id="no masks at all"),
        pytest.param("segmentation", ["data.erasing=0.1"], ["task segmentation cuts its views"], id="augmented masks"),
        pytest.param("contrastive", [], ["8 x 1 ranks", "train.global_batch=16"], id="contrastive accumulation"),
    ],
)  # fmt: skip
def test_setting(
    recipe_values: Values, saved: Saved, refused: Refused, task: str, overrides: list[str], facts: list[str]
) -> None:
    values = recipe_values(task)
    sentence = refused(VERBS[task], saved(values), *overrides)
    assert all(fact in sentence for fact in facts), sentence
    assert not Path(values["run_dir"]).exists(), "it was refused before anything was written"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", ["required and not given", "data", "model", "task"]),
        ("- 1", ["a mapping of sections"]),
        ("3", ["a mapping of sections"]),
        ("optim: [1", ["not a YAML file", "line 1"]),
        ("optim: {lr: 1}\noptim: {lr: 2}", ["not a YAML file", "duplicate key optim"]),
        ("task: ${job}", ["task", "'job' not found"]),
        ("\x00", ["not a YAML file"]),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, refused: Refused, text: str, facts: list[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    sentence = refused("distill", str(file))
    assert all(fact in sentence for fact in [str(file), *facts]), sentence


@pytest.mark.parametrize("section", ["model", "data", "optim", "train"])
def test_missing_section(recipe_values: Values, saved: Saved, refused: Refused, section: str) -> None:
    values = recipe_values()
    del values[section]
    assert f"required and not given: {section}" in refused("distill", saved(values))


def test_unknown_recipe(refused: Refused) -> None:
    sentence = refused("distill", "digits/distil")
    assert "digits/distil: neither a file nor a packaged recipe; did you mean digits/distill?" in sentence
    assert "digits/distill" in sentence.split("one of:")[1]


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_verb_of_another_task(recipe_values: Values, saved: Saved, refused: Refused, verb: str) -> None:
    assert "its task is distill; run it with `fd-scale distill`" in refused(verb, saved(recipe_values()))


def test_empty_data_set(recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    sentence = refused("distill", saved(recipe_values()), f"data.train=imagefolder:{tmp_path / 'images'}")
    assert f"{tmp_path / 'images'} holds no images" in sentence


def test_no_labels_to_learn(recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path) -> None:
    for index in range(16):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    sentence = refused(
        "finetune", saved(recipe_values("classification")), f"data.train=imagefolder:{tmp_path}"
    )
    assert "has 0 classes; classification needs labels" in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be used")
def test_gpu_that_is_not_there(recipe_values: Values, saved: Saved, refused: Refused) -> None:
    sentence = refused("distill", saved(recipe_values()), "train.device=cuda")
    assert "train.device: got cuda, but torch sees no GPU" in sentence
    assert "set train.device=cpu" in sentence


def test_run_folder_that_cannot_be_written(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # nobody can make a folder below a file, root neither
    sentence = refused("distill", saved(recipe_values()), f"run_dir={tmp_path / 'file' / 'run'}")
    assert f"run_dir: {tmp_path / 'file' / 'run'} cannot be written (Not a directory)" in sentence
    assert "run_dir=PATH" in sentence


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"train_batch_size": 32}, ["train_batch_size is 32", "train.global_batch gives 16 on 1 ranks"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu is 4", "gives 8"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "gives 2"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "gives 0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled is true", "gives false"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "gives false"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["params.lr is 0.1", "optim.lr is 0.001"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, ["betas is [0.8, 0.9]", "[0.9, 0.999]"]),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, ["params.eps is 1e-06", "optim.eps is 1e-08"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0}}},
            ["params.weight_decay is 0", "optim.weight_decay is 0.05"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, ["params has amsgrad", "remove"]),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, ["params has [1]", "remove"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["optimizer.type is OneBitAdam", "expected AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["has a scheduler", "remove the scheduler"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast in", "train.precision says", "remove it"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size is 2 in", "train.mics_shard_size is 0"]),
        ({"zero_optimization": {"zero_hpz_partition_size": "auto"}}, ['size is "auto"', "expected a whole number"]),
        ({"zero_optimization": 3}, ["zero_optimization is 3", "expected an object"]),
        ({"bf16": True}, ["bf16 is true", "expected an object"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage is 4", "expected 0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": "two"}}, ['zero_optimization.stage is "two"', "expected 0, 1, 2 or 3"]),
        ([1], ["holds a list", "expected an object"]),
    ],
    ids=lambda value: "".join(re.findall(r"\w+", json.dumps(value))) if isinstance(value, dict) else "-",
)  # fmt: skip
def test_deepspeed_json(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path, config: Any, facts: list[str]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    sentence = refused("distill", saved(recipe_values(optim__grad_clip=0.5)), f"train.ds_config={file}")
    assert all(fact in sentence for fact in ["train.ds_config", str(file), *facts]), sentence


@pytest.mark.parametrize("content", [b'{"train_batch_size": ', b"\xff\xfe\x00"])
def test_deepspeed_json_that_is_broken(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    sentence = refused("distill", saved(recipe_values()), f"train.ds_config={tmp_path / 'ds.json'}")
    assert f"{tmp_path / 'ds.json'} is not JSON" in sentence


@pytest.mark.parametrize(
    ("zero", "fact"),
    [
        ({"stage": 1, "reduce_bucket_size": "many"}, "reduce_bucket_size"),
        ({"stage": 1, "reduce_bucket_size": [1]}, "reduce_bucket_size"),
        ({"stage": 3, "zero_quantized_weights": True}, "not been implemented on CPU"),
    ],
)
def test_what_deepspeed_itself_refuses(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path, zero: dict[str, Any], fact: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    sentence = refused("distill", saved(recipe_values(optim__grad_clip=0.5)), f"train.ds_config={file}")
    assert "train.ds_config: DeepSpeed refuses it" in sentence
    assert fact in sentence


def other_weights(path: Path, kind: str) -> list[str]:
    """Writes weights that do not fit the tiny student; returns what the refusal must say."""
    tiny = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "num_heads": (1, 2), "window_size": 4}
    if kind == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
        return ["is not a whole safetensors file"]
    depths = (1, 1) if kind == "fewer blocks" else (1, 3) if kind == "more blocks" else (1, 2)
    wide = {"embed_dim": 24} if kind == "wider" else {}
    save_file(create_model("swin_v2_tiny", **(tiny | {"depths": depths} | wide)).state_dict(), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
        return ["is not a whole safetensors file"]
    return {
        "fewer blocks": ["layers.1.blocks.1.attn.logit_scale is missing", "more"],
        "more blocks": ["layers.1.blocks.2.attn.logit_scale is unknown", "more"],
        "wider": ["patch_embed.proj.weight is (24, 3, 4, 4), expected (16, 3, 4, 4)", "more"],
    }[kind] + ["is of another architecture"]


@pytest.mark.parametrize("kind", ["pickle", "truncated", "fewer blocks", "more blocks", "wider"])
def test_weights_that_do_not_fit(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path, kind: str
) -> None:
    facts = other_weights(tmp_path / "other.safetensors", kind)
    sentence = refused("distill", saved(recipe_values()), f"model.weights={tmp_path / 'other.safetensors'}")
    assert all(fact in sentence for fact in [str(tmp_path / "other.safetensors"), *facts]), sentence


@pytest.mark.parametrize(
    ("damage", "overrides", "facts"),
    [
        ("larger", [], ["images/0.png", "cannot be decoded", "max_bad_fraction"]),
        ("corrupt", [], ["images/0.png", "cannot be decoded", "max_bad_fraction"]),
        ("unknown", [], ["images/0.png", "cannot be decoded", "max_bad_fraction"]),
        ("missing", [], ["1 of 8 images have no mask", "masks/0.png", "add the masks"]),
        ("none", ["segmentation.num_classes=4"], ["segmentation.num_classes: got 4", "has 3"]),
        ("none", ["model.img_size=26"], ["26 x 26 px", "patch size 4"]),
        ("none", ["model.name=test_vit", "model.img_size=32", "model.overrides={}", "segmentation.inference=whole"],
         ["segmentation.inference: test_vit takes images of 32 px alone", "slide"]),
        ("none", ["segmentation.layers=[0,1,1,1]"], ["segmentation.layers", "gives all of its stages"]),
        ("none", ["model.name=resnet18", "model.overrides={}"], ["LayerNorm at its end", "swin_v2_* or fd_vit_*"]),
    ],
)  # fmt: skip
def test_masks(
    recipe_values: Values, saved: Saved, refused: Refused, write_shapes: Callable[..., str], tmp_path: Path,
    damage: str, overrides: list[str], facts: list[str],
) -> None:  # fmt: skip
    """A sentence with the file's name. What a transform cannot use is a bad sample: named in the log, and counted."""
    source = write_shapes(tmp_path / "shapes")
    mask = tmp_path / "shapes/masks/0.png"
    if damage == "larger":
        Image.new("L", (50, 50)).save(mask)
    elif damage == "corrupt":
        mask.write_bytes(mask.read_bytes()[:50])
    elif damage == "unknown":
        Image.fromarray(np.asarray(Image.open(mask)) + np.uint8(7)).save(mask)
    elif damage == "missing":
        mask.unlink()
    values = recipe_values("segmentation", data__train=source, train__global_batch=8)
    sentence = refused("finetune", saved(values), *overrides)
    assert all(fact in sentence for fact in facts), sentence


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["detection.num_classes=4"], ["detection.num_classes: got 4", "has 2"]),
        (["detection.head=htc", "detection.semantic_classes=7"], ["semantic_classes: got 7", "with 0 classes"]),
        (["boxes alone"], ["detection.masks:", "has boxes alone; set it to false"]),
        (["model.name=fd_vit_tiny_patch16", "model.img_size=32", "model.overrides={}", "detection.scales=[1.0,1.5]"],
         ["detection.scales: fd_vit_tiny_patch16 takes images of 32 px alone", "up to 1"]),
        (["model.name=fd_vit_tiny_patch16", "model.img_size=32", "model.overrides={}",
          "detection.global_attention=true"],
         ["detection.global_attention: the blocks of a plain ViT have it"]),
        (["model.name=resnet18", "model.overrides={}"], ["LayerNorm at its end", "swin_v2_* or fd_vit_*"]),
    ],
)  # fmt: skip
def test_objects(
    recipe_values: Values, saved: Saved, refused: Refused, write_objects: Callable[..., str], tmp_path: Path,
    overrides: list[str], facts: list[str],
) -> None:  # fmt: skip
    source = write_objects(tmp_path / "objects")
    values = recipe_values("detection", data__train=source, train__global_batch=8)
    if overrides == ["boxes alone"]:
        file, overrides = tmp_path / "objects/instances.json", []
        known = json.loads(file.read_text())
        bare = [each | {"segmentation": []} for each in known["annotations"]]
        file.write_text(json.dumps(known | {"annotations": bare}))
    sentence = refused("finetune", saved(values), *overrides)
    assert all(fact in sentence for fact in facts), sentence


def test_masks_are_for_segmentation(
    recipe_values: Values, saved: Saved, refused: Refused, write_shapes: Callable[..., str], tmp_path: Path
) -> None:
    sentence = refused("distill", saved(recipe_values()), f"data.train={write_shapes(tmp_path / 'shapes')}")
    assert (
        "has masks, which only task segmentation learns; name its images, imagefolder:PATH/images" in sentence
    )


def test_a_mask_that_does_not_fit_is_a_counted_skip_where_that_is_configured(
    recipe_values: Values, saved: Saved, write_shapes: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = write_shapes(tmp_path / "shapes")
    Image.new("L", (50, 50)).save(tmp_path / "shapes/masks/0.png")
    values = recipe_values("segmentation", data__train=source, train__global_batch=8, train__steps=2)
    cli.main(["finetune", saved(values), "data.max_bad_fraction=0.2"])
    said = capsys.readouterr().err
    assert "images/0.png cannot be decoded, another sample takes its place: its mask" in said
    assert "masks/0.png is 50 x 50 px" in said


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run that all tests below look at is made, by the first of them."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(
    trained_once: Path, recipe_values: Values, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """A recipe whose run folder holds two steps of training."""
    values = recipe_values(train__steps=2)
    if not trained_once.exists():
        cli.main(["distill", saved(values), f"run_dir={trained_once}"])
        capsys.readouterr()
    shutil.copytree(trained_once, values["run_dir"])
    return values


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["seed=1"], ["its checkpoints were written with seed=0, this run has 1"]),
        (
            ["seed=1", "optim.lr=1e-2"],
            ["optim.lr=0.001, this run has 0.01; with seed=0, this run has 1; restore them"],
        ),
        (
            ["model.overrides.drop_path_rate=0.1"],
            ["written with model.overrides.drop_path_rate=0.2, this run has 0.1"],
        ),
        (["data.train=digits:test"], ["written with images (data.train)="]),
        (["train.ds_config=zero1"], ["written with ZeRO stage (train.ds_config)=0, this run has 1"]),
    ],
)
def test_checkpoint_of_another_run(
    run: dict[str, Any], saved: Saved, refused: Refused, overrides: list[str], facts: list[str]
) -> None:
    recipe_file = Path(run["run_dir"]) / "recipe.yaml"
    before = recipe_file.read_text()
    sentence = refused("distill", saved(run), *overrides)
    assert all(fact in sentence for fact in [*facts, "a run_dir of its own"]), sentence
    assert recipe_file.read_text() == before, "what was refused leaves no trace"


def test_export_of_what_is_no_run(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path}: no recipe.yaml there" in refused("export", str(tmp_path), str(tmp_path / "out"))
    assert f"{tmp_path / 'no'}: no recipe.yaml" in refused(
        "export", str(tmp_path / "no"), str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_export_of_a_torn_recipe(run: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    (Path(run["run_dir"]) / "recipe.yaml").write_text("task: [dis")
    assert "recipe.yaml: not a YAML file" in refused("export", run["run_dir"], str(tmp_path / "out"))


def test_export_without_a_checkpoint(run: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    shutil.rmtree(Path(run["run_dir"]) / "checkpoints")
    sentence = refused("export", run["run_dir"], str(tmp_path / "out"))
    assert f"{run['run_dir']}: no whole checkpoint" in sentence


def test_export_to_where_nothing_can_be_written(
    run: dict[str, Any], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    sentence = refused("export", run["run_dir"], str(tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file' / 'out'}: cannot be written (Not a directory)" in sentence


def test_a_good_recipe_is_not_refused(
    run: dict[str, Any], saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe of these tests is sound: what they see refused is what they broke."""
    cli.main(["distill", saved(run), "run_dir=" + run["run_dir"] + "-again"])
    assert (Path(run["run_dir"] + "-again") / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_evaluation_of_what_cannot_be(
    run: dict[str, Any], refused: Refused, tmp_path: Path, recipe_values: Values
) -> None:
    assert "expected the folder of a run" in refused("evaluate", str(tmp_path))
    folder = str(run["run_dir"])
    assert "names no images to evaluate on" in refused("evaluate", folder)
    sentence = refused("evaluate", folder, "data.evaluation=digits:test", "--real", "real.json")
    assert "--real: labels are for a classifier" in sentence
    sentence = refused("evaluate", folder, "data.evaluation=digits:test", "model.overrides.embed_dim=16")
    assert "its model is what it was trained as" in sentence
    checkpoint = next((Path(folder) / "checkpoints").glob("step_*"))
    torn = shutil.copytree(checkpoint, tmp_path / "run/checkpoints/step_00000009")
    next(torn.glob("*.pt")).write_bytes(b"")
    assert "this checkpoint is not whole" in refused("evaluate", str(torn))


def test_a_batch_script_learns_the_sentence(
    recipe_values: Values, saved: Saved, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_ERROR_FILE", str(tmp_path / "error"))
    sentence = refused("distill", saved(recipe_values()), "train.global_bach=1")
    assert (tmp_path / "error").read_text() == sentence.removeprefix("fd-scale: ") + "\n"


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_preempted_run_says_so_by_its_exit_code(
    recipe_values: Values, saved: Saved, monkeypatch: pytest.MonkeyPatch, torchrun: bool
) -> None:
    values = recipe_values()
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    original = Trainer.agree

    def agree(self: Trainer, micro_batches: Any) -> Any:
        if self.state.step == 2:
            (Path(values["run_dir"]) / "preempt").touch()
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "agree", agree)
    if torchrun:
        cli.main(["distill", saved(values)])
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(["distill", saved(values)])
        assert ended.value.code == 75
    assert (Path(values["run_dir"]) / "preempt").exists(), "why it ended"
    assert not (Path(values["run_dir"]) / "lock").exists()
    monkeypatch.setattr(Trainer, "agree", original)
    cli.main(["distill", saved(values)])
    assert not (Path(values["run_dir"]) / "preempt").exists()
    steps = [
        json.loads(line) for line in (Path(values["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
