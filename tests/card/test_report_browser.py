"""The report in a real browser: it is shown whole, in light and dark, and asks nobody for anything.

Screenshots stay in `artifacts/` of the checkout, for people to look at.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.colors
import numpy as np
import pytest
from card_cases import changed, fill, llama_bd3lm
from matplotlib.image import imread
from report_cases import drawable

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
SIZE = (1000, 3600)
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


def browse(page: Path, port: int, profile: Path, *options: str) -> str:
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
            f"--window-size={SIZE[0]},{SIZE[1]}",
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
    manifest = changed(llama_bd3lm(), measurements=drawable())
    return write_report(fill(tmp_path / "out", manifest))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_shown_whole_and_asks_for_nothing(
    scheme: str, report: Path, proxy: tuple[int, list[str]], tmp_path: Path
) -> None:
    port, asked = proxy
    ARTIFACTS.mkdir(exist_ok=True)
    shutil.copy(report, ARTIFACTS / "report.html")
    picture = ARTIFACTS / f"report-{scheme}.png"
    picture.unlink(missing_ok=True)
    setting, background = SCHEMES[scheme]
    choose = f"--blink-settings=preferredColorScheme={setting}"
    browse(report, port, tmp_path / "profile", choose, f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == SIZE[::-1]

    def share(colour: str) -> float:
        near = np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02
        return float(near.mean())

    assert share(background) > 0.5, "the page follows the reader's colour scheme"
    assert share(SHUT) > 0.01, "the influence maps are drawn"
    assert share(BLUE) > 0.0005, "the curves are drawn"
    assert by_the_page(asked) == []


def test_a_request_would_have_been_seen(proxy: tuple[int, list[str]], tmp_path: Path) -> None:
    """The check above is worth something: the same browser and proxy, a page that does ask."""
    port, asked = proxy
    page = tmp_path / "asks.html"
    outside = ("http://pictures.invalid/x.png", "http://127.0.0.1:8123/y.png")
    page.write_text("".join(f'<img src="{address}">' for address in outside))
    browse(page, port, tmp_path / "profile", f"--screenshot={tmp_path / 'asks.png'}")
    assert set(by_the_page(asked)) == set(outside)


def test_markup_in_a_value_does_not_run(proxy: tuple[int, list[str]], tmp_path: Path) -> None:
    manifest = changed(llama_bd3lm(), measurements=drawable())
    evil = "<script>document.title='ran'</script><img src=http://127.0.0.1:8123/x onerror=alert(1)>"
    manifest["sample"]["text"] = evil
    manifest["verification"]["probes"][0]["detail"] = evil
    page = write_report(fill(tmp_path / "out", manifest))
    port, asked = proxy
    document = browse(page, port, tmp_path / "profile", "--dump-dom")
    assert "<title>Llama-3.2-1B" in document
    assert "&lt;script&gt;document.title" in document
    assert by_the_page(asked) == []
