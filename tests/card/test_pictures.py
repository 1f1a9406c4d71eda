"""The pictures: drawn from the manifest, readable on any page, the same for the same run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import drawable

from dllm_convert.card.charts import FAINTEST_LEVEL, SHUT, running_median
from dllm_convert.card.pictures import (
    ATTENTION,
    DENOISING,
    LOSS,
    PICTURES,
    draw,
    draw_all,
    draw_svg,
)
from dllm_convert.common.colours import BLUE, GREY, VERMILION
from dllm_convert.verification.observe.logged import Curve, read_curves
from dllm_convert.verification.observe.observations import Observations

PAGES = {"light": "#ffffff", "dark": "#0b0f19"}
MEASUREMENTS = {
    "nelbo_before": {"nats_per_token": 9.0},
    "nelbo_after": {"nats_per_token": 5.0},
    "ar_nll": {"nats_per_token": 3.0},
}


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def drawn(folder: Path, measurements: dict[str, Any] | None = None) -> Path | None:
    """Draw the loss of a folder's metrics.jsonl, by way of the manifest."""
    curves = read_curves(folder / "metrics.jsonl")
    seen = json.loads(json.dumps(Observations(curves=curves).as_dict()))
    return folder / LOSS.file if draw(LOSS, seen | (measurements or {}), folder) else None


def metrics(folder: Path, steps: int = 50) -> Path:
    path = folder / "metrics.jsonl"
    rows = [
        {"step": step, "seconds": 1.0, "loss": 9 - step / 20, "nelbo": 9.5 - step / 20}
        for step in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_colours_stand_out_on_both_pages(page: str) -> None:
    for line in (BLUE, VERMILION):
        assert contrast(line, page) >= 3
    assert contrast(GREY, page) >= 4


def test_the_picture(tmp_path: Path) -> None:
    metrics(tmp_path)
    out = drawn(tmp_path, MEASUREMENTS)
    assert out is not None
    pixels = imread(out)
    assert pixels.shape == (600, 1200, 4)
    assert pixels[0, 0, 3] == 0, "the page shows through"
    opaque = pixels[pixels[..., 3] == 1][:, :3]
    for colour in (BLUE, VERMILION, GREY):
        near = np.abs(opaque - matplotlib.colors.to_rgb(colour)).max(axis=1) < 0.02
        assert near.sum() > 100, colour
    first = out.read_bytes()
    out.unlink()
    drawn(tmp_path, MEASUREMENTS)
    assert out.read_bytes() == first
    assert b"Matplotlib" not in first


def test_a_loss_that_is_the_bound_is_drawn_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 5.0 + 1 / step, "nelbo": 5.0 + 1 / step} for step in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert drawn(tmp_path)
    pixels = imread(tmp_path / LOSS.file)
    shown = pixels[pixels[..., 3] > 0][:, :3]
    orange = np.abs(shown - matplotlib.colors.to_rgb(VERMILION)).max(axis=1) < 0.02
    assert not orange.any()


@pytest.mark.parametrize(
    "content", ["", "{}\n", "not json\n", '{"step": 1, "loss": 2.0}\n', '{"step": 1}\n[1]\nnull\n']
)
def test_nothing_to_draw(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    assert not drawn(tmp_path)
    path.unlink()
    assert not drawn(tmp_path)
    assert not (tmp_path / LOSS.file).exists()


def test_broken_lines_and_values_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": "x"}\n'
        '{"step": 4, "loss": 1.0, "nelbo": Infinity}\n{"step": 5, "lo'
    )
    curves = read_curves(path)
    assert set(curves) == {"loss"}
    assert curves["loss"].steps == (1, 4)
    assert curves["loss"].values == (2.0, 1.0)
    assert drawn(tmp_path, {"nelbo_after": {"nats_per_token": 1.5}})


def test_running_median_ignores_a_spike() -> None:
    values = [1.0] * 10 + [100.0] + [1.0] * 10
    assert running_median(values) == [1.0] * 21
    assert running_median([3.0, 1.0, 2.0], window=1) == [3.0, 1.0, 2.0]
    assert running_median([]) == []


def test_every_picture_is_described() -> None:
    for picture in (*PICTURES, DENOISING):
        assert len(picture.alt.split()) >= 8
        assert picture.caption.endswith(".")
        assert not set(picture.alt) & set('<>&"[]'), "it stands in HTML and in Markdown"


def full() -> dict[str, Any]:
    """Everything that can be drawn, with the held-out values."""
    return MEASUREMENTS | drawable()


