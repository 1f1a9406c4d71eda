"""Another model that verifies what a conversion drafts: which one it is, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_convert.adapters import adapter_of, get_adapter
from dllm_convert.adapters.base import Adapter
from dllm_convert.common.console import Reporter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
from dllm_convert.errors import DataError, IncompatibleError, RequestError
from dllm_convert.modeling.loading import load_base
from dllm_convert.sampling.checking import (
    own_verifier,
    require_decoding,
    require_settings,
    who_verifies,
)
from dllm_convert.sampling.one_copy import share_weights
from dllm_convert.source.folder import check_pickle
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise
from dllm_convert.source.recorded import recorded_base
from dllm_convert.source.tokenizer_loading import load_tokenizer


@dataclass(frozen=True)
class Settled:
    """Who decides what is written.

    Attributes:
        given: Settings of decoding, that of the verifier among them if there is one.
        other: Another model that verifies, from its headers or loaded; None for none.
        home: Folder that the conversion was loaded from for this alone; None where it is somebody's
            own, or lies in no folder.
    """

    given: Mapping[str, Any]
    other: Any = None
    home: Path | None = None

    def load(self, model: Any, tokenizer: Any, reporter: Reporter) -> Any:
        """Return the other model, loaded beside the one that drafts; None for none.

        Raises:
            DllmConvertError: As `load_verifier`.
        """
        if isinstance(self.other, SourceInfo):
            return load_verifier(model, tokenizer, self.other, reporter, self.home)
        return self.other


def settle(
    checkpoint: Any,
    given: Mapping[str, Any],
    *,
    lossless: bool = False,
    base: Any = None,
    folder: Path | None = None,
    argument: str | None = None,
) -> Settled:
    """Settle who verifies, and refuse settings that do not go with it, before weights are read.

    Args:
        checkpoint: Folder of a conversion, or one that is loaded.
        given: Fields of `DecodingOptions` that were asked for.
        lossless: Whether whichever verifier there is is to decide what is written.
        base: Another model that verifies: a folder, Hub id or GGUF file, or one that is loaded;
            None is the base that was converted.
        folder: Of a model that is loaded: where it lies, whose manifest names its base.
        argument: Argument that said the settings.

    Raises:
        DataError: Nothing says which base that is, or it is not here.
        IncompatibleError: It does not verify.
        RequestError: Settings contradict each other or the checkpoint.
    """
    is_folder = isinstance(checkpoint, Path)
    own = own_verifier(checkpoint if is_folder else checkpoint.config.to_dict())
    given, other = who_verifies(own, given, lossless=lossless, base=base)
    if is_folder:
        require_decoding(checkpoint, given, argument, other_verifies=other)
    else:
        require_settings(checkpoint, given, other_verifies=other)
    if not other:
        return Settled(given)
    if getattr(checkpoint, "reader", None) is not None:
        raise RequestError(
            "what llama.cpp runs drafts for no other model: give the folder that was exported in "
            "place of the file, or leave `lossless` out",
            argument="lossless",
        )
    if base is not None and not isinstance(base, str | Path):
        if not callable(getattr(base, "generate", None)):
            raise RequestError(
                f"base is {type(base).__name__}, expected a folder, a Hub id, a GGUF file, or a "
                "loaded model of transformers",
                argument="base",
            )
        return Settled(given, base)
    home = checkpoint if is_folder else folder
    if home is None and base is None:
        raise RequestError(
            "this model holds no verifier: where it was opened clean tokens are not read strictly "
            "causally; name its `base`",
            argument="base",
        )
    return Settled(given, verifying_source(home, None if base is None else str(base)), home)


def verifying_source(checkpoint: Path | None, base: str | None) -> SourceInfo:
    """Return whose text is written, from headers: what was named, or the base that was converted.

    Args:
        checkpoint: Folder of a conversion whose clean tokens were opened; its manifest names the
            base.
        base: Folder, Hub id or GGUF file.

    Raises:
        DataError: It is not here, or nothing says which it is.
        IncompatibleError: It is a diffusion model itself, or a pickle that nobody allowed.
    """
    if base is not None:
        found, allowed = inspect_source(base), False
    elif checkpoint is not None and (checkpoint / MANIFEST_FILE).is_file():
        manifest = read_manifest(checkpoint)
        found = recorded_base(manifest)
        allowed = (manifest.get("recipe") or {}).get("allow_pickle") is True
    else:
        raise DataError(
            f"{checkpoint} says nothing of the base it was made of ({MANIFEST_FILE})",
            hint="Give it with --base, a folder or a Hub id",
        )
    if diffusion_section(found.config) is not None:
        raise IncompatibleError(
            f"{found.given} is a diffusion model, and who verifies goes on from left to right",
            hint="Give the base of the conversion with --base",
        )
    check_pickle(
        found,
        allowed=allowed,
        instead="Give a safetensors version of it with --base; the base of the conversion verifies "
        "without --base, as a pickle if it was converted with --allow-pickle",
    )
    return found


def load_verifier(
    model: Any,
    tokenizer: Any,
    source: SourceInfo,
    reporter: Reporter,
    home: Path | None = None,
) -> Any:
    """Load the stock model that verifies what another one drafts, in its type, where it is.

    A conversion that kept the adapter of its training, and is nobody else's, computes from then on
    with the base's weights and that adapter: one copy of them is held.

    Args:
        model: The conversion that drafts.
        tokenizer: Its tokenizer.
        source: Who verifies.
        reporter: Progress.
        home: Folder that the conversion was loaded from for this alone; None leaves it as it is.

    Raises:
        DataError: It cannot be loaded.
        IncompatibleError: It reads both sides of a token, or its tokens are others.
        UnsupportedError: Its family is not known.
    """
    adapter = _adapter(model, source)
    folder = materialise(source, reporter).folder
    check_tokens(tokenizer, load_tokenizer(folder), source)
    dtype: torch.dtype = model.dtype
    with reporter.task("load the verifier"):
        verifier = load_base(folder, adapter, device=str(model.device), dtype=dtype)
        if home is not None:
            share_weights(model, verifier, home)
        return verifier


def _adapter(model: Any, source: SourceInfo) -> Adapter:
    own = adapter_of(model.config.to_dict())
    adapter = own if own.model_type == source.model_type else get_adapter(source.model_type)
    if adapter.attention != "causal":
        raise IncompatibleError(
            f"{source.given} reads both sides of every token, and who verifies goes on from left "
            "to right",
            hint="Give an autoregressive model with --base",
        )
    return adapter


def check_tokens(own: Any, other: Any, source: SourceInfo) -> None:
    """Check that all ids mean the same words, but for those that a conversion added.

    Raises:
        IncompatibleError: They do not.
    """
    drafted, verified = own.get_vocab(), other.get_vocab()
    wrong = [word for word, number in verified.items() if drafted.get(word, number) != number]
    missing = len(verified.keys() - drafted.keys())
    if wrong or missing > len(verified) // 100:
        raise IncompatibleError(
            f"{source.given} has another tokenizer: {len(wrong)} of its {len(verified)} tokens "
            f"have other ids, {missing} are not known",
            hint="Who verifies shares the tokenizer of the conversion, as its base does",
        )
