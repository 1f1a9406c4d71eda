"""Evaluation: likelihood of answers and generation, the same for a base and its conversion."""
