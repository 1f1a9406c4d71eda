"""Layouts that serving engines read, as declarations: what they are, and what they cannot hold."""
