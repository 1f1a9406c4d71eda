"""The version of this package: the one home of the number."""

__version__ = "0.1.0"
