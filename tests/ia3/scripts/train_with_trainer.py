"""A user's script around Trainer: plain here, distributed where a launcher starts it. Arguments: kind, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from tests.ia3.scripts.distributed_cases import batch, make


def main(kind: str, folder: Path, processes: int = 1, dtype: torch.dtype = torch.float32) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=4 // processes,
        learning_rate=0.5,
        adam_epsilon=1e-2,  # so that tiny gradients, which are mostly rounding, are not blown up
        logging_steps=1,
        save_steps=3,
    )
    rows = [row for step in range(2) for row in batch(step).tolist()]
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model=make(kind, dtype).to(dtype), args=arguments, train_dataset=data)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), processes=2)
    if torch.distributed.is_initialized():
        # Or a busy machine ends the process while its communication's threads still run, which aborts it.
        torch.distributed.destroy_process_group()
