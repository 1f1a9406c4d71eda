"""Three runs written down by hand: nothing in them depends on this machine, a version or a seed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from dllm_convert.modeling.bundle import CODE_FILES

Manifest = dict[str, Any]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
VERSIONS = {
    "python": "3.12.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.30.1",
}


def probe(
    name: str, passed: bool | None, measured: str, required: str, detail: str = ""
) -> Manifest:
    """Return one probe of a report."""
    return {
        "name": name,
        "passed": passed,
        "measured": measured,
        "required": required,
        "detail": detail,
    }


def _recipe(source: str, target: str, block: int | None, method: str) -> Manifest:
    return {
        "name": "example",
        "description": None,
        "references": ["arXiv:2503.09573"],
        "source": source,
        "revision": None,
        "license": None,
        "target": target,
        "block_size": block,
        "token_shift": "keep",
        "sliding_window": "open",
        "mask_token": {"token": None, "id": None},
        "noise": {
            "schedule": "linear",
            "power": 2.0,
            "min_time": 0.001,
            "max_time": 1.0,
            "draw": "count",
        },
        "data": {
            "source": "pydoc",
            "text_field": "text",
            "split": "train",
            "sequence_length": 256,
            "held_out_fraction": 0.1,
            "held_out_sequences": 16,
            "max_documents": None,
        },
        "training": {
            "method": method,
            "steps": 40,
            "max_minutes": None,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "learning_rate": 0.0003,
            "lr_schedule": "cosine",
            "warmup_ratio": 0.05,
            "loss_weight": "elbo",
            "gradient_checkpointing": False,
            "seed": 0,
            "lora": {"rank": 64, "alpha": None, "dropout": 0.0},
        },
        "generation": {"max_new_tokens": 128, "temperature": 0.0},
    }


def _manifest(
    source: Manifest, target: str, block: int | None, method: str, mask: Manifest, **plan: Any
) -> Manifest:
    recipe = _recipe(source["given"], target, block, method)
    return {
        "format_version": 1,
        "created": "2026-11-23T22:30:00+00:00",
        "dllm_convert": "0.1.0",
        "versions": dict(VERSIONS),
        "source": {
            "kind": "hub",
            "license_name": None,
            "license_link": None,
            "origin": None,
            "parameters": plan["parameters"],
            "fingerprint": {"commit": COMMIT},
            **source,
        },
        "recipe": recipe,
        "plan": {
            "source": {"parameters": plan["parameters"], "context": plan["context"]},
            "target": target,
            "block_size": block,
            "token_shift": plan["shift"],
            "mask": mask,
            "attention_changes": list(plan["changes"]),
            "notes": [],
            "min_transformers": "5.2.0",
        },
        "stages": [],
        "measurements": {
            "data": {
                "source": "pydoc",
                "kind": "pydoc",
                "documents": 70,
                "held_out_documents": 7,
                "train_tokens": 51234,
                "held_out_tokens": 1987,
            },
            "nelbo_before": {"nats_per_token": 8.25, "stderr": 0.125, "tokens": 1987},
            "nelbo_after": {"nats_per_token": 5.5, "stderr": 0.0625, "tokens": 1987},
            "ar_nll": {"nats_per_token": 3.25, "stderr": 0.03125, "tokens": 1987},
            "train": {
                "method": method,
                "steps": 40,
                "tokens": 81920,
                "seconds": 131.4,
                "trainable_parameters": 28311552,
                "final_loss": 5.43,
                "stopped": "steps",
                "device": "NVIDIA H100 80GB HBM3",
                "devices": 2,
                "flops": 6.5e14,
            },
        },
        "sample": {
            "prompt": "A name is",
            "text": " bound | to `an` object.\n```\n",
            "new_tokens": 9,
            "forwards": 4,
            "tokens_per_forward": 2.25,
            "seconds": 0.5,
        },
        "verification": {
            "passed": True,
            "seconds": 41.0,
            "probes": [
                probe("weights", True, "0 of 272 tensors wrong", "0 missing"),
                probe("base-logits", None, "not measured", "0", "the weights were trained"),
                probe("cache", True, "logits differ by 3.1e-06", "at most 0.0001"),
            ],
        },
    }


_CHANGES = ["the causal mask is opened"]


def llama_bd3lm() -> Manifest:
    """BD3LM from a Llama under its community licence, trained on a Hub dataset with LoRA."""
    source = {
        "given": "meta-llama/Llama-3.2-1B",
        "repo_id": "meta-llama/Llama-3.2-1B",
        "revision": COMMIT,
        "license": "llama3.2",
        "language": ["en", "de"],
        "model_type": "llama",
    }
    mask = {
        "id": 128002,
        "token": "<|reserved_special_token_0|>",
        "rule": "reserved",
        "reason": "the tokenizer reserves it and nothing uses it",
        "rows_before": 128256,
        "rows_after": 128256,
        "used_rows": 128000,
        "write_row": True,
    }
    made = _manifest(
        source,
        *("bd3lm", 32, "lora", mask),
        parameters=1235814400,
        context=131072,
        shift=True,
        changes=_CHANGES,
    )
    made["recipe"]["data"]["source"] = "org/some-text"
    made["measurements"]["data"] |= {
        "source": "org/some-text",
        "kind": "hub",
        "revision": DATASET_COMMIT,
    }
    return made


def bert_mdlm() -> Manifest:
    """MDLM from a BERT in a local folder, all weights trained on CPython's own text."""
    source = {
        "given": "/home/somebody/models/bert-tiny",
        "kind": "folder",
        "repo_id": None,
        "revision": None,
        "license": "apache-2.0",
        "language": ["en"],
        "model_type": "bert",
    }
    mask = {
        "id": 103,
        "token": "[MASK]",
        "rule": "own",
        "reason": "the tokenizer names it as its mask token",
        "rows_before": 30522,
        "rows_after": 30522,
        "used_rows": 30522,
        "write_row": False,
    }
    made = _manifest(
        source,
        *("mdlm", None, "full", mask),
        parameters=4416698,
        context=512,
        shift=False,
        changes=[],
    )
    del made["measurements"]["ar_nll"]
    made["measurements"]["train"] |= {"device": "CPU (x86_64)", "devices": 1}
    return made


