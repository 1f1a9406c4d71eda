"""What probes measure with: implementations of attention, comparisons, tensors by name."""
