"""Proof by the engine's own code: its logits are ours, and it writes the tokens that we write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import VerificationError
from dllm_convert.serving.engines import Answers, EngineCode, Questions, running

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

    @property
    def passed(self) -> bool:
        """Whether it is the same model to the engine."""
        return self.difference <= self.tolerance and self.equal == self.decoded > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self) | {"passed": self.passed}

    def in_words(self) -> str:
        """Return the result in a line."""
        stopped = f", {self.texts} of {self.planned} texts in the time there was"
        return (
            f"logits differ by at most {self.difference:.1e} (bound {self.tolerance:.2g}), "
            f"{self.equal} of {self.decoded} decoded tokens equal"
            + (stopped if self.texts < self.planned else "")
        )


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
            thresholds=THRESHOLDS,
            new=_NEW_TOKENS if small else _FEW,
            block=own if own <= _BLOCKS else _SMALLER,
        )

    def logits(self, prompt: tuple[int, ...]) -> Any:
        """Return our logits at a prompt, (length, rows)."""
        import torch

        with torch.no_grad():
            found = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        return found.float().numpy()

    def exact(self, prompts: Sequence[tuple[int, ...]]) -> list[Any]:
        """Return our logits at prompts as float64 has them; what ours lose is lost in float32."""
        import torch

        self.model.to(torch.float64)
        try:
            with torch.no_grad():
                return [
                    self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].numpy()
                    for prompt in prompts
                ]
        finally:
            self.model.to(torch.float32)

    def write(self, prompt: tuple[int, ...], asked: Questions, threshold: float) -> list[int]:
        """Return what we write behind a prompt."""
        import torch

        from dllm_convert.modeling.denoising import denoised

        config = self.model.config
        own, config.block_size = config.block_size, asked.block
        try:
            text = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=asked.new,
                max_denoising_steps=asked.block,
                confidence_threshold=threshold,
                eos_token_id=None,
                **denoised(self.model),
            )
        finally:
            config.block_size = own
        return list(text[0, len(prompt) :].tolist())


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
    subject = Subject.load(folder, mask=mask, tokens=tokens)
    asked = subject.questions()
    ours: dict[tuple[float, int], list[int]] = {}
    proofs = []
    with _one_thread():
        for code in engines:
            with running(code) as process:
                planned = len(asked.prompts) * (1 + len(asked.thresholds))
                with reporter.task(f"{code.name} reads and writes", total=planned) as task:
                    answers = process.ask(out, asked, SECONDS, task.advance)
            _refuse_silence(code, answers, asked)
            with reporter.task("compare with ours", total=len(answers.texts)) as task:
                proof = _compared(code, subject, asked, answers, ours, task.advance)
            proofs.append(proof)
    for proof in proofs:
        if not proof.passed:
            raise VerificationError(
                f"{proof.engine} reads another model: {proof.in_words()}",
                hint="Nothing was written. Report it, with the versions of both",
            )
    return proofs


def _refuse_silence(code: EngineCode, answers: Answers, asked: Questions) -> None:
    """Refuse what proves too little: every prompt is to be read, and written behind once."""
    if len(answers.texts) < len(asked.prompts):
        raise VerificationError(
            f"{code.name} answered {len(answers.texts)} of {len(asked.prompts)} prompts in "
            f"{SECONDS:g} seconds, which proves too little",
            hint="Try again on a machine that does nothing else, or leave --prove out: the bytes "
            "are compared all the same",
        )


def _compared(
    code: EngineCode,
    subject: Subject,
    asked: Questions,
    answers: Answers,
    ours: dict[tuple[float, int], list[int]],
    advance: Any,
) -> Proof:
    """Compare answers with ours, of which those that were computed already are kept."""
    mine = [subject.logits(prompt) for prompt in asked.prompts]
    difference, tolerance = _apart(answers.logits, mine, subject.usable), TOLERANCE
    if difference > TOLERANCE:
        exact = subject.exact(asked.prompts)
        difference = _apart(answers.logits, exact, subject.usable)
        tolerance = max(TOLERANCE, ROUNDING * _apart(mine, exact, subject.usable))
    equal = decoded = 0
    for (threshold, number), text in answers.texts.items():
        if (threshold, number) not in ours:
            ours[threshold, number] = subject.write(asked.prompts[number], asked, threshold)
        known = ours[threshold, number]
        decoded += len(known)
        equal += sum(one == other for one, other in zip(known, text, strict=False))
        advance()
    return Proof(
        engine=f"{code.name} {code.version}",
        difference=difference,
        tolerance=tolerance,
        texts=len(answers.texts),
        planned=len(asked.prompts) * len(asked.thresholds),
        decoded=decoded,
        equal=equal,
    )


def _apart(some: Sequence[Any], others: Sequence[Any], usable: list[int]) -> float:
    """Return the largest difference of logits (length, rows) at tokens, over some prompts."""
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
