"""`python -m dllm_convert`, the same as the command `dllm-convert`."""

from dllm_convert.cli.app import main

main()
