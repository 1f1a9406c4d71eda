"""Layouts that serving engines read: the same weights under other names, proven byte for byte."""
