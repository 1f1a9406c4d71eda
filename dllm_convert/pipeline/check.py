"""What a dry run shows: the plan, and what of it is not the plan's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.tables import Block, Printed
from dllm_convert.pipeline.family import probe_recipe
from dllm_convert.pipeline.run import plan_conversion
from dllm_convert.pipeline.text import looked_at
from dllm_convert.planning.conversion import source_facts
from dllm_convert.planning.document import plan_document
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.planning.plan_text import plan_blocks
from dllm_convert.recipe.schema import Recipe

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions


@dataclass(frozen=True)
class Check(Printed):
    """What a dry run shows.

    Attributes:
        document: What `check --json` prints.
    """

    document: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the document."""
        return dict(self.document)

    def as_blocks(self) -> list[Block]:
        """Return the plan in sections."""
        return plan_blocks(self.document)


def check(
    recipe: Recipe,
    folder: Path,
    push: PushOptions | None = None,
    launch: Launch = ALONE,
    *,
    probe: bool = False,
) -> Check:
    """Return what a dry run shows: the plan, for a launch, and where it would be published.

    With `probe` the family is measured, whether it has an adapter or not.

    Raises:
        DllmConvertError: The conversion cannot work, or may not be published as asked.
    """
    measured: dict[str, Any] = {}
    if probe:
        recipe, measured = _probed(recipe)
    plan = plan_conversion(recipe, launch=launch)
    document = plan_document(plan, folder, **measured, **looked_at(plan))
    if push is None:
        return Check(document)
    from dllm_convert.publishing.run import licence_warnings

    publication = {
        "repository": push.repo_id,
        "visibility": "public" if push.public else "private, if it is new",
        "revision": "a pull request" if push.create_pr else push.revision or "main",
        "warnings": list(licence_warnings({"source": source_facts(plan)}, push)),
    }
    return Check(document | {"publication": publication})


def _probed(recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Measure a recipe's source; return the recipe that allows it, and what was measured."""
    from dllm_convert.adapters import has_adapter

    report = probe_recipe(recipe)
    if not has_adapter(report.model_type):
        report.require()
    found = {key: value for key, value in report.as_dict().items() if key != "adapter"}
    found["ways"] = list(report.ways)
    return recipe.model_copy(update={"allow_generic": True}), {"probe": found}
