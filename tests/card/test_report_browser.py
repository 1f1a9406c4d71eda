"""The report in a real browser: it is shown whole, in light and dark, and asks nobody for anything.

Screenshots stay in `artifacts/` of the checkout, for people to look at.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib.colors
import numpy as np
import pytest
from card_cases import changed, fill, llama_bd3lm, probe
from matplotlib.image import imread
from report_cases import drawable, evaluated

from dllm_convert.card.charts import SHUT
from dllm_convert.card.report import write_report
from dllm_convert.common.colours import BLUE

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
OWN = re.compile(
    r"(accounts|clients\d?|android\.clients|safebrowsing|update|www)\.google(apis)?\.com"
    r"|(optimizationguide-pa|content-autofill|safebrowsing|update)\.googleapis\.com"
)
"""Hosts that Chromium asks on its own, whatever page is open: the time, updates, sign-in."""
SIZES = {"desktop": (1280, 3600), "phone": (390, 5600)}
SCHEMES = {"light": (1, "#ffffff"), "dark": (0, "#0e1116")}

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[str]]]:
    """Return the port of a proxy that answers nothing, and what it was asked for."""
    asked: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(502)

        do_GET = do_POST = do_HEAD = do_CONNECT = refuse

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()
    thread.join()


def by_the_page(asked: list[str]) -> list[str]:
    """Leave out what the browser asks for on its own."""
    hosts = {address: urlsplit(address).hostname or address.split(":")[0] for address in asked}
    return [address for address, host in hosts.items() if not OWN.fullmatch(host)]


def browse(page: Path, port: int, profile: Path, size: tuple[int, int], *options: str) -> str:
    """Open a file with everything that leaves the browser sent to the proxy; return its output."""
    result = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
            "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter",
            *("--disable-default-apps", "--disable-sync", "--disable-dev-shm-usage"),
            f"--user-data-dir={profile}",
            f"--proxy-server=http://127.0.0.1:{port}",
            # Not even this machine is exempt.
            "--proxy-bypass-list=<-loopback>",
            f"--window-size={size[0]},{size[1]}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return result.stdout


@pytest.fixture
def report(tmp_path: Path) -> Path:
    from PIL import Image

    probes = [
        probe("weights", True, "0 of 272 tensors wrong", "0 missing"),
        probe("attention-layers", False, "3 of 16 layers", "0", "layer 4 sees 7 positions ahead"),
        probe("base-logits", None, "not measured", "0", "the weights were trained"),
    ]
    manifest = changed(
        llama_bd3lm(),
        measurements=drawable(),
        evaluation=evaluated(),
        verification={"passed": False, "probes": probes, "seconds": 41.0},
    )
    folder = fill(tmp_path / "out", manifest)
    frames = [Image.new("RGB", (640, 120), colour) for colour in ("#808080", "#7e7e7e")]
    frames[0].save(folder / "sample.gif", save_all=True, append_images=frames[1:], duration=400)
    return write_report(folder)


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_shown_whole_and_asks_for_nothing(
    scheme: str, width: str, report: Path, proxy: tuple[int, list[str]], tmp_path: Path
) -> None:
    port, asked = proxy
    ARTIFACTS.mkdir(exist_ok=True)
    shutil.copy(report, ARTIFACTS / "report.html")
    picture = ARTIFACTS / f"report-{width}-{scheme}.png"
    picture.unlink(missing_ok=True)
    setting, background = SCHEMES[scheme]
    choose = f"--blink-settings=preferredColorScheme={setting}"
    size = SIZES[width]
    browse(report, port, tmp_path / "profile", size, choose, f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == size[::-1]

    def share(colour: str) -> float:
        near = np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02
        return float(near.mean())

    if width == "desktop":
        grey = np.abs(pixels[:300] - 128 / 255).max(axis=-1) < 0.02
        assert grey.mean() > 0.1, "the film is shown"
    assert share(background) > 0.5, "the page follows the reader's colour scheme"
    assert share(SHUT) > 0.001, "the influence maps are drawn"
    assert share(BLUE) > 0.00005, "the curves are drawn"
    assert by_the_page(asked) == []


LOOK = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((one) => (one.open = true));
  const wide = document.documentElement.scrollWidth, broken = [], hidden = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    if (node.parentElement.closest("pre, svg, .facts td, .unseen, script")) continue;
    for (const word of node.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const tops = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      if (tops.size > 1) broken.push(word[0]);
      if (range.getBoundingClientRect().right > innerWidth) hidden.push(word[0]);
    }
  }
  parent.document.title = JSON.stringify({ wide, inner: innerWidth, broken, hidden });
});
</script>"""
"""Put into a copy of the page: how wide it is, and which words stand on two lines or outside."""


def looked(page: str, folder: Path, port: int, size: tuple[int, int]) -> dict[str, Any]:
    """What a browser sees of a page whose policy lets this one script run."""
    copy = folder / "looked.html"
    policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    inside = html.escape(policy.replace("</body>", f"{LOOK}</body>"))
    # In a frame: a window of a browser is never as narrow as a phone's.
    frame = f'<iframe width={size[0]} height={size[1]} style="border: 0" srcdoc="{inside}">'
    copy.write_text(f"<!DOCTYPE html><title></title>{frame}</iframe>", encoding="utf-8")
    document = browse(copy, port, folder / "profile", SIZES["desktop"], "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    return seen


@pytest.mark.parametrize("width", SIZES)
def test_nothing_scrolls_to_the_side_and_no_word_is_broken(
    width: str, report: Path, proxy: tuple[int, list[str]], tmp_path: Path
) -> None:
    page = report.read_text(encoding="utf-8")
    seen = looked(page, tmp_path, proxy[0], SIZES[width])
    assert seen == {"wide": SIZES[width][0], "inner": SIZES[width][0], "broken": [], "hidden": []}
    if width == "desktop":
        return
    narrow = page.replace("overflow-wrap: break-word", "overflow-wrap: anywhere; width: 5rem")
    assert looked(narrow, tmp_path, proxy[0], SIZES[width])["broken"], "the check can fail"


def test_a_request_would_have_been_seen(proxy: tuple[int, list[str]], tmp_path: Path) -> None:
    """The check above is worth something: the same browser and proxy, a page that does ask."""
    port, asked = proxy
    page = tmp_path / "asks.html"
    outside = ("http://pictures.invalid/x.png", "http://127.0.0.1:8123/y.png")
    page.write_text("".join(f'<img src="{address}">' for address in outside))
    shot = f"--screenshot={tmp_path / 'asks.png'}"
    browse(page, port, tmp_path / "profile", SIZES["desktop"], shot)
    assert set(by_the_page(asked)) == set(outside)


def test_markup_in_a_value_does_not_run(proxy: tuple[int, list[str]], tmp_path: Path) -> None:
    manifest = changed(llama_bd3lm(), measurements=drawable())
    evil = "<script>document.title='ran'</script><img src=http://127.0.0.1:8123/x onerror=alert(1)>"
    manifest["sample"]["text"] = evil
    manifest["verification"]["probes"][0]["detail"] = evil
    page = write_report(fill(tmp_path / "out", manifest))
    port, asked = proxy
    document = browse(page, port, tmp_path / "profile", SIZES["phone"], "--dump-dom")
    assert "<title>Llama-3.2-1B" in document
    assert "&lt;script&gt;document.title" in document
    assert by_the_page(asked) == []
