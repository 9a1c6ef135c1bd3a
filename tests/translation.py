"""Where the translation of a Markdown file is not in step with the original.

Both are cut into sections, and these into pieces: paragraphs, list items, code blocks and tables. Pieces that stand at
the same place must hold the same facts: code spans, link targets, numbers with units, ticks, bold marks, names like
NpuFusedAdam. The words between them are the translator's: nothing here can tell whether they say the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

# What a line begins. A line that begins nothing continues the paragraph or list item before it, or is a paragraph.
STARTS = {
    "code block": re.compile(r" *```"),
    "heading": re.compile(r"#{1,6} "),
    "table": re.compile(r"\|"),
    "list item": re.compile(r" *(?:[-*+]|\d+\.) "),
    "comment": re.compile(r"<!--.*-->$"),  # for the scripts or editors of one of the files: not compared
    "blank line": re.compile(r"\s*$"),
}
# What a translation keeps. Each is cut out before the next one is looked for: a number in a code span is not a number.
FACTS = {
    "code": re.compile(r"`[^`]+`"),
    "link": re.compile(r"\]\([^)]*\)"),
    "number": re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?(?:\s?(?:%|x|s|ms|µs|ns|GB/s)(?![A-Za-z0-9]))?"),
    "tick": re.compile(r"[✓✔✗✘×]"),
    "bold": re.compile(r"\*\*"),
    "name": re.compile(r"[A-Za-z_][\w.]*[A-Z_]\w*(?:\.\w+)*", re.ASCII),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Lines that belong together; `line` is the number of the first."""

    file: str
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def title(self) -> str:
        """How it begins."""
        begin = self.text.splitlines()[0].lstrip("# ")
        return f"'{begin[:40]}…'" if len(begin) > 40 else f"'{begin}'"

    @property
    def level(self) -> int:
        """Of a heading."""
        return len(self.text) - len(self.text.lstrip("#"))

    @property
    def rows(self) -> list[Piece]:
        """Of a table, without the line under its head."""
        lines = [Piece(self.file, self.line + i, "row", line) for i, line in enumerate(self.text.splitlines())]
        return lines[:1] + lines[2:]

    @property
    def cells(self) -> list[str]:
        """Of a row."""
        return [cell.strip() for cell in self.text.strip().strip("|").split("|")]


def pieces(text: str, file: str) -> Iterator[Piece]:
    """The pieces of a Markdown text, in order."""
    lines = text.splitlines()
    kinds = [_kind(line) for line in lines]
    begin = 0
    while begin < len(lines):
        kind, end = kinds[begin], begin + 1
        if kind == "code block":
            end += next((i for i, line in enumerate(lines[end:], 1) if line.strip() == "```"), len(lines))
        else:
            continued = {"table": "table", "paragraph": "paragraph", "list item": "paragraph"}.get(kind)
            while end < len(lines) and kinds[end] == continued:
                end += 1
        if kind not in ("blank line", "comment"):
            yield Piece(file, begin + 1, kind, "\n".join(lines[begin:end]))
        begin = end


def _kind(line: str) -> str:
    return next((kind for kind, start in STARTS.items() if start.match(line)), "paragraph")


def sections(text: str, file: str) -> list[list[Piece]]:
    """The sections of a Markdown text that begins with a heading: each heading, then what stands under it."""
    found: list[list[Piece]] = []
    for piece in pieces(text, file):
        if piece.kind == "heading":
            found.append([])
        found[-1].append(piece)
    return found


