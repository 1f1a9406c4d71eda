"""Publishing: what goes up, how it goes up, and the proof that it arrived."""
