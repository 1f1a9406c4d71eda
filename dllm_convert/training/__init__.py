"""Text in, trained checkpoint out: data, trainer, progress."""
