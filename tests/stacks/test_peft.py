"""peft: low-rank adapters are trained, everything else stands still."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from .models import language_model, sentences
from .twins import MAKERS, Patch, assert_as_near, trained

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "peft",
        ("peft", "transformers"),
        "`compile_optimizer_(opt)`; `opt` may have all parameters of the model",
        "LoRA, in a loop and in Trainer",
    ),
]


def adapted(dtype: torch.dtype) -> Any:
    return get_peft_model(language_model(dtype), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).to(dtype)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_loop(maker: str) -> None:
    def run(patch: Patch, dtype: torch.dtype) -> list[torch.Tensor]:
        model = adapted(dtype)
        opt = patch(MAKERS[maker](p for p in model.parameters() if p.requires_grad))
        for batch in torch.utils.data.DataLoader(sentences(8), batch_size=2):  # type: ignore[arg-type]
            opt.zero_grad()
            model(**batch).loss.backward()
            opt.step()
        return trained(model)

    assert_as_near(run)


def test_in_trainer(tmp_path: pathlib.Path) -> None:
    """All parameters of the model are given: those without gradients are left out."""

    def run(patch: Patch, dtype: torch.dtype) -> list[torch.Tensor]:
        model = adapted(dtype)
        opt = patch(torch.optim.AdamW(model.parameters(), lr=1e-2))
        given: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, **given)
        Trainer(model, args, train_dataset=sentences(), optimizers=(opt, None)).train()
        return trained(model)

    assert_as_near(run)
