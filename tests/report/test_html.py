"""The page as people get it: one file, safe with any name, and shown by a real browser without errors."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.report.html import write_report

Report = tuple[Path, list[Path]]  # the page and the figures' files

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")


class Page(HTMLParser):
    """Collects tags with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(three_runs, output=tmp_path_factory.mktemp("report") / "out" / "page.html")


def test_the_page_tells_everything_and_needs_nothing(report: Report) -> None:
    output, files = report
    text = output.read_text()
    page = Page(text)
    for words in ("71.25 ± 0.50", "72.25 ± 0.50", "e8ba6cb5e662", "untrained encoder", "barlow_twins", "2.15.0"):
        assert words in page.text, words
    assert "Notes on half" in page.text and "has not finished" in page.text and "Notes on none" not in page.text
    differing = page.text.split("Settings that differ")[1].split("Recipe of")[0]
    assert "orthogonality.penalty" in differing and "training.seed" in differing and "batch_size" not in differing
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            link = attributes.get(name) or "#"
            assert link.startswith(("#", "data:")) or (tag == "a" and (output.parent / link).is_file()), (tag, link)
        assert not any(name.startswith("on") for name in attributes), attributes
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert {file.parent for file in files} == {output.parent / "figures"} and all(file.is_file() for file in files)


def test_every_picture_has_words_and_every_table_a_caption(make_run, tmp_path: Path) -> None:
    output, _ = write_report([make_run("so", seed=1)])
    page = Page(output.read_text())
    assert output.parent.name == "so" and (output.parent / "figures" / "loss.svg").is_file()
    pictures = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == 8 and all(len(a["aria-label"]) > 40 for a in pictures)
    assert all(svg["aria-hidden"] == "true" for svg in page.all("svg"))
    assert len(page.all("img")) == 1 and "one row per image" in page.all("img")[0]["alt"]
    assert len(page.all("caption")) == len(page.all("table")) and page.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a") if a["href"][0] == "#"} <= set(ids)
    assert "Settings that differ" not in page.text  # of one run


def test_one_script_runs_and_the_policy_allows_no_other(report: Report) -> None:
    text = report[0].read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def test_names_from_outside_stay_text(report: Report) -> None:
    text = report[0].read_text()
    page = Page(text)
    assert len(page.all("script")) == 1 and len(page.all("img")) == 2 and not page.all("b")
    assert text.count("<script") == 1 and "</title><script>alert(1)</script>\"'><img src=x onerror" in page.text
    assert "alert(2)>{{7*7}}" in page.text and "r<b>&amp;'\"x${-long" in page.text


def test_the_verb(make_run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    none, so = make_run("none"), make_run("so", seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(none), str(so), "--figures", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "drawn" / "spectra-compared.png").is_file()
    assert f"wrote report.html and 20 files of figures in {tmp_path / 'drawn'}\n" == capsys.readouterr().out
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").touch()
    for argv, message in (
        ([tmp_path / "photos"], "photos: is no run's folder"),
        ([none, "--output", tmp_path / "file" / "page.html"], "file"),
        ([], "RUN"),
    ):
        assert main(["report", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_without_umap_one_line_says_so_and_pca_is_drawn(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    folder = make_run("run")
    with pytest.raises(InputError, match=r"--umap: needs the package umap-learn.*hf-ssl-or\[report\]"):
        write_report([folder], umap=True)
    assert not (folder / "report.html").exists()
    assert any(file.name == "embedding-pca.png" for file in write_report([folder])[1])


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

Browse = Callable[..., tuple[str, str]]
MESSAGE = re.compile(r":CONSOLE[:(].*")  # how Chromium logs what a page writes to its console, errors included

HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const results = [];
const look = (width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    results.push(`width ${width} overflow ${root.scrollWidth - root.clientWidth}`);
    const button = page.getElementById("theme"), colors = [];
    for (let i = 0; i < 3; i++) {
      button.click();
      colors.push(frame.contentWindow.getComputedStyle(page.body).backgroundColor);
    }
    results.push(`theme ${colors[0]} ${colors[1]} ${root.dataset.theme}`);
    const table = page.querySelector("table[data-sortable]");
    const first = () => table.tBodies[0].rows[0].cells[0].textContent;
    const sorter = table.querySelectorAll("th button")[1];
    sorter.click(); const up = first(); sorter.click();
    results.push(`sorted ${up} ${first()} ${table.querySelector("[aria-sort]").getAttribute("aria-sort")}`);
    page.querySelector(".skip").focus();
    results.push(`skip ${page.activeElement.getBoundingClientRect().left >= 0}`);
    results.push(`drawn ${[...page.querySelectorAll("figure svg, figure img")].every((f) => f.clientWidth > 200)}`);
    done();
  };
  frame.src = "PAGE";
  document.body.append(frame);
});
look(360).then(() => look(1400)).then(() => { document.body.textContent = results.join(";"); });
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a file in headless Chromium and gives the page's HTML and what went to the console."""
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")

    def open_page(path: Path, *flags: str) -> tuple[str, str]:
        quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
        more = ("disable-component-update", "disable-sync", "enable-logging=stderr", "dump-dom")
        options = [f"--{name}" for name in ("headless", "no-sandbox", *quiet, *more, *flags)]
        command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, "\n".join(MESSAGE.findall(done.stderr))

    return open_page


def test_the_browser_reports_errors_of_a_page(browse: Browse, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!doctype html><script>missing()</script><p>seen")
    dom, console = browse(tmp_path / "bad.html")
    assert "seen" in dom and "missing is not defined" in console


def test_a_browser_shows_the_page_without_errors(browse: Browse, report: Report, tmp_path: Path) -> None:
    output = report[0]
    dom, console = browse(output)
    assert console == "" and '<button id="theme" type="button">' in dom  # shown by the script, which the policy allows
    (tmp_path / "harness.html").write_text(HARNESS.replace("PAGE", output.as_uri()))
    dom, console = browse(tmp_path / "harness.html", "allow-file-access-from-files", "virtual-time-budget=20000")
    for result in (
        *("width 360 overflow 0", "width 1400 overflow 0"),
        *("theme rgb(255, 255, 255) rgb(20, 23, 27) undefined", "skip true", "drawn true"),
        "sorted half r&lt;b&gt;",
    ):
        assert result in dom, dom[-600:]
    assert "descending" in dom and console == ""


def test_umap_draws_a_figure_of_its_own(make_run) -> None:
    pytest.importorskip("umap", reason="needs the extra hf-ssl-or[report]")
    page, figures = write_report([make_run("run")], umap=True)
    assert {"embedding-umap.png", "embedding-umap.svg", "embedding-pca.png"} <= {file.name for file in figures}
    assert "UMAP" in page.read_text()
