"""What a loaded model does when its input changes: measured, and judged by whoever asks."""
