"""README, CONTRIBUTING and docs say what is so: their code runs, their names and links exist."""

import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest

from lightning_bd import backbones
from lightning_bd.config_files import read_config, shipped_configs

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    _, _, section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    lines = section.partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(rows) > 2, f"there is no table below {heading}"
    return rows[2:]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_the_drop_in_example_runs_and_keeps_the_old_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.splitlines()) < 40
    assert set(re.findall(r"from (lightning_bd\S*)", example)) == {"lightning_bd.callbacks"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    accuracy = {name: float(value) for name, value in re.findall(r"(\w+) task: (\d\.\d+)", printed.getvalue())}
    # Without EWC the old task falls to 0.78.
    assert accuracy["old"] > 0.84
    assert accuracy["new"] > 0.94


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=lambda page: page.name)
def test_the_sessions_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    report = io.StringIO()
    failures, tried = doctest.DocTestRunner().run(test, out=report.write)
    assert tried > 0
    assert failures == 0, report.getvalue()


def test_the_methods_of_the_table_exist() -> None:
    rows = table(ROOT / "README.md", "Methods")
    assert len(rows) >= 7
    for name, paper, file, config in rows:
        (source,) = re.findall(r"\((.+?)\)", file)
        (method,) = re.findall(r"^`(\w+)`", name)
        module = source.removesuffix(".py").replace("/", ".")
        module = module if module.startswith("lightning_bd") else f"lightning_bd.{module}"
        assert hasattr(importlib.import_module(module), method)
        assert hasattr(importlib.import_module(module.rpartition(".")[0]), method), f"{method} is not exported"
        assert re.search(r"https://(arxiv\.org/abs/|openreview\.net/|doi\.org/)", paper), paper
        for used in re.findall(r"`(\w+)`", config):
            assert f".{method}" in shipped_configs()[used].read_text(), f"{used} does not use {method}"


def test_the_configs_of_the_table_are_the_shipped_ones() -> None:
    rows = table(ROOT / "README.md", "Configs")
    assert [row[0].strip("`") for row in rows] == sorted(shipped_configs())


def test_the_backbones_of_the_table_are_those_of_the_package() -> None:
    listed = dict(re.findall(r"`(\w+)` \| ([\d,]+)", (ROOT / "README.md").read_text()))
    assert set(listed) == set(backbones.__all__)
    for name, parameters in listed.items():
        model = getattr(backbones, name)(num_classes=10)
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", "")), name


def test_the_anatomy_is_a_config(tmp_path: Path) -> None:
    (anatomy,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "anatomy.yaml").write_text(anatomy)
    assert set(read_config(tmp_path / "anatomy.yaml")) == {"seed_everything", "model", "data", "trainer"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing, f"{page.name} links to what is not there: {missing}"
