"""What is asked of a third-party checkpoint in place of what our own files promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import DataError
from dllm_convert.verification.foreign.claim import Claim
from dllm_convert.verification.foreign.layout import ForeignLayout
from dllm_convert.verification.foreign.remote import check_own_code
from dllm_convert.verification.memory import WITHOUT_MODEL
from dllm_convert.verification.probes.files import check_files, check_finite, check_hashes
from dllm_convert.verification.probes.storage import check_storage
from dllm_convert.verification.report import Probe, first_items, skipped

if TYPE_CHECKING:
    from dllm_convert.verification.subject import Subject


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that another project wrote.

    Attributes:
        folder: Where it lies; the subject's folder is the view of it.
        config: Its own config.json.
        layout: Its layout.
        stated: What it claims, and where.
        unmapped: Why no class of this package computes it, None if one does.
    """

    folder: Path
    config: Mapping[str, Any]
    layout: ForeignLayout
    stated: Claim
    unmapped: str | None

    def group(
        self, name: str, run: Callable[[Subject], list[Probe]]
    ) -> Callable[[Subject], list[Probe]]:
        """Return what answers for a group of probes on this checkpoint.

        Args:
            name: Name of the group.
            run: What answers for it on our own checkpoints.
        """
        if name == "files":
            return self._files
        if name == "portability":
            return check_own_code
        if self.unmapped is not None and name not in WITHOUT_MODEL:
            reason = self.unmapped
            return lambda _: [skipped(name, "to be measured", reason)]
        return run

    def _files(self, subject: Subject) -> list[Probe]:
        """Return `claim` and the probes of the files; what only our own config promises is out."""
        if self.unmapped is None:
            probes = [probe for probe in check_files(subject) if probe.name != "config"]
        else:
            probes = _headers_only(subject)
        return [self._claim(subject), *probes]

    def _claim(self, subject: Subject) -> Probe:
        wrong = list(self.stated.contradictions)
        mask = self.stated.claim.mask_token_id
        try:
            rows = (subject.shapes.get(subject.adapter.embedding) or (None,))[0]
        except DataError:
            rows = None  # the probe `weights` fails
        if rows is not None and mask >= rows:
            wrong.append(f"mask id {mask} is outside the embedding of {rows} rows")
        reading = (
            f"computed by {subject.adapter.diffusion_class}, without the folder's code"
            if self.unmapped is None
            else "headers and tokens only"
        )
        return Probe(
            "claim",
            not wrong,
            f"{self.layout.name}: {', '.join(self.stated.grounds)}",
            "stated, and without contradiction",
            first_items(wrong) or reading,
        )


def _headers_only(subject: Subject) -> list[Probe]:
    """Return the probes of the files where the names of the tensors are not known."""
    required = "safetensors, indexed exactly"
    try:
        headers = subject.headers
        probes = [
            Probe(
                "weights",
                True,
                f"{len(subject.shapes)} tensors in {len(headers)} files",
                required,
                "which tensors its own code expects is not known",
            ),
            *check_storage(subject),
            check_finite(subject),
        ]
    except DataError as error:
        probes = [Probe("weights", False, "not readable", required, str(error))]
    return [*probes, check_hashes(subject)]
