"""How large a whole number is that somebody may ask for: steps, tokens, sizes, seeds."""

from __future__ import annotations

LARGEST_COUNT = 2**31 - 1
"""Most of anything that is counted: no size of a tensor and no training comes near it."""
LARGEST_TOKENS = 10**18
"""Most tokens that a training is asked for; the largest of all read 10^14."""
LARGEST_SEED = 2**32 - 1
"""NumPy's largest seed; PyTorch takes more."""
LONGEST_MINUTES = 10**9
"""Longest time that is believed, in minutes: two thousand years."""
