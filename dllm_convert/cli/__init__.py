"""The command line: parse, call, print, exit code."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from dllm_convert.cli.app import main as run

    run()
