"""The stages of a conversion in order, each recorded when it is done, resumable."""