def adapter() -> Manifest:
    """The adapter alone, of a Qwen whose licence has a name and no id."""
    source = {
        "given": "Qwen/Qwen2.5-3B",
        "repo_id": "Qwen/Qwen2.5-3B",
        "revision": COMMIT,
        "license": "other",
        "license_name": "qwen-research",
        "license_link": f"https://huggingface.co/Qwen/Qwen2.5-3B/blob/{COMMIT}/LICENSE",
        "language": ["en"],
        "model_type": "qwen2",
    }
    mask = {
        "id": 151665,
        "token": "<|mask|>",
        "rule": "free",
        "reason": "it is the first row of the embedding that no token uses",
        "rows_before": 151936,
        "rows_after": 151936,
        "used_rows": 151665,
        "write_row": True,
    }
    made = _manifest(
        source,
        *("mdlm", None, "lora", mask),
        parameters=3085938688,
        context=32768,
        shift=True,
        changes=_CHANGES,
    )
    return {**made, "adapter_only": True}


def fill(folder: Path, manifest: Manifest) -> Path:
    """Lay down the files a card of this manifest looks at; weights are none of them."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"llama": (2048, 16, True), "bert": (128, 2, True), "qwen2": (2048, 36, True)}
    hidden, layers, tied = shapes[manifest["source"]["model_type"]]
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "dllm_convert.json").write_text(json.dumps(manifest))
    for name in (*CODE_FILES, "LICENSE", "generation_config.json"):
        (folder / name).write_text("")
    if manifest["source"]["license"] == "llama3.2":
        for name in ("USE_POLICY.md", "NOTICE", "chat_template.jinja"):
            (folder / name).write_text("")
    if not manifest.get("adapter_only"):
        for name in ("loss.png", "sample.gif"):
            (folder / name).write_bytes(b"")
    return folder


def changed(manifest: Manifest, **sections: Any) -> Manifest:
    """Return a copy with entries of its sections replaced."""
    result = copy.deepcopy(manifest)
    for name, value in sections.items():
        result[name] = {**(result.get(name) or {}), **value} if isinstance(value, dict) else value
    return result


CASES = {"mdlm-bert": bert_mdlm, "bd3lm-llama": llama_bd3lm, "adapter-qwen2": adapter}
