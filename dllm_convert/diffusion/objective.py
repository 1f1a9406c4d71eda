"""What is learnt, and from which text: MDLM or BD3LM, over packed documents.

MDLM (arXiv 2406.07524) runs one noisy stream with full attention. BD3LM (arXiv 2503.09573) runs
noisy streams beside a clean one. They differ in the mask, in which tokens share a noise level, and
in where a prediction is read; everything else is the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.common.terms import ActsOn, Behind, Context, Draft, Kernel, Target
from dllm_convert.diffusion.device import moved
from dllm_convert.diffusion.neighbours import Walk, read_walk
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.diffusion.word_classes import WordClasses


@dataclass(frozen=True)
class Objective:
    """What the model is trained and measured on.

    Attributes:
        target: mdlm or bd3lm.
        mask_token_id: Token that stands for a masked one; no text holds it.
        token_shift: Whether position i is predicted from the hidden state of i-1, as AR models do.
        block_size: Tokens per block, bd3lm only.
        kernel: `absorbing` (a token becomes the mask), `uniform` (it becomes any other) or
            `neighbours` (it becomes one like it, and then any other; D3PM, arXiv 2107.03006).
        vocabulary: Rows of the embedding; the other kernels draw from them.
        context: What a clean token of bd3lm sees of its own block: all of it (`block`) or what
            stands before it (`causal`).
        behind: How noisy tokens stand behind clean ones there: by a mask, or by a copy of the
            base's cache.
        schedule: Discrete-time schedule in which the bound of the other kernels is measured.
        acts_on: Which tokens an adapter acts on: `noisy` where clean ones are the base's.
        draft: Whom a noisy token sees of its block: all of it (`open`) or what stands before it
            (`causal`; the clean stream then is strictly causal as well).
        walk: Which words are alike, of the kernel `neighbours`.
        classes: Which words share an exponent of a schedule that is learnt.
    """

    target: Target
    mask_token_id: int
    token_shift: bool
    block_size: int | None = None
    kernel: Kernel = "absorbing"
    vocabulary: int = 0
    context: Context = "block"
    schedule: Schedule = field(default_factory=Schedule)
    acts_on: ActsOn = "all"
    draft: Draft = "open"
    behind: Behind = "mask"
    walk: Walk | None = None
    classes: WordClasses | None = None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether a corrupted token costs the cross-entropy of the clean one, times a weight."""
        return self.masks and self.classes is None

    @property
    def masks(self) -> bool:
        """Whether noise is a mask; else it is other tokens, and the mask is never shown."""
        return self.kernel == "absorbing"

    @property
    def is_gated(self) -> bool:
        """Whether clean tokens are read by the base, and an adapter acts on noisy ones."""
        return self.acts_on == "noisy"

    @classmethod
    def from_config(cls, config: Any) -> Objective:
        """Read the objective from a converted checkpoint's config, as transformers loads it."""
        folder = Path(getattr(config, "_name_or_path", ""))
        return cls.from_section(DiffusionSection.of(config.diffusion), config.vocab_size, folder)

    @classmethod
    def from_section(cls, section: DiffusionSection, vocabulary: int, folder: Path) -> Objective:
        """Return the objective that a checkpoint was made for.

        Args:
            section: The `diffusion` section of its config.json.
            vocabulary: Rows of the embedding.
            folder: The checkpoint; only the kernel `neighbours` has a file there.

        Raises:
            DataError: That file is missing or broken.
        """
        jumps, exponents = section.noise_jumps, section.noise_exponents
        classes = WordClasses(exponents, section.noise_classes, vocabulary) if exponents else None
        return cls(
            target=section.objective,
            mask_token_id=section.mask_token_id,
            token_shift=section.token_shift,
            block_size=section.block_size,
            kernel=section.noise_kernel,
            vocabulary=vocabulary,
            context=section.context,
            schedule=Schedule(
                # What is learnt begins with it, and is no schedule of all words.
                "linear" if exponents else section.noise_schedule,
                section.noise_power,
                discrete_steps=section.discrete_steps,
            ),
            acts_on=section.acts_on,
            draft=section.draft,
            behind=section.behind,
            walk=None if jumps is None else read_walk(folder, vocabulary, jumps),
            classes=classes,
        )

    @property
    def size(self) -> int:
        """Tokens per block.

        Raises:
            ValueError: If the objective has no blocks.
        """
        if self.block_size is None:
            raise ValueError("bd3lm needs a block size")
        return self.block_size


@dataclass(frozen=True)
class TextBatch:
    """Clean text, possibly several documents to a row.

    Attributes:
        tokens: Token ids, shape (batch, length).
        segments: Document of each token, numbered within its row, -1 at padding; (batch, length).
        positions: Position of each token in its document, from 0, shape (batch, length).
        loss: Tokens that may be masked and scored, shape (batch, length), bool; None for all. In a
            chat, the assistant's only.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    loss: torch.Tensor | None = None

    def to(self, device: torch.device) -> TextBatch:
        """Return the same text on a device."""
        return TextBatch(**{name: moved(value, device) for name, value in vars(self).items()})

    @property
    def scorable(self) -> torch.Tensor:
        """Tokens that are predicted: of `loss`, no padding, no document's first; (batch, length).

        The first token has nothing before it: autoregressive models do not score it either, so
        likelihoods of both kinds count the same tokens.
        """
        inside = (self.segments >= 0) & (self.positions > 0)
        return inside if self.loss is None else inside & self.loss

    def blocks(self, size: int) -> torch.Tensor:
        """Block of each token, counted from position 0 of its document, rising along the row."""
        padding = self.segments < 0
        starts = torch.where(
            padding,
            padding.long().diff(dim=-1, prepend=padding[:, :1]) > 0,
            self.positions % size == 0,
        )
        return starts.long().cumsum(-1)

    def noise_groups(self, objective: Objective) -> torch.Tensor:
        """Tokens that share a noise level: a block (BD3LM), a document (MDLM); (batch, length)."""
        whole = self.tokens.shape[1]
        return self.blocks(objective.size if objective.target == "bd3lm" else whole)
