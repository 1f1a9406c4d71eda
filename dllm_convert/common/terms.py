"""Words of the field that a recipe, a plan and the mathematics share."""

from __future__ import annotations

from typing import Literal

Target = Literal["mdlm", "bd3lm"]
"""Objective: one noisy stream with full attention, or blocks behind clean text."""
Kernel = Literal["absorbing", "uniform", "neighbours"]
"""What corrupts a token: it becomes the mask, any other token, or by and by one like it and then
any other (D3PM, arXiv 2107.03006)."""
Context = Literal["block", "causal"]
"""What a clean token of bd3lm sees of its own block: all of it, or what stands before it."""
Draft = Literal["open", "causal"]
"""Whom a noisy token of bd3lm sees of its block: all of it, or what stands before it."""
Behind = Literal["mask", "cache"]
"""How noisy tokens stand behind a kept base's clean ones: by a mask over both in one forward, or in
rows of their own, each on a copy of the base's cache."""
ActsOn = Literal["all", "noisy"]
"""Which tokens an adapter acts on: all, or the noisy ones, and clean ones are the base's."""
Divergence = Literal["forward_kl", "reverse_kl", "total_variation"]
"""What is made small between a teacher's distribution and the student's."""
