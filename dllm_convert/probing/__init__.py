"""Measure on a small random instance whether a family without an adapter can be converted.

`run.py` and `report.py` are what the rest of the package sees and import neither torch nor
transformers; everything else runs in a process of its own.
"""

from __future__ import annotations

from dllm_convert.probing.report import ProbeReport
from dllm_convert.probing.run import probe_family

__all__ = ["ProbeReport", "probe_family"]
