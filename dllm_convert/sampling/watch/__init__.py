"""Denoising made visible: frames of what was written when, in a terminal, as a GIF or as a page."""
