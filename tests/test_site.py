"""The documentation's site, as far as it shows without building it (``make docs``, in CI)."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from pwm_fast import ops
from tests.test_docs_paths import ROOT

DOCS = ROOT / "docs"


def test_the_reference_has_every_operation() -> None:
    text = (DOCS / "reference" / "ops.rst").read_text("utf-8")
    named = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)", text, re.MULTILINE)
    assert sorted(named) == sorted(ops.__all__)


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/conf.py, without the address of a repository."""
    for package in ("sphinx", "docutils", "pygments"):
        pytest.importorskip(package)
    from importlib.util import module_from_spec, spec_from_file_location

    monkeypatch.delenv("DOCS_REPOSITORY", raising=False)
    spec = spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("written", "shown", "link", "expected"),
    [
        ("docs/ops.md", "ops.md", "[x](performance.md#mish)", "[x](performance.md#mish)"),
        ("docs/ops.md", "ops.md", "[x](#glossary)", "[x](#glossary)"),
        ("docs/ops.md", "ops.md", "[x](https://a.org/b.md)", "[x](https://a.org/b.md)"),
        ("docs/ops.md", "ops.md", "[x](../README.md#speed)", "[x](index.md)"),
        ("docs/guides/a.md", "guides/a.md", "[x](../../CHANGELOG.md)", "[x](../changelog.md)"),
        (
            "docs/guides/a.md",
            "guides/a.md",
            "[x](../../CONTRIBUTING.md#a)",
            "[x](../contributing.md#a)",
        ),
        ("CONTRIBUTING.md", "contributing.md", "[x](docs/ops.md#rules)", "[x](ops.md#rules)"),
        ("CONTRIBUTING.md", "contributing.md", "[x](setup.py)", "[x](../setup.py)"),
        ("docs/ops.md", "ops.md", "[`kernels/`](../kernels)", "`kernels/`"),
    ],
)
def test_links_lead_to_their_place_in_the_site(
    conf: ModuleType, written: str, shown: str, link: str, expected: str
) -> None:
    assert conf._relinked(link, ROOT / written, DOCS / shown) == expected


def test_links_out_of_the_pages_lead_to_the_repository(
    conf: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conf, "REPOSITORY", "https://example.org/blob/main")
    page = DOCS / "ops.md"
    for link, expected in (
        ("[x](../kernels/plan.py)", "[x](https://example.org/blob/main/kernels/plan.py)"),
        ("[x](../kernels)", "[x](https://example.org/blob/main/kernels)"),
        ("[x](../README.md)", "[x](index.md)"),
    ):
        assert conf._relinked(link, page, page) == expected


def test_every_page_is_in_one_list_of_the_navigation(conf: ModuleType) -> None:
    listed: list[Path] = []
    for group in conf.GROUPS:
        page = DOCS / f"{group}.md"
        listed += [
            (page.parent / item).resolve() for item in conf._ITEM.findall(page.read_text("utf-8"))
        ]
    pages = [p.with_suffix("") for p in DOCS.rglob("*") if p.suffix in (".md", ".rst")]
    twice = {path for path in listed if listed.count(path) > 1}
    assert {DOCS / "index", *listed} == set(pages)
    assert twice == {DOCS / "guides" / "quickstart"}  # in the header, too


def test_the_chinese_pages_name_their_language(conf: ModuleType) -> None:
    for page, language in (("zh-TW/clusters", "zh-TW"), ("clusters", "en")):
        context = {"language": "en"}
        conf.localize(None, page, "page.html", context, None)
        assert context == {"language": language}
