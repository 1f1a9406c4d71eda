"""What a probe returns: what was measured, and the adapter that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.adapters import has_adapter
from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.measured import adapter_as_dict, adapter_from_dict
from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import UnsupportedError


@dataclass(frozen=True)
class Finding:
    """One thing that was measured.

    Attributes:
        name: Short name, the same in every report.
        passed: Whether it is as a conversion needs it.
        measured: What was found, with its number.
        detail: The first thing that is wrong, empty if nothing is.
        targets: Objectives that need it.
    """

    name: str
    passed: bool
    measured: str
    detail: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ProbeReport(Printed):
    """One family, measured on a small random instance.

    Attributes:
        model_type: Its key.
        stock_class: Class in transformers that was measured.
        layers: Kind of each layer of the small instance.
        findings: What was measured, in the order it was.
        reason: Why it cannot be converted, None if it can.
        adapter: The measured declaration, None if it cannot be converted.
        versions: Versions of transformers and torch it was measured with.
        seconds: Wall time.
    """

    model_type: str
    stock_class: str
    layers: tuple[str, ...]
    findings: tuple[Finding, ...]
    reason: str | None
    adapter: Adapter | None
    versions: Mapping[str, str]
    seconds: float

    def require(self) -> Adapter:
        """Return the measured adapter.

        Raises:
            UnsupportedError: The family cannot be converted; the message says what was measured.
        """
        if self.adapter is None:
            raise UnsupportedError(
                f"model_type {self.model_type!r} cannot be converted, measured on a small random "
                f"{self.stock_class or 'instance'}: {self.reason}",
                hint="See docs/any-architecture.md for the families that can",
            )
        return self.adapter

    @property
    def ways(self) -> tuple[str, ...]:
        """How the family can be converted: opened, or beside a base that stays; with what to type.

        Beside its base a family that was measured has drafts that are strictly causal, behind its
        cache; one that has an adapter may have open blocks there, too.
        """
        adapter = self.adapter
        if adapter is None:
            return ()
        opened = [f"opened (--to {target})" for target in adapter.targets]
        kept = ["beside its base, causal drafts (--to bd3lm --lora 64 --keep-base)"]
        if has_adapter(self.model_type):
            kept.insert(0, "beside its base, open blocks (--to bd3lm --lora 64 --keep-base)")
            kept[1] = "beside its base, causal drafts (and --set block_attention=causal)"
        return (*opened, *(kept if adapter.behind is not None else []))

    def as_blocks(self) -> list[Block]:
        """Return whether it can be converted, and a line per finding."""
        from dllm_convert.planning.plan_text import probe_blocks

        verdict = f"cannot be converted: {self.reason}"
        if self.adapter is not None:
            verdict = f"can be converted: {'; '.join(self.ways)}"
        head = f"{self.model_type} {verdict}"
        took = f"measured on a small random {self.stock_class} in {self.seconds:.0f} s"
        return [head, took, "", *probe_blocks(self.as_dict())]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        adapter = None if self.adapter is None else adapter_as_dict(self.adapter)
        return {**asdict(self), "adapter": adapter}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeReport:
        """Read a report that `as_dict` wrote."""
        adapter = values["adapter"]
        return cls(
            **{
                **values,
                "layers": tuple(values["layers"]),
                "findings": tuple(
                    Finding(**{**finding, "targets": tuple(finding["targets"])})
                    for finding in values["findings"]
                ),
                "adapter": None if adapter is None else adapter_from_dict(adapter),
            }
        )
