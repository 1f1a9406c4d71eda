"""The options of the command line: their names, limits and help texts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dllm_convert.cli import completion
from dllm_convert.cli.errors import JSON_KEY
from dllm_convert.cli.output import write
from dllm_convert.cli.types import count, count_from_zero, named, offering, one_of, path_of
from dllm_convert.common.version import __version__


class TargetName(StrEnum):
    """What a checkpoint is converted to: the schema's `Target`, without importing pydantic."""

    MDLM = "mdlm"
    BD3LM = "bd3lm"


class Integration(StrEnum):
    """Where a training can log to: the schema's, without importing pydantic."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[JSON_KEY] = value
    return value


def _show_version(value: bool) -> None:
    if value:
        write(f"dllm-convert {__version__}")
        raise typer.Exit


class EngineName(StrEnum):
    """Who can be asked to serve a conversion: the recipe's `Serve`, without importing pydantic."""

    SGLANG = "sglang"
    LMDEPLOY = "lmdeploy"
    MLX_VLM = "mlx-vlm"
    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"
    LLAMA_DIFFUSION_CLI = "llama-diffusion-cli"
    DLLM = "dllm"


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_remember_json, help="Print one JSON document on stdout, and no bars."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and the result only.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every probe and all that was measured.")
]

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        parser=named,
        autocompletion=completion.sources,
        help="Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", parser=path_of, help="Folder that `run` wrote.", show_default=False
    ),
]
Published = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        parser=named,
        help="Folder that `run` wrote, or Hub id of a published one.",
        show_default=False,
    ),
]
CheckpointOrGguf = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        parser=named,
        help="Folder that `run` wrote, Hub id of a published one, or GGUF file.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", parser=named, metavar="REV", help="Branch, tag or commit of a Hub id."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        autocompletion=completion.recipes,
        help="Show this one, with every field.",
    ),
]

To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="mdlm|bd3lm",
        parser=one_of(TargetName),
        autocompletion=offering(TargetName),
        help="What to convert to, instead of the recipe's.",
    ),
]
Block = Annotated[
    int | None,
    typer.Option("--block", parser=count, metavar="N", help="Tokens per block, for bd3lm only."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", parser=path_of, help="Output folder; default ./NAME-TARGET."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        parser=named,
        help="Training text: pydoc, files or globs, a Hub dataset id; NAME:0.7,NAME:0.3 mixes.",
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", parser=count, metavar="N", help="Optimizer steps.")
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="N",
        help="Tokens to train on, instead of steps: 5M, 1.5B. Padding counts.",
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="TIME", help="Stop training after 90m, 2h or 1h30m."),
]
GlobalBatch = Annotated[
    int | None,
    typer.Option(
        "--global-batch",
        parser=count,
        metavar="N",
        help="Sequences per optimizer step: batch size x accumulation x processes.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        autocompletion=completion.presets,
        help="Take the settings of this preset; other options and --set win over it.",
    ),
]
Serve = Annotated[
    str | None,
    typer.Option(
        "--serve",
        parser=one_of(EngineName),
        autocompletion=offering(EngineName),
        metavar="|".join(EngineName),
        help="Engine that is to serve the result: chooses what it needs to read it.",
    ),
]
LoraRank = Annotated[
    int | None, typer.Option("--lora", parser=count, metavar="R", help="Train LoRA of this rank.")
]
Full = Annotated[bool, typer.Option("--full", help="Train all weights.")]
NoTrain = Annotated[bool, typer.Option("--no-train", help="Convert without training.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=completion.fields,
        help="Set any field of the recipe, as in training.learning_rate=2e-5. Repeatable.",
    ),
]
KeepAdapter = Annotated[
    bool, typer.Option("--keep-adapter", help="Write the LoRA adapter beside the merged weights.")
]
KeepBase = Annotated[
    bool,
    typer.Option(
        "--keep-base",
        help="With --lora: leave the base as it is; the adapter lies beside it and acts on noisy "
        "tokens only.",
    ),
]
SourceRevision = Annotated[
    str | None,
    typer.Option(
        "--source-revision",
        metavar="REV",
        parser=named,
        help="Branch, tag or commit of a Hub SOURCE.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to",
        parser=one_of(Integration),
        autocompletion=offering(Integration),
        metavar="tensorboard|wandb|trackio",
        help="Log the training there too. Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop, as check does.")]

