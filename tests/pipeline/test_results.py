"""What the journal remembers of a stage, and what of another version's is not believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dllm_convert.errors import DataError
from dllm_convert.pipeline.results import Adapted, Baseline, Done, Recorded, Verified

JOURNAL = Path("out/.work/journal.json")
BASELINE = {"data": {"tokens": 3}, "nelbo_before": {"nats_per_token": 4.0}, "start": {}}


@pytest.mark.parametrize("ar_nll", [None, {"nats_per_token": 3.0}])
def test_what_was_not_measured_is_left_out(ar_nll: dict[str, Any] | None) -> None:
    found = Baseline(**BASELINE, ar_nll=ar_nll)
    record = found.as_dict()
    assert ("ar_nll" in record) == (ar_nll is not None)
    assert Baseline.from_dict(record, JOURNAL) == found


def test_a_section_of_another_room_stays_as_it_is() -> None:
    assert Recorded.from_dict({"any": None}, JOURNAL).as_dict() == {"any": None}
    assert Done.from_dict({}, JOURNAL).as_dict() == {}
    assert Adapted().as_dict()["files"] == {}


@pytest.mark.parametrize(
    "record",
    [{}, {"data": {}}, BASELINE | {"of_a_later_version": 1}],
    ids=["empty", "something missing", "something more"],
)
def test_a_record_of_another_version_is_told(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="another version of dllm-convert") as caught:
        Baseline.from_dict(record, JOURNAL)
    assert "out/.work" in str(caught.value.hint)


def test_the_probes_that_failed_are_named() -> None:
    probes: list[Any] = [
        {"name": name, "passed": passed}
        for name, passed in (("a", True), ("b", False), ("c", None), ("d", False))
    ]
    assert Verified(passed=False, probes=probes, seconds=1.0, groups={}).failed == "b, d"
