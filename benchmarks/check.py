"""Time of a local `check`, process start included, and what it imports.

    python -m benchmarks.check SOURCE

SOURCE is a folder or a .gguf file. The least of several runs is what the command needs: the others
had to wait for the machine. Modules are counted by the package they belong to.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import subprocess
import sys
import time

from dllm_convert.cli.output import write
from dllm_convert.common.tables import Table, text_of

COUNT = """
import json, sys
from dllm_convert.cli.app import app
app(sys.argv[1:], standalone_mode=False)
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


def seconds(line: list[str]) -> float:
    """Run a command once."""
    started = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def modules(arguments: list[str]) -> collections.Counter[str]:
    """Count the modules that are loaded at the end, by top-level package."""
    line = [sys.executable, "-c", COUNT, *arguments]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    names = done.stderr.strip().strip("[]").replace('"', "").split(", ")
    return collections.Counter(name.partition(".")[0] for name in names)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    arguments = ["check", options.source]
    times = [
        seconds([sys.executable, "-m", "dllm_convert", *arguments]) for _ in range(options.repeats)
    ]
    shown = (min(times), statistics.median(times), max(times))
    write("wall seconds, least, median, largest: " + ", ".join(f"{t:.2f}" for t in shown))
    write(text_of([Table(("package", "modules"), modules(arguments).most_common(8))]))


if __name__ == "__main__":
    main()
