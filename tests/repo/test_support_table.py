"""The table of optimizers in docs/optimizers.md is what the reports say, and leaves no optimizer of torch out."""

from __future__ import annotations

import pathlib

import pytest
import torch

from scripts import support_table


@pytest.mark.slow
def test_the_page_has_the_table_that_the_reports_give(capsys: pytest.CaptureFixture[str]) -> None:
    status = support_table.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_every_optimizer_of_torch_has_a_row() -> None:
    labels = " ".join(label for label, _ in support_table.rows())
    found = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert {n for n in found - {"Optimizer"} if f"`torch.optim.{n}`" not in labels} == set()


def test_a_row_says_what_was_fused_and_what_was_not() -> None:
    fused = support_table.row("x", lambda p: torch.optim.SGD(p, lr=0.1))
    assert fused == ["x", "1 (4)", "1", "12", "fused"]
    assert "LBFGS" in support_table.row("x", torch.optim.LBFGS)[-1]


def test_a_wrong_table_is_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "optimizers.md"
    page.write_text(f"before\n{support_table.BEGIN}\n| old |\n{support_table.END}\nafter\n")
    monkeypatch.setattr(support_table, "PAGE", page)
    monkeypatch.setattr(support_table, "table", lambda: "| new |")
    assert support_table.main(["--check"]) == 1
    assert support_table.main(["--write"]) == 0
    assert support_table.main(["--check"]) == 0
    assert page.read_text() == f"before\n{support_table.BEGIN}\n| new |\n{support_table.END}\nafter\n"
