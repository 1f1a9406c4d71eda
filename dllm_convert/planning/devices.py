"""The devices that plans estimate for, in one table, and what this machine is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """Something to train on.

    Attributes:
        name: For people.
        flops: Operations per second that a training reaches: the peak times the utilisation.
        memory: Bytes of memory of one.
        gpu: Whether it is a GPU.
        bf16: Whether it multiplies bfloat16 natively.
        source: Where the numbers are from.
    """

    name: str
    flops: float
    memory: int
    gpu: bool
    bf16: bool
    source: str


UTILISATION = 0.2
"""Share of a GPU's peak that a conversion reaches, assumed.

Fast-dLLM v2's 7B (arXiv 2509.26328; 1.3B tokens in 768 A100-hours) reached 0.18 by the formulas of
`costs.py`. Pretraining reaches more (Llama 3 405B 0.38 to 0.43 on H100, 2407.21783, table 4), small
models and short steps less.
"""
USABLE_MEMORY = 0.95
"""Share of a GPU's memory that is planned with; the caching allocator wastes some."""


def _gpu(name: str, sheet: str, tflops: int, gigabytes: int) -> Device:
    return Device(
        name,
        tflops * 1e12 * UTILISATION,
        gigabytes * 10**9,
        gpu=True,
        bf16=True,
        source=f"NVIDIA {sheet} data sheet: {tflops:,} TFLOP/s bf16 dense, {gigabytes} GB; "
        f"{UTILISATION} of it assumed",
    )


GPUS = (
    _gpu("A100 80GB", "A100", 312, 80),
    _gpu("H100 80GB", "H100 SXM", 989, 80),
    _gpu("H200 141GB", "H200 SXM", 989, 141),
    _gpu("B200 180GB", "DGX B200", 2250, 180),
)


def known_gpu(name: str) -> Device | None:
    """Return what is known of a GPU by the name its driver has for it; None if nothing is."""
    words = re.split(r"[\s-]+", name)
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in words), None)


_CORE_FLOPS = {True: 1.8e11, False: 8.4e10}
"""Per core with bfloat16 instructions and without, measured: SmolLM2-135M, full steps of 2 x 128
tokens with complementary masks, by the formulas of `costs.py`: 184 and 85 tokens per second (in
float32) on 2 cores of an AMD EPYC with avx512_bf16. Machines of that name differ by two."""


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def this_cpu() -> Device:
    """Describe the processor this runs on; 0 bytes of memory where the system does not say."""
    cores, bf16 = _cores(), _multiplies_bf16()
    return cpu(cores, _memory(), bf16=bf16)


def cpu(cores: int, memory: int, *, bf16: bool) -> Device:
    """Describe a processor.

    Args:
        cores: Number of cores; speed is taken to grow with them.
        memory: Bytes.
        bf16: Whether it multiplies bfloat16 natively.
    """
    per_core = _CORE_FLOPS[bf16]
    return Device(
        f"this CPU, {cores} cores",
        per_core * cores,
        memory,
        gpu=False,
        bf16=bf16,
        source=f"measured on 2 cores of an AMD EPYC: {per_core / 1e9:.0f} GFLOP/s per core",
    )
