"""The model card: what it says is what the run recorded, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_cases import (
    CASES,
    COMMIT,
    DATASET_COMMIT,
    Manifest,
    adapter,
    bert_mdlm,
    changed,
    fill,
    llama_bd3lm,
    probe,
)
from conversion import convert
from huggingface_hub import ModelCard

from dllm_convert.card.readme import render_card, write_card
from dllm_convert.common.manifest import write_manifest
from dllm_convert.errors import DataError
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.verification.report import BY_FILES

ALWAYS = ["Use", "The model", "Limits", "Training", "Reproduce", "Licence", "Citation"]
TRAINED = [
    *("Use", "The model", "Limits", "Training", "Measured on held-out text", "A sample"),
    *("Verification", "Reproduce", "Licence", "Citation"),
]


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes the checked card of a manifest and reads it back."""
    count = 0

    def make(manifest: Manifest, **options: Any) -> str:
        nonlocal count
        count += 1
        folder = fill(tmp_path / str(count), manifest)
        return write_card(folder, **options).read_text(encoding="utf-8")

    return make


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def prose(text: str) -> str:
    """The card without metadata and code blocks, on one line."""
    bare = re.sub(r"^(`{3,}).*?^\1$", "", body(text), flags=re.MULTILINE | re.DOTALL)
    return " ".join(bare.split())


