"""`fd-scale report`: the page stands alone, its pictures are pictures, and runs are compared."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from fd_scale.config import build_recipe, to_yaml
from fd_scale.errors import UserError
from fd_scale.report.run import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, values_in: Callable[..., dict[str, Any]]) -> list[Path]:
    """Two runs that differ in their learning rate."""
    folders = []
    for name, rate in (("slow", 1e-4), ("fast", 1e-3)):
        root = tmp_path_factory.mktemp(name)
        values = values_in(
            root / name,
            data__evaluation="digits:test",
            optim__lr=rate,
            log__images_every_steps=2,
            log__evaluate_every_steps=2 if name == "fast" else 0,
            train__steps=4,
        )
        (root / "recipe.yaml").write_text(to_yaml(build_recipe(values)))
        subprocess.run(
            [sys.executable, "-m", "fd_scale", "distill", str(root / "recipe.yaml")], check=True, timeout=120
        )
        folders.append(root / name)
    return folders


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([str(run) for run in runs], tmp_path_factory.mktemp("page") / "compared.html")


def test_the_page_stands_alone_and_its_pictures_can_be_read(page: Path) -> None:
    text = page.read_text()
    sources = re.findall(r"(?:src|href)='([^']*)'", text)
    assert len(sources) >= 8
    for source in sources:
        kind, data = source.removeprefix("data:image/").split(";base64,")
        decoded = base64.b64decode(data)
        if kind == "png":
            Image.open(io.BytesIO(decoded)).verify()
        else:
            assert ElementTree.fromstring(decoded).tag.endswith("svg")
    assert "<script" not in text
    for words in (
        "Pictures of slow",
        "Pictures of fast",
        "training loss",
        "evaluation: loss",
        "runs the PyTorch",
    ):
        assert words in text


def test_what_was_measured_once_is_no_curve(runs: list[Path], tmp_path: Path) -> None:
    text = report([str(runs[0])], tmp_path / "slow.html").read_text()
    assert "training loss" in text
    assert "evaluation: loss" not in text


def test_only_settings_that_differ_are_listed(page: Path) -> None:
    settings = page.read_text().split("<h2>Settings</h2>")[1].split("<h2>")[0]
    names = set(re.findall(r"<tr><td>([^<]*)</td>", settings))
    assert names == {"run_dir", "optim.lr", "log.evaluate_every_steps"}
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [run["recipe"]["optim.lr"] for run in numbers] == ["0.0001", "0.001"]
    assert all(run["final"]["step"] == 4 and run["final"]["loss"] > 0 for run in numbers)


@pytest.mark.parametrize("width_px", [420, 1280])
def test_a_browser_has_nothing_to_complain_about(page: Path, width_px: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Debian's chromium, and there is none")
    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": width_px, "height": 900})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri(), wait_until="load")
        pictures = tab.eval_on_selector_all(
            "img",
            "all => all.map(each => [each.complete && each.naturalWidth > 0, each.getBoundingClientRect().right])",
        )
        headings = tab.locator("h2").all_inner_texts()
        settings = tab.locator("tr", has_text="optim.lr").locator("td").all_inner_texts()
        overflow_px = tab.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        chromium.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert pictures
    assert all(drawn and right <= width_px for drawn, right in pictures), "each is drawn, within the screen"
    assert {"Settings", "Pictures of slow", "Pictures of fast"} <= set(headings)
    assert settings == ["optim.lr", "0.0001", "0.001"], "the runs stand side by side"
    assert overflow_px <= 0, "nobody scrolls sideways"


def test_the_folder_that_one_is_in(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs[0])
    page = report(["."], tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<h1>{runs[0].name}</h1>" in page


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml there"):
        report([str(tmp_path)], None)
    with pytest.raises(UserError, match=r"ends in \.html"):
        report([str(runs[0])], tmp_path / "page.pdf")
