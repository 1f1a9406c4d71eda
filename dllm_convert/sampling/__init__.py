"""Decoding by denoising."""
