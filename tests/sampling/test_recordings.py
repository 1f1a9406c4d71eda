"""GIFs and pages of a film: whole, small, and they show what was written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import TOKENIZERS
from films import denoised, film_of
from PIL import Image, ImageColor

from dllm_convert.sampling.watch import gif
from dllm_convert.sampling.watch.cells import cells_of
from dllm_convert.sampling.watch.frames import Film
from dllm_convert.sampling.watch.page import render_page
from dllm_convert.sampling.watch.pieces import TokenText
from dllm_convert.sampling.watch.record import write_recording

NASTY = ' </script><script>alert(1)</script> <!-- <img src="https://x.org/a.png"> &amp; "\' \u2028'
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TOKENIZERS["llama"]()


@pytest.fixture(scope="module")
def film(tokenizer: Any) -> Film:
    text = " is bound in a block, 世界 e\u0301.\n\nThen it is local, and the block \x1b[1m ends."
    return film_of(tokenizer, "A name", text, block=8)


@pytest.fixture(scope="module")
def text(tokenizer: Any, film: Film) -> TokenText:
    return TokenText(tokenizer, film.end_ids)


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def pixels(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image.convert("RGB")) == ImageColor.getrgb(colour)).all(-1).sum())


def test_a_gif_has_every_frame(film: Film, text: TokenText) -> None:
    data = gif.render_gif(film, text)
    image: Any = opened(data)
    assert image.format == "GIF"
    assert image.n_frames == len(film.frames)
    assert image.info["loop"] == 0
    assert len(data) < gif.MOST_BYTES
    final = cells_of(film, film.frames[-1], len(film.frames) - 1, text)
    masks, durations, legend = [], [], pixels(image, gif._TINTS[0])
    for number in range(image.n_frames):
        image.seek(number)
        durations.append(image.info["duration"])
        masks.append(pixels(image, gif._BOX) + pixels(image, gif._LATER))
        written = zip(film.frames[number].written, final, strict=False)
        new = any(when == number > 0 and cell.text.strip() for when, cell in written)
        assert (pixels(image, gif._TINTS[0]) > legend) == new, "the newest stand out"
    assert durations[-1] > durations[0] > durations[1]
    # The bar's ground shrinks as well; what is left at the end is the legend and the border.
    assert masks == sorted(masks, reverse=True)
    assert masks[-1] < masks[0] / 2
    assert gif.render_gif(film, text) == data


def test_nothing_moves_but_what_is_written(film: Film, text: TokenText) -> None:
    images = [np.asarray(image) for image in gif.draw_frames(film, text)]
    assert len({image.shape for image in images}) == 1
    first = images[-1][: gif._MARGIN + gif._LINE_HEIGHT, : gif._MARGIN + 6 * gif._COLUMN]
    for image in images:
        assert (image[: first.shape[0], : first.shape[1]] == first).all(), "the prompt stays"


def test_a_gif_of_a_long_text_is_small(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    film = film_of(tokenizer, "Say", " the quick brown fox" * 80, per_frame=24, block=48)
    whole = gif.render_gif(film, TokenText(tokenizer))
    monkeypatch.setattr(gif, "MOST_BYTES", len(whole) // 2)
    data = gif.render_gif(film, TokenText(tokenizer))
    image: Any = opened(data)
    assert len(data) < len(whole) // 2
    assert 2 <= image.n_frames < len(film.frames)
    height = gif.MOST_LINES * gif._LINE_HEIGHT + 2 * gif._MARGIN + gif._FOOTER
    assert image.size[1] == height


def luminance(colour: str) -> float:
    channels = np.array(ImageColor.getrgb(colour)[:3]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_stands_out_on_every_tint() -> None:
    for tint in gif._TINTS:
        assert (luminance(tint) + 0.05) / (luminance(gif._INK) + 0.05) >= 7
    assert sorted(map(luminance, gif._TINTS)) == [luminance(tint) for tint in gif._TINTS]


def test_masks_behind_the_end_are_there_until_it_is_known(tokenizer: Any) -> None:
    ids = tokenizer(" one two", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    film = denoised([ids[0]], [*ids, end, *[end] * 150], per_frame=50, ends=frozenset([end]))
    first, *_, last = gif.draw_frames(film, TokenText(tokenizer, film.end_ids))
    boxes = pixels(first, gif._BOX) - pixels(last, gif._BOX)
    assert boxes > 150 * 0.7 * gif._COLUMN * gif._LINE_HEIGHT * 0.6


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        key = attributes.get("id") or tag
        self.data[key] = self.data.get(key, "") + data


def test_a_page_is_one_file_and_asks_for_nothing(tokenizer: Any) -> None:
    film = film_of(tokenizer, "Say" + NASTY, NASTY)
    source = render_page(film, TokenText(tokenizer, film.end_ids), title=f"a {NASTY}")
    page = Page(source)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"link", "img", "iframe", "object", "base"} & set(tags)
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    code = page.data["style"] + source.rpartition("<script>")[2]
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp|import\(|//[a-z]", code)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none';")


def replay(source: str) -> list[list[tuple[str, str] | None]]:
    states: list[list[tuple[str, str] | None]] = []
    for frame in json.loads(Page(source).data["film"])["frames"]:
        state = list(states[-1]) if states else []
        for number, *cell in frame["cells"]:
            state += [None] * (number + 1 - len(state))
            state[number] = (cell[0], cell[1]) if cell else None
        states.append(state)
    return states


def test_a_page_holds_every_frame(film: Film, text: TokenText) -> None:
    source = render_page(film, text, title="t")
    states = replay(source)
    assert len(states) == len(film.frames)
    for number, (state, frame) in enumerate(zip(states, film.frames, strict=True)):
        cells = cells_of(film, frame, number, text)
        assert [cell[1] for cell in state if cell] == [cell.text for cell in cells]
    final = cells_of(film, film.frames[-1], len(film.frames) - 1, text)
    assert "".join(cell.text for cell in final) in "".join(
        re.findall(r'<span class="..?">([^<]*)</span>', source)
    ), "without scripts the final text is there"


DRIVER = """<script>
const said = [], key = (name, on) => (on || document.body).dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const note = () => said.push([document.getElementById("seek").value,
  document.getElementById("play").textContent,
  document.getElementById("text").getBoundingClientRect().height,
  document.getElementById("text").textContent.length]);
