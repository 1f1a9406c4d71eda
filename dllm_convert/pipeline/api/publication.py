"""Document a converted checkpoint, and put it on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import RequestError

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions, PushResult
    from dllm_convert.serving.run import Export


@dataclass(frozen=True)
class Documents(Printed):
    """What people read of a checkpoint.

    Attributes:
        path: README.md, the model card.
        report: report.html.
    """

    path: Path
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Return what `card --json` prints."""
        return {"path": str(self.path), "report": str(self.report)}

    def as_blocks(self) -> list[Block]:
        """Return the path of the card."""
        return [str(self.path)]


def write_card(checkpoint: str | Path) -> Documents:
    """Write README.md, the model card, and report.html of a converted checkpoint anew.

    Args:
        checkpoint: The folder.

    Raises:
        DataError: The folder has no manifest of ours, or cannot be written.
    """
    from dllm_convert.card.readme import write_card as write_readme
    from dllm_convert.card.report import write_report

    # The card links to the report where there is one.
    report = write_report(Path(checkpoint))
    return Documents(write_readme(Path(checkpoint)), report)


def export(
    checkpoint: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    prove: bool = False,
    outtype: str | None = None,
    base: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Export:
    """Write a converted checkpoint in the layout of a serving engine, proven byte for byte.

    Args:
        checkpoint: The folder; only read.
        to: The layout: `sdar` (SGLang, LMDeploy), `llada2` (SGLang, mlx-vlm), `gguf`
            (llama.cpp), `gguf-diffusion` (llama-diffusion-cli), `nemotron` (vLLM, mlx-vlm), `a2d`
            (dLLM); or `merged`, an adapter and its base as one checkpoint.
        out: Folder to create; None: beside the checkpoint, with the layout's name behind.
        data: Text file to measure on how likely the mask is; None: Python's language reference.
        prove: Whether an engine's own code, which has to be installed, must agree in logits and
            in decoded tokens.
        outtype: Type of the matrices of a GGUF file: `f32`, `f16`, `bf16`, `q8_0`, by llama.cpp's
            quantiser `q4_0`, `q4_k_m`, `q5_k_m`, `q6_k`; None, or `auto`, as they are.
        base: Folder or Hub id of the base of an adapter, for `merged`; None: as the manifest says.
        reporter: Progress; by default silent.

    Raises:
        DataError: A file is broken or missing, the folder is there, or the disk is full.
        IncompatibleError: The engine would read the model wrong.
        RequestError: There is no such layout, or no engine to prove it by.
        VerificationError: The engine reads another model.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.planning.layouts.registry import MERGED
    from dllm_convert.serving.run import export as exported

    if to == MERGED:
        from dllm_convert.serving.merged import merge

        for argument, asked in (("data", data is not None), ("prove", prove)):
            if asked:
                raise RequestError(
                    f"`{argument}` is about engines' layouts; {MERGED} is compared with the class "
                    "in any case",
                    argument=argument,
                )
        with quiet_libraries():
            return merge(
                Path(checkpoint),
                None if out is None else Path(out),
                base=None if base is None else str(base),
                reporter=reporter,
            )
    if base is not None:
        raise RequestError(f"`base` is for `to={MERGED}`", argument="base")
    with quiet_libraries():
        return exported(
            Path(checkpoint),
            to,
            None if out is None else Path(out),
            data=None if data is None else Path(data),
            proven=prove,
            outtype=outtype,
            reporter=reporter,
        )


def push_options(
    repo_id: str, *, max_shard_size: int | str | None = None, **given: Any
) -> PushOptions:
    """Return where and how to publish.

    Args:
        repo_id: Repository.
        max_shard_size: Bytes per weight file, or text as `"5GB"`.
        **given: Other fields of `PushOptions`.

    Raises:
        RequestError: They contradict each other.
    """
    from dllm_convert.publishing import PushOptions
    from dllm_convert.publishing.reshard import parse_size

    if given.get("create_pr") and given.get("revision"):
        raise RequestError("give `create_pr` or `revision`, a pull request has its own")
    try:
        size = parse_size(str(max_shard_size)) if max_shard_size else None
    except ValueError as error:
        raise RequestError(str(error), argument="max_shard_size") from error
    return PushOptions(repo_id, max_shard_size=size, **given)


def push(
    checkpoint: str | Path,
    repo_id: str | PushOptions,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> PushResult:
    """Publish a converted checkpoint, or an export of one, and check what arrived there.

    Args:
        checkpoint: The folder.
        repo_id: `namespace/name`, or a name in your own.
        reporter: Progress; None tells it on stderr.
        **options: `public`, `revision`, `create_pr`, `commit_message`, `max_shard_size`,
            `overwrite_card`, `adapter_only`, `force_unverified`, `base_model`; see `PushOptions`.

    Raises:
        VerificationError: It was not verified, or failed; or what was published does not work.
        IncompatibleError: The base's licence does not allow it as asked.
        HubError: The Hub refuses it or cannot be reached.
    """
    from dllm_convert.publishing import push_checkpoint

    asked = push_options(repo_id, **options) if isinstance(repo_id, str) else repo_id
    return push_checkpoint(Path(checkpoint), asked, reporter or Reporter())
