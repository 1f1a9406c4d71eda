"""The loss picture: drawn from what was logged, readable on any page, the same for the same run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.image import imread

from dllm_convert.pictures import (
    BLUE,
    DENOISING,
    GREY,
    LOSS,
    PICTURES,
    VERMILION,
    draw_loss,
    read_curves,
    running_median,
)

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
    out = tmp_path / LOSS.file
    assert draw_loss(metrics(tmp_path), MEASUREMENTS, out)
    pixels = imread(out)
    assert pixels.shape == (600, 1200, 4)
    assert pixels[0, 0, 3] == 0, "the page shows through"
    opaque = pixels[pixels[..., 3] == 1][:, :3]
    for colour in (BLUE, VERMILION, GREY):
        near = np.abs(opaque - matplotlib.colors.to_rgb(colour)).max(axis=1) < 0.02
        assert near.sum() > 100, colour
    again = tmp_path / "again.png"
    draw_loss(tmp_path / "metrics.jsonl", MEASUREMENTS, again)
    assert again.read_bytes() == out.read_bytes()
    assert b"Matplotlib" not in out.read_bytes()


def test_a_loss_that_is_the_bound_is_drawn_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 5.0 + 1 / step, "nelbo": 5.0 + 1 / step} for step in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_loss(path, {}, tmp_path / LOSS.file)
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
    assert not draw_loss(path, {}, tmp_path / LOSS.file)
    assert not draw_loss(tmp_path / "missing", {}, tmp_path / LOSS.file)
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
    assert draw_loss(path, {"nelbo_after": {"nats_per_token": 1.5}}, tmp_path / LOSS.file)


def test_running_median_ignores_a_spike() -> None:
    values = [1.0] * 10 + [100.0] + [1.0] * 10
    assert running_median(values) == [1.0] * 21
    assert running_median([3.0, 1.0, 2.0], window=1) == [3.0, 1.0, 2.0]
    assert running_median([]) == []


def test_every_picture_is_described() -> None:
    for picture in (*PICTURES, DENOISING):
        assert len(picture.alt.split()) >= 8
        assert picture.caption.endswith(".")
