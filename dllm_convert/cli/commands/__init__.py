"""The commands: each parses its options, calls one function, prints what it returns."""
