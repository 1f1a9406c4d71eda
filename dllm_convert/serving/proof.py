"""Proof by the engine's own code: its logits are ours, and it writes the tokens that we write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import VerificationError
from dllm_convert.serving.engines import MASK, Answers, EngineCode, Questions, running

TOLERANCE = 1e-4
"""Largest difference of float32 logits."""
ROUNDING = 10.0
"""A model that nobody trained amplifies rounding, so that two right sums in float32 differ by more.
Then both are held against float64, and the engine may lose this many times what ours loses there:
measured on SmolLM2-135M before its training, ours 2e-3 and mlx-vlm's plain sums 1.6e-2."""
THRESHOLDS = (1.0, 0.9, 0.5)
"""Of confidence: no token is above the first, so that one is written in every step."""
SECONDS = 600.0
"""An engine is stopped then; what it has said until then has to do."""
_BLOCKS = 8
"""Larger blocks cost a forward of the whole block for every token of it. An engine is told the size
of its blocks when it starts: in smaller ones it computes the same function with the same code."""
_SMALLER = 4
_PARAMETERS = 10_000_000
"""A larger model writes less: enough to end a block and to begin the next one."""
_NEW_TOKENS, _FEW = 21, 6
_LENGTHS = (8, 11, 3)
"""Prompts that end with a block, in its middle, and before the first has ended, for blocks of 4."""


@dataclass(frozen=True)
class Proof:
    """What an engine's own code made of an export.

    Attributes:
        engine: Its name and version.
        difference: Largest difference of logits at a prompt, in float32.
        tolerance: What it may be.
        texts: Prompts behind which something was written, once for each threshold.
        planned: How many of them there would have been with more time.
        decoded: Tokens that were decoded.
        equal: How many of them are ours.
    """

    engine: str
    difference: float
    tolerance: float
    texts: int
    planned: int
    decoded: int
    equal: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def in_words(self) -> str:
        """Return the result in a line."""
        said = f"logits differ by at most {self.difference:.1e} (bound {self.tolerance:.2g})"
        if not self.planned:
            return f"{said}; its sampler needs a GPU"
        if not self.decoded:
            return f"{said}; it was not asked to write"
        said += f", {self.equal} of {self.decoded} decoded tokens equal"
        if self.texts < self.planned:
            said += f", {self.texts} of {self.planned} texts in the time there was"
        return said


@dataclass(frozen=True)
class Subject:
    """What an export was made from, loaded to be compared with.

    Attributes:
        model: The conversion, in float32 on the CPU.
        usable: Ids that the tokenizer has, the mask's left out.
    """

    model: Any
    usable: list[int]

    @classmethod
    def load(cls, folder: Path, *, mask: int, tokens: int) -> Subject:
        """Load a conversion.

        Args:
            folder: The conversion.
            mask: Row of the mask in the export.
            tokens: Ids that the tokenizer has.
        """
        from dllm_convert.modeling.loading import load_checkpoint

        loaded = load_checkpoint(folder, device="cpu", dtype="float32")
        own = int(loaded.config["mask_token_id"])
        return cls(loaded.model, [row for row in range(tokens) if row not in (own, mask)])

    def questions(self) -> Questions:
        """Return what to ask an engine of it: prompts at random, and how much to write."""
        import torch

        draw = torch.Generator().manual_seed(0)
        prompts = tuple(
            tuple(
                self.usable[at]
                for at in torch.randint(len(self.usable), (length,), generator=draw).tolist()
            )
            for length in _LENGTHS
        )
        small = sum(weight.numel() for weight in self.model.parameters()) <= _PARAMETERS
        own = int(self.model.config.block_size)
        return Questions(
            prompts=prompts,
            texts=tuple(
                tuple(MASK if at % 3 == 1 else one for at, one in enumerate(prompt))
                for prompt in prompts
            ),
            thresholds=THRESHOLDS,
            new=_NEW_TOKENS if small else _FEW,
            block=own if own <= _BLOCKS else _SMALLER,
        )

    def logits(self, text: Sequence[int]) -> Any:
        """Return our logits of a text with masks (`MASK`) in it, (length, rows)."""
        import torch

        mask = self.model.config.mask_token_id
        ids = torch.tensor([[mask if one == MASK else one for one in text]])
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits[0].numpy()

    def exact(self, texts: Sequence[Sequence[int]]) -> list[Any]:
        """Return our logits of texts as float64 has them; what ours lose is lost in float32."""
        import torch

        self.model.to(torch.float64)
        try:
            return [self.logits(text) for text in texts]
        finally:
            self.model.to(torch.float32)

    def write(self, prompt: tuple[int, ...], asked: Questions, threshold: float) -> list[int]:
        """Return what we write behind a prompt, by the rule of the engines it is made for."""
        import torch

        from dllm_convert.modeling.denoising import denoised

        config = self.model.config
        if config.diffusion.get("context") == "causal":
            from dllm_convert.serving.nemotron_rule import write_causal

            return write_causal(self.model, prompt, asked.new, asked.block, threshold)
        own, config.block_size = config.block_size, asked.block
        # Engines write whole blocks; ours ranks no position that nobody asked for.
        whole = -(-(len(prompt) + asked.new) // asked.block) * asked.block
        try:
            text = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=whole - len(prompt),
                max_denoising_steps=asked.block,
                confidence_threshold=threshold,
                eos_token_id=None,
                **denoised(self.model),
            )
        finally:
            config.block_size = own
        return list(text[0, len(prompt) : len(prompt) + asked.new].tolist())


