"""Whether the package is right on a GPU, and how fast: `python -m benchmarks.gpu`."""
