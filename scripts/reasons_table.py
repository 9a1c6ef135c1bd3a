"""Writes docs/reasons.md: every code of a reason, what it means, and what to do. Without arguments."""

from __future__ import annotations

import pathlib

from npu_fuse_pass.reasons import Code

PATH = pathlib.Path(__file__).parents[1] / "docs" / "reasons.md"
_HEAD = """# Why something is not fused

Whatever stays unfused has a reason, and the same reason is in the report (`report.reasons`, `print(report)`,
`to_json()`), in warnings, in what `explain` and `dump --check` say, and in dumps:

```python
for reason in npu_fuse_pass.explain(opt).reasons:
    print(reason.code.name, reason, reason.remedy, reason.node, reason.source)
```

`code` is a row of the table below, `text` says what is the case, `op` the operation, rule or group that it is about,
`remedy` what to do (None: nothing is known, or the text says it), `node` the node in the captured graph, and `source`
its place in the source, as "train.py:12, in step". What is not fused runs as it was captured.

| code | what is the case | what to do |
|---|---|---|
"""


def text() -> str:
    """The page."""
    rows = [f"| `{code.name}` | {code.meaning} | {code.remedy or 'see the reason'} |" for code in Code]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
