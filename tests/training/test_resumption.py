"""Which processes can go on from a checkpoint, by what wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_convert.errors import IncompatibleError
from dllm_convert.training.resume import check_sharing

ZERO, FILE, SHARDS = "global_step4", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"


@pytest.mark.parametrize(
    ("wrote", "fsdp", "zero", "refused"),
    [
        (None, False, False, None),
        (ZERO, False, True, None),
        (FILE, True, False, None),
        # Shards are read by whoever holds what of the model.
        (SHARDS, True, False, None),
        (SHARDS, False, False, None),
        (ZERO, False, False, "written by DeepSpeed"),
        (ZERO, True, False, "written by DeepSpeed"),
        (FILE, False, False, "written by FSDP"),
        (None, False, True, "written by something other than DeepSpeed"),
    ],
)
def test_a_checkpoint_is_read_by_those_that_share_alike(
    wrote: str | None, fsdp: bool, zero: bool, refused: str | None, tmp_path: Path
) -> None:
    if wrote == FILE:
        (tmp_path / wrote).touch()
    elif wrote is not None:
        (tmp_path / wrote).mkdir()
    if refused is None:
        check_sharing(tmp_path, fsdp=fsdp, zero=zero)
        return
    with pytest.raises(IncompatibleError, match=refused) as caught:
        check_sharing(tmp_path, fsdp=fsdp, zero=zero)
    assert caught.value.hint and "--launch-config" in caught.value.hint
