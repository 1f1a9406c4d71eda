"""The `diffusion` section of config.json: what a converted model was made to be.

Written once, by the plan, and read here by everybody but the published modelling file, which stands
alone and reads three keys of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.common.terms import ActsOn, Behind, Context, Draft, Kernel, Target

FORMAT_VERSION = 1
NEIGHBOURS_FILE = "noise_neighbours.npy"
"""Which words are near to each, beside the weights, where noise walks among them: int32, shape
(rows of the embedding, k)."""
LEARNT = ("noise_exponents", "noise_classes")
"""What a training writes into the section: no plan knows it."""
ATTENTION: Mapping[str, str] = {"mdlm": "bidirectional", "bd3lm": "block-causal"}
"""Objective to the attention it means."""


@dataclass(frozen=True)
class DiffusionSection:
    """What a converted model is.

    Attributes:
        objective: mdlm or bd3lm.
        block_size: Tokens per block; None for mdlm.
        mask_token_id: Id of the mask.
        token_shift: Whether position i is predicted from the hidden state of i-1.
        noise_schedule: linear, cosine, polynomial or learned.
        noise_power: Exponent of the polynomial.
        noise_kernel: What corrupts a token.
        discrete_steps: T of the bound in discrete time; None: continuous time.
        noise_jumps: How often a word becomes one like it, at t = 1; kernel `neighbours` only.
        noise_exponents: w of each class of words, alpha(t) = 1 - t^w; of a learned schedule only.
        noise_classes: Ids of the words of all classes but the last, which has the others.
        context: What a clean token of bd3lm sees of its own block.
        acts_on: Which tokens the adapter acts on: `noisy` where the weights are the base's and an
            adapter lies beside them; `all` where there is one set of weights.
        adapter_rank: Rank of the adapter's matrices; this and the next two where it acts on noisy
            tokens.
        adapter_alpha: Their product is multiplied with alpha / rank.
        adapter_targets: Names of the linear layers that have one.
        adapter_norms: Names of the norms whose weights noisy tokens have scaled.
        draft: Whom a noisy token sees of its block; `causal` where clean ones see no more either.
        behind: How noisy tokens stand behind clean ones there; by a cache drafts are causal.
    """

    objective: Target
    block_size: int | None
    mask_token_id: int
    token_shift: bool
    noise_schedule: str = "linear"
    noise_power: float = 2.0
    noise_kernel: Kernel = "absorbing"
    discrete_steps: int | None = None
    noise_jumps: float | None = None
    noise_exponents: tuple[float, ...] = ()
    noise_classes: tuple[tuple[int, ...], ...] = ()
    context: Context = "block"
    acts_on: ActsOn = "all"
    adapter_rank: int | None = None
    adapter_alpha: int | None = None
    adapter_targets: tuple[str, ...] = ()
    adapter_norms: tuple[str, ...] = ()
    draft: Draft = "open"
    behind: Behind = "mask"

    @property
    def is_gated(self) -> bool:
        """Whether the weights are the base's, and an adapter acts on noisy tokens only."""
        return self.acts_on == "noisy"

    @property
    def masks(self) -> bool:
        """Whether noise is a mask; else it is other tokens, and the mask is never shown."""
        return self.noise_kernel == "absorbing"

    @property
    def attention(self) -> str:
        """Attention of the noisy tokens: bidirectional or block-causal."""
        return ATTENTION[self.objective]

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> DiffusionSection:
        """Read a section that is known to be sound; what it leaves out has its default.

        Args:
            section: As config.json has it. Of another origin it is checked first, by
                `modeling.converted_config.read_section`.
        """
        known = {key: section[key] for key in cls.__dataclass_fields__ if key in section}
        lists = {
            "adapter_targets": tuple(known.get("adapter_targets", ())),
            "adapter_norms": tuple(known.get("adapter_norms", ())),
            "noise_exponents": tuple(known.get("noise_exponents", ())),
            "noise_classes": tuple(map(tuple, known.get("noise_classes", ()))),
        }
        return cls(**known | lists)

    def as_dict(self) -> dict[str, Any]:
        """Return the section as config.json has it: what is at its default is left out."""
        section: dict[str, Any] = {
            "objective": self.objective,
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "token_shift": self.token_shift,
            "noise_schedule": self.noise_schedule,
            "attention": self.attention,
            "format_version": FORMAT_VERSION,
        }
        if self.noise_schedule == "polynomial":
            section["noise_power"] = self.noise_power
        if self.noise_exponents:
            section["noise_exponents"] = list(self.noise_exponents)
            section["noise_classes"] = list(map(list, self.noise_classes))
        if not self.masks:
            section |= {"noise_kernel": self.noise_kernel, "discrete_steps": self.discrete_steps}
        if self.noise_jumps is not None:
            section["noise_jumps"] = self.noise_jumps
        if self.context == "causal":
            section["context"] = self.context
        if self.is_gated:
            section |= {
                "acts_on": self.acts_on,
                "adapter_rank": self.adapter_rank,
                "adapter_alpha": self.adapter_alpha,
                "adapter_targets": list(self.adapter_targets),
            }
        if self.adapter_norms:
            section["adapter_norms"] = list(self.adapter_norms)
        if self.draft == "causal":
            section["draft"] = self.draft
        if self.behind == "cache":
            section["behind"] = self.behind
        return section


def diffusion_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a conversion wrote into config.json, None if the model is no conversion.

    The values are as they stand there: nobody has checked them yet.
    """
    section = config.get("diffusion")
    return section if isinstance(section, Mapping) else None
