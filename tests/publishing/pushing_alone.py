"""A push without what loads torch: what is published is compared byte by byte.

Other tests run the whole command. Arguments: folder, repository, whether as a pull request.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.publishing import PushOptions, confirm, push_checkpoint
from dllm_convert.publishing import run as publish_run


def main() -> int:
    folder, repo_id, create_pr = sys.argv[1:]
    confirm.short_verification = lambda *_: ()
    publish_run.quiet_libraries = nullcontext
    options = PushOptions(repo_id, create_pr=create_pr == "True")
    try:
        push_checkpoint(Path(folder), options, Reporter(quiet=True))
    except DllmConvertError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


sys.exit(main())
