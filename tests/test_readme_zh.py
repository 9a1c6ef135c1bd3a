"""README.zh.md is in step with README.md: the same code, tables, numbers, names and links at the same places."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import Counter

import pytest

from tests.translation import Piece, differences, facts, has_words, sections

ROOT = pathlib.Path(__file__).parent.parent
LANGUAGES = {"README.md": "English | [简体中文](README.zh.md)", "README.zh.md": "[English](README.md) | 简体中文"}
DIGIT = re.compile(r"\d")
OTHER_DIGITS = str.maketrans("0123456789", "1234567890")
WHAT_TO_DO = """README.zh.md is not in step with README.md. Change README.zh.md at each of the lines below: translate
the words; code blocks, `code`, numbers, ticks, names and links stay exactly as README.md has them."""


def read(file: str) -> list[list[Piece]]:
    """The sections of one of the two files; its line of languages, which names the other file, is left out."""
    text = (ROOT / file).read_text(encoding="utf-8")
    line = LANGUAGES[file]
    assert text.splitlines()[2] == line, f"{file}: line 3 leads to the other language: {line}"
    return sections(text.replace(line, "", 1), file)


@pytest.fixture(scope="module")
def translation() -> list[list[Piece]]:
    return read("README.zh.md")


def test_the_chinese_readme_is_in_step(translation: list[list[Piece]]) -> None:
    found = differences(read("README.md"), translation)
    if found:
        pytest.fail("\n- ".join([WHAT_TO_DO, *found]), pytrace=False)


def places(piece: Piece) -> list[str]:
    """The places that messages name if all numbers change: of a table, one for each cell; of code, the first line."""
    if piece.kind == "table":
        return [row.place for row in piece.rows for cell in row.cells if DIGIT.search(cell)]
    lines = piece.text.splitlines()
    numbered = [i for i, line in enumerate(lines) if DIGIT.search(line)]
    first = numbered[0] if numbered and piece.kind == "code block" else 0
    return [f"{piece.file}:{piece.line + first}"] if numbered else []


def test_every_number_is_held(translation: list[list[Piece]]) -> None:
    """Whatever number of README.md somebody changes, a message names its line."""
    original = read("README.md")
    changed = [[dataclasses.replace(p, text=p.text.translate(OTHER_DIGITS)) for p in s] for s in original]
    expected = Counter(place for section in original for piece in section for place in places(piece))
    found = Counter(re.findall(r"README\.md:\d+", "\n".join(differences(changed, translation))))
    assert found == expected
    assert expected.total() > 100


ORIGINAL = """# Tool

Intro with `code`, see [the page](docs/page.md): 3 steps in 0.5 s.

## Measured

| name | ours, ms | as fast |
|---|---|---|
| Adam, fused | 9.96 | **4.7x** |
| NpuFusedSGD | 8 (foreach) | ✓ |

```python
x = 1  # a comment
```

- first
- second: `b`
  goes on

After 20% it ends.
"""
TRANSLATION = """# 工具

介绍 `code`，0.5 s 内完成 3 步，见[页面](docs/page.md)。

## 实测

<!-- for editors: 2 remarks -->
| 名称 | 我们的，ms | 速度比 |
|---|---|---|
| Adam，融合 | 9.96 | **4.7x** |
| NpuFusedSGD | 8（foreach） | ✓ |

```python
x = 1  # a comment
```

- 第一
- 第二：`b`，还有

