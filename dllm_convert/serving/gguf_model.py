"""A GGUF file as a diffusion model: llama.cpp runs the forwards, our decoding decides.

`generate` is the one of the published classes, with all its settings. What is exchanged is who runs
a forward: a block behind the clean ones in llama.cpp's KV cache, or a whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.shown_text import shown
from dllm_convert.errors import IncompatibleError, RequestError
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.converted_config import (
    check_converted_config,
    read_converted_config,
    read_section,
)
from dllm_convert.modeling.published.canvas import Canvas
from dllm_convert.modeling.published.modeling import DiffusionMixin
from dllm_convert.modeling.published.reading import BlockReader
from dllm_convert.planning.layouts.gguf import BLOCK_KEY, FACTORS, SHIFT_KEY, GgufLayout
from dllm_convert.planning.layouts.registry import TARGETS
from dllm_convert.planning.layouts.target import Converted
from dllm_convert.serving.gguf_export import CARRIED, FILES_KEY, TOKENIZER_KEY
from dllm_convert.serving.gguf_writing import holds
from dllm_convert.serving.llama_cpp import LlamaCpp
from dllm_convert.source.gguf import stock_name
from dllm_convert.source.gguf_header import GgufHeader, read_gguf_header
from dllm_convert.source.safetensors_header import TensorEntry
from dllm_convert.source.tokenizer_loading import load_tokenizer

_LAYOUTS = tuple(target for target in TARGETS.values() if isinstance(target, GgufLayout))


class LlamaCppModel(DiffusionMixin):
    """What `generate` needs of a model, around one that llama.cpp has loaded.

    Args:
        engine: The loaded file.
        config: config.json of the conversion, as its stock class has it.
        generation_config: Its generation_config.json.
    """

    def __init__(self, engine: LlamaCpp, config: Any, generation_config: Any) -> None:
        self.engine, self.config, self.generation_config = engine, config, generation_config
        self.device = torch.device("cpu")
        blocks = getattr(config, "block_size", None)
        self.reader = partial(LlamaBlockReader if blocks else LlamaCanvasReader, engine)

    def modules(self) -> Iterator[Any]:
        """Yield none: there are no layers of torch."""
        return iter(())

    def get_input_embeddings(self) -> None:
        """Return none: it is llama.cpp that looks tokens up."""


class LlamaCanvasReader:
    """Forward passes of llama.cpp over whole texts, as `CanvasReader` runs them."""

    def __init__(self, engine: LlamaCpp, model: Any, canvas: Canvas) -> None:
        if canvas.options.approximate_cache:
            raise RequestError(
                "the approximate cache writes states in the middle of a text, and llama.cpp takes "
                "them at its end only",
                argument="approximate_cache",
            )
        self.canvas = canvas
        width = int(canvas.ends.max())
        self.cache = engine.cache(width, width)
        self.vocabulary = engine.rows

    def read(self, masked: torch.Tensor, window: torch.Tensor, everything: bool) -> torch.Tensor:
        """Return logits of the masked positions, those without the prompt behind them.

        Args:
            masked: What is to be written, shape (rows, width), bool.
            window: Which window each row is in; a forward runs the whole text.
            everything: Whether a row begins one.
        """
        canvas, shift = self.canvas, int(self.canvas.options.token_shift)
        width = masked.shape[1]
        texts = canvas.read(canvas.index[:width].expand(len(masked), -1))  # (streams * rows, width)
        ends = canvas.ends[canvas.rows].tolist()
        found = []
        for number, text in enumerate(texts.tolist()):
            row = number % len(masked)
            places = (masked[row].nonzero().squeeze(-1) - shift).tolist()
            found.append(torch.from_numpy(self.cache.run(0, text[: ends[row]], 0, places)))
            self.cache.forget(0, 0)
        canvas.forwards += 1
        return torch.cat(found)

    def select(self, kept: torch.Tensor) -> None:
        """Keep only these rows: nothing is kept of any."""


class LlamaBlockReader(BlockReader):
    """Forward passes of llama.cpp over one block of every row, behind the row's clean blocks.

    llama.cpp takes no mask. Told that attention is not causal, what one call holds sees itself and
    all that is kept: a call holds one block of one row, and what it wrote is forgotten again unless
    the block is clean.
    """

    def __init__(self, engine: LlamaCpp, model: Any, canvas: Canvas, size: int) -> None:
        self.model, self.canvas, self.options, self.size = model, canvas, canvas.options, size
        first = canvas.masked.long().argmax(-1)  # every row has a mask
        self.starts = first // size * size
        self.previous: torch.Tensor | None = None
        rows = len(canvas.rows) * (2 if self.options.guided else 1)
        self.cache: Any = _Lines(engine, canvas.tokens.shape[1], size, rows)

    def read_prompt(self) -> None:
        """Run the clean blocks of the prompts into the cache, block by block as they are read."""
        starts = self.starts.tolist()
        width = max(starts)
        if not width:
            return
        columns = self.canvas.index[:width].expand(len(starts), -1)
        texts = self.canvas.read(columns, noise=False).tolist()  # (streams * rows, width)
        causal = self.options.causal_context
        step = width if causal else self.size
        ends = []
        for line, text in enumerate(texts):
            end = starts[line % len(starts)]
            logits = torch.zeros(1, self.cache.vocabulary)
            for first in range(0, end, step):
                part = text[first : min(first + step, end)]
                last = [len(part) - 1] if first + step >= end and self.options.token_shift else []
                found = self.cache.run(line, part, first, last, causal=causal)
                logits = found if last else logits
            ends.append(logits)
        self.canvas.forwards += -(-width // step)
        if self.options.token_shift:
            self.previous = torch.cat(ends)

    def read_ahead(self, columns: torch.Tensor) -> torch.Tensor | None:
        """Return nothing: two blocks of which one does not see the other are two calls."""
        return None

    def _mask(self, clean: torch.Tensor) -> None:
        # Who sees whom is llama.cpp's to know, by call.
        return None

    def _run(
        self,
        columns: torch.Tensor,
        mask: torch.Tensor | None,
        at: torch.Tensor,
        clean: torch.Tensor | None = None,
        *,
        is_prompt: bool = False,
    ) -> torch.Tensor:
        texts = self.canvas.read(columns).tolist()  # (streams * rows, block)
        rows = len(columns)
        written = [False] * rows if clean is None else clean.tolist()
        firsts = columns[:, 0].tolist()
        row, place = at // self.size, at % self.size
        found = torch.empty(len(texts) // rows, len(at), self.cache.vocabulary)
        for line, text in enumerate(texts):
            stream, number = divmod(line, rows)
            here = (row == number).nonzero().squeeze(-1)
            # With token shift a place can be wanted for two positions.
            places, again = torch.unique(place[here], return_inverse=True)
            causal = self.options.causal_context and written[number]
            first = firsts[number]
            logits = self.cache.run(line, text, first, places.tolist(), causal=causal)
            found[stream, here] = logits[again]
            if not written[number]:
                self.cache.forget(line, first)
        self.canvas.forwards += 1
        return found.flatten(0, 1)


class _Lines:
    """The cache of the rows at hand, by their number among them."""

    def __init__(self, engine: LlamaCpp, columns: int, size: int, rows: int) -> None:
        self._cache, self.vocabulary = engine.cache(columns, size, rows), engine.rows
        self._numbers = list(range(rows))

    def run(
        self, line: int, tokens: list[int], first: int, wanted: list[int], *, causal: bool
    ) -> torch.Tensor:
        number = self._numbers[line]
        return torch.from_numpy(self._cache.run(number, tokens, first, wanted, causal=causal))

    def forget(self, line: int, first: int) -> None:
        self._cache.forget(self._numbers[line], first)

    def keep(self, length: int) -> None:
        """Nothing to do: what is not clean was forgotten."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        self._numbers = [self._numbers[index] for index in indices.tolist()]