def sections(text: str) -> dict[str, str]:
    hidden = re.sub(
        r"^(`{3,}).*?^\1$",
        lambda found: found.group().replace("\n#", "\n "),
        body(text),
        flags=re.MULTILINE | re.DOTALL,
    )
    parts = re.split(r"^## (.+)$", hidden, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def front(text: str) -> Manifest:
    return dict(yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n")))


def untrained(manifest: Manifest) -> Manifest:
    plain = {**manifest, "measurements": {}, "sample": None}
    del plain["verification"]
    return plain


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_sections(make: Callable[[], Manifest], card: Callable[..., str]) -> None:
    assert list(sections(card(make()))) == TRAINED
    plain = card(untrained(make()))
    assert list(sections(plain)) == ALWAYS
    assert "Not verified" in plain


def test_an_untrained_conversion_says_so(card: Callable[..., str]) -> None:
    text = card(untrained(llama_bd3lm()))
    assert "**not trained** for diffusion" in text
    assert "do not expect sensible text" in text
    assert "model-index" not in front(text)
    assert "datasets" not in front(text)


def test_numbers_are_those_of_the_run(card: Callable[..., str]) -> None:
    text = card(llama_bd3lm())
    assert "| NELBO before training | 8.25 ± 0.12 | 3828 | 1,987 |" in text
    assert "| NELBO after training | 5.5 ± 0.062 | 244.7 | 1,987 |" in text
    assert "| NLL of the base, autoregressive | 3.25 ± 0.031 | 25.79 | 1,987 |" in text
    assert "40 optimizer steps, 81,920 tokens" in text
    assert "2.25 nats per token above the base's" in text
    assert "2 of 3 checks passed, 1 not run" in text
    assert "id 128002" in sections(text)["The model"]


@pytest.mark.parametrize("ran", [(), ("portable",)])
def test_a_model_that_was_never_run(card: Callable[..., str], ran: tuple[str, ...]) -> None:
    """The four probes of files pass; any other with a verdict needed the model."""
    manifest = llama_bd3lm()
    by_files = [probe(name, True, "0", "0") for name in sorted(BY_FILES)]
    others = [probe(name, name in ran or None, "0", "0") for name in ("portable", "cache")]
    manifest["verification"] = {"passed": True, "probes": [*by_files, *others], "seconds": 1.0}
    text = card(manifest)
    assert ("> **The model was never run.** Only its files were verified" in text) is (not ran)
    assert ("Measured in float32" in text) is bool(ran)


def test_cost(card: Callable[..., str]) -> None:
    training = prose(card(llama_bd3lm()))
    assert (
        "2 min 11 s of wall time on 2 \u00d7 NVIDIA H100 80GB HBM3, 623 tokens per second"
        in training
    )
    assert "roughly 6.5e14 floating-point operations, an estimate" in training


@pytest.mark.parametrize("unknown", [{"flops": None}, {}])
def test_cost_without_what_an_estimate_needs(
    card: Callable[..., str], unknown: dict[str, None]
) -> None:
    manifest = llama_bd3lm()
    for key in ("device", "devices", "flops"):
        del manifest["measurements"]["train"][key]
    manifest["measurements"]["train"] |= unknown
    text = card(manifest)
    assert "2 min 11 s of wall time, 623 tokens per second\n" in text
    assert "floating-point" not in text


def test_front_matter_of_a_hub_source(card: Callable[..., str]) -> None:
    values = front(card(llama_bd3lm()))
    assert values.pop("model-index")
    assert values == {
        "language": ["en", "de"],
        "license": "llama3.2",
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "finetune",
        "datasets": ["org/some-text"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dllm-convert", "diffusion", "block-diffusion", "bd3lm", "custom_code"],
    }


def test_front_matter_of_an_adapter(card: Callable[..., str]) -> None:
    values = front(card(adapter()))
    assert values["base_model"] == "Qwen/Qwen2.5-3B"
    assert values["base_model_relation"] == "adapter"
    assert values["library_name"] == "peft"
    assert values["license"] == "other"
    assert values["license_name"] == "qwen-research"
    assert values["license_link"] == "LICENSE"
    assert "lora" in values["tags"]
    assert "datasets" not in values


def test_measured_values_round_trip_through_the_hubs_own_reader(card: Callable[..., str]) -> None:
    data = ModelCard(card(llama_bd3lm(), repo_id="me/Llama-x")).data
    assert data.model_name == "Llama-x"
    nelbo, perplexity = data.eval_results
    assert (nelbo.metric_type, nelbo.metric_value) == ("nelbo", 5.5)
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", 244.7)
    for result in (nelbo, perplexity):
        assert "upper bound" in result.metric_name
        assert result.dataset_type == "org/some-text"
        assert result.dataset_split == "train"
        assert result.dataset_revision == DATASET_COMMIT
        assert result.task_type == "text-generation"
        assert result.verified is None


@pytest.mark.parametrize("nats", [float("nan"), float("inf")])
def test_no_result_from_what_is_no_number(card: Callable[..., str], nats: float) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["nelbo_after"]["nats_per_token"] = nats
    text = card(manifest)
    assert "model-index" not in front(text)
    assert "| NELBO after training | not a number" in text or "| infinite" in text


def test_perplexity_beyond_a_float_is_left_out(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["nelbo_after"]["nats_per_token"] = 800.0
    text = card(manifest)
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_type == "nelbo"
    assert "| beyond a float |" in text


def test_files_of_the_author_are_no_benchmark(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["data"] |= {"source": "/data/a.txt,/data/b.md", "kind": "files"}
    text = card(manifest)
    assert not {"model-index", "datasets"} & front(text).keys()
    assert "`a.txt`, `b.md`" in text
    assert "/data" not in text


@pytest.mark.parametrize(
    ("source", "recorded", "hub"),
    [
        ("org/text", None, True),
        ("org/text.jsonl", None, False),
        ("texts/*.txt", None, False),
        ("org/text", "files", False),
        ("org/text", "hub", True),
        ("../x", "hub", False),
    ],
)
def test_older_manifests_do_not_say_what_the_text_was(
    card: Callable[..., str], source: str, recorded: str | None, hub: bool
) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["data"]["source"] = source
    del manifest["measurements"]["data"]["kind"]
    if recorded:
        manifest["measurements"]["data"]["kind"] = recorded
    assert ("datasets" in front(card(manifest))) == hub


def test_measured_on_another_text(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["data"]["held_out"] = {
        **{"source": "org/benchmark", "kind": "hub", "subset": "v2", "split": "test"},
        "revision": COMMIT,
    }
    text = card(manifest)
    assert front(text)["datasets"] == ["org/some-text"]
    (result, _) = ModelCard(text).data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("org/benchmark", "v2")
    assert (result.dataset_split, result.dataset_revision) == ("test", COMMIT)
    assert result.dataset_name == "org/benchmark, 1,987 tokens"
    assert "measured on 1,987 tokens of [org/benchmark]" in text
    assert "subset `v2`, split `test` at revision" in text
    assert "held out, of which" not in text


def test_an_older_manifest_measured_on_another_text(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["recipe"]["data"]["held_out_source"] = "/home/somebody/held-out.txt"
    text = card(manifest)
    assert "model-index" not in front(text)
    assert "tokens of local files: `held-out.txt`" in text
    assert "somebody" not in text


def test_a_stream_has_no_counts_of_what_was_read(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    data = manifest["measurements"]["data"]
    data["streaming"] = True
    del data["documents"], data["train_tokens"]
    assert "documents streamed while training; 7 whole documents were held out" in card(manifest)


def test_a_mixture_is_told_by_its_texts(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    facts = manifest["measurements"]["data"]
    texts = [
        {"share": 0.7, "source": "org/some-text", "kind": "hub", "revision": COMMIT,
         "subset": "s", "split": "train[:10%]", "containing": "python"},
        {"share": 0.25, "source": "/home/somebody/b.jsonl", "kind": "files", "split": "[:5]"},
        {"share": 0.05, "source": "pydoc", "kind": "pydoc", "split": "train"},
    ]  # fmt: skip
    asked = [
        {"source": text["source"], "weight": text["share"], "split": text["split"]}
        for text in texts
    ]
    line = "org/some-text:s/train[:10%]:0.7,/home/somebody/b.jsonl:[:5]:0.25,pydoc:0.05"
    facts |= {"kind": "mixture", "source": line, "texts": texts}
    manifest["recipe"]["data"] |= {"source": line, "mixture": asked}
    text = card(manifest)
    assert "a mixture by sequences: 70% [org/some-text]" in text
    assert "subset `s`, split `train[:10%]` at revision" in text
    assert "only documents that contain `python`; 25% local files: `b.jsonl`" in text
    assert "the part `[:5]`; 5% the Python language reference" in text
    assert front(text)["datasets"] == ["org/some-text"]
    assert "somebody" not in text
    # What is to be run again is a mixture still.
    assert "source: b.jsonl" in text and "weight: 0.25" in text


def test_chats(card: Callable[..., str]) -> None:
    assert "training was on plain text" in prose(card(llama_bd3lm()))
    manifest = llama_bd3lm()
    manifest["measurements"]["data"]["chats"] = 60
    text = prose(card(manifest))
    assert "60 of the documents were chats, but following instructions was not measured" in text
    assert "plain text" not in text


def test_an_encoder_has_no_autoregressive_baseline(card: Callable[..., str]) -> None:
    text = card(bert_mdlm())
    assert "autoregressive |" not in text
    assert front(text)["pipeline_tag"] == "fill-mask"
    assert "causal attention" not in text


def test_a_local_base_is_no_base_model(card: Callable[..., str]) -> None:
    text = card(bert_mdlm())
    assert not {"base_model", "base_model_relation"} & front(text).keys()
    assert "somebody" not in text
    assert "# bert-tiny-mdlm\n" in text
    assert "beside `bert-tiny`:" in text


def gguf(**source: Any) -> Manifest:
    digest = "b179c952" * 8
    given = "/downloads/SmolLM2-135M-Instruct.Q4_1.gguf"
    manifest = changed(
        llama_bd3lm(),
        source={
            **{"kind": "gguf", "given": given, "repo_id": None, "revision": None},
            **{"license": "apache-2.0", "language": ["en", "English", "zh-CN"]},
            "files": {"SmolLM2-135M-Instruct.Q4_1.gguf": digest},
            **source,
        },
    )
    manifest["recipe"]["source"] = given
    # Wherever it was cached: a folder's name is no record of its content.
    folder = f"/home/somebody/.cache/dllm-convert/gguf/{'0' * 64}"
    manifest["stages"] = [{"name": "materialise", "seconds": 1.0, "result": {"folder": folder}}]
    return manifest


def test_gguf_source(card: Callable[..., str]) -> None:
    text = card(gguf())
    assert "# SmolLM2-135M-Instruct.Q4_1-bd3lm-32" in text
    assert f"sha256 `{'b179c952' * 8}`" in text
    assert "/downloads" not in text
    assert "somebody" not in text
    assert front(text)["license"] == "apache-2.0"
    assert front(text)["language"] == ["en", "zh"]
    assert "base_model" not in front(text)
    assert "quantised weights, whose errors it keeps" in prose(text)


def test_gguf_that_names_what_it_holds(card: Callable[..., str]) -> None:
    text = card(gguf(origin="HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert front(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "says of itself" in text
    assert " at revision" not in sections(text)["Licence"]
    assert "base_model" not in front(card(gguf(origin="not a model")))


def test_failed_verification_comes_first(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["verification"]["passed"] = False
    manifest["verification"]["probes"].append(
        probe("attention-eager", False, "3 of 400 pairs wrong", "0 pairs", "position 1 sees 2")
    )
    text = card(manifest, repo_id="me/Llama-x")
    title, first, second = body(text).strip().split("\n\n")[:3]
    assert title == "# Llama-x"
    assert first.startswith("> **Verification failed.**")
    assert "3 of 400 pairs wrong; required: 0 pairs. position 1 sees 2" in first
    assert second.startswith("**Built with Llama**")
    assert "1 failed" in sections(text)["Verification"]


def test_no_verification_comes_first(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    del manifest["verification"]
    _, first = body(card(manifest)).strip().split("\n\n")[:2]
    assert first.startswith("> **Not verified.**")


@pytest.mark.parametrize("report", [{"passed": False, "probes": []}, {"probes": []}])
def test_a_verification_that_did_not_pass_is_a_failed_one(
    card: Callable[..., str], report: Manifest
) -> None:
    _, first = body(card({**llama_bd3lm(), "verification": report})).strip().split("\n\n")[:2]
    assert first.startswith("> **Verification failed.**")


def test_a_probe_that_measured_nan_can_be_documented(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["verification"]["passed"] = False
    manifest["verification"]["probes"] = [
        probe("cache", False, "logits differ by nan", "at most 0.0001", "None of {{ x }} is None")
    ]
    text = card(manifest)
    assert "logits differ by `nan`" in text


def test_lora_is_named_and_cited(card: Callable[..., str]) -> None:
    text = card(llama_bd3lm())
    assert "LoRA of rank 64, merged into the weights" in text
    assert "https://arxiv.org/abs/2106.09685" in text
    assert "@inproceedings{hu2022lora," in text
    assert "2106.09685" not in card(bert_mdlm())
    assert "merged into the weights (" not in card(adapter())


def test_methods_and_base_are_cited(card: Callable[..., str]) -> None:
    cited = sections(card(llama_bd3lm()))["Citation"]
    assert "https://arxiv.org/abs/2406.07524" in cited
    assert "https://arxiv.org/abs/2503.09573" in cited
    assert f"note = {{Revision {COMMIT}}}" in cited
    assert cited.count("{") == cited.count("}")
    plain = sections(card(bert_mdlm()))["Citation"]
    assert "2503.09573" not in plain
    assert "@misc" not in plain


def test_training_cut_short_says_so(card: Callable[..., str]) -> None:
    manifest = llama_bd3lm()
    manifest["measurements"]["train"]["stopped"] = "time"
    assert "the time limit left no more of the 40 planned" in card(manifest)


@pytest.mark.parametrize("stderr", [None, float("inf")])
def test_unknown_spread_is_left_out(card: Callable[..., str], stderr: float | None) -> None:
    manifest = llama_bd3lm()
    for name in ("nelbo_before", "nelbo_after", "ar_nll"):
        manifest["measurements"][name]["stderr"] = stderr
    text = card(manifest)
    assert "±" not in text
    assert "infinite" not in text


def test_llama_terms(card: Callable[..., str]) -> None:
    text = card(llama_bd3lm())
    assert body(text).strip().split("\n\n")[1] == "**Built with Llama**"
    licence = sections(text)["Licence"]
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright ©" in licence
    assert "[USE_POLICY.md](USE_POLICY.md)" in licence
    assert "[NOTICE](NOTICE)" in licence
    assert "https://www.llama.com/llama3_2/license/" in licence
    assert "The weights were changed" in licence


def test_the_title_of_a_derived_llama_begins_with_llama(card: Callable[..., str]) -> None:
    source = {"repo_id": "org/Hermes-1B", "given": "org/Hermes-1B"}
    assert "\n# Llama-Hermes-1B-bd3lm-32\n" in card(changed(llama_bd3lm(), source=source))


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ({"license": "gemma"}, "Gemma is provided under and subject to the Gemma Terms of Use"),
        ({"license": "cc-by-nc-4.0"}, "Commercial use is not allowed"),
        ({"license": "cc-by-nc-nd-4.0"}, "Do not distribute it"),
        ({"license": "etalab-2.0"}, "does not know its terms"),
        ({"license": None}, "not recorded in the files"),
        ({"license": "other", "license_name": "my-terms"}, "`my-terms`, see [LICENSE](LICENSE)"),
        ({"license": "an-id-nobody-knows"}, "`an-id-nobody-knows`, see [LICENSE](LICENSE)"),
        ({"license": "other"}, "`see-the-base-model`"),
    ],
)
def test_terms_are_explained(card: Callable[..., str], licence: Manifest, words: str) -> None:
    text = card(changed(bert_mdlm(), source=licence))
    assert words in prose(text)
    values = front(text)
    if licence["license"] is None:
        assert "license" not in values
    elif values["license"] == "other":
        assert values["license_name"]
        assert values["license_link"] == "LICENSE"


def test_a_link_of_the_base_is_made_absolute(tmp_path: Path) -> None:
    source = {"license": "other", "license_name": "x", "license_link": "TERMS.txt"}
    manifest = changed(adapter(), source=source)
    folder = fill(tmp_path, manifest)
    (folder / "LICENSE").unlink()
    link = front(render_card(folder, manifest))["license_link"]
    assert link == f"https://huggingface.co/Qwen/Qwen2.5-3B/blob/{COMMIT}/TERMS.txt"
    for bad in ("../../x", "javascript:alert(1)", "http://x.org"):
        manifest["source"]["license_link"] = bad
        assert "license_link" not in front(render_card(folder, manifest))


def test_the_repository_names_title_and_snippets(card: Callable[..., str]) -> None:
    text = card(llama_bd3lm(), repo_id="me/Llama-mine")
    assert "\n# Llama-mine\n" in text
    assert text.count('checkpoint = "me/Llama-mine"') == 2
    assert "[NOTICE](NOTICE)" in text
    assert 'checkpoint = "."' in card(llama_bd3lm())
    assert 'adapter = "me/y"' in card(adapter(), repo_id="me/y")


def test_pictures_that_are_there_are_shown(tmp_path: Path) -> None:
    manifest = bert_mdlm()
    folder = fill(tmp_path, manifest)
    assert re.search(r"^!\[[^\]]{20,}\]\(loss\.png\)$", render_card(folder, manifest), re.MULTILINE)
    assert re.search(
        r"^!\[[^\]]{20,}\]\(sample\.gif\)$", render_card(folder, manifest), re.MULTILINE
    )
    (folder / "loss.png").unlink()
    (folder / "sample.gif").unlink()
    assert "![" not in render_card(folder, manifest)


@pytest.mark.parametrize(("family", "target"), [("llama", "bd3lm"), ("bert", "mdlm")])
def test_recipe_in_the_card_loads(
    source_cache: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    plan = convert(source_cache(family), tmp_path / "out", target)
    recipe = plan.recipe.model_dump(mode="json")
    text = render_card(tmp_path / "out", {**bert_mdlm(), "recipe": recipe})
    found = re.search(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found
    path = tmp_path / "recipe.yaml"
    path.write_text(found[1])
    loaded = load_recipe(str(path), overrides={}).model_dump(mode="json")
    assert {**loaded, "name": None} == recipe | {"source": source_cache(family).name}


def test_recipe_in_the_card_pins_the_base(card: Callable[..., str]) -> None:
    assert f"\nrevision: {COMMIT}\n" in card(llama_bd3lm())
    assert "\nrevision:" not in sections(card(bert_mdlm()))["Reproduce"]


def test_written_card(tmp_path: Path) -> None:
    folder = fill(tmp_path, llama_bd3lm())
    names = {path.name for path in folder.iterdir()}
    path = write_card(folder)
    assert path == folder / "README.md"
    path.write_text("mine")
    assert write_card(folder, overwrite=False).read_text() == "mine"
    assert write_card(folder).read_text().startswith("---\n")
    assert {path.name for path in folder.iterdir()} == {*names, "README.md"}


def test_no_card_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dllm_convert\.json"):
        write_card(tmp_path)


@pytest.mark.parametrize("key", ["plan", "source", "recipe"])
def test_incomplete_manifest(tmp_path: Path, key: str) -> None:
    manifest = llama_bd3lm()
    del manifest[key]
    write_manifest(tmp_path, manifest)
    with pytest.raises(DataError, match=key):
        write_card(tmp_path)
