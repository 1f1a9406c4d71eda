"""The report: everything that was found, failures first, and nothing in it is taken for HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from card_cases import CASES, Manifest, bert_mdlm, changed, fill, llama_bd3lm, probe
from report_cases import drawable, evaluated

from dllm_convert.card.groups import group_probes
from dllm_convert.card.readme import render_card
from dllm_convert.card.report import LARGEST_FILM, render_report, write_report
from dllm_convert.errors import DataError
from dllm_convert.verification.catalogue import CATALOGUE

SCRIPT = "<script>alert(1)</script>"
EVIL = f'"><img src=https://evil.example/x.png onerror=alert(1)>{SCRIPT}{{{{ 7*7 }}}}&amp;'
VOID = {"meta", "br", "image", "use", "path"}
INSIDE = ("data:image/png;base64,", "data:image/gif;base64,")
LOADING = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")


class Reader(HTMLParser):
    """Reads a page as a browser would, far enough to say what it holds and what it loads."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if self.rows and self.rows[-1] and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def outside(self) -> list[str]:
        """Addresses that a browser would load or that a reader could follow."""
        return [
            value
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in LOADING and value and not value.startswith(("#", *INSIDE))
        ]


def page_of(manifest: Manifest, folder: Path) -> str:
    return render_report(fill(folder, manifest), manifest)


def assert_inert(page: str) -> None:
    """Nothing runs, nothing is loaded, and the browser is told to refuse both."""
    read = Reader(page)
    assert not read.outside
    assert not {"script", "iframe", "link", "object", "embed", "base", "form"} & {
        tag for tag, _ in read.tags
    }
    assert not [name for _, held in read.tags for name in held if name.startswith("on")]
    policy = [held for tag, held in read.tags if tag == "meta" and "http-equiv" in held]
    assert [held["http-equiv"] for held in policy] == ["Content-Security-Policy"]
    assert str(policy[0]["content"]).startswith("default-src 'none';")
    assert "@import" not in page


@pytest.mark.parametrize("case", CASES)
def test_a_page_for_every_kind_of_run(case: str, tmp_path: Path) -> None:
    manifest = changed(CASES[case](), measurements=drawable())
    page = page_of(manifest, tmp_path / "out")
    read = Reader(page)
    assert_inert(page)
    assert read.count("h1") == read.count("html") == read.count("main") == 1
    assert read.count("svg") == read.count("figure") == 4
    for tag, attributes in read.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(str(attributes["aria-label"]).split()) >= 8
    assert read.count("caption") == read.count("table")
    assert "Verification passed" in read.text
    assert "2 of 3 checks passed, 1 not run" in read.text
    assert "In the base 0 of 66 pairs look ahead; in the converted model 18 do" in read.text
    assert "somebody" not in page, "no folder of the machine it was made on"
    assert page == page_of(manifest, tmp_path / "out"), "the same every time"


def test_an_evaluation_beside_its_base_and_over_thresholds(tmp_path: Path) -> None:
    page = page_of(changed(llama_bd3lm(), evaluation=evaluated()), tmp_path / "out")
    assert_inert(page)
    read = Reader(page)
    for row in (
        ["task", "metric", "items", "examples before each", "base", "this model", "difference"],
        ["capitals", "acc", "1,200", "0", "0.750 ± 0.100", "0.500 ± 0.125", "-0.250 ± 0.062"],
        ["copying", "exact_match", "1,200", "unknown", "not measured", "0.000", ""],
        ["0.5", "copying", "exact_match", "0.250 ± 0.100", "4", "80"],
        ["0.9", "copying", "exact_match", "0.500 ± 0.100", "1.25", "25"],
        ["1", "copying", "exact_match", "0.000 ± 0.100", "none", "none"],
    ):
        assert row in read.rows
    assert read.count("caption") == read.count("table")
    (curve,) = [held for tag, held in read.tags if tag == "svg" and "threshold" in str(held)]
    assert "Line chart of the score of each task" in str(curve["aria-label"])
    drawn = [held for tag, held in read.tags if tag == "use" and "parallelism-" in str(held)]
    assert len(drawn) >= 2, "a point per threshold that wrote anything"
    assert "NELBO 4.5 nats per token, NLL of the base 3.25" in read.text
    assert "up to 32 draws" in read.text


