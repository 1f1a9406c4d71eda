"""Text of one's own as rows to train on, without a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.texts import fields_of_text
from dllm_convert.training.data import text as data_text


@dataclass(frozen=True)
class TrainingText:
    """Text that was tokenised, split and packed.

    Attributes:
        train: Rows for `DiffusionTrainer(train_dataset=...)`.
        held_out: Batches that are not trained on, for `dllm_convert.diffusion.nelbo`.
        facts: What was read: documents, tokens, rows.
        keep: What has to live as long as the rows.
    """

    train: Dataset[dict[str, Any]]
    held_out: tuple[TextBatch, ...]
    facts: dict[str, Any]
    keep: Any = None


def prepare_data(
    source: str,
    tokenizer: Any,
    *,
    rows: int,
    length: int = 256,
    block: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    folder: Path | str | None = None,
    reporter: Reporter | None = None,
    **data: Any,
) -> TrainingText:
    """Read, tokenise, split and pack text as a conversion does.

    Args:
        source: `pydoc`, files, folders or globs, or a Hub dataset id; a part of one, or a mixture,
            as `--data` takes them.
        tokenizer: Tokenizer of a converted checkpoint.
        rows: Rows of the whole training: steps times rows per step.
        length: Tokens per row.
        block: Tokens per block of bd3lm; None for mdlm.
        batch_size: Rows per held-out batch.
        seed: Seed of the order of the rows.
        folder: Where tokens are kept, for a later call on the same text; temporary if None.
        reporter: Progress; by default silent.
        **data: Other fields of a recipe's `data`, as `text_field` or `held_out_fraction`.

    Raises:
        DataError: There is too little text, or something else than text.
        HubError: A Hub dataset cannot be read.
        ValueError: A field of `data` is unknown or no such value.
    """
    recipe = Recipe.model_validate(
        {
            "source": ".",
            "target": "mdlm" if block is None else "bd3lm",
            "block_size": block,
            "data": {**fields_of_text(source), "sequence_length": length, **data},
            "training": {
                "steps": -(-rows // batch_size),
                "batch_size": batch_size,
                "gradient_accumulation": 1,
                "seed": seed,
            },
        }
    )
    found = data_text.prepare_data(
        recipe,
        tokenizer,
        reporter or Reporter(quiet=True),
        None if folder is None else Path(folder),
    )
    made = found.training_rows(start=0, total=rows)
    return TrainingText(made, found.held_out, found.facts, found.keep)
