"""`card` and `push`: document a converted checkpoint, and publish it."""

from __future__ import annotations

from dllm_convert.cli import options as option
from dllm_convert.cli.commands.shared import make_reporter, show_done, typed
from dllm_convert.cli.values import push_options


def card(checkpoint: option.Checkpoint, as_json: option.Json = False) -> None:
    """Write README.md, the model card, and report.html of a converted checkpoint anew."""
    from dllm_convert.pipeline.api.publication import write_card

    show_done(write_card(checkpoint), as_json=as_json)


def export(
    checkpoint: option.Checkpoint,
    to: option.ExportTarget,
    out: option.ExportOut = None,
    data: option.ExportData = None,
    prove: option.Prove = False,
    outtype: option.Outtype = None,
    base: option.ExportBase = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write a converted checkpoint in the layout of a serving engine, proven byte for byte."""
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.pipeline.api.publication import export as exported

    with typed():
        result = exported(
            checkpoint,
            to,
            out,
            data=data,
            prove=prove,
            outtype=outtype,
            base=base,
            reporter=reporter,
        )
    show_done(result, as_json=as_json)


def push(
    checkpoint: option.Checkpoint,
    repo_id: option.RepoId,
    public: option.Public = None,
    revision: option.PushRevision = None,
    create_pr: option.CreatePr = False,
    commit_message: option.CommitMessage = None,
    max_shard_size: option.MaxShardSize = None,
    overwrite_card: option.OverwriteCard = False,
    adapter_only: option.AdapterOnly = False,
    force_unverified: option.ForceUnverified = False,
    base_model: option.BaseModel = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Publish a converted checkpoint, or an export of one, and check what arrived there."""
    reporter = make_reporter(quiet=quiet or as_json)
    options = push_options(
        repo_id,
        public=public,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        max_shard_size=max_shard_size,
        overwrite_card=overwrite_card,
        adapter_only=adapter_only,
        force_unverified=force_unverified,
        base_model=base_model,
    )
    from dllm_convert.pipeline.api.publication import push as pushed

    result = pushed(checkpoint, options, reporter=reporter)
    show_done(result, as_json=as_json)