note(); key("Home"); note(); key("ArrowRight"); note(); key("ArrowRight"); note();
key("ArrowLeft"); note(); key("End"); note(); key(" "); note(); key(" "); note();
document.getElementById("back").click(); note(); document.getElementById("on").click(); note();
const result = document.createElement("pre");
result.id = "result"; result.textContent = JSON.stringify(said); document.body.append(result);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_page_is_played_and_stepped_by_keyboard(
    film: Film, text: TokenText, tmp_path: Path
) -> None:
    path = tmp_path / "film.html"
    path.write_text(render_page(film, text, title="t").replace("</body>", DRIVER + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--force-prefers-reduced-motion"]
    done = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=500", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    said = json.loads(found[1])
    last = str(len(film.frames) - 1)
    steps = [last, "0", "1", "2", "1", last, "0", "0", "0", "1"]
    assert [entry[0] for entry in said] == steps
    plays = ["Play"] * 6 + ["Pause", "Play", "Play", "Play"]
    assert [entry[1] for entry in said] == plays
    assert len({entry[2] for entry in said}) == 1, "nothing moves"


def test_files_are_written_whole(film: Film, text: TokenText, tmp_path: Path) -> None:
    for name in ("a.GIF", "b.html"):
        path = tmp_path / name
        path.write_text("old")
        write_recording(path, film, text, title="t")
        assert path.stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.GIF", "b.html"]
    with pytest.raises(ValueError, match=r"none of \.gif, \.html"):
        write_recording(tmp_path / "c.png", film, text, title="t")
