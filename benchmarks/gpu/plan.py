"""What the plan says of one GPU, as the table of docs/gpu.md.

python -m benchmarks.gpu.plan                      # print it
python -m benchmarks.gpu.plan --write docs/gpu.md  # and write it between its marks
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.models import shape_of
from dllm_convert.planning.devices import GPUS, UTILISATION, Device
from dllm_convert.planning.estimate import DeviceEstimate, estimate_device
from dllm_convert.recipe.schema import Recipe

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
CARDS = (
    # Peak by NVIDIA's whitepaper of the Ada architecture, bf16 with float32 sums, dense.
    Device("RTX 4090 24GB", 165e12 * UTILISATION, 24 * 10**9, gpu=True, bf16=True, source="Ada"),
    *(device for device in GPUS if device.name in ("H100 80GB", "H200 141GB")),
)
SIZES = ("135M", "1.5B", "7B")


def estimates() -> Iterator[tuple[str, str, DeviceEstimate]]:
    """Yield the size, the method, and what the plan says of each card."""
    for size in SIZES:
        for method in ("full", "lora"):
            recipe = Recipe.model_validate(
                {
                    "source": "any",
                    "target": "bd3lm",
                    "block_size": 32,
                    "noise": {"complementary": True},
                    "data": {"sequence_length": 1024},
                    "training": {
                        "method": method,
                        "batch_size": "auto",
                        "gradient_accumulation": 32,
                        "steps": 1000,
                    },
                }
            )
            for card in CARDS:
                yield size, method, estimate_device(shape_of(size), recipe, card)


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | method | card | rows a forward | checkpointing | peak | 1,000 steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, method, found in estimates():
        peak, hours = f"{found.memory / 1e9:.0f} GB", f"{found.hours:.2g} h"
        if not found.fits:
            way = f", or with `{found.fits_with}`" if found.fits_with else ""
            peak, hours = f"{peak}: {found.devices_needed} cards{way}", ""
        cells = (size, method, found.device, str(found.sequences_per_forward))
        lines.append(f"| {' | '.join((*cells, found.checkpointing, peak, hours))} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    print(table())
    if options.write:
        options.write.write_text(written(options.write.read_text()))


if __name__ == "__main__":
    main()
