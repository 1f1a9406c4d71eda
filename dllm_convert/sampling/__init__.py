"""Decoding by denoising."""

DEFAULT_PROMPT = "The meaning of a name in a program is"
"""What is written on when nobody says what: by `sample`, by a run, in the card."""
