"""What a checkpoint is, read from headers, config and tokenizer files; no weight is loaded."""
