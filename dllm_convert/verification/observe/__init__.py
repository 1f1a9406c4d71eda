"""What pictures are drawn from: attention, curves, a recorded decoding, as plain values."""
