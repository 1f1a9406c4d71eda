"""All that travels with a converted model: needs torch and transformers, nothing of ours."""