@dataclass(frozen=True)
class GgufCheckpoint:
    """A GGUF file that is to be run.

    Attributes:
        model: Around what llama.cpp has loaded.
        tokenizer: The conversion's own, of transformers.
    """

    model: LlamaCppModel
    tokenizer: Any


def load_gguf(path: Path, threads: int | None = None) -> GgufCheckpoint:
    """Load a file that `export --to gguf` wrote.

    Args:
        path: The file.
        threads: Threads that compute; None: as many as torch has.

    Raises:
        DataError: The file is broken, or llama.cpp cannot load it.
        IncompatibleError: It is none of ours, or says two things.
        RequestError: llama.cpp is not installed.
    """
    header = read_gguf_header(path)
    with TemporaryDirectory() as name:
        folder = Path(name)
        _unpack(header.metadata, folder, path)
        config = read_converted_config(folder)
        adapter = check_converted_config(config, path)
        _check_keys(header, config, adapter, path)
        stock = diffusion_class(adapter).config_class.from_pretrained(folder)
        generation = _generation_config(folder)
        tokenizer = load_tokenizer(folder, int(config["vocab_size"]))
    engine = LlamaCpp(path, threads or torch.get_num_threads())
    if engine.rows != config["vocab_size"]:
        raise _contradicts(path, "tokenizer.ggml.tokens", engine.rows, config["vocab_size"])
    return GgufCheckpoint(LlamaCppModel(engine, stock, generation), tokenizer)


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig()  # type: ignore[no-untyped-call]


