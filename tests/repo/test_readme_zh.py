"""README.md fits one screen and its links lead somewhere; README.zh.md has its code, and its figures and names."""

from __future__ import annotations

import pathlib
import re
from collections import Counter

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = ["README.md", "README.zh.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
FACT = re.compile(r"`[^`]+`|[A-Za-z]*\d+(?:[.x]\d+)*[x%]?|torch\.optim|torch_npu")


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def rows(text: str) -> list[str]:
    return [line for line in BLOCK.sub("", text).splitlines() if line.startswith("|")]


def differences(english: str, chinese: str) -> list[str]:
    """Code blocks and rows of tables that do not belong together; the table of pages is in README.md alone."""
    pairs = list(zip(BLOCK.findall(english), BLOCK.findall(chinese), strict=True))
    found = [f"README.md:\n{one}\nREADME.zh.md:\n{other}" for one, other in pairs if one != other]
    both = zip(rows(english.partition("\n## Pages")[0]), rows(chinese), strict=True)
    facts = ((one, other, Counter(FACT.findall(one)), Counter(FACT.findall(other))) for one, other in both)
    return found + [
        f"{one}\n{other}\n{(ours - theirs) | (theirs - ours)}" for one, other, ours, theirs in facts if ours != theirs
    ]


def test_the_chinese_readme_is_in_step() -> None:
    assert differences(read("README.md"), read("README.zh.md")) == []


@pytest.mark.parametrize(("old", "new"), [("6.7x", "6.8x"), ("`fused=True`", "`fused`"), ("lr=1e-3", "lr=1e-2")])
def test_a_change_of_one_of_them_is_noticed(old: str, new: str) -> None:
    text = read("README.md")
    assert old in text
    assert differences(text.replace(old, new), read("README.zh.md"))


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file: str) -> None:
    targets = [link for link in LINK.findall(BLOCK.sub("", read(file))) if "://" not in link]
    assert [link for link in targets if not (ROOT / file).parent.joinpath(link).exists()] == []


def test_the_readme_is_one_screen_and_leads_to_every_page() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    linked = set(LINK.findall("\n".join(lines)))
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} - linked == set()
