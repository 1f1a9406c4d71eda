"""llama.cpp as somebody who runs forwards: one graph, one KV cache, attention as it is told.

The binding is cyllama's: llama.cpp's own code, compiled, on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import DataError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

PACKAGE, EXTRA = "cyllama", "serve-gguf"
_FLOAT32 = 0
"""Of ggml's types."""


def require_llama_cpp(argument: str | None = None) -> None:
    """Refuse what needs llama.cpp where it is not installed.

    Args:
        argument: Argument that asks for it.

    Raises:
        RequestError: It is not.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise RequestError(
            f"{PACKAGE}, which brings llama.cpp, is not installed",
            hint=f"pip install 'dllm-convert[{EXTRA}]'",
            argument=argument,
        )


@cache
def _binding() -> ModuleType:
    home = importlib.import_module(f"{PACKAGE}.llama.llama_cpp")
    home.disable_logging()
    home.llama_backend_init()
    return home


class LlamaCpp:
    """A GGUF file as llama.cpp has loaded it.

    Args:
        path: The file.
        threads: Threads that compute.

    Raises:
        DataError: llama.cpp cannot load it.
        RequestError: It is not installed.
    """

    def __init__(self, path: Path, threads: int) -> None:
        require_llama_cpp()
        home, self.threads = _binding(), threads
        parameters = home.LlamaModelParams()
        parameters.n_gpu_layers = 0
        try:
            self._model = _with_vocabulary(home)(str(path), parameters, verbose=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"llama.cpp cannot load {path} ({error})",
                hint="Its graphs have no room for what the file holds, or the file is damaged",
            ) from error
        self.vocabulary = self._model.get_vocab()
        self.rows = int(self.vocabulary.n_vocab)

    def tokenize(self, text: str) -> list[int]:
        """Return what llama.cpp's own tokenizer makes of a text, its beginning included."""
        return [int(token) for token in self.vocabulary.tokenize(text, True, True)]

    def cache(self, columns: int, at_once: int, rows: int = 1) -> LlamaCache:
        """Return an empty KV cache.

        Args:
            columns: Tokens that a text may have.
            at_once: Most tokens that see each other in one forward.
            rows: Texts.
        """
        home = _binding()
        parameters = home.LlamaContextParams()
        parameters.n_ctx, parameters.n_seq_max = columns * rows, rows
        parameters.n_batch, parameters.n_ubatch = max(columns, at_once), at_once
        parameters.n_threads = parameters.n_threads_batch = self.threads
        # Its flash attention holds keys in half precision, and so does its cache by default.
        parameters.flash_attn_type = 0
        parameters.type_k = parameters.type_v = _FLOAT32
        return LlamaCache(home, home.LlamaContext(self._model, parameters, verbose=False), self)


class LlamaCache:
    """Clean tokens of some texts, and forwards behind them."""

    def __init__(self, home: ModuleType, context: Any, engine: LlamaCpp) -> None:
        self._home, self._context, self._engine = home, context, engine
        self._causal: bool | None = None

    def run(
        self,
        row: int,
        tokens: Sequence[int],
        first: int,
        wanted: Sequence[int] = (),
        *,
        causal: bool = False,
    ) -> Floats:
        """Run tokens of a text behind those that are kept, and keep them.

        Args:
            row: Which text.
            tokens: The tokens; they see all that is kept, and each other.
            first: Position of the first of them.
            wanted: Places among them whose logits are wanted, each once.
            causal: Whether each sees only those before it.

        Returns:
            Logits, shape (wanted, vocab).

        Raises:
            DataError: llama.cpp refuses them.
        """
        import numpy as np

        if causal != self._causal:
            self._context.set_causal_attn(causal)
            self._causal = causal
        batch = self._home.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        asked = frozenset(wanted)
        for place, token in enumerate(tokens):
            batch.add(int(token), first + place, [row], place in asked)
        try:
            self._context.decode(batch)
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"llama.cpp cannot run {len(tokens)} tokens from position {first} on ({error})",
                hint="Shorten the text, or give the machine more memory",
            ) from error
        logits = np.empty((len(wanted), self._engine.rows), np.float32)
        for number, place in enumerate(wanted):
            logits[number] = self._context.get_logits_ith(place)
        return logits

    def forget(self, row: int, first: int) -> None:
        """Drop what is kept of a text from a position on."""
        self._context.memory_seq_rm(row, first, -1)


def quantise_file(path: Path, out: Path, number: int) -> None:
    """Have llama.cpp's quantiser write a file with fewer bits.

    Args:
        path: The file.
        out: The new file.
        number: What llama.cpp calls the mixture of types.

    Raises:
        DataError: It refuses.
    """
    home = _binding()
    parameters = home.LlamaModelQuantizeParams()
    parameters.ftype, parameters.nthread = number, 1
    try:
        home.model_quantize(str(path), str(out), parameters)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"llama.cpp cannot quantise {path.name} ({error})",
            hint="Take --outtype q8_0, which is written here",
        ) from error


@cache
def _with_vocabulary(home: ModuleType) -> Any:
    """Return the binding's class of models with what its contexts read of it and it has not."""

    class Model(home.LlamaModel):  # type: ignore[name-defined, misc]
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    return Model
