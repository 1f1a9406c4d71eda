"""Token ids that a checkpoint's configs name: ids at all, and ids of rows that there are."""

from __future__ import annotations

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.text_bounds import stated_ids
from dllm_convert.source.config_numbers import check_ids
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.tokenizer_files import ID_ROLES


def check_token_ids(source: SourceInfo, rows: int) -> None:
    """Check what the configs say of the tokens that begin, end and pad a text.

    Args:
        source: The checkpoint.
        rows: Rows of the conversion's embedding.

    Raises:
        IncompatibleError: An entry is no id, or of a row that does not exist.
    """
    check_ids(source.generation, "generation_config.json")
    for role in ID_ROLES:
        beyond = [
            token for token in stated_ids(role, source.config, source.generation) if token >= rows
        ]
        if beyond:
            raise IncompatibleError(
                f"{role}_token_id is {beyond[0]}, and the embedding has {rows} rows",
                hint="Correct it in generation_config.json or config.json",
            )
