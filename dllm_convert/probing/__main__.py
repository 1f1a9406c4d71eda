"""The process that measures: a request on stdin, a report as one line of JSON on stdout."""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dllm_convert.common import strict_json
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.probing.family import measure_family


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    with quiet_libraries():
        report = measure_family(request["config"], request["tensors"])
    sys.stdout.write(strict_json.dumps(report.as_dict(), default=str) + "\n")


if __name__ == "__main__":
    main()
