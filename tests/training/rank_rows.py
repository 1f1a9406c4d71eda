"""One process of a training: prepares data and writes down the rows its Trainer would see.

Arguments: recipe (JSON), tokenizer, data folder, output folder, optimizer steps before the start.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import skip_first_batches
from transformers import AutoTokenizer, Trainer

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import Rank
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training.data.rows import collate
from dllm_convert.training.data.text import prepare_data
from dllm_convert.training.run import _arguments


def main() -> None:
    recipe_json, tokenizer, folder, out, resumed = sys.argv[1:]
    recipe, out_folder, step = Recipe.model_validate_json(recipe_json), Path(out), int(resumed)
    data = prepare_data(
        recipe,
        AutoTokenizer.from_pretrained(tokenizer),
        Reporter(quiet=True),
        Path(folder),
        Rank.from_environment(),
    )
    arguments = _arguments(recipe, out_folder, False, data.streaming)
    training = recipe.training
    micro = training.gradient_accumulation
    rows = training.batch_size * micro * arguments.world_size
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=arguments,
        train_dataset=data.training_rows(start=step * rows, total=training.steps * rows),
        data_collator=collate,
    )
    loader = trainer.get_train_dataloader()
    if not data.streaming:
        loader = skip_first_batches(loader, step * micro)
    seen = []
    for batch in loader:
        names = ("input_ids", "segment_ids", "position_ids", "loss_mask")
        seen.append(
            [[batch[name][i].tolist() for name in names] for i in range(len(batch[names[0]]))]
        )
        if len(seen) == (training.steps - step) * micro:
            break
    (out_folder / f"rank-{arguments.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