def test_a_sweep_is_one_number_and_batches_are_told_apart(tmp_path: Path) -> None:
    found = evaluated()
    aup = {"task": "copying", "metric": "exact_match", "aup": 34.5, "best": 50.0}
    swept = [
        row | {"batch_size": batch, "writing_seconds": 8.0 / batch}
        for row in found["sweep"]
        for batch in (1, 8)
    ]
    section = found | {"sweep": swept, "parallelism": [aup]}
    read = Reader(page_of(changed(llama_bd3lm(), evaluation=section), tmp_path / "out"))
    assert "Accuracy under parallelism of copying exact_match: 34.5" in read.text
    assert ["0.5", "8", "copying", "exact_match", "0.250 ± 0.100", "4", "80", "1"] in read.rows
    plain = Reader(page_of(changed(llama_bd3lm(), evaluation=found), tmp_path / "plain"))
    drawn = [
        [held for tag, held in page.tags if tag == "use" and "parallelism-" in str(held)]
        for page in (read, plain)
    ]
    assert len(drawn[0]) == len(drawn[1]), "one place per threshold, whatever the batch"


@pytest.mark.parametrize(
    "broken",
    [
        *({"results": [{}]}, {"settings": {}}, {"tasks": None}, {"sweep": [{}]}),
        {"text": {"source": "a.txt", "nelbo": {"nats_per_token": None}}},
    ],
)
def test_an_evaluation_that_says_little_spoils_nothing(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(changed(llama_bd3lm(), evaluation=evaluated() | broken), tmp_path / "out")
    assert_inert(page)
    assert "Verification passed" in Reader(page).text


def test_failures_come_first(tmp_path: Path) -> None:
    probes = [
        probe("fine", True, "1", "1"),
        probe("unasked", None, "not measured", "2", "no base"),
        probe("broken", False, "3 wrong", "0 wrong", "layer 4") | {"origin": "counting is exact"},
        probe("fine too", True, "1", "1"),
    ]
    report = {"passed": False, "probes": probes, "seconds": 2.0}
    read = Reader(page_of(changed(bert_mdlm(), verification=report), tmp_path / "out"))
    names = [row for row in read.rows if row[0].strip("✓✗○ ") in ("passed", "FAILED", "not run")]
    assert [row[1] for row in names] == ["broken", "unasked", "fine", "fine too"]
    assert names[0] == ["✗ FAILED", "broken", "3 wrong", "0 wrongcounting is exact", "layer 4"]
    assert names[1] == ["○ not run", "unasked", "not measured", "2", "no base"]
    assert "Verification failed" in read.text
    assert "2 of 4 checks passed, 1 failed, 1 not run" in read.text


def test_checks_are_folded_by_group_with_failures_open_and_named(tmp_path: Path) -> None:
    probes = [
        probe("weights", True, "1", "1"),
        probe("attention-sdpa", True, "1", "1"),
        probe("attention-layers", False, "3 wrong", "0 wrong"),
        probe("cache", None, "not measured", "0"),
        probe("never-heard-of", False, "1", "0"),
    ]
    report = {"passed": False, "probes": probes, "seconds": 2.0}
    manifest = changed(llama_bd3lm(), verification=report)
    page = page_of(manifest, tmp_path / "out")
    groups = re.findall(
        r"<details( open)?><summary>(.*?)</summary>\n<table class=.grid probes", page
    )
    titles = [(bool(is_open), re.sub(r"<[^>]+>", "", title)) for is_open, title in groups]
    assert titles == [
        (True, "Who sees whom 1 of 2 passed, 1 failed"),
        (True, "Others 0 of 1 passed, 1 failed"),
        (False, "Files and weights 1 of 1 passed"),
        (False, "Decoding 0 of 1 passed, 1 not run"),
    ]
    verdict = page[page.index("Verification failed") : page.index("</header>")]
    assert "<li>attention-layers</li>" in verdict and "<li>never-heard-of</li>" in verdict
    card = render_card(tmp_path / "out", manifest)
    opened = re.findall(r"<details open>\n<summary>(.*)</summary>", card)
    assert opened == [
        "Who sees whom: 1 of 2 passed, 1 failed: attention-layers",
        "Others: 0 of 1 passed, 1 failed: never-heard-of",
    ]


def test_every_probe_has_a_group() -> None:
    groups = group_probes([{"name": name, "passed": True} for name in CATALOGUE])
    assert "Others" not in [group.title for group in groups]
    assert sum(len(group.probes) for group in groups) == len(CATALOGUE)


def test_the_story_is_told_from_the_top(tmp_path: Path) -> None:
    manifest = changed(llama_bd3lm(), measurements=drawable(), evaluation=evaluated())
    folder = fill(tmp_path / "out", manifest)
    (folder / "sample.gif").write_bytes(b"GIF89a")
    page = render_report(folder, manifest)
    assert_inert(page)
    told = [
        *("<h1>", 'src="data:image/gif;base64,R0lGODlh"', "NELBO before", "NELBO after"),
        *("base, autoregressive", "tokens per forward", "Verification passed", "Behind its base"),
        *("<h2>A sample", "Held-out loss at each mask rate", "<h2>Held-out text", "<h2>Evaluation"),
        *("<h2>Checks", "<h2>The model", "The resolved recipe"),
    ]
    places = [page.index(text) for text in told]
    assert places == sorted(places)
    (film,) = [held for tag, held in Reader(page).tags if tag == "img"]
    assert len(str(film["alt"]).split()) >= 8
    large = folder / "sample.gif"
    with large.open("wb") as file:
        file.truncate(LARGEST_FILM + 1)
    assert "data:image/gif" not in render_report(folder, manifest), "the page stays a page"


def test_it_needs_no_scrolling_to_the_side(tmp_path: Path) -> None:
    """Nothing is wider than it may be, and no word is broken in a table."""
    manifest = changed(llama_bd3lm(), measurements=drawable(), evaluation=evaluated())
    page = page_of(manifest, tmp_path / "out")
    style = page[page.index("<style>") : page.index("</style>")]
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", style)
    assert "overflow-x" not in style and "nowrap" not in style.replace(".unseen", "").replace(
        "clip-path: inset(50%); white-space: nowrap", ""
    )
    assert not re.search(r"min-width: *[1-9]", style)
    anywhere = [selector.strip() for selector, rule in rules if "anywhere" in rule]
    assert anywhere == [".facts td"], "ids and hashes, of which no part is a word"
    phone = style[style.index("@media (max-width") :]
    assert "th, td { display: block" in phone and "attr(data-name)" in phone
    tables = re.findall(r"<table class=.grid [^>]*>(.*?)</table>", page, flags=re.DOTALL)
    assert len(tables) >= 6
    for table in tables:
        for values in re.findall(r"<tr[^>]*><th scope=.row.*?</tr>", table, flags=re.DOTALL):
            assert values.count("<td") == values.count("data-name="), "a value without its column"


GAPS = [
    ({"nelbo_after": 3.4}, "good", "Near its base", "lie 0.17 to 0.33 above"),
    ({"nelbo_after": 3.2}, "good", "Near its base", "no higher than the base's own"),
    ({"nelbo_after": 4.0}, "fair", "Behind its base", "closed 85% of the distance"),
    ({"nelbo_after": 7.0}, "poor", "Far from its base", "Expect little of its text"),
    ({"nelbo_after": 9.0}, "poor", "No better than before training", "9 nats per token, and was"),
    ({"nelbo_after": None}, "open", "Quality not measured", "held-out"),
    ({"ar_nll": None}, "open", "Trained; nothing to compare with", "came down from 8.25 to 5.5"),
]


@pytest.mark.parametrize(("found", "kind", "headline", "said"), GAPS)
def test_quality_is_judged_in_words(
    found: dict[str, float | None], kind: str, headline: str, said: str, tmp_path: Path
) -> None:
    manifest = llama_bd3lm()
    for name, nats in found.items():
        held = manifest["measurements"].pop(name)
        if nats is not None:
            manifest["measurements"][name] = {**held, "nats_per_token": nats}
    folder = fill(tmp_path / "out", manifest)
    page = render_report(folder, manifest)
    assert f'<div class="verdict {kind}">\n<strong>{headline}</strong>' in page
    assert said in Reader(page).text
    card = render_card(folder, manifest)
    assert f"**Is it any good?** {headline}. " in card and said in card
    assert card.index(headline) < card.index("## Use") < card.index("## Limits")
    assert card.index("## Limits") < card.index("## Training")


def test_no_verification_is_not_a_pass(tmp_path: Path) -> None:
    manifest = llama_bd3lm()
    del manifest["verification"]
    read = Reader(page_of(manifest, tmp_path / "out"))
    assert "Not verified" in read.text
    assert "passed" not in read.text


def _poisoned(value: Any) -> Any:
    """Every text of a manifest with markup in it; keys and what templates branch on stay."""
    if isinstance(value, dict):
        kept = ("model_type", "target", "kind", "method", "given", "license", "stopped", "data")
        return {k: v if k in kept else _poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_poisoned(entry) for entry in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_escaped(case: str, tmp_path: Path) -> None:
    manifest = CASES[case]()
    poisoned = {
        key: _poisoned(value) if key != "measurements" else value
        for key, value in changed(manifest, evaluation=evaluated()).items()
    }
    poisoned["recipe"]["source"] = poisoned["source"]["given"] = f"some/model{EVIL}"
    page = page_of(changed(poisoned, measurements=drawable()), tmp_path / "out")
    assert_inert(page)
    assert SCRIPT not in page
    assert SCRIPT in Reader(page).text, "it is shown as what it is"
    assert "{{ 7*7 }}" in Reader(page).text


def test_the_title_is_escaped(tmp_path: Path) -> None:
    folder = fill(tmp_path / f"a{EVIL.replace('/', '')}", bert_mdlm())
    (folder / "dllm_convert.json").unlink()
    page = render_report(folder, {"verification": bert_mdlm()["verification"]})
    assert_inert(page)
    read = Reader(page)
    assert "<script>alert(1)<script>" in read.text
    assert "says nothing of how it was made" in read.text


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"plan": []},
        {"plan": {}, "source": 3, "recipe": None},
        {"verification": {"passed": True, "probes": [{}]}},
        {"verification": {"passed": None, "probes": None}, "measurements": {"decoding": "fast"}},
    ],
)
def test_a_manifest_that_says_little(manifest: Manifest, tmp_path: Path) -> None:
    page = render_report(fill(tmp_path / "out", bert_mdlm()), manifest)
    assert_inert(page)
    assert Reader(page).count("h1") == 1