_LAUNCH = "Several processes"
Processes = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        parser=count,
        metavar="N",
        rich_help_panel=_LAUNCH,
        help="Train with N processes, one per GPU, of all machines together.",
    ),
]
Machines = Annotated[
    int | None,
    typer.Option(
        "--num-machines",
        parser=count,
        metavar="N",
        rich_help_panel=_LAUNCH,
        help="Machines that the processes are on; each runs the same command.",
    ),
]
MachineRank = Annotated[
    int | None,
    typer.Option(
        "--machine-rank",
        parser=count_from_zero,
        metavar="N",
        rich_help_panel=_LAUNCH,
        help="Number of this machine, from 0.",
    ),
]
MainAddress = Annotated[
    str | None,
    typer.Option(
        "--main-address",
        parser=named,
        metavar="HOST[:PORT]",
        rich_help_panel=_LAUNCH,
        help="Where all machines reach machine 0.",
    ),
]
LaunchConfig = Annotated[
    Path | None,
    typer.Option(
        "--launch-config",
        metavar="FILE",
        parser=path_of,
        rich_help_panel=_LAUNCH,
        help="Accelerate config, such as recipes/launch/fsdp2.yaml: what the processes share.",
    ),
]

_HUB = "Publishing"
ExportTarget = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="LAYOUT",
        parser=named,
        help="sdar (SGLang, LMDeploy), llada2 (SGLang, mlx-vlm), gguf, gguf-diffusion (llama.cpp), "
        "nemotron (vLLM, mlx-vlm), a2d (dLLM); or merged: an adapter and its base as one "
        "checkpoint.",
        show_default=False,
    ),
]
ExportOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", parser=path_of, help="Output folder; CHECKPOINT-LAYOUT."),
]
ExportData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        parser=path_of,
        help="Text to measure on how likely the mask is; Python's reference.",
    ),
]
ExportBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="SOURCE",
        parser=named,
        help="Base of an adapter, for --to merged, where it is not where it was.",
    ),
]
Prove = Annotated[
    bool,
    typer.Option(
        "--prove", help="Compare logits and decoded tokens with an engine's own, installed code."
    ),
]
Outtype = Annotated[
    str | None,
    typer.Option(
        "--outtype",
        metavar="TYPE",
        parser=named,
        help="Matrices of a GGUF file: f32, f16, bf16, q8_0; by llama.cpp's quantiser q4_0, "
        "q4_k_m, q5_k_m, q6_k; auto, as the checkpoint has them.",
    ),
]
RepoId = Annotated[
    str,
    typer.Argument(
        metavar="REPO_ID",
        parser=named,
        help="namespace/name, or a name in your own.",
        show_default=False,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO_ID",
        parser=named,
        rich_help_panel=_HUB,
        help="Publish the finished checkpoint there.",
    ),
]
Public = Annotated[
    bool | None,
    typer.Option(
        "--public/--private",
        rich_help_panel=_HUB,
        help="Visibility of a new repository; private if neither is given.",
        show_default=False,
    ),
]
PushRevision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="BRANCH",
        parser=named,
        rich_help_panel=_HUB,
        help="Branch to push to, made if it does not exist.",
    ),
]
CreatePr = Annotated[
    bool,
    typer.Option("--create-pr", rich_help_panel=_HUB, help="Propose the files as a pull request."),
]
CommitMessage = Annotated[
    str | None,
    typer.Option(
        "--commit-message", metavar="TEXT", rich_help_panel=_HUB, help="First line of the commit."
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        rich_help_panel=_HUB,
        help="Split weights into files of at most this size, as in 5GB.",
    ),
]
OverwriteCard = Annotated[
    bool,
    typer.Option(
        "--overwrite-card",
        rich_help_panel=_HUB,
        help="Replace a README.md that a person wrote or edited; it is kept otherwise.",
    ),
]
AdapterOnly = Annotated[
    bool,
    typer.Option(
        "--adapter-only", rich_help_panel=_HUB, help="Publish the LoRA adapter, not the weights."
    ),
]
ForceUnverified = Annotated[
    bool,
    typer.Option(
        "--force-unverified",
        rich_help_panel=_HUB,
        help="Publish what failed verification or was never verified; the card says so first.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="REPO_ID",
        parser=named,
        rich_help_panel=_HUB,
        help="Of an export: where its conversion is; not needed for a --revision of that.",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Read pickled weights (.bin), without running code in them."
    ),
]

_GENERIC = "Families without an adapter"
Probe = Annotated[
    bool,
    typer.Option(
        "--probe",
        rich_help_panel=_GENERIC,
        help="Measure on a small random instance whether the family can be converted; check only.",
    ),
]
AllowEpochs = Annotated[
    bool,
    typer.Option(
        "--allow-epochs", help="Read the text more than 20 times, which is refused otherwise."
    ),
]
AllowGeneric = Annotated[
    bool,
    typer.Option(
        "--allow-generic",
        rich_help_panel=_GENERIC,
        help="Convert a family that has no adapter, if it passes what --probe measures.",
    ),
]
