"""Write the untrained conversion: weights streamed from file to file, config, tokenizer, code."""