def test_paths_are_cut_down(tmp_path: Path) -> None:
    report = {
        "passed": True,
        "seconds": 1.0,
        "probes": [probe("weights", True, "/home/somebody/secret/x.safetensors is fine", "0")],
    }
    page = page_of(changed(llama_bd3lm(), verification=report), tmp_path / "out")
    assert "somebody" not in page
    assert "x.safetensors is fine" in page


def test_it_is_written_beside_its_manifest(tmp_path: Path) -> None:
    manifest = changed(llama_bd3lm(), measurements=drawable())
    folder = fill(tmp_path / "out", manifest)
    assert write_report(folder) == folder / "report.html"
    card = render_card(folder, manifest)
    assert "[report.html](report.html)" in card
    elsewhere = tmp_path / "elsewhere.html"
    failed = {"passed": False, "probes": [probe("cache", False, "1", "0")], "seconds": 1.0}
    write_report(folder, elsewhere, verification=failed)
    assert "Verification failed" in Reader(elsewhere.read_text(encoding="utf-8")).text
    assert json.loads((folder / "dllm_convert.json").read_text()) == manifest


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    folder = fill(tmp_path / "out", llama_bd3lm())
    with pytest.raises(DataError, match="cannot be written"):
        write_report(folder, tmp_path / "missing" / "report.html")
    (folder / "dllm_convert.json").unlink()
    with pytest.raises(DataError, match=r"no dllm_convert\.json"):
        write_report(folder)


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, ValueError])
def test_a_fault_of_ours_is_no_other_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Of a sound manifest the page is never the one of a folder that says nothing."""

    def broken(facts: object) -> None:
        raise error("a fault of ours")

    monkeypatch.setattr("dllm_convert.card.report._facts", broken)
    folder = fill(tmp_path / "out", bert_mdlm())
    with pytest.raises(error, match="a fault of ours"):
        render_report(folder, bert_mdlm())
