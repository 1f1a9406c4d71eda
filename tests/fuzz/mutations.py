"""Damage to what users hand in: JSON, tokenizers, weights, recipes, prompts and rows of data.

Every function takes a `random.Random`, so that a seed alone says what was done.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

NESTED: Any = "x"
for _ in range(60):
    NESTED = [NESTED]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 63, 3.5, 8.0, -0.5, 1e308, float("nan"), float("inf"),
    2**31, 2**63, 10**400, "", "a", "8", "auto", "none", "🎉", "\ud800", "a\0b", "\u202egpj", [],
    [0], [None], ["a"], [0, 1], [10**9], {}, {"a": 1}, {"0": "a"}, [[1]], "x" * 3000, NESTED,
]  # fmt: skip
TEXTS = [
    "", " ", "\n\n", "a", "The value of a name is an object.", "[MASK]", "<|mask|>", "<mask>",
    "<|end|>", "<|begin|><|end|>", "\ud800", "a\0b", "\x1b[31mred", "\u202eright to left", "🎉👩‍👩‍👧",
    "\ufeffmark", "\ufffd", "x" * 2000, "word " * 300, "ＡＢＣ", "é" * 50, "\r\n", "\t", "___",
    "{{ 1 }}", "%s%n", "</s>", "-", "--help", "\u2028", "\x7f", "ا" * 20,
]  # fmt: skip


def junk(dice: random.Random) -> Any:
    return deepcopy(dice.choice(VALUES))


def other_type(value: Any, dice: random.Random) -> Any:
    """Return a value that looks the same and is of another type."""
    if isinstance(value, bool):
        return dice.choice([int(value), str(value), None, [value]])
    if isinstance(value, int | float):
        near = [float(value), str(value), bool(value), -value, value + 1, value * 10**6, 0, [value]]
        return dice.choice([*near, value // 2, value - 1])
    if isinstance(value, str):
        return dice.choice([value.upper(), value + "x", value[:-1], [value], {value: value}, 0, ""])
    if isinstance(value, list):
        return dice.choice([value[:-1], value * 2, value[::-1], {}, "".join(map(str, value)), None])
    if isinstance(value, dict):
        return dice.choice([list(value), str(value)[:50], {}, None, list(value.values())[:3]])
    return dice.choice([0, "null", [], {}])


def mutate_json(content: Any, dice: random.Random, depth: float = 0.7) -> str:
    """Change one place of a JSON document; return what was done."""
    path: list[str] = []
    node = content
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = dice.choice(keys)
        path.append(str(key)[:40])
        child = node[key]
        if isinstance(child, dict | list) and child and dice.random() < depth:
            node = child
            continue
        kind = dice.randrange(6)
        if kind == 0:
            del node[key]
        elif kind in (1, 2):
            node[key] = junk(dice)
        elif kind in (3, 4):
            node[key] = other_type(child, dice)
        elif isinstance(node, dict):
            node[dice.choice(["more", "", "\ud800", str(key) + "_"])] = junk(dice)
        else:
            node.insert(key, dice.choice([junk(dice), deepcopy(child)]))
        return f"{'.'.join(path)} #{kind}"
    return "nothing"


def mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Flip, cut, insert, double or replace the whole."""
    damaged = bytearray(raw)
    at, kind = dice.randrange(len(damaged) + 1), dice.randrange(7)
    if kind == 0 and at < len(damaged):
        damaged[at] = dice.randrange(256)
    elif kind == 1:
        del damaged[at:]
    elif kind == 2:
        damaged[at:at] = dice.choice([b"{", b"[", b'"', b"\\", b"\xff\xfe", b"\0", b"9" * 5000])
    elif kind == 3:
        del damaged[at : at + dice.randrange(1, 60)]
    elif kind == 4:
        damaged[at:at] = dice.choice([b"[", b'{"a":']) * dice.randrange(3000)
    elif kind == 5:
        choices = [b"", b"null", b"[]", b"{}", b"\0" * 100, b"7", b'"a"', b"<html>Not found</html>"]
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        return dice.choice([*choices, pointer, bytes(dice.randrange(256) for _ in range(200))])
    else:
        damaged[:0] = dice.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"//\n"])
    return bytes(damaged)


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_file(path: Path, dice: random.Random, curated: dict[str, list[Any]]) -> str:
    """Damage a JSON file: a curated field, any place, or bytes."""
    kind = dice.randrange(10)
    if kind == 0 or not path.is_file():
        path.write_bytes(mutate_bytes(path.read_bytes() if path.is_file() else b"{}", dice))
        return f"{path.name}: bytes"
    content = json.loads(path.read_text())
    if kind < 6 and curated:
        key = dice.choice(list(curated))
        value = deepcopy(dice.choice(curated[key]))
        *parents, leaf = key.split("/")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
        done = f"{key}={ascii(value)[:60]}"
    else:
        times = dice.choice([1, 1, 1, 2, 3])
        done = ", ".join(mutate_json(content, dice) for _ in range(times))
    write(path, content)
    return f"{path.name}: {done}"


