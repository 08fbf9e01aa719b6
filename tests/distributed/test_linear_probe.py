"""A linear probe: features once, classifiers that do not touch each other, the same on any number of ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from fd_scale import api, run_folder
from fd_scale.config import build_recipe
from fd_scale.data import ImageAlone, evaluation_transform, open_source
from fd_scale.diagnose.run import Options, diagnose, load_backbone
from fd_scale.distributed import ALONE
from fd_scale.errors import UserError
from fd_scale.finetune.linear_probe import LinearProbeModule, doubt_of_sweep
from fd_scale.models import build_model, normalize, resolved
from fd_scale.verbs.export import export

Values = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.slow


@pytest.fixture
def values(recipe_values: Values) -> dict[str, Any]:
    return recipe_values(
        "linear_probe", data__evaluation="digits:test", optim__lr=1e-3, optim__grad_clip=0.0,
        optim__weight_decay=0.0, train__global_batch=64, train__micro_batch=32, train__steps=46,
        checkpoint__save_every_steps=23, log__evaluate_every_steps=23,
    )  # fmt: skip


def evaluations(values: dict[str, Any]) -> list[dict[str, Any]]:
    return cases.read_metrics(Path(values["run_dir"]), "evaluation")


def test_ranks_and_a_resume_change_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for name, ranks, stage in (("one", 1, 0), ("two", 2, 3), ("resumed", 2, 3)):
        run = values | {
            "run_dir": str(tmp_path / name),
            "train": values["train"] | {"ds_config": f"zero{stage}"},
        }
        if name == "resumed":
            run_ranks(cases.train_until_preempted, ranks, run, 30)
        run_ranks(cases.train, ranks, run)
        found[name] = evaluations(run)[-1]
        curve = cases.curve(run["run_dir"])
        assert len(curve) == 46
        found[name]["curve"] = curve
    assert found["resumed"]["curve"] == found["two"]["curve"]
    for key in ("top1", "loss", "learning_rate"):
        assert found["one"][key] == pytest.approx(found["two"][key], rel=1e-3), key
    np.testing.assert_allclose(found["one"]["curve"], found["two"]["curve"], rtol=1e-3)
    assert found["one"]["top1"] > 0.3


def test_features_are_the_backbones_and_computed_once(values: dict[str, Any]) -> None:
    run_ranks(cases.train_until_preempted, 2, values, 2)
    folder = Path(values["run_dir"]) / "features"
    features = np.load(folder / "evaluation/features.npy")
    recipe = resolved(build_recipe(values))
    source, transform = open_source("digits:test"), ImageAlone(evaluation_transform(recipe.model.size))
    torch.manual_seed(0)
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}
    run_ranks(cases.train, 2, values)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")} == stamps
    assert len(stamps) == 2
    # Without a file, or for another model, they are computed again.
    (folder / "train/features.npy").unlink()
    run_ranks(cases.train, 2, values)
    assert (folder / "train/features.npy").stat().st_mtime_ns > stamps[folder / "train/features.npy"]
    # Another way to the same features: whole batches, one process.
    backbone = run_ranks(cases.initial_backbone, 1, values)[0]
    model = build_model(recipe.model)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in backbone.items()})
    images = torch.stack([transform(*source.read(index))[0] for index in range(64)])
    with torch.no_grad():
        expected = model.eval()(normalize(images, model.mean, model.std)).mean(1)
    np.testing.assert_allclose(features[:64], expected, atol=1e-5)


def test_comes_near_logistic_regression(values: dict[str, Any]) -> None:
    """scikit-learn's, on the same features: the classifier of the best learning rate is as good within 5%."""
    values["train"]["steps"] = 460
    values["linear_probe"] |= {"lr_factors": [0.1, 10.0, 30.0, 100.0], "knn_images": 500}
    values["log"]["evaluate_every_steps"] = 0
    values["checkpoint"]["save_every_steps"] = 460
    values["log"]["every_steps"] = 100
    run_ranks(cases.train, 1, values)
    folder = Path(values["run_dir"]) / "features"
    (x, y), (x_test, y_test) = (
        (np.load(folder / f"{part}/features.npy"), open_source(f"digits:{name}").all_labels())
        for part, name in (("train", "train"), ("evaluation", "test"))
    )
    mean, std = x.mean(0), x.std(0)
    judge = LogisticRegression(max_iter=2000).fit((x - mean) / std, y)
    expected = judge.score((x_test - mean) / std, y_test)
    [found] = evaluations(values)
    assert expected > 0.6
    assert found["top1"] > expected - 0.05, expected
    assert found["learning_rate"] > 1e-4
    spread_N = np.arange(500) * len(x) // 500
    neighbours = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(x[spread_N], y[spread_N])
    # One image in 300 may have two neighbours that are equally far in fp32.
    assert found["knn_top1"] == pytest.approx(neighbours.score(x_test, y_test), abs=1 / 300)
    with pytest.raises(UserError, match="hold no backbone"):
        export(values["run_dir"], folder.parent / "export")
    with pytest.raises(
        UserError, match=r"of a linear probe, whose checkpoints hold no backbone.*model\.weights"
    ):
        diagnose([values["run_dir"]], None, Options(num_images=4))


