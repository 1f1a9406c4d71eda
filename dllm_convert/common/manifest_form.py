"""The form of the manifest: what kind of value stands where, checked once, when it is read.

A manifest travels with its checkpoint and may have been edited, cut or written by somebody else.
Everything that a card, a report, a push or a verification reads of it is named here; what else it
holds is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dllm_convert.common.shown_text import shown
from dllm_convert.errors import DataError

_HINT = "Put the file back from a copy, or convert the model again"
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a text",
}
MANIFEST_VERSION = 1
"""Version of the whole manifest; its sections have their own."""
Object = dict[str, Any]


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _Source(_Section):
    given: str
    model_type: str
    kind: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] | str | None = None
    origin: str | None = None


class _Mask(_Section):
    token: str
    id: int
    rule: str
    reason: str
    write_row: bool
    used_rows: int
    rows_before: int
    rows_after: int


class _Noise(_Section):
    schedule: str = "linear"
    power: float = 2.0
    kernel: str = "absorbing"
    discrete_steps: int | None = None
    classes: int | None = None
    exponent_rate: float | None = None
    neighbours: int | None = None
    jumps: float | None = None
    min_time: float = 0.0
    max_time: float = 1.0
    draw: str = "time"
    position_bias: float = 0.0
    views: int = 1
    complementary: bool = False


class _RecipeData(_Section):
    source: str | None = None
    subset: str | None = None
    split: str | None = None
    held_out_source: str | None = None
    held_out_split: str | None = None
    sequence_length: int


class _Lora(_Section):
    rank: int | None = None
    learning_rate: float | None = None


class _BlockGrowth(_Section):
    steps: int = 0


class _OnPolicy(_Section):
    share: float = 0.0
    new_tokens: int = 0


class _Training(_Section):
    method: str
    steps: int
    batch_size: int | Literal["auto"]
    gradient_accumulation: int
    learning_rate: float
    lr_schedule: str
    loss_weight: str
    ar_loss_weight: float = 0.0
    attention_annealing_steps: int = 0
    block_growth: _BlockGrowth | None = None
    on_policy: _OnPolicy | None = None
    confidence_loss_weight: float = 0.0
    alignment_loss_weight: float = 0.0
    auxiliary_loss_weight: float = 0.0
    mask_noise_std: float = 0.0
    mask_noise_steps: int = 0
    lora: _Lora | None = None


class _Recipe(_Section):
    source: str
    noise: _Noise
    data: _RecipeData
    training: _Training


class _Planned(_Section):
    parameters: int | None = None
    context: int | None = None


class _Plan(_Section):
    source: _Planned
    target: str
    block_size: int | None
    token_shift: bool
    mask: _Mask
    attention_changes: list[str]
    min_transformers: str
    notes: list[str] = []


class _Stage(_Section):
    name: str
    seconds: float | None = None
    result: Object | None = None


class _Held(_Section):
    nats_per_token: float | None
    tokens: int
    stderr: float | None = None


class _Train(_Section):
    method: str
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    device: str | None = None
    devices: int | None = None
    flops: float | None = None
    stopped: str | None = None


class _Text(_Section):
    source: str
    kind: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str | None = None


class _Data(_Text):
    documents: int | None = None
    train_tokens: int | None = None
    held_out_documents: int | None = None
    held_out_tokens: int
    chats: int | None = None
    held_out: _Text | None = None


class _Measurements(_Section):
    train: _Train | None = None
    data: _Data | None = None
    nelbo_before: _Held | None = None
    nelbo_after: _Held | None = None
    ar_nll: _Held | None = None


class _Sample(_Section):
    prompt: str
    text: str
    new_tokens: int
    forwards: int
    tokens_per_forward: float | None = None
    seconds: float | None = None
    chat: bool = False
    base: str | None = None
    more: list[_Sample] = []


class _Probe(_Section):
    name: str
    passed: bool | None
    measured: str
    required: str
    detail: str | None = None
    origin: str | None = None


class _Verification(_Section):
    passed: bool | None = None
    probes: list[_Probe]
    seconds: float | None = None


class _Mean(_Section):
    items: int
    value: float
    half_width: float | None


class _Difference(_Section):
    value: float
    half_width: float | None


class _Result(_Section):
    task: str
    metric: str
    after: _Mean
    before: _Mean | None = None
    difference: _Difference | None = None


class _Nats(_Section):
    nats_per_token: float | None


class _MeasuredText(_Section):
    source: str
    nelbo: _Nats | None = None
    nll: _Nats | None = None


class _Task(_Section):
    shots: int | None = None


class _Settings(_Section):
    draws: int
    rounds: int


class _Effort(_Section):
    tokens_per_forward: float | None = None
    tokens_per_second: float | None = None


class _Efforts(_Section):
    after: _Effort | None = None


class _Swept(_Section):
    threshold: float
    task: str
    metric: str
    value: float
    half_width: float | None
    tokens_per_forward: float | None = None
    tokens_per_second: float | None = None
    writing_seconds: float | None = None
    batch_size: int | None = None


class _Parallelism(_Section):
    task: str
    metric: str
    aup: float
    best: float


class _Evaluation(_Section):
    settings: _Settings
    results: list[_Result] | None = None
    tasks: dict[str, _Task] | None = None
    sweep: list[_Swept] | None = None
    parallelism: list[_Parallelism] | None = None
    effort: _Efforts | None = None
    text: _MeasuredText | None = None


class _Card(_Section):
    sha256: str | None = None
    blob: str | None = None


class Manifest(_Section):
    """Content of dllm_convert.json, as far as anything reads it."""

    format_version: Any
    created: str
    dllm_convert: str
    versions: dict[str, str]
    source: _Source
    recipe: _Recipe
    plan: _Plan
    stages: list[_Stage] | None = None
    measurements: _Measurements | None = None
    sample: _Sample | None = None
    verification: _Verification | None = None
    evaluation: _Evaluation | None = None
    card: _Card | None = None
    adapter_only: bool = False


def is_this_version(version: object) -> bool:
    """Whether a `format_version` is the one that this version writes; True is no number."""
    return version == MANIFEST_VERSION and not isinstance(version, bool)


def check_version(content: Mapping[str, Any], where: Path | str) -> None:
    """Check that a manifest is of the version that is read here; what it says could mean another.

    One that names no version is told by `check_form`, where everything has to be there.

    Args:
        content: Content of dllm_convert.json.
        where: Its path, for the message.

    Raises:
        DataError: It is of another version.
    """
    version = content.get("format_version", MANIFEST_VERSION)
    if not is_this_version(version):
        raise DataError(
            f"{where}: format_version is {shown(version)}, expected {MANIFEST_VERSION}",
            hint="Use the version of dllm-convert that wrote it, or convert the model again",
        )


def check_form(content: Mapping[str, Any], where: Path | str, *, whole: bool = False) -> None:
    """Check that what a manifest holds is of the kind that is read there.

    Args:
        content: Content of dllm_convert.json.
        where: Its path, for the message.
        whole: Whether everything that every run records has to be there.

    Raises:
        DataError: Something is of another kind, or missing.
    """
    try:
        Manifest.model_validate(content)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False):
            path = ".".join(map(str, problem["loc"]))
            if problem["type"] != "missing":
                expected = _EXPECTED.get(problem["type"], problem["msg"])
                raise DataError(
                    f"{where}: {path} is {shown(problem['input'])}, expected {expected}", hint=_HINT
                ) from error
            if whole:
                raise DataError(
                    f"{where} has no {path}, which every run records", hint=_HINT
                ) from error
