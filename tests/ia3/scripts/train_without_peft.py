"""Train with transformers' Trainer where PEFT is not installed; started by test_training_stack.py with a folder."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_find_spec = importlib.util.find_spec


class _NoPeft(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def _hide_peft() -> None:
    """As if it were not installed, for ``import`` and for those who ask ``find_spec`` first."""
    sys.meta_path.insert(0, _NoPeft())
    importlib.util.find_spec = lambda name, package=None: (  # type: ignore[assignment]
        None if name.partition(".")[0] == "peft" else _find_spec(name, package)
    )


def main(folder: Path) -> None:
    _hide_peft()
    import torch
    import transformers
    from transformers.utils import is_peft_available

    import ia3
    from ia3.mlp import patch_of

    assert not is_peft_available()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    data = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(3, 64, (16, 10), generator=torch.Generator().manual_seed(7)).tolist()
    ]

    def run(model: ia3.PeftModel, name: str, resume: str | None = None, **arguments: Any) -> transformers.Trainer:
        settings = transformers.TrainingArguments(
            output_dir=str(folder / name),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            **arguments,
        )
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data[:4])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    before = model.eval()(**{key: torch.tensor([row[key] for row in data]) for key in data[0]}).loss
    trainer = run(model, "run", save_strategy="steps", save_steps=2)
    assert sum(patch_of(block) is not None for block in model.modules()) == 2
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate(data)["eval_loss"] < before

    # Trainer knows PEFT's class only: its own checkpoints hold the whole model, and resume from there to the same bits.
    checkpoint = folder / "run" / "checkpoint-2"
    assert (checkpoint / "model.safetensors").exists()
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    resumed = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    run(resumed, "resumed", str(checkpoint), save_strategy="no")
    states = model.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    model.save_pretrained(folder / "adapter")
    ids = torch.tensor([row["input_ids"] for row in data])
    torch.save({"input_ids": ids, "logits": model.eval()(input_ids=ids).logits.detach()}, folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