20% 之后结束。
"""


TABLE = "section 'Measured' ('实测'), table 1"
PLANTED = {
    "code span": ("`code`", "`core`", ["section 'Tool'", "paragraph 1", "a.md:3: code `code`", "b.md:3: code `core`"]),
    "code span left out": ("`code`", "代码", ["a.md:3: code `code`", "b.md:3: nothing"]),
    "number in a text": ("3 步", "4 步", ["only at a.md:3: number 3;", "only at b.md:3: number 4"]),
    "unit": ("20%", "20", ["paragraph 1", "number 20%", "b.md:20: number 20"]),
    "link": ("docs/page.md", "docs/seite.md", ["docs/page.md", "docs/seite.md"]),
    "figure": ("9.96", "9.69", [f"{TABLE}, row 1 (Adam, fused), column 'ours, ms': '9.96' at a.md:9", "b.md:10"]),
    "ratio": ("4.7x", "4.7", ["column 'as fast'", "'**4.7x**' at a.md:9"]),
    "bold": ("**4.7x**", "4.7x", ["'4.7x' at b.md:10"]),
    "tick": ("✓", "✗", ["row 2 (NpuFusedSGD)", "'✗' at b.md:11"]),
    "name": ("NpuFusedSGD |", "NpuFusedAdam |", ["row 2", "column 'name'", "'NpuFusedAdam' at b.md:11"]),
    "figure beside words": ("8（foreach", "9（foreach", ["row 2", "a.md:10: number 8", "b.md:11: number 9"]),
    "row left out": ("| Adam，融合 | 9.96 | **4.7x** |\n", "", ["2 and 1 rows", "Adam, fused at a.md:9", "b.md:10"]),
    "row too many": ("| NpuFusedSGD", "| Lamb | 1 | 2x |\n| NpuFusedSGD", [TABLE, "2 and 3 rows", "b.md:11"]),
    "cell left out": ("9.96 | ", "", [f"{TABLE}, row 1", "3 cells at a.md:9, 2 at b.md:10"]),
    "head": ("| 速度比 |", "| 速度比 2 |", [f"{TABLE}, head", "number 2"]),
    "code block": ("# a comment", "# 注释", ["code block 1", "a.md:13 and b.md:14", "copy the block"]),
    "code block left out": (TRANSLATION[TRANSLATION.index("```") :][:38], "", ["1 and 0 code blocks", "a.md:12"]),
    "list item left out": ("- 第一\n", "", ["2 and 1 list items", "a.md:17", "b.md:19"]),
    "paragraph left out": ("\n20% 之后结束。\n", "", ["1 and 0 paragraphs", "After 20%", "nothing more"]),
    "level of a heading": ("## 实测", "### 实测", ["'Measured' of level 2 at a.md:5", "level 3 at b.md:5"]),
    "heading left out": ("## 实测\n", "", ["headings: ", "'Measured'", "none in the translation"]),
}


def compared(translation: str) -> list[str]:
    return differences(sections(ORIGINAL, "a.md"), sections(translation, "b.md"))


def test_a_translation_in_step_has_no_differences() -> None:
    assert compared(TRANSLATION) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_named(planted: str) -> None:
    old, new, said = PLANTED[planted]
    assert TRANSLATION.count(old) == 1
    found = "\n".join(compared(TRANSLATION.replace(old, new)))
    assert [words for words in said if words not in found] == [], found


def test_what_a_translation_keeps() -> None:
    kept = facts("`a` **CPUs** 1,797 at 9.2e-7, 2048x2048 in 0.5 s ([x](y)), NpuFusedAdam and NpuFusedAdam")
    numbers = ["1,797", "9.2e-7", "2048", "2048", "0.5 s"]
    assert sorted(kept.elements()) == sorted(
        [("code", "`a`"), ("bold", "**"), ("bold", "**"), ("name", "CPU"), ("name", "NpuFusedAdam"), ("link", "](y)")]
        + [("number", n) for n in numbers]
    )


@pytest.mark.parametrize("cell", ["2 / 2, 28", "–", "**0.94x**", "`a`, `b`", "0.5 s", "NpuFusedSGD", "torch_npu.optim"])
def test_cells_without_words_are_copied(cell: str) -> None:
    assert not has_words(cell)


@pytest.mark.parametrize("cell", ["44 (fused)", "是", "`a` and `b`"])
def test_cells_with_words_are_translated(cell: str) -> None:
    assert has_words(cell)
