"""A check for several machines: what they exchange, and what is left when one of them dies."""