def test_features_of_other_weights_are_not_taken(values: dict[str, Any]) -> None:
    """Without given weights the seed decides them. There is no checkpoint yet that would refuse another seed."""
    values["checkpoint"]["save_every_steps"] = 1000
    values["train"]["steps"] = 2
    run_ranks(cases.train, 1, values)
    folder = Path(values["run_dir"])
    features = np.load(folder / "features/train/features.npy")
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    run_ranks(cases.train, 1, values | {"seed": 5})
    assert np.abs(np.load(folder / "features/train/features.npy") - features).max() > 0.1


def test_diagnose_takes_the_backbone_from_the_weights(values: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = build_model(resolved(build_recipe(values)).model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    values["model"]["weights"] = str(tmp_path / "weights.pth")
    folder = run_folder.create(build_recipe(values), open_source("digits:train"))
    found = load_backbone(str(folder), None).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_other_classes_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    for label in range(4):
        (tmp_path / f"data/class{label}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/class{label}/x.png")
    values["data"]["evaluation"] = f"imagefolder:{tmp_path / 'data'}"
    [error] = run_ranks(cases.train_or_error, 1, values)
    assert "4 classes" in error
    assert not (Path(values["run_dir"]) / "features").exists()


def test_the_loss_is_the_mean_of_the_heads_and_each_learns_alone() -> None:
    torch.manual_seed(0)
    module, x_BD, labels_B = LinearProbeModule(6, 4, 3), torch.randn(5, 6), torch.tensor([0, 3, -1, 2, 1])
    loss = module(x_BD, labels_B)["loss"]
    loss.backward()
    alone = []
    for head in module.heads:
        weight = head.weight.detach().clone().requires_grad_()
        alone.append(
            F.cross_entropy(x_BD[labels_B >= 0] @ weight.T, labels_B[labels_B >= 0], reduction="sum")
        )
        alone[-1].backward()
        torch.testing.assert_close(head.weight.grad, weight.grad)
    assert loss.item() == pytest.approx(sum(each.item() for each in alone) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        ([0.1, 0.5, 0.6, 0.7], "the largest learning rate of the sweep, 0.3, is the best"),
        ([0.8, 0.5, 0.6, 0.7], "the smallest learning rate of the sweep, 0.01, is the best"),
        ([0.1, 0.5, 0.7, 0.7], ""),
        ([0.7, 0.7, 0.1, 0.1], ""),
        ([0.1, 0.7, 0.7, 0.2], ""),
    ],
)
def test_the_best_at_an_end_of_the_sweep(top1: list[float], words: str) -> None:
    found = doubt_of_sweep([0.01, 0.03, 0.1, 0.3], top1)
    assert words in found
    assert bool(found) == bool(words)
    assert doubt_of_sweep([0.3, 0.1, 0.03, 0.01], top1[::-1]) == found
    assert doubt_of_sweep([0.3], top1[:1]) == ""


def test_an_evaluation_warns_of_the_end(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    recipe = build_recipe(values)
    task: Any = api.build_task(recipe, open_source("digits:train"))
    folder = Path(values["run_dir"]) / "features/evaluation"
    folder.mkdir(parents=True)
    np.save(folder / "features.npy", np.zeros((len(open_source("digits:test")), 1), np.float32))
    best = 1

    def forward(features_BD: torch.Tensor, labels_B: torch.Tensor) -> dict[str, torch.Tensor]:
        logits_RBK = torch.randn(3, len(labels_B), 10, generator=torch.Generator().manual_seed(0))
        logits_RBK[best] = F.one_hot(labels_B, 10).float()
        return {"logits": logits_RBK}

    assert task.evaluate(forward, ALONE)["learning_rate"] == recipe.optim.lr
    assert "lr_factors" not in caplog.text
    best = 2
    assert task.evaluate(forward, ALONE)["top1"] == 1.0
    assert "linear_probe.lr_factors: the largest learning rate" in caplog.text
    assert "optim.lr" in caplog.text
