"""What `check` says beyond the decisions: parts, bytes, layers, refusals, and how light it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from giant import LLAMA_70B, write_giant

from dllm_convert.common.quantities import bytes_text, hours_text, ranges_text
from dllm_convert.common.tables import text_of
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning import environment as plan_fit
from dllm_convert.planning.conversion import ConversionPlan, make_plan, plan_as_dict
from dllm_convert.planning.layers import kept_features
from dllm_convert.planning.plan_text import plan_blocks
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import SourceInfo, TensorInfo, inspect_source

Sources = Callable[..., Path]
MODULES, ROOMS = 396, 182
"""Modules of others, and of this package, that a local check may load: each costs time."""
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "httpx", "httpx2", "safetensors")


def replan(info: SourceInfo, target: str = "bd3lm", **fields: Any) -> ConversionPlan:
    block = {"block_size": 16} if target == "bd3lm" else {}
    recipe = Recipe.model_validate({"source": "x", "target": target, **block, **fields})
    return make_plan(recipe, info)


def with_config(info: SourceInfo, **config: Any) -> SourceInfo:
    return replace(info, config={**info.config, **config})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dllm_convert", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


class TestLight:
    """A check loads little, so that it takes less than a second, process start included."""

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_modules_of_a_local_check(self, source_cache: Sources, form: list[str]) -> None:
        code = (
            "import sys\nfrom dllm_convert.cli.app import app\n"
            "app(['check', *sys.argv[1:]], standalone_mode=False)\n"
            "sys.stderr.write(' '.join(sys.modules))"
        )
        line = [sys.executable, "-c", code, str(source_cache("llama")), *form]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
        loaded = done.stderr.split()
        assert not set(loaded) & set(HEAVY)
        own = [name for name in loaded if name.startswith("dllm_convert")]
        assert len(loaded) - len(own) < MODULES
        assert len(own) < ROOMS

    def test_seventy_billion_parameters_are_as_light(
        self, source_cache: Sources, tmp_path: Path
    ) -> None:
        for path in source_cache("llama").iterdir():
            if "token" in path.name:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        write_giant(tmp_path, LLAMA_70B)
        done = run("check", str(tmp_path), "--to", "bd3lm", "--block", "32", "--full", "--json")
        found = json.loads(done.stdout)
        assert found["source"]["parts"]["total"] == 70_553_706_496
        assert found["writes"]["weights_bytes"] == 2 * 70_553_706_496
        assert found["writes"]["changed_bytes"] == 2 * 2 * 128_256 * 8192
        assert len(found["writes"]["files_changed"]) == 2
        gpu = found["estimate"]["devices"][1]
        assert not gpu["fits"]
        assert 15 <= gpu["devices_needed"] <= 25


class TestWrites:
    """Bytes are those that the adapted checkpoint has."""

    @pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_bytes_of_the_untrained_conversion(
        self, source_factory: Sources, tmp_path: Path, family: str, shards: int
    ) -> None:
        from dllm_convert.common.console import Reporter
        from dllm_convert.source.safetensors_header import read_checkpoint
        from dllm_convert.weights.run import adapt

        source = source_factory(family, shards=shards)
        plan = replan(inspect_source(str(source)), "mdlm")
        out = tmp_path / "out"
        adapt(plan, source, out, Reporter(quiet=True))
        entries = [e for header in read_checkpoint(out).values() for e in header.entries.items()]
        assert plan.writes is not None
        assert plan.writes.total == sum(entry.end - entry.start for _, entry in entries)
        changed = {n: e.end - e.start for n, e in entries if n in plan.tensors_changed}
        assert plan.writes.changed == changed

    def test_a_dropped_tensor_changes_its_file(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("bert")))
        pooler = TensorInfo("F32", (32, 32), "model.safetensors")
        made = replan(
            replace(info, tensors={**info.tensors, "bert.pooler.dense.weight": pooler}), "mdlm"
        )
        assert made.writes is not None
        assert made.writes.changed == {}
        assert list(made.writes.files_changed) == ["model.safetensors"]


class TestLayers:
    """Attention by layer type, and what else shapes it."""

    def test_windows_are_named_by_layer(self, source_cache: Sources) -> None:
        options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        made = plan_as_dict(replan(inspect_source(str(source_cache("qwen2", **options)))))
        assert made["attention_layers"] == [
            {
                **{"type": "full_attention", "layers": [0], "window": None},
                **{"before": "causal", "after": "block-causal"},
            },
            {
                **{"type": "sliding_attention", "layers": [1], "window": 8},
                **{"before": "causal, window of 8", "after": "block-causal"},
            },
        ]

    def test_encoders_stay(self, source_cache: Sources) -> None:
        (group,) = replan(inspect_source(str(source_cache("bert"))), "mdlm").layers
        assert (group.before, group.after) == ("bidirectional", "bidirectional")

    def test_soft_caps_sinks_and_scaling_of_one_layer_type(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        rope = {
            "full_attention": {"rope_type": "yarn", "factor": 4.0},
            "sliding_attention": {"rope_type": "default"},
        }
        info = with_config(
            info, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rope_parameters=rope
        )
        notes = " / ".join(replan(info).notes)
        assert "rotary scaling of full_attention layers kept: yarn, factor 4.0" in notes
        assert "soft-cap of 50.0 on attention scores" in notes
        assert "soft-cap of 30.0 on logits" in notes
        sink = TensorInfo("F32", (4,), "model.safetensors")
        names = {f"model.layers.{n}.self_attn.sinks": sink for n in (0, 1)}
        kept = " / ".join(kept_features(replace(info, tensors={**info.tensors, **names})))
        assert "attention sinks kept, on 2 layers" in kept


class TestRefusals:
    """What would make the conversion wrong."""

    def test_transformers_that_is_too_old(
        self, source_cache: Sources, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan_fit.metadata, "version", lambda name: "4.57.1")
        with pytest.raises(IncompatibleError, match=r"4\.57\.1 .* at least 5\.2\.0") as caught:
            replan(inspect_source(str(source_cache("llama"))))
        assert caught.value.exit_code == 3
        assert "pip install" in str(caught.value.hint)

    @pytest.mark.parametrize(
        "name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "RewardModel"]
    )
    def test_another_head(self, source_cache: Sources, name: str) -> None:
        info = inspect_source(str(source_cache("llama")))
        with pytest.raises(IncompatibleError, match=name):
            replan(with_config(info, architectures=[name]))

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("hidden_size", 64, "wide, config.json says hidden_size 64"),
            ("intermediate_size", 48, "intermediate_size"),
            ("num_attention_heads", 8, "hidden_size x queries"),
            ("head_dim", 2, "keys x hidden_size"),
        ],
    )
    def test_sizes_that_are_not_the_weights(
        self, source_cache: Sources, key: str, value: int, message: str
    ) -> None:
        info = inspect_source(str(source_cache("llama")))
        head = {"head_dim": 8} if key == "num_attention_heads" else {}
        with pytest.raises(IncompatibleError, match=message):
            replan(with_config(info, **head, **{key: value}))

    def test_exit_code_and_way_out(self, source_factory: Sources) -> None:
        folder = source_factory("llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
        done = run("check", str(folder), "--to", "mdlm")
        assert (done.returncode, done.stdout) == (3, "")
        assert "Take the config.json that belongs to these weights" in done.stderr


@pytest.mark.parametrize(
    ("parameters", "block", "words"),
    [
        (1_500_000_000, 128, "33.7 at 128"),
        (1_500_000_000, 4, "25.1 at 4"),
        (8_000_000_000, 8, "64 best at 4B"),
        (1_500_000_000, 16, None),
        (8_000_000_000, 64, None),
    ],
)
def test_block_size_against_model_size(
    source_cache: Sources,
    parameters: int,
    block: int,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = inspect_source(str(source_cache("llama")))
    monkeypatch.setattr(SourceInfo, "parameters", parameters)
    said = [w for w in replan(info, block_size=block).warnings if w.startswith("blocks of")]
    assert [words in w for w in said if words] == ([True] if words else [])
    assert bool(said) == bool(words)


def test_shift_with_a_long_budget(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("llama")))
    long = {"steps": 10_000_000, "batch_size": 8}
    assert any("38.4 without" in w for w in replan(info, training=long).warnings)
    dropped = replan(info, training=long, token_shift="drop")
    assert not any("shift" in w for w in dropped.warnings)


class TestText:
    """What people see is what the document holds."""

    @pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "roberta"])
    def test_every_section(self, source_cache: Sources, family: str) -> None:
        done = run("check", str(source_cache(family)), "--to", "mdlm", "--full")
        assert done.returncode == 0, done.stderr
        for title in ("Becomes", "Mask token", "Attention", "Weights", "Training", "Warnings"):
            assert f"\n{title}\n" in done.stdout
        assert "A100 80GB" in done.stdout
        assert max(map(len, done.stdout.splitlines())) < 140

    def test_without_training_or_shapes(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        bare = replan(replace(info, tensors={}), training={"method": "full"})
        document = {"out": "x", **plan_as_dict(bare), "estimate": None}
        assert "the headers tell no shapes" in text_of(plan_blocks(document))
        assert plan_as_dict(bare)["writes"] is None
        untrained = replan(info, training={"method": "none"})
        document = {"out": "x", **plan_as_dict(untrained), "estimate": None}
        assert "\nTraining\n  none" in text_of(plan_blocks(document))

    def test_gated_and_licensed(self, source_cache: Sources) -> None:
        info = replace(inspect_source(str(source_cache("llama"))), gated="manual")
        document = {"out": "x", **plan_as_dict(replan(info, license="llama3.1")), "estimate": None}
        assert "licence llama3.1, gated (its owner decides on each request)" in text_of(
            plan_blocks(document)
        )

    def test_numbers(self) -> None:
        assert [bytes_text(n) for n in (0, 999, 1500, 538_207_488, 3e9, 1.4e12)] == [
            *("0 B", "999 B", "1.5 kB", "538 MB", "3 GB", "1.4 TB"),
        ]
        assert [hours_text(h) for h in (1 / 3600, 0.5, 12.34, 4000)] == [
            *("1 s", "30 min", "12.3 h", "4,000 h"),
        ]
        assert ranges_text([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"
        assert ranges_text(list(range(0, 80, 2))).endswith("...")