def facts(text: str) -> Counter[tuple[str, str]]:
    """What a translation of this text keeps, as pairs of kind and fact, and how often."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, pattern in FACTS.items():
        here = [" ".join(fact.split()) for fact in pattern.findall(text)]
        if kind == "name":  # one language says "NPUs" or "it" where the other repeats the name
            here = list({name.removesuffix("s") for name in here})
        found.update((kind, fact) for fact in here)
        text = pattern.sub(" ", text)
    return found


def has_words(text: str) -> bool:
    """Whether there is anything to translate: a letter outside of all facts."""
    for pattern in FACTS.values():
        text = pattern.sub(" ", text)
    return any(character.isalpha() for character in text)


def differences(ours: Sequence[Sequence[Piece]], theirs: Sequence[Sequence[Piece]]) -> list[str]:
    """Every place where two lists of sections, original and translation, are not in step; empty if there is none."""
    for a, b in itertools.zip_longest(ours, theirs):
        if a is None or b is None or a[0].level != b[0].level:
            here, there = (f"{s[0].title} of level {s[0].level} at {s[0].place}" if s else "none" for s in (a, b))
            return [f"headings: {here} in the original, {there} in the translation; nothing after it was compared"]
    return [found for a, b in zip(ours, theirs, strict=True) for found in _section(a, b)]


def _section(ours: Sequence[Piece], theirs: Sequence[Piece]) -> Iterator[str]:
    where = f"section {ours[0].title} ({theirs[0].title})"
    seen: Counter[str] = Counter()
    for a, b in itertools.zip_longest(ours, theirs):
        if a is None or b is None or a.kind != b.kind:
            here, there = (f"{p.kind} {p.title} at {p.place}" if p else "nothing more" for p in (a, b))
            yield f"{where}: {_counts(ours, theirs)}; they part at {here} in the original, {there} in the translation"
            return  # what follows has no counterpart
        seen[a.kind] += 1
        compare = {"code block": _code, "table": _table}.get(a.kind, _same_facts)
        yield from compare(f"{where}, {a.kind} {seen[a.kind]}", a, b)


def _counts(ours: Sequence[Piece], theirs: Sequence[Piece]) -> str:
    here, there = (Counter(piece.kind for piece in section) for section in (ours, theirs))
    unlike = [f"{here[kind]} and {there[kind]} {kind}s" for kind in sorted(here | there) if here[kind] != there[kind]]
    return ", ".join(unlike) or "the same pieces in another order"


def _code(where: str, ours: Piece, theirs: Piece) -> Iterator[str]:
    lines = itertools.zip_longest(ours.text.splitlines(), theirs.text.splitlines())
    for offset, (a, b) in enumerate(lines):
        if a != b:
            at = f"{ours.file}:{ours.line + offset} and {theirs.file}:{theirs.line + offset}"
            yield f"{where}: {at} are {a!r} and {b!r}: copy the block as it is, comments included"
            return


def _table(where: str, ours: Piece, theirs: Piece) -> Iterator[str]:
    if len(ours.rows) != len(theirs.rows):
        pairs = itertools.zip_longest(ours.rows, theirs.rows)
        a, b = next((a, b) for a, b in pairs if a is None or b is None or any(_row("", a, b, ours.rows[0])))
        here, there = (f"{p.cells[0]} at {p.place}" if p else "nothing more" for p in (a, b))
        counts = f"{len(ours.rows) - 1} and {len(theirs.rows) - 1} rows"
        yield f"{where}: {counts}; they part at {here} in the original, {there} in the translation"
        return
    for number, (a, b) in enumerate(zip(ours.rows, theirs.rows, strict=True)):
        yield from _row(f"{where}, {f'row {number} ({a.cells[0]})' if number else 'head'}", a, b, ours.rows[0])


def _row(where: str, ours: Piece, theirs: Piece, head: Piece) -> Iterator[str]:
    if len(ours.cells) != len(theirs.cells):
        yield f"{where}: {len(ours.cells)} cells at {ours.place}, {len(theirs.cells)} at {theirs.place}"
        return
    for column, a, b in zip(head.cells, ours.cells, theirs.cells, strict=False):
        here, there = (dataclasses.replace(piece, text=cell) for piece, cell in ((ours, a), (theirs, b)))
        if a == b or has_words(a):
            yield from _same_facts(f"{where}, column '{column}'", here, there)
        else:
            at = f"'{a}' at {ours.place}, '{b}' at {theirs.place}"
            yield f"{where}, column '{column}': {at}: nothing to translate, copy it"


def _same_facts(where: str, ours: Piece, theirs: Piece) -> Iterator[str]:
    here, there = facts(ours.text), facts(theirs.text)
    if here != there:
        only = [", ".join(f"{kind} {fact}" for kind, fact in more.elements()) for more in (here - there, there - here)]
        yield f"{where}: only at {ours.place}: {only[0] or 'nothing'}; only at {theirs.place}: {only[1] or 'nothing'}"