def test_what_the_manifest_holds_is_what_was_measured() -> None:
    measurements = full()
    seen = Observations.from_measurements(measurements)
    assert seen.influence is not None
    assert seen.influence.converted.ahead == (18, 66)
    assert seen.influence.claimed_ahead == 18
    assert seen.influence.base is not None
    assert seen.influence.base.ahead == (0, 66)
    assert seen.decoding[0].threshold is None
    assert seen.held_out == {"nelbo_before": 9.0, "nelbo_after": 5.0, "ar_nll": 3.0}
    again = json.loads(json.dumps(seen.as_dict()))
    assert again == {key: value for key, value in measurements.items() if key in again}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("influence", {"converted": None}),
        ("influence", [1]),
        ("influence", {"block_size": 0, "base": None, "converted": {"rows": [". 1"], "stride": 1}}),
        ("influence", {"block_size": 4, "base": None, "converted": {"rows": ["x"], "stride": 1}}),
        ("influence", {"block_size": 4, "base": None, "converted": {"rows": ["1"], "stride": 0}}),
        ("influence", {"block_size": 4, "base": None, "converted": {"rows": 7, "stride": 1}}),
        ("influence", {"block_size": 4, "base": None, "converted": {"rows": [7], "stride": 1}}),
        ("influence", {"block_size": 4, "base": None, "converted": {"rows": [], "stride": 1}}),
        ("influence", {"block_size": 4, "base": None}),
        ("decoding", [{"threshold": "0.9"}]),
        ("decoding", [{"threshold": 0, "tokens_per_forward": math.nan, "agreement": 1}]),
        ("decoding", 7),
        ("mask_rates", ["before"]),
        ("mask_rates", {"after": [{"rate": 0.5, "nats": None, "stderr": 1, "tokens": 3}]}),
        ("curves", {"loss": {"steps": [1, 2], "values": [1.0]}}),
        ("curves", {"loss": {"steps": [1, 2], "values": [1.0, math.inf]}}),
    ],
)
def test_what_does_not_fit_is_not_drawn(tmp_path: Path, key: str, value: Any) -> None:
    names = {"influence": "attention", "mask_rates": "mask_rates", "curves": "loss"}
    missing = f"{names.get(key, key)}.png"
    written = draw_all(full() | {key: value}, tmp_path)
    assert set(written) == {picture.file for picture in PICTURES} - {missing}
    assert {path.name for path in tmp_path.iterdir()} == set(written)


def test_the_triangle_becomes_a_staircase(tmp_path: Path) -> None:
    """Of each map the corner that looks ahead is shut, but for the converted model's own block."""
    assert draw(ATTENTION, full(), tmp_path)
    pixels = imread(tmp_path / ATTENTION.file)[..., :3]
    dark = np.abs(pixels - matplotlib.colors.to_rgb(SHUT)).max(axis=-1) < 0.02
    columns = np.flatnonzero(dark.sum(axis=0) > 20)
    gap = int(columns[np.argmax(np.diff(columns))])
    base, converted = dark[:, : gap + 1].sum(), dark[:, gap + 1 :].sum()
    assert converted / base == pytest.approx(48 / 66, abs=0.03)


def test_shut_pairs_differ_from_the_faintest_that_are_open() -> None:
    faintest = matplotlib.colormaps["viridis"](FAINTEST_LEVEL)
    assert contrast(SHUT, matplotlib.colors.to_hex(faintest)) >= 2.5


def test_drawings_stand_together_on_one_page() -> None:
    """Ids are the page's own, colours follow the page, nothing points outside."""
    seen = Observations.from_measurements(full())
    drawings = [draw_svg(picture, seen) for picture in PICTURES]
    page = "".join(text for text in drawings if text)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(drawings) == page.count("<svg") == len(PICTURES)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert targets
    assert set(targets) <= set(ids)
    assert not re.search(r'(href|src)="(?!#|data:image/png)|url\((?!#)|<!DOCTYPE|<metadata', page)
    assert GREY not in page
    assert "currentColor" in page
    assert page == "".join(draw_svg(picture, seen) or "" for picture in PICTURES)


def test_nothing_measured_gives_no_picture(tmp_path: Path) -> None:
    assert draw_all({}, tmp_path) == []
    assert draw_all({"nelbo_after": {"nats_per_token": 1.0}}, tmp_path) == []
    assert not any(tmp_path.iterdir())


def test_a_long_curve_is_thinned() -> None:
    curve = Curve(tuple(range(10_000)), tuple(map(float, range(10_000)))).thinned()
    assert len(curve.steps) == len(curve.values) == 200
    assert (curve.steps[0], curve.steps[-1]) == (0, 9999)
