"""Write a conversion as one GGUF file that says of itself what it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.foreign_files import MAX_VOCABULARY_BYTES, read_text
from dllm_convert.errors import RequestError
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.planning.layouts.gguf import GgufLayout
from dllm_convert.planning.layouts.target import Converted
from dllm_convert.serving.dangers import check, measure
from dllm_convert.serving.gguf_guide import GgufFile, gguf_guide
from dllm_convert.serving.gguf_quantised import QUANTISED, quantise
from dllm_convert.serving.gguf_tokens import tokenizer_keys
from dllm_convert.serving.gguf_writing import (
    AUTO,
    OUTTYPES,
    Weights,
    file_type,
    kind_of,
    prove_gguf,
    write_gguf,
)
from dllm_convert.serving.llama_cpp import require_llama_cpp
from dllm_convert.serving.run import Export, Source, held_out_texts, new_folder, write_record
from dllm_convert.source.folder import LICENCE_FILES, file_names, matching
from dllm_convert.source.safetensors_header import Header, load_json_object
from dllm_convert.source.tokenizer_loading import load_tokenizer

TOKENIZER_KEY = "tokenizer.huggingface.json"
"""Where GGUF has a tokenizer.json whole."""
FILES_KEY = "dllm_convert.files."
"""Ours: before the name of a small file of the conversion, which travels as text."""
CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that travel; what decodes the model needs no other."""
_TOKENIZER = "tokenizer.json"


def export_gguf(
    layout: GgufLayout,
    source: Source,
    place: Path,
    outtype: str,
    data: Path | None,
    proven: bool,
    reporter: Reporter,
) -> Export:
    """Write a conversion as a folder with one GGUF file, its README and its record.

    Args:
        layout: The layout; what it refuses was refused before.
        source: The conversion.
        place: Folder to create.
        outtype: Type of the matrices.
        data: A text file to measure on; None: Python's language reference.
        proven: Whether llama.cpp itself has to agree.
        reporter: Progress.

    Raises:
        DataError: A file is broken, or the disk is full.
        IncompatibleError: llama.cpp has no such tokenizer, or a number does not fit the type.
        RequestError: There is no such type.
        VerificationError: llama.cpp reads another model.
    """
    folder, converted = source.folder, source.converted
    name = folder.resolve().name
    checked, more = _dangers(layout, source, data)
    asked = check_outtype(outtype)
    fewer = asked in QUANTISED
    file = describe(layout, converted, folder, name, AUTO if fewer else asked)
    with new_folder(place, file.size * (2 if fewer else 1)) as partial:
        compared = write_file(file, folder, source.headers, partial, reporter)
        checked["bytes"] = _compared(file, compared)
        if fewer:
            lossless, file = file, _quantised(file, name, asked)
            with reporter.task("quantise"):
                near = quantise(partial / lossless.name, partial / file.name, asked)
            (partial / lossless.name).unlink()
            checked["quantised"] = f"{near:,} numbers by llama.cpp of that file, every row near"
        more["outtype"] = file.type_name
        if proven:
            # It needs torch, and the binding.
            from dllm_convert.serving.gguf_proof import prove_by_llama_cpp

            path, texts = partial / file.name, held_out_texts(data)
            proof = prove_by_llama_cpp(folder, path, file.type_name, texts)
            checked[f"by {proof.engine}"] = proof.in_words()
            more["proof"] = proof.as_dict()
        for licence in matching(file_names(folder), LICENCE_FILES):
            shutil.copyfile(folder / licence, partial / licence)
        launch = layout.started(converted, file.name)
        readme = gguf_guide(layout, converted, file, checked, name, launch)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        made = {file.name: ("rewritten", sha256_file(partial / file.name))}
        write_record(layout, folder, partial, source.headers, made, checked, more)
    return Export(
        path=place,
        target=layout.name,
        engines=layout.engines,
        ways={file.name: "rewritten"},
        checked=checked,
        launch=layout.started(converted, place / file.name),
    )


