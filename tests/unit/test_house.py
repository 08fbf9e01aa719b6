"""The rules of the house: who imports whom, and one place that steps an optimizer."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"fd_scale": ROOT / "fd_scale", "fd_kernels": ROOT / "kernels" / "fd_kernels"}
FILES = sorted(path for root in PACKAGES.values() for path in root.rglob("*.py"))

LIGHT = {
    "fd_scale.errors",
    *(
        f"fd_scale.config{part}"
        for part in ("", ".checks", ".reading", ".recipe", ".sections", ".shape", ".tasks")
    ),
    "fd_scale.hardware",
    "fd_scale.lock",
    "fd_scale.cluster",
    "fd_scale.cluster.job",
    "fd_scale.cluster.pinned",
    "fd_scale.cluster.submit",
    "fd_scale",
}  # read on a login node, in milliseconds


def module_name(path: Path) -> str:
    root = PACKAGES["fd_kernels"].parent if "fd_kernels" in path.parts else ROOT
    name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; `from x import y` counts as x and as x.y."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "fd_scale" and len(parts) > 1 else parts[0]


# room -> rooms (or packages) that it must not import
FORBIDDEN = {
    "teachers": {"distill", "finetune", "pretrain", "trainer", "api", "verbs"},
    "models": {"distill", "finetune", "pretrain", "teachers", "trainer", "engine", "api", "verbs"},
    "data": {"models", "distill", "finetune", "pretrain", "teachers", "trainer", "engine", "api", "verbs"},
    "finetune": {"distill", "teachers", "pretrain", "trainer", "engine", "api", "verbs"},
    "distill": {"finetune", "pretrain", "trainer", "engine", "api", "verbs"},
    "pretrain": {"finetune", "distill", "teachers", "trainer", "engine", "api", "verbs"},
    "evaluation": {
        "finetune",
        "distill",
        "teachers",
        "pretrain",
        "trainer",
        "engine",
        "api",
        "models",
        "verbs",
    },
    "trainer": {"finetune", "distill", "teachers", "pretrain", "models", "api", "verbs"},
    "plan": {"engine", "api", "verbs"},
    "cluster": {"finetune", "distill", "pretrain", "teachers", "trainer", "engine", "api"},
    "engine": {"finetune", "distill", "pretrain", "teachers", "trainer", "api", "verbs"},
    "report": {"finetune", "distill", "pretrain", "teachers", "trainer", "engine", "api", "verbs"},
}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_import_arrows(path: Path) -> None:
    module, found = module_name(path), imports(path)
    packages = {name.split(".")[0] for name in found}
    if module.startswith("fd_kernels"):
        plot = {"matplotlib"} if module == "fd_kernels.benchmarks.report" else set()
        assert packages - sys.stdlib_module_names <= {"torch", "triton", "fd_kernels"} | plot
    if module in LIGHT:
        assert not packages & {"torch", "deepspeed", "timm", "torchvision", "fd_kernels"}
    if "deepspeed" in packages:
        assert room(module) == "engine"
    if "fd_kernels" in packages and not module.startswith("fd_kernels"):
        rooms = {"models", "distill", "plan", "diagnose"}
        assert room(module) in rooms or room(module) == "cli"  # `bench kernels`
    if any(room(name) == "plan" for name in found):
        assert room(module) in {"plan", "api", "cli", "verbs", "benchmarks", "cluster"}
    wrong = {
        name
        for name in found
        if name.startswith("fd_scale.") and room(name) in FORBIDDEN.get(room(module), set())
    }
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_every_room_with_rules_exists() -> None:
    assert set(FORBIDDEN) <= {room(module_name(path)) for path in FILES}


def test_one_optimizer_step_in_the_package() -> None:
    """One loop: the engine alone steps an optimizer, and the trainer alone calls the engine's step."""
    calls = [
        f"{module_name(path)}: {ast.unparse(node)}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
    ]
    inside = "fd_scale.optim: super().step(closure)"  # AdamW's own arithmetic, below the engine
    # The bare loops that ours is measured against.
    bare = {
        "fd_scale.benchmarks.step: optimizer.step()",
        "fd_scale.benchmarks.finetune: self.optimizer.step()",
    }
    assert sorted(set(calls) - {inside} - bare) == [
        "fd_scale.engine.engine: self.deepspeed.step()",
        "fd_scale.trainer: self.engine.step()",
    ]


def test_no_module_hides_another() -> None:
    installed = {"kernels", "datasets", "evaluate", "timm", "torch", "deepspeed"}
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's kernels package"
    for path in FILES:
        top = (
            path.relative_to(PACKAGES["fd_scale"].parent).parts[0]
            if "fd_scale" in path.parts
            else "fd_kernels"
        )
        assert top not in sys.stdlib_module_names | installed


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_takes_over_matplotlib(path: Path) -> None:
    """Its pyplot keeps one backend and one list of figures for the whole process, which is its user's."""
    assert "matplotlib.pyplot" not in imports(path)
    assert "matplotlib.use(" not in path.read_text()
