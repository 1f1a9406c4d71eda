"""Engines whose own code is run here: which there are, and a process that answers with it."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol, cast

from dllm_convert.common.secrets_found import without_secrets
from dllm_convert.errors import RequestError, VerificationError

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Engines' workers spin at barriers: beside anything else two are ten times slower than one."""
MASK = -1
"""Stands for the mask in a text to be read: every engine has a row of its own for it."""
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class EngineCode:
    """An engine's code, as far as a proof needs it.

    Attributes:
        name: The engine.
        package: What is imported.
        distribution: What it is called in an index.
        tried: Release that it was run with here; its insides are no interface.
        extra: Extra of this package that installs it; None: it cannot be had that way.
        module: Module of this package that has `load`, which makes a `Reader` of a folder.
        writes: Whether its sampler runs here too.
    """

    name: str
    package: str
    distribution: str
    tried: str
    extra: str | None
    module: str
    writes: bool = True

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def advice(self) -> str:
        """What to do where it does not agree."""
        if self.version == self.tried:
            return "Nothing was written. Report it, with the versions of both"
        return (
            f"This was tried with {self.name} {self.tried}, here is {self.version}: pip install "
            f"'{self.distribution}=={self.tried}'; without --prove the bytes are compared all the "
            "same"
        )

    @property
    def version(self) -> str:
        """Its release, as its files say."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "of unknown version"


MLX_VLM = EngineCode(
    "mlx-vlm", "mlx_vlm", "mlx-vlm", "0.7.10", "serve-mlx", "dllm_convert.serving.mlx_engine"
)
SGLANG = EngineCode(
    "SGLang", "sglang", "sglang", "0.5.23", "serve-sglang", "dllm_convert.serving.sglang_engine"
)
LMDEPLOY = EngineCode(
    "LMDeploy",
    "lmdeploy",
    "lmdeploy",
    "0.18.0",
    None,
    "dllm_convert.serving.lmdeploy_engine",
    writes=False,
)
ENGINES: Mapping[str, tuple[EngineCode, ...]] = {
    "sdar": (SGLANG, LMDEPLOY),
    "llada2": (SGLANG, MLX_VLM),
    "nemotron": (MLX_VLM,),
}
"""Layout to the engines whose code proves it; every one that is installed is asked."""


class Reader(Protocol):
    """A model as an engine reads it from an export."""

    def logits(self, text: Sequence[int]) -> Any:
        """Return logits of a text with masks (`MASK`) in its blocks, (length, rows), float32."""

    def write(self, prompt: Sequence[int], new: int, block: int, threshold: float) -> list[int]:
        """Return `new` tokens as the engine's own sampler writes them behind a prompt."""


@dataclass(frozen=True)
class Questions:
    """What an engine is asked of an export.

    Attributes:
        prompts: Ids; something is written behind each.
        texts: The prompts with masks in them, to be read.
        thresholds: Of confidence; everything is written with each.
        new: Tokens to write.
        block: Tokens per block when something is written; a prompt is read in the export's own.
    """

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]
    thresholds: tuple[float, ...]
    new: int
    block: int


@dataclass
class Answers:
    """What an engine said, as far as it came in its time.

    Attributes:
        logits: Of each text, at every position, (length, rows).
        texts: New tokens, by threshold and number of the prompt.
        stopped: Whether time was up before all was answered.
    """

    logits: list[Any] = field(default_factory=list)
    texts: dict[tuple[float, int], list[int]] = field(default_factory=dict)
    stopped: bool = False


def engines_of(target: str) -> tuple[EngineCode, ...]:
    """Return the engines that can prove a layout here.

    Raises:
        RequestError: There is none, or none is installed.
    """
    known = ENGINES.get(target, ())
    if not known:
        raise RequestError(
            f"no engine of {target} runs its code without a GPU and a server; the bytes are "
            "compared all the same",
            hint="Leave `prove` out",
            argument="prove",
        )
    found = tuple(code for code in known if code.installed)
    if not found:
        extras = [code.extra for code in known if code.extra]
        raise RequestError(
            f"{' and '.join(code.package for code in known)}, whose code proves this layout, "
            f"{'are' if len(known) > 1 else 'is'} not installed",
            hint=" or ".join(f"pip install 'dllm-convert[{extra}]'" for extra in extras),
            argument="prove",
        )
    return found


class EngineProcess:
    """An engine in a process of its own: it may be stopped, and what it changes ends with it.

    Args:
        code: The engine.
    """

    def __init__(self, code: EngineCode) -> None:
        self.code = code
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dllm_convert.serving._engine_process", code.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=without_secrets(os.environ) | ONE_THREAD | {"HF_HUB_OFFLINE": "1"},
        )
        # Pipes, as asked for above.
        self._orders = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)

    @property
    def alive(self) -> bool:
        """Whether it can be asked something."""
        return self._process.poll() is None

    def ask(
        self,
        out: Path,
        asked: Questions,
        seconds: float,
        advance: Callable[[], None],
        agreed: Callable[[Answers], bool],
    ) -> Answers:
        """Have the engine read an export, and write with it.

        Args:
            out: The export.
            asked: What to read and to write.
            seconds: Time after which what there is has to do.
            advance: Called at every answer.
            agreed: Asked once everything is read: whether it is worth while to write.

        Raises:
            VerificationError: The engine cannot read the export; or said nothing in its time.
        """
        found = Answers()
        with tempfile.TemporaryDirectory(prefix="dllm-convert-prove-") as scratch:
            for said in self._said(out, asked, Path(scratch), seconds):
                if said is None:
                    found.stopped = True
                    break
                if "failed" in said:
                    raise VerificationError(
                        f"{self.code.name} cannot read the export: {said['failed']}",
                        hint=self.code.advice,
                    )
                if "read" in said:
                    self._send(agreed(found))
                    continue
                if "logits" in said:
                    found.logits.append(_array(Path(said["logits"])))
                elif "text" in said:
                    found.texts[said["threshold"], said["prompt"]] = said["text"]
                advance()
        return found

    def _said(
        self, out: Path, asked: Questions, scratch: Path, seconds: float
    ) -> Iterator[dict[str, Any] | None]:
        """Send the questions and yield answer after answer; None once time is up."""
        order = {"out": str(out.resolve()), "scratch": str(scratch), **vars(asked)}
        self._send(order)
        for line in self._lines(time.monotonic() + seconds):
            said = None if line is None else json.loads(line)
            if said is not None and said.get("done"):
                return
            yield said

    def _send(self, said: Any) -> None:
        with suppress(BrokenPipeError):  # It ended; its last words are read for its answer.
            self._orders.write(json.dumps(said).encode() + b"\n")
            self._orders.flush()

    def _lines(self, deadline: float) -> Iterator[bytes | None]:
        pipe, kept = self._answers.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    yield None
                    return
                piece = os.read(pipe, _AT_ONCE)
                if not piece:
                    yield json.dumps({"failed": self._last_words()}).encode()
                    return
                *whole, kept = (kept + piece).split(b"\n")
                yield from whole

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended")

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # An order that it did not live to read.
            self._orders.close()
        self._answers.close()
        self._errors.close()


@contextmanager
def running(code: EngineCode) -> Iterator[EngineProcess]:
    """Have an engine's process until the block ends."""
    process = EngineProcess(code)
    try:
        yield process
    finally:
        process.close()


def _array(path: Path) -> Any:
    import numpy as np

    found = np.load(path)
    path.unlink()
    return found