ROPES: list[Any] = [
    {"rope_type": "yarn"}, {"type": "linear", "factor": "2"}, {"rope_type": "llama3", "factor": 8},
    {"rope_type": "nope"}, {"factor": float("nan")}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}, {"rope_type": 5},
    {"full_attention": {"rope_type": "default"}}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "default", "rope_theta": "1e4"}, {"rope_type": "yarn", "factor": 0}, [], "yarn",
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 64}, {"rope_theta": None}, {"rope_type": None},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "a"},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3},
]  # fmt: skip
IDS: list[Any] = [[0, 1], [0, 10**9], [], ["a"], [-1], True, 1.0, 10**9, -1, "1", None, [[1]], {}]
CONFIG: dict[str, list[Any]] = {
    "rope_scaling": ROPES, "rope_parameters": ROPES, "rope_theta": [0, -1, "1e4", None, 10**400],
    "eos_token_id": IDS, "bos_token_id": IDS, "pad_token_id": IDS, "sep_token_id": IDS,
    "mask_token_id": IDS, "vocab_size": [0, 1, 10, 384, 10**9, "384", None, 385.0],
    "layer_types": [["full_attention"], ["sliding_attention"] * 2, ["nope"] * 2, "full", [1, 2],
                    ["sliding_attention", "full_attention"], [None] * 2, {}, []],
    "quantization_config": [{}, {"quant_method": "gptq", "bits": 4}, {"quant_method": None}, [],
                            "fp8", {"quant_method": "nope"}, {"load_in_4bit": True}, 5],
    "architectures": [[], None, "X", [1], ["LlamaForCausalLM", "X"], ["LlamaModel"], [None],
                      ["Qwen2ForCausalLM"], ["BertForMaskedLM"], {}, 5, [""], ["../x"], [["X"]]],
    "auto_map": [{}, [], {"AutoModel": "x.Y"}, {"AutoConfig": 5}, "x.Y", None, {"AutoModel": None}],
    "torch_dtype": ["nope", "float16", 5, "bfloat16", [], "torch.float32", "auto", None, "int8"],
    "dtype": ["nope", "float16", 5, "bfloat16", {}, "torch.float32", "auto", None, "_C", "Tensor"],
    "model_type": ["llama2", None, "", 5, "mistral", "qwen2", "gpt2", "../x", "bert", [], {}, "t5"],
    "hidden_act": ["nope", 5, None, [], "", "relu"], "is_causal": [True, "false", None, 0, []],
    "tie_word_embeddings": [True, "true", None, 1, []], "use_cache": ["x", None, 5],
    "num_hidden_layers": [0, 1, 3, "2", 2.0, None, True, 10**9, [2]],
    "num_attention_heads": [0, 3, "4", None, 10**9, -4, 4.0],
    "num_key_value_heads": [0, 3, "2", None, 10**9, 4, 1],
    "hidden_size": [0, 33, "32", None, 16, 10**9, -32], "head_dim": [0, 7, None, "8", 4, 10**9],
    "intermediate_size": [0, 65, "64", None, [64, 64]],
    "max_position_embeddings": [0, 1, -1, "256", None, 10**12, 8, 2.0, True],
    "sliding_window": [0, 4, -1, "4", 10**9, True], "use_sliding_window": [True, "no", 1],
    "max_window_layers": [0, 1, "x", None], "rms_norm_eps": [0, -1, "x", None, float("nan")],
    "layer_norm_eps": ["x", None, -1], "initializer_range": ["x", None, -1, 1e308],
    "attention_dropout": ["x", 2, -1], "hidden_dropout_prob": [2, "x", None],
    "attention_bias": ["x", True, None], "mlp_bias": [True, "x", 5], "type_vocab_size": [0, "x", 1],
    "id2label": [{}, {"a": "b"}, [], 5], "label2id": [5, {"a": []}], "num_labels": ["x", -1, 10**9],
    "problem_type": ["nope", 5], "attn_implementation": ["flash", 5], "torchscript": ["x", True],
    "_attn_implementation": ["nope", 5, "eager"], "transformers_version": [5, "9.0", None, []],
    "return_dict": [False, "x"], "output_attentions": [True, "x"], "output_hidden_states": [True],
    "is_decoder": [True, "x"], "is_encoder_decoder": [True, "x"], "chunk_size_feed_forward": [3],
    "add_cross_attention": [True], "pretraining_tp": [2, "x"], "text_config": [{}, 5, {"a": 1}],
    "position_embedding_type": ["relative_key", 5], "_name_or_path": [5, None, "\ud800"],
    "use_return_dict": [False], "name_or_path": [5], "per_layer_config": [5], "license": [5, [1]],
}  # fmt: skip
SECTION: dict[str, list[Any]] = {
    "diffusion": [{}, [], None, 5, "mdlm", {"objective": "mdlm"}],
    "diffusion/objective": ["nope", None, [], 5, "bd3lm", "mdlm"],
    "diffusion/block_size": [0, -1, "8", 8.0, None, 10**9, True, [8], 3],
    "diffusion/mask_token_id": IDS, "diffusion/token_shift": ["x", None, 1, True, False],
    "diffusion/attention": ["nope", None, "bidirectional", "block-causal", []],
    "diffusion/noise_schedule": ["nope", None, {}, 5], "diffusion/format_version": [0, 2, "1", None],
    "diffusion/noise_kernel": ["nope", None, "uniform", 5],
    "diffusion/context": ["nope", None, 5, "causal"], "block_size": [0, -1, "8", None, 10**9, 3],
    "mask_token_id": IDS, "is_causal": [True, "false", None, 0], "model_type": CONFIG["model_type"],
    "architectures": CONFIG["architectures"], "auto_map": CONFIG["auto_map"],
}  # fmt: skip
GENERATION: dict[str, list[Any]] = {
    "max_new_tokens": [-1, 0, "10", 10**9, None, 2.5, [], True], "eos_token_id": IDS,
    "bos_token_id": IDS, "pad_token_id": IDS, "mask_token_id": IDS, "max_length": [-1, "x", 3],
    "temperature": ["hot", -1, float("nan"), None, 0, [], True, 1e308], "top_k": [0, -1, "5", 2.5],
    "top_p": [0, 2, "x", -1], "min_p": [2, "x", -1], "num_beams": [4, "x", 0],
    "do_sample": ["x", True, None], "cache_implementation": ["nope", 5, "static", "quantized"],
    "confidence_threshold": [0, 2, "x", -1, None, True], "max_denoising_steps": [0, -1, "x", 2.5],
    "block_size": [0, "x", 3], "block_length": [0, "x", 3, -1], "remasking": ["nope", 5, "random"],
    "remasking_ratio": [1, -1, "x"], "unmasking": ["nope", 5, []], "guidance_scale": [-1, "x", 3.0],
    "entropy_bound": [-1, "x", float("nan")], "approximate_cache": ["x", True, 5],
    "transformers_version": [5, None], "_from_model_config": ["x", True], "watermarking_config": [5],
    "suppress_tokens": [[0], "x", [10**9], 5], "bad_words_ids": [[], "x"], "stop_strings": [5, "a"],
    "forced_eos_token_id": IDS, "return_dict_in_generate": [True, "x"], "assistant_model": [5],
    "compile_config": [5, {}], "decoder_start_token_id": IDS, "trust_remote_code": [True],
}  # fmt: skip
TEMPLATES: list[Any] = [
    "{% for", "{{ undefined.x.y }}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "", 5, [], {},
    "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[0]['content'] + 5 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 10**11 }}", "{{ ''.__class__ }}",
    "constant", "{{ messages }}", "{{ bos_token + eos_token }}", "{% include 'x' %}",
    "{{ messages[7].content }}", "{% if add_generation_prompt %}{{ 1 }}{% endif %}", None,
    [{"name": "default", "template": "{{ x }}"}], {"default": "{{ messages[0].content }}"},
    "{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{{ messages[0].content | nope }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}", "\ud800",
    "{% set ns = namespace(x=0) %}{{ ns.x.y }}{% break %}", "{{ messages[0].content[::-1] }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
    [{"name": "a"}], [5], "{{ [].append(1) }}", "{% extends 'x' %}", "{{ messages.x }}",
]  # fmt: skip
TOKEN: list[Any] = [
    None, 5, [], {}, "", "🎉", "not in the vocabulary", {"content": "a"}, {"content": 5}, "<|end|>",
    {"__type": "AddedToken", "content": "<z>", "lstrip": "x"}, "\ud800", "a", " ", True, ["a"],
    {"content": "<y>", "lstrip": True, "rstrip": False, "normalized": True, "special": False},
]  # fmt: skip
TOKENIZER_CONFIG: dict[str, list[Any]] = {
    "chat_template": TEMPLATES, "mask_token": TOKEN, "eos_token": TOKEN, "bos_token": TOKEN,
    "pad_token": TOKEN, "unk_token": TOKEN, "sep_token": TOKEN, "cls_token": TOKEN,
    "additional_special_tokens": [5, "a", [5], ["<x>"], [None], {}, ["<|end|>"], [{"content": 1}]],
    "extra_special_tokens": [5, "a", [5], {"image_token": "<i>"}, {"a": None}, ["<x>"]],
    "added_tokens_decoder": [{}, [], {"a": {"content": "x"}}, {"-1": {"content": "x"}}, {"5": 5},
                             {"3": {"content": "odd", "special": True}}, {"10000": {"content": "f"}},
                             {"384": {"content": "new"}}, {"0": {"content": None}}, None, {"1": {}}],
    "tokenizer_class": ["Nope", None, 5, "LlamaTokenizer", "BertTokenizer", "GPT2TokenizerFast",
                        "PreTrainedTokenizerFast", "", [], "Qwen2Tokenizer", "T5Tokenizer"],
    "model_max_length": [0, -1, "x", None, 10**30, 2.5, 3], "auto_map": [{"AutoTokenizer": ["x", 5]},
                                                                       5, {"AutoTokenizer": 5}],
    "add_bos_token": ["x", True, None, 5], "add_eos_token": ["x", True, None], "legacy": ["x", True],
    "add_prefix_space": ["x", True, None], "padding_side": ["middle", 5, "left", None],
    "truncation_side": ["middle", 5], "model_input_names": [5, [], ["x"], None, [5]],
    "clean_up_tokenization_spaces": ["x", True, None], "split_special_tokens": [True, "x"],
    "processor_class": [5, "X"], "response_schema": [5], "errors": ["nope", 5], "vocab_size": [5],
    "do_lower_case": ["x", True], "tokenizer_file": [5, "/nope"], "name_or_path": [5, "\ud800"],
    "sp_model_kwargs": [5, {"a": 1}], "fix_mistral_regex": [True, "x"], "backend": [5, "nope"],
}  # fmt: skip
TOKENIZER: dict[str, list[Any]] = {
    "added_tokens": [[], {}, None, 5, [5], [{}], [{"id": 3}], [{"id": -1, "content": "a"}],
                     [{"id": 10**6, "content": "far", "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": False, "special": True}],
                     [{"id": 0, "content": "", "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": False, "special": True}],
                     [{"id": 2, "content": "a", "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": False, "special": True}] * 2],
    "model": [None, {}, {"type": "BPE"}, {"type": "BPE", "vocab": {}, "merges": []}, {"type": "X"},
              {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}, [], 5,
              {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]",
               "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
              {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
              {"type": "Unigram", "vocab": [], "unk_id": None}],
    "model/vocab": [{}, [], None, {"a": 0}, {"a": -1}, {"a": "0"}, {"a": 0, "b": 0}, {"a": 10**6}],
    "model/merges": [[], None, ["a"], [["a"]], [["a", "zz"]], ["a b c"], 5, [["\u0120", "t", "h"]]],
    "model/unk_token": ["nope", None, 5], "model/dropout": [2.0, "x", 0.5, -1],
    "model/byte_fallback": [True, "x"], "model/continuing_subword_prefix": ["##", 5, None],
    "pre_tokenizer": [None, {}, {"type": "X"}, {"type": "Split", "pattern": {"Regex": "("}}, 5,
                      {"type": "Sequence", "pretokenizers": []}, {"type": "Whitespace"},
                      {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                       "invert": False}],
    "post_processor": [
        None, {}, {"type": "X"}, 5,
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}},
                                                  {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}},
                                                  {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
         "special_tokens": {"<q>": {"id": "<q>", "ids": [10**6], "tokens": ["<q>"]}}},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["[CLS]", 10**6]},
        {"type": "Sequence", "processors": []}],
    "decoder": [None, {}, {"type": "X"}, 5, {"type": "ByteFallback"}, {"type": "Fuse"}],
    "normalizer": [None, {}, {"type": "X"}, {"type": "Lowercase"}, 5, {"type": "Prepend"},
                   {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
                   {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""},
                   {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
    "truncation": [5, {}, {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                           "stride": 0},
                   {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}],
    "padding": [5, {}, {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
                        "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}],
    "version": ["2.0", 5, None],
}  # fmt: skip


def _slow_files(folder: Path) -> None:
    """Replace tokenizer.json by the vocabulary files of a class that reads its own."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if model["type"] == "WordPiece":
        ordered = sorted(model["vocab"], key=model["vocab"].get)
        (folder / "vocab.txt").write_text("\n".join(ordered) + "\n")
        config["tokenizer_class"] = "BertTokenizer"
    else:
        write(folder / "vocab.json", model["vocab"])
        pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
        config["tokenizer_class"] = "GPT2Tokenizer"
    write(folder / "tokenizer_config.json", config)


def mutate_tokenizer(folder: Path, dice: random.Random) -> str:
    kind = dice.randrange(12)
    if kind < 4:
        return change_file(folder / "tokenizer.json", dice, TOKENIZER)
    if kind < 8:
        template = folder / "chat_template.jinja"
        if template.is_file() and dice.randrange(2):
            texts = [text for text in TEMPLATES if isinstance(text, str)]
            chosen = dice.choice(texts).encode("utf-8", "surrogatepass")
            raw = dice.choice([chosen, chosen, chosen, mutate_bytes(template.read_bytes(), dice)])
            template.write_bytes(raw)
            return f"chat_template.jinja: {raw[:60]!r}"
        return change_file(folder / "tokenizer_config.json", dice, TOKENIZER_CONFIG)
    if kind == 8:
        name = dice.choice(["special_tokens_map.json", "added_tokens.json", "vocab.json"])
        write(
            folder / name, dice.choice([junk(dice), {"a": junk(dice)}, {"mask_token": junk(dice)}])
        )
        return f"{name}: junk"
    if kind == 9:
        present = [p for p in folder.iterdir() if "token" in p.name or p.suffix == ".jinja"]
        gone = dice.choice(sorted(present))
        gone.unlink()
        return f"{gone.name}: gone"
    _slow_files(folder)
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
    present = [folder / name for name in names if (folder / name).is_file()]
    path = dice.choice(present)
    if path.suffix == ".json" and dice.randrange(2):
        return "slow " + change_file(path, dice, {})
    lines = path.read_bytes().splitlines(keepends=True)
    dice.shuffle(lines)
    kept = lines[: dice.randrange(len(lines) + 1)]
    damaged = dice.choice(
        [mutate_bytes(path.read_bytes(), dice), b"".join(kept), kept and kept[0] * 9]
    )
    path.write_bytes(damaged or b"")
    return f"slow {path.name}: lines"


def mutate_weights(folder: Path, dice: random.Random) -> str:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    kind, done = dice.randrange(9), ""
    names = [name for name in header if name != "__metadata__"]
    name = dice.choice(names)
    if kind == 0:
        path.write_bytes(mutate_bytes(raw[: size + 200], dice) + bytes(data[192:]))
        return "weights: header bytes"
    if kind == 1:
        path.write_bytes(raw[: dice.choice([0, 4, 8, size, len(raw) - 1, len(raw) // 2])])
        return "weights: truncated"
    if kind == 2:
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, path.name)}
        index["weight_map"][name] = dice.choice(
            ["gone.safetensors", "", "../x", None, 5, path.name]
        )
        if dice.randrange(2):
            mutate_json(index, dice)
        write(folder / "model.safetensors.index.json", index)
        return "weights: index"
    if kind == 3:
        data[: 4 * 64] = struct.pack("<f", dice.choice([float("nan"), float("inf")])) * 64
        done = "not finite"
    elif kind == 4:
        header[name]["dtype"] = dice.choice(["I32", "U32", "F16", "BF16", "F8_E4M3", "X", "F64"])
        done = f"{name} of another type"
    elif kind == 5:
        shape = header[name]["shape"]
        header[name]["shape"] = dice.choice([[0, *shape], [1, *shape], shape[::-1], [], [2**40]])
        done = f"{name} of another shape"
    elif kind == 6:
        header[dice.choice(["more", "model.x.weight", "\ud800", "", "base_model.x"])] = header.pop(
            name
        )
        done = f"{name} renamed"
    elif kind == 7:
        end = max(header[n]["data_offsets"][1] for n in names)
        header["extra.weight"] = {"dtype": "F32", "shape": [0, 8], "data_offsets": [end, end]}
        done = "a tensor of size zero"
    else:
        header["__metadata__"] = dice.choice(
            [{}, {"format": "tf"}, {"format": "np"}, {"a": 5}, None]
        )
        done = "metadata"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return f"weights: {done}"


def mutate_config(folder: Path, dice: random.Random) -> str:
    """Damage config.json, generation_config.json or the weights of a source."""
    kind = dice.randrange(10)
    if kind < 6:
        return change_file(folder / "config.json", dice, CONFIG)
    if kind < 8:
        return change_file(folder / "generation_config.json", dice, GENERATION)
    return mutate_weights(folder, dice)


def mutate_converted(folder: Path, dice: random.Random) -> str:
    """Damage the configs, the manifest or the weights of a conversion."""
    kind = dice.randrange(12)
    if kind < 3:
        return change_file(folder / "config.json", dice, SECTION)
    if kind < 5:
        return change_file(folder / "config.json", dice, CONFIG)
    if kind < 7:
        return change_file(folder / "generation_config.json", dice, GENERATION)
    if kind < 10:
        return change_file(folder / "dllm_convert.json", dice, {})
    if kind == 10:
        name = dice.choice(["recipe.yaml", "modeling_dllm.py", "README.md", "LICENSE"])
        old = (folder / name).read_bytes() if (folder / name).is_file() else b"x"
        (folder / name).write_bytes(mutate_bytes(old, dice))
        return f"{name}: bytes"
    return mutate_weights(folder, dice)


RECIPE: dict[str, Any] = {
    "name": "mine", "description": "one line", "references": ["a"], "target": "bd3lm",
    "block_size": 8, "token_shift": "keep", "sliding_window": "open", "license": "mit",
    "inherits": ["small-budget"], "allow_generic": False,
    "mask_token": {"token": None, "id": None},
    "noise": {"schedule": "linear", "power": 2.0, "kernel": "absorbing", "discrete_steps": None,
              "min_time": 0.001, "max_time": 1.0, "draw": "time", "position_bias": 0.0, "views": 1,
              "complementary": False},
    "data": {"source": "pydoc", "subset": None, "split": "train", "text_field": "text",
             "streaming": "auto", "sequence_length": 32, "held_out_fraction": 0.1,
             "held_out_sequences": 2, "max_documents": 40, "scored_turns": "all",
             "fill_blocks": "auto", "supervise_padding": False},
    "training": {"method": "none", "steps": 1, "batch_size": 2, "learning_rate": 1e-4,
                 "lr_schedule": "cosine", "warmup_ratio": 0.05, "max_grad_norm": 1.0,
                 "loss_weight": "elbo", "ar_loss_weight": 0.0, "attention_annealing_steps": 0,
                 "precision": "fp32", "gradient_checkpointing": "off", "attention": "sdpa",
                 "save_steps": None, "log_steps": 1, "seed": 0, "report_to": [],
                 "lora": {"rank": 4, "alpha": None, "dropout": 0.0, "embeddings": "full"}},
    "generation": {"max_new_tokens": 8, "max_denoising_steps": None, "temperature": 0.0,
                   "confidence_threshold": 0.9, "top_k": None, "unmasking": None},
}  # fmt: skip
ASSIGNMENTS = [
    "training", "=", "a=", "=1", "training.steps", "training.steps=", "training.steps=[1", "a.b.c=1",
    "training.steps=1e3", "training.steps=0x10", "training.lora=5", "training={}", ".=1", "..=1",
    "training..steps=1", "training.steps.x=1", "block_size=0", "block_size=null", "block_size=8.0",
    "data.source=[a]", "data.source=", "mask_token.id=-1", "mask_token.id=99999999999999999999",
    "mask_token.token='\ud800'", "mask_token.token=''", "mask_token.token=🎉", "mask_token.token=a",
    "source=x", "source=null", "target=ar", "name=../x", "training.seed=-1", "noise.power=.inf",
    "training.learning_rate=nan", "generation.top_p=0", "generation.temperature=1e999",
    "mask_token={a: {b: {c: []}}}", "training.steps=!!python/object:os.system x", "a" * 3000 + "=1",
    "training.learning_rate=1" + "0" * 400, "data.text_field=\0", "training.steps=\t1", "noise=[]",
    "training.report_to=wandb", "training.report_to=[nope]", "training.method=lora", " =1",
    "training.lora.rank=100000", "mask_token.id=5", "mask_token.token=the", "data.split=''",
    "generation.max_denoising_steps=9999", "generation.block_length=7", "training.batch_size=true",
    "noise.min_time=0.9", "noise.max_time=0.5", "noise.discrete_steps=1", "noise.kernel=uniform",
    "license='\u202e'", "description=" + "x" * 9000, "inherits=x", "data.sequence_length=9",
]  # fmt: skip


def mutate_recipe(
    path: Path, source: Path, target: str, dice: random.Random
) -> tuple[str, list[str]]:
    """Write a damaged recipe; return what was done and `--set` options."""
    import yaml

    content = deepcopy(RECIPE) | {"source": str(source), "target": target}
    content["training"]["method"] = dice.choice(["none", "none", "full", "lora"])
    if target == "mdlm":
        del content["block_size"]
    kind, given = dice.randrange(10), []
    done = "as it is"
    if kind < 6:
        done = ", ".join(mutate_json(content, dice) for _ in range(dice.choice([1, 1, 2, 3])))
        try:
            text = yaml.safe_dump(content, allow_unicode=True)
        except (UnicodeEncodeError, yaml.YAMLError):
            text = json.dumps(content)
        raw = text.encode("utf-8", "surrogatepass")
    elif kind < 8:
        raw = mutate_bytes(yaml.safe_dump(content).encode(), dice)
        done = "bytes"
    else:
        raw = yaml.safe_dump(content).encode()
        chosen = dice.sample(ASSIGNMENTS, dice.choice([1, 1, 2]))
        given = [part for text in chosen for part in ("--set", text)]
        done = ascii(chosen)[:100]
    path.write_bytes(raw)
    return done, given


PROMPT_OPTIONS: list[list[str]] = [
    [], [], ["--chat"], ["--infill", "___"], ["--infill", ""], ["--infill", "[MASK]"], ["--json"],
    ["--infill", "a"], ["--temperature", "1", "--top-k", "1"], ["--temperature", "nan"],
    ["--temperature", "1e-30"], ["--temperature", "inf"], ["--top-p", "0"], ["--threshold", "0"],
    ["--top-k", "99999999999999999999"], ["--steps", "99999999999"], ["--seed", "9" * 30],
    ["--seed", "18446744073709551616", "--temperature", "1"], ["--block-length", "4"],
    ["--block-length", "3", "--approximate-cache"], ["--guidance-scale", "1e30"],
    ["--guidance-scale", "0"], ["--remasking", "random", "--remasking-ratio", "0.5"],
    ["--remasking-ratio", "1"], ["--unmasking", "entropy"], ["--entropy-bound", "inf"],
    ["--min-p", "1", "--temperature", "2"], ["--quiet"], ["--watch"], ["--record", "out.gif"],
    ["--record", "out.html"], ["--record", "nowhere/out.gif"], ["--threshold", "nan"],
    ["--max-new-tokens", "0"], ["--max-new-tokens", "99999999999999"], ["--max-new-tokens", "255"],
    ["--chat", "--infill", "___"], ["--temperature", "1e308", "--min-p", "0.5"],
    ["--chat", "--record", "out.gif"], ["--unmasking", "margin", "--threshold", "1"],
]  # fmt: skip


def make_prompts(dice: random.Random) -> list[str]:
    """Return options of `sample`: prompts, and how to decode."""
    texts = []
    for _ in range(dice.choice([0, 1, 1, 1, 1, 2, 3])):
        parts = [dice.choice(TEXTS) for _ in range(dice.choice([1, 1, 2, 3]))]
        text = dice.choice(["", "", " ", "___", "[MASK]", "<|mask|>"]).join(parts)
        # A NUL cannot be in an argument of a program.
        texts += ["--prompt", text]
    return [*texts, *dice.choice(PROMPT_OPTIONS)]


PROSE = "A list is an ordered collection of items that may be changed after it was made. "
GOOD: list[Callable[[int], dict[str, Any]]] = [
    lambda n: {"text": f"{n}. {PROSE * 3}"},
    lambda n: {"messages": [{"role": "user", "content": f"What is {n}?"},
                            {"role": "assistant", "content": f"{n} is a number. {PROSE}"}]},
    lambda n: {"conversations": [{"from": "human", "value": f"What is {n}?"},
                                 {"from": "gpt", "value": f"{n} is a number. {PROSE}"}]},
    lambda n: {"prompt": f"What is {n}?", "completion": f"{n} is a number. {PROSE}"},
    lambda n: {"instruction": f"Say {n}", "input": "", "output": f"{n}. {PROSE}"},
    lambda n: {"question": f"Say {n}", "answer": f"{n}. {PROSE}"},
]  # fmt: skip
MESSAGES: list[Any] = [
    {"role": "wizard", "content": "x"}, {"role": None, "content": "x"}, {"content": "x"},
    {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": 5},
    {"role": "user", "content": [{"type": "text", "text": "a"}]}, "x", None, 5, [], {},
    {"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "user", "content": [5]},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "assistant", "content": "x", "weight": "0"}, {"role": "tool", "content": {"a": 1}},
    {"role": "system", "content": "be kind"}, {"role": "assistant", "content": "x", "weight": 0},
    {"role": "user", "content": "\ud800"}, {"role": ["user"], "content": "x"},
    {"from": "human", "value": 5}, {"role": "user", "content": [{"type": "text"}]},
    {"role": "assistant", "content": "a", "thinking": 5}, {"role": "USER", "content": "x"},
]  # fmt: skip


def _damage_row(row: Any, dice: random.Random) -> Any:
    kind = dice.randrange(8)
    if kind < 3:
        mutate_json(row, dice)
        return row
    if kind == 3:
        return junk(dice)
    if kind == 4:
        row[dice.choice(["system", "tools", "weight", "text", "label", "meta", "messages"])] = junk(
            dice
        )
        return row
    if kind == 5:
        return {"messages": [deepcopy(dice.choice(MESSAGES)) for _ in range(dice.randrange(4))]}
    if kind == 6:
        key = dice.choice(list(row))
        row[key] = dice.choice(TEXTS)
        return row
    if "messages" in row:
        row["messages"].insert(dice.randrange(3), deepcopy(dice.choice(MESSAGES)))
    return row


def make_rows(folder: Path, dice: random.Random) -> tuple[Path, str]:
    """Write a damaged data file."""
    make = dice.choice(GOOD)
    good, bad = dice.choice([(0, 3), (60, 1), (60, 1), (60, 4), (60, 60), (3, 0), (0, 0), (60, 0)])
    rows: list[Any] = [make(n) for n in range(good)]
    for number in range(bad):
        rows.insert(dice.randrange(len(rows) + 1), _damage_row(make(1000 + number), dice))
    suffix = dice.choice(
        [
            "jsonl",
            "jsonl",
            "jsonl",
            "json",
            "csv",
            "tsv",
            "txt",
            "md",
            "jsonl.gz",
            "ndjson",
            "parquet",
            "JSONL",
            "txt.gz",
            "pdf",
            "xyz",
        ]
    )
    kind, done = suffix.lower(), f"{good}+{bad} rows of {list(make(0))}"
    if kind.startswith(("jsonl", "ndjson")):
        raw = "\n".join(map(json.dumps, rows)).encode()
    elif kind == "json":
        raw = json.dumps(dice.choice([rows, rows, {"data": rows}, {"train": rows}, "x"])).encode()
    elif kind in ("csv", "tsv"):
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
        writer.writerow(make(0))
        for row in rows:
            cells = list(row.values()) if isinstance(row, dict) else [row]
            writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
        raw = stream.getvalue().encode("utf-8", "surrogatepass")
    elif kind == "parquet":
        raw = _parquet(rows, dice)
    else:
        raw = "\n\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")
    if dice.randrange(6) == 0:
        raw, done = mutate_bytes(raw, dice), f"{done}, bytes"
    if kind.endswith("gz") and dice.randrange(4):
        raw = gzip.compress(raw)[: dice.choice([None, None, None, -9])]
    path = folder / f"rows.{suffix}"
    path.write_bytes(raw)
    return path, f"{path.name}: {done}"


def _parquet(rows: list[Any], dice: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), stream)
    except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
        kinds: list[Any] = [[5, 6], [b"\xff", b"a"], [None, None], [["a"], []], [{"a": 1}, None]]
        pq.write_table(
            pa.table({dice.choice(["text", "messages", ""]): dice.choice(kinds)}), stream
        )
    return stream.getvalue()
