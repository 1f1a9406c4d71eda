"""The diffusion classes: written beside the weights of an output, and loaded from there."""
