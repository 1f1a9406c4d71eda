"""How long `verify` takes, group by group: python -m benchmarks.verify CHECKPOINT [--against BASE].

Prints seconds per group of probes, the slowest first, and the whole; the import of torch and
transformers is measured apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

LIMIT_S = 90.0
"""What all probes may take on SmolLM2-135M with two quiet cores."""


def main() -> None:
    """Verify as often as asked and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--against", type=Path, help="folder of the base's safetensors")
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()

    started = time.monotonic()
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.verification import verify_checkpoint

    print(f"{'imports':<14}{time.monotonic() - started:7.1f} s")
    totals: list[float] = []
    groups: dict[str, list[float]] = {}
    for _ in range(arguments.runs):
        with quiet_libraries():
            report = verify_checkpoint(arguments.checkpoint, against=arguments.against)
        totals.append(report.seconds)
        for name, seconds in report.groups.items():
            groups.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(values) for name, values in groups.items()}
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{name:<14}{seconds:7.1f} s")
    whole = statistics.median(totals)
    verdicts = [probe.passed for probe in report.probes]
    print(f"{'all':<14}{whole:7.1f} s of {LIMIT_S:g}, {min(totals):.1f} to {max(totals):.1f}")
    print(
        f"{verdicts.count(True)} passed, {verdicts.count(False)} failed, "
        f"{verdicts.count(None)} not run"
    )
    for probe in report.failed:
        print(f"FAILED {probe.name}: {probe.measured}; required {probe.required}; {probe.detail}")


if __name__ == "__main__":
    main()