def _unpack(metadata: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Put the small files that a GGUF file carries into a folder."""
    if FILES_KEY + "config.json" not in metadata or TOKENIZER_KEY not in metadata:
        raise IncompatibleError(
            f"{path.name} does not carry the files of a conversion, by which it is decoded",
            hint="Give a file that dllm-convert export --to gguf wrote",
        )
    for name in CARRIED:
        text = metadata.get(FILES_KEY + name)
        if isinstance(text, str):
            (folder / name).write_text(text, encoding="utf-8")
    (folder / "tokenizer.json").write_text(str(metadata[TOKENIZER_KEY]), encoding="utf-8")


def _check_keys(
    header: GgufHeader, config: Mapping[str, Any], adapter: Adapter, path: Path
) -> None:
    """Refuse a file of which llama.cpp would make another model than its config.json says.

    llama.cpp itself ends the whole process where heads do not fit a matrix.
    """
    section, found = read_section(config), header.metadata
    graph = found.get("general.architecture")
    expected = {
        f"{graph}.attention.causal": False,
        SHIFT_KEY: section.token_shift,
        "tokenizer.ggml.mask_token_id": section.mask_token_id,
    }
    if section.block_size:
        expected[BLOCK_KEY] = section.block_size
    entries = {
        stock_name(name): TensorEntry("F32", tensor.shape, 0, 0)
        for name, tensor in header.tensors.items()
        if name != FACTORS
    }
    if adapter.embedding not in entries:
        raise _contradicts(path, adapter.embedding, None, "a tensor")
    converted = Converted(config, section, adapter, entries, int(config["vocab_size"]))
    layout = next((one for one in _LAYOUTS if _graph(one, converted) == graph), None)
    if layout is None:
        raise _contradicts(path, "general.architecture", graph, f"a graph of {adapter.model_type}")
    for key, value in {**layout.keys(converted), **expected}.items():
        if not holds(header, key, value):
            raise _contradicts(path, key, found.get(key), value)


def _graph(layout: GgufLayout, converted: Converted) -> str | None:
    """Return the graph that a layout has for a checkpoint, None where it takes none such."""
    refused = any(True for _ in layout.refusals(converted))
    return None if refused else layout.architecture(converted)


def _contradicts(path: Path, key: str, found: object, expected: object) -> IncompatibleError:
    return IncompatibleError(
        f"{path.name}: {key} is {shown(found)}, and the config.json that it carries says "
        f"{shown(expected)}",
        hint="Export it again: dllm-convert export CHECKPOINT --to gguf",
    )
