"""The page of a run: complete, right, and loading nothing."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import cli
from fastcl.trainer import TrainError, plots, table, write_page
from fastcl.trainer.checkpoint import load_checkpoint, save_checkpoint
from fastcl.trainer.page import nearest_of_each_class

PICTURES = {
    "training loss against step",
    "probes against step",
    "images and their nearest neighbours",
    "map of features",
}
VOID = {"img", "meta"}


class Parsed(HTMLParser):
    """Tags that are closed in order, their attributes, and the text of cells and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def page(short_run: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(short_run[0], folder)
    return write_page(folder)


def test_the_page_parses_and_holds_the_run(page: Path, short_run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = short_run
    parsed = Parsed(page.read_text(encoding="utf-8"))
    assert not parsed.open
    assert parsed.text["h2"] == ["Probes", "Curves", "Nearest neighbours", "Features", "Settings"]
    assert "".join(parsed.text["pre"]) == table(result)
    cells = parsed.text["td"]
    config = load_checkpoint(folder / "checkpoint.pt")["config"]
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == {
        name: str(value) for name, value in (config | result["versions"]).items()
    }


def test_its_pictures_are_inside_and_whole(page: Path) -> None:
    parsed = Parsed(page.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in parsed.attributes if tag == "img"]
    assert {image["alt"] for image in images} == PICTURES
    for image in images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB\x60\x82") and len(png) > 5000


def test_it_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Parsed(text)
    links = [a[key] for _, a in parsed.attributes for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert len(links) == 4 and all(str(link).startswith("data:") for link in links)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.attributes}
    without_pictures = re.sub(r'src="data:[^"]*"', "", text)
    assert "://" not in without_pictures and "url(" not in without_pictures and "@import" not in without_pictures


def test_names_are_escaped(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder)
    state, hostile = load_checkpoint(folder / "checkpoint.pt"), "<script>alert('&')</script>"
    save_checkpoint(folder / "checkpoint.pt", state | {"config": state["config"] | {"output": hostile}})
    text = write_page(folder).read_text(encoding="utf-8")
    assert hostile not in text and html.escape(hostile) in text
    assert hostile in Parsed(text).text["td"]


def test_neighbours_are_the_nearest_others() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    found = nearest_of_each_class(features, labels)
    z = torch.nn.functional.normalize(features.double())
    cosine = (z @ z.T).fill_diagonal_(-2)
    assert found.tolist() == [[q, *cosine[q].argsort(descending=True)[:7].tolist()] for q in range(3)]


def test_a_neighbour_of_another_class_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    said: list[tuple[str, str]] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, fontsize, color: said.append((text, color)))
    images, labels = torch.rand(2, 3, 1, 8, 8), torch.tensor([[0, 0, 1], [1, 0, 1]])
    plots.plot_neighbours(tmp_path / "neighbours.png", images, labels, ["cat", "dog"])
    assert said == [
        ("cat", "black"),
        ("cat", "green"),
        ("dog", "red"),
        ("dog", "black"),
        ("cat", "red"),
        ("dog", "green"),
    ]
    plots.plot_neighbours(tmp_path / "colour.png", torch.rand(1, 2, 3, 8, 8), labels[:1, :2], ["cat", "dog"])
    assert (tmp_path / "colour.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_has_no_page(page: Path, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path / "run", ignore=shutil.ignore_patterns("result.json", "report.html"))
    with pytest.raises(TrainError, match=r"interrupted run; .* fastcl train --resume"):
        write_page(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(TrainError, match=r"no checkpoint\.pt"):
        write_page(tmp_path)


def test_the_command_names_the_file(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_bytes()
    assert cli.main(["report", str(page.parent)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_bytes() == before  # the same run has the same page


def test_a_browser_shows_it(page: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(names)}")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "Nearest neighbours" in shown and shown.count("data:image/png") == 4