def prove_by_engine(
    folder: Path,
    out: Path,
    engines: tuple[EngineCode, ...],
    *,
    mask: int,
    tokens: int,
    reporter: Reporter,
) -> list[Proof]:
    """Compare engines' logits and text with ours.

    Args:
        folder: The conversion.
        out: The export.
        engines: Whose code to ask, one after the other.
        mask: Row of the mask in the export.
        tokens: Ids that the tokenizer has; prompts are made of them.
        reporter: Progress.

    Raises:
        VerificationError: An engine reads another model, or does not answer in time.
    """
    with _one_thread():
        subject = Subject.load(folder, mask=mask, tokens=tokens)
        ours = _Ours(subject, subject.questions())
        return [_prove(code, out, ours, reporter) for code in engines]


class _Ours:
    """What we make of the questions, computed when it is first asked for.

    Args:
        subject: The conversion.
        asked: The questions.
    """

    def __init__(self, subject: Subject, asked: Questions) -> None:
        self.subject, self.asked = subject, asked
        self._texts: dict[tuple[float, int], list[int]] = {}

    @cached_property
    def logits(self) -> list[Any]:
        """Logits of the texts, (length, rows) each, float32."""
        return [self.subject.logits(text) for text in self.asked.texts]

    @cached_property
    def exact(self) -> list[Any]:
        """The same in float64."""
        return self.subject.exact(self.asked.texts)

    def text(self, threshold: float, prompt: int) -> list[int]:
        """Return what we write behind a prompt, which is given by its number."""
        key = threshold, prompt
        if key not in self._texts:
            given = self.asked.prompts[prompt]
            self._texts[key] = self.subject.write(given, self.asked, threshold)
        return self._texts[key]

    def apart(self, logits: list[Any]) -> tuple[float, float]:
        """Return how far an engine's logits are from ours at the most, and how far they may be."""
        usable = self.subject.usable
        difference = _apart(logits, self.logits, usable)
        if difference <= TOLERANCE:
            return difference, TOLERANCE
        lost = _apart(self.logits, self.exact, usable)
        return _apart(logits, self.exact, usable), max(TOLERANCE, ROUNDING * lost)


def _prove(code: EngineCode, out: Path, ours: _Ours, reporter: Reporter) -> Proof:
    """Compare one engine's answers with ours.

    Raises:
        VerificationError: It reads another model, or does not answer in time.
    """
    asked = ours.asked if code.writes else replace(ours.asked, thresholds=())

    def agreed(answers: Answers) -> bool:
        difference, tolerance = ours.apart(answers.logits)
        return difference <= tolerance

    with running(code) as process:
        planned = len(asked.texts) + len(asked.prompts) * len(asked.thresholds)
        with reporter.task(f"{code.name} reads and writes", total=planned) as task:
            answers = process.ask(out, asked, SECONDS, task.advance, agreed)
    if len(answers.logits) < len(asked.texts):
        raise _proves_too_little(code, f"{len(answers.logits)} of {len(asked.texts)} texts read")
    difference, tolerance = ours.apart(answers.logits)
    decoded = equal = 0
    with reporter.task("compare with ours", total=len(answers.texts)) as task:
        for (threshold, number), text in answers.texts.items():
            known = ours.text(threshold, number)
            decoded += len(known)
            equal += sum(one == other for one, other in zip(known, text, strict=False))
            task.advance()
    proof = Proof(
        engine=f"{code.name} {code.version}",
        difference=difference,
        tolerance=tolerance,
        texts=len(answers.texts),
        planned=len(asked.prompts) * len(asked.thresholds),
        decoded=decoded,
        equal=equal,
    )
    if difference > tolerance or equal != decoded:
        raise VerificationError(
            f"{proof.engine} reads another model: {proof.in_words()}", hint=code.advice
        )
    if asked.thresholds and len(answers.texts) < len(asked.prompts):
        raise _proves_too_little(code, f"{len(answers.texts)} of {proof.planned} texts written")
    return proof


def _proves_too_little(code: EngineCode, found: str) -> VerificationError:
    """Return the refusal of an engine that was stopped before it had written behind each prompt."""
    return VerificationError(
        f"{code.name} had {found} in {SECONDS:g} seconds, which proves too little",
        hint="Try again on a machine that does nothing else, or leave --prove out: the bytes are "
        "compared all the same",
    )


def _apart(some: Sequence[Any], others: Sequence[Any], usable: list[int]) -> float:
    """Return the largest difference of logits (length, rows) at tokens, over some texts."""
    pairs = zip(some, others, strict=True)
    return max(float(abs(one[:, usable] - other[:, usable]).max()) for one, other in pairs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute with one thread: forwards this small gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_section(proofs: list[Proof]) -> Mapping[str, Any]:
    """Return what the record of an export keeps of proofs."""
    return {proof.engine: proof.as_dict() for proof in proofs}