def _dangers(
    layout: GgufLayout, source: Source, data: Path | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Measure what who decodes does not rule out; return what to say of it, and its numbers.

    Raises:
        IncompatibleError: A probability is above its bound.
    """
    if layout.rules_out_mask:
        return {}, {}
    converted = source.converted
    rows = converted.entries[converted.adapter.embedding].shape[0]
    found = measure(source.folder, held_out_texts(data), tokens=converted.tokens, rows=rows)
    said = check(found, repaired=False, tied=converted.tied)
    return dict(said), {"probabilities": found.as_dict()}


def _compared(file: GgufFile, count: int) -> str:
    """Return in words what the bytes of a file were compared with."""
    lossy = {"F16", "Q8_0"} & set(file.kinds.values())
    of = "the conversion's, all equal"
    if lossy:
        of = f"the conversion's own numbers in {' and '.join(sorted(lossy))}, all equal"
    return f"{count:,} compared with {of}"


def check_outtype(outtype: str) -> str:
    """Return a type of matrices that can be written.

    Raises:
        RequestError: There is none of that name, or llama.cpp would have to make it and is not
            installed.
    """
    known = (AUTO, *OUTTYPES, *QUANTISED)
    if outtype.lower() not in known:
        raise RequestError(
            f"`outtype` is {outtype!r}, expected one of {', '.join(known)}", argument="outtype"
        )
    if outtype.lower() in QUANTISED:
        require_llama_cpp("outtype")
    return outtype.lower()


def describe(
    layout: GgufLayout, converted: Converted, folder: Path, name: str, outtype: str
) -> GgufFile:
    """Decide all that a file will hold; no weight is read.

    Args:
        layout: The layout.
        converted: The checkpoint.
        folder: Its folder.
        name: Name of the model.
        outtype: One of `check_outtype`.

    Raises:
        DataError: A file of the checkpoint is broken.
        IncompatibleError: llama.cpp has no such tokenizer.
    """
    tensors = layout.tensors(converted)
    kinds = {stored.name: kind_of(stored, outtype, converted.entries) for stored in tensors}
    rows = converted.entries[converted.adapter.embedding].shape[0]
    generation = folder / "generation_config.json"
    stated = load_json_object(generation) if generation.is_file() else {}
    ends = read_ids(stated.get("eos_token_id", converted.config.get("eos_token_id")))
    tokenizer = load_tokenizer(folder, rows)
    keys = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type(kinds, tensors),
        "general.quantization_version": 2,
        **layout.keys(converted),
        **tokenizer_keys(
            tokenizer, rows=rows, mask=converted.section.mask_token_id, ends=list(ends)
        ),
        **_carried(folder, tokenizer),
    }
    number = keys["general.file_type"]
    kind = next(kind for kind, code in OUTTYPES.items() if code == number).upper()
    return GgufFile(
        f"{name}-{kind}.gguf", layout.architecture(converted), keys, tensors, kinds, kind
    )


def _quantised(file: GgufFile, name: str, outtype: str) -> GgufFile:
    kind = outtype.upper()
    return replace(file, name=f"{name}-{kind}.gguf", type_name=kind)


def _carried(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Return the small files of a checkpoint by the keys that they travel under."""
    whole = folder / _TOKENIZER
    if whole.is_file():
        text = read_text(whole, MAX_VOCABULARY_BYTES)
    else:
        text = tokenizer.backend_tokenizer.to_str()
    found = {FILES_KEY + name: read_text(folder / name) for name in CARRIED
             if (folder / name).is_file()}  # fmt: skip
    return {**found, TOKENIZER_KEY: text}


def write_file(
    file: GgufFile,
    folder: Path,
    headers: Mapping[str, Header],
    out: Path,
    reporter: Reporter,
) -> int:
    """Write a file into a folder, and read it back against the conversion.

    Args:
        file: What it holds.
        folder: The conversion.
        headers: Headers of its files.
        out: Where the file goes.
        reporter: Progress.

    Returns:
        Bytes that were compared.

    Raises:
        DataError: What was written is not what was to be written.
        IncompatibleError: A number does not fit the type.
    """
    with ExitStack() as stack:
        weights = Weights(folder, headers, stack)
        path = out / file.name
        with reporter.task("write", total=file.size) as task:
            write_gguf(
                path,
                file.architecture,
                file.keys,
                file.tensors,
                file.kinds,
                weights,
                task.advance,
            )
        return prove_gguf(path, file.keys, file.tensors, file.kinds, weights)
