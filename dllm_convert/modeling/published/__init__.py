"""All that travels with a converted model: needs torch and transformers, nothing of ours.

`attention.py`, the masks of training and scoring, stays behind.
"""
