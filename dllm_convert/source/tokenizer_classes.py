"""Which class transformers loads a tokenizer with, and the tokens that class has by itself.

A tokenizer's files do not say everything: `{"do_lower_case": true}` is all that bert-base-uncased
states, and its `[MASK]` is a default of `BertTokenizer`. The tables are facts of transformers 5; a
test compares them with the release that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

GENERIC = "TokenizersBackend"
"""The class that takes tokenizer.json as it is and has no token of its own."""

_GENERIC_NAMES = frozenset(
    {GENERIC, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", "BloomTokenizer"}
)

_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA = {
    **{"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>"},
    **{"pad": "<pad>", "cls": "<s>", "mask": "<mask>"},
}
_ALBERT = {
    **{"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]"},
    **{"pad": "<pad>", "cls": "[CLS]", "mask": "[MASK]"},
}
_GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_QWEN = {"eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}

_DEFAULTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "AlbertTokenizer": _ALBERT,
        "BartTokenizer": _ROBERTA,
        "BertTokenizer": _BERT,
        "BigBirdTokenizer": _ALBERT | {"bos": "<s>", "eos": "</s>"},
        "BlenderbotTokenizer": _ROBERTA,
        "CamembertTokenizer": _ROBERTA,
        "CodeLlamaTokenizer": _LLAMA,
        "CohereTokenizer": {
            **{"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "unk": "<UNK>"},
            **{"sep": "<SEP>", "pad": "<PAD>", "cls": "<CLS>", "mask": "<MASK_TOKEN>"},
        },
        "DebertaTokenizer": _BERT | {"bos": "[CLS]", "eos": "[SEP]"},
        "DebertaV2Tokenizer": _BERT | {"bos": "[CLS]", "eos": "[SEP]"},
        "DistilBertTokenizer": _BERT,
        "ElectraTokenizer": _BERT,
        "FNetTokenizer": _ALBERT,
        "GPT2Tokenizer": _GPT2,
        "GPTNeoXTokenizer": _GPT2 | {"pad": "<|padding|>"},
        "GemmaTokenizer": {
            **{"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
        },
        "LayoutLMv3Tokenizer": _ROBERTA,
        "LlamaTokenizer": _LLAMA,
        "MBartTokenizer": _ROBERTA,
        "MPNetTokenizer": _ROBERTA | {"unk": "[UNK]"},
        "MobileBertTokenizer": _BERT,
        "MvpTokenizer": _ROBERTA,
        "OpenAIGPTTokenizer": {"unk": "<unk>"},
        "Qwen2Tokenizer": _QWEN,
        "Qwen3_5Tokenizer": _QWEN,
        "RobertaTokenizer": _ROBERTA,
        "SplinterTokenizer": _BERT,
        "T5Tokenizer": _T5,
        "XGLMTokenizer": _ROBERTA | {"mask": ""},
        "XLMRobertaTokenizer": _ROBERTA,
    }
)
"""Class to role to text, of the classes that build their tokenizer anew from its vocabulary."""

_FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        GENERIC: (
            *("flex_olmo", "fuyu", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_bigcode"),
            *("granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "ministral"),
            *("ministral3", "mistral", "mixtral", "olmo2", "olmo3", "olmo_hybrid", "persimmon"),
            *("stablelm", "xlm-roberta-xl", "kimi_linear", "mimo_v2_flash", "beam", "got_ocr2"),
            *("bigbird_pegasus", "nystromformer"),
        ),
        "AlbertTokenizer": ("albert", "yoso"),
        "BertTokenizer": (
            *("bert", "convbert", "distilbert", "electra", "ernie", "git", "layoutlm"),
            *("megatron-bert", "nomic_bert", "squeezebert"),
        ),
        "BigBirdTokenizer": ("big_bird",),
        "BlenderbotTokenizer": ("blenderbot",),
        "CamembertTokenizer": ("camembert",),
        "CohereTokenizer": ("cohere", "cohere2"),
        "DebertaTokenizer": ("deberta",),
        "DebertaV2Tokenizer": ("deberta-v2",),
        "FNetTokenizer": ("fnet",),
        "GPT2Tokenizer": (
            *("codegen", "dbrx", "emu3", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi"),
            "starcoder2",
        ),
        "GPTNeoXTokenizer": (
            *("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv"),
            "xlstm",
        ),
        "GemmaTokenizer": (
            *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
            *("recurrent_gemma", "zaya"),
        ),
        "MBartTokenizer": ("mbart",),
        "MPNetTokenizer": ("mpnet",),
        "MobileBertTokenizer": ("mobilebert",),
        "MvpTokenizer": ("mvp",),
        "OpenAIGPTTokenizer": ("openai-gpt",),
        "Qwen2Tokenizer": (
            *("dots3_note", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
            "moss_transcribe_diarize",
        ),
        "Qwen3_5Tokenizer": (
            *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp"),
        ),
        "RobertaTokenizer": (
            *("bart", "data2vec-text", "ibert", "longformer", "mra", "roberta"),
            "roberta-prelayernorm",
        ),
        "T5Tokenizer": ("musicgen", "musicgen_melody"),
        "XGLMTokenizer": ("xglm",),
        "XLMRobertaTokenizer": ("gte", "jina_embeddings_v3", "trocr", "xlm-roberta", "xmod"),
    }
)
"""Class to the families of language models it is registered for; llama is not among them."""

_MISNAMED = frozenset(
    {
        *("ernie4_5", "ernie4_5_moe", "fuyu", "hyperclovax", "internlm3", "iquestcoder", "jamba"),
        *("minicpm3", "minimax_m2", "modernbert", "modernbert-decoder", "nemotron", "phi3"),
        *("phimoe", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"),
    }
)
"""Families whose files name a wrong class: the registered one is taken, or else the generic."""

_REGISTERED = {family: name for name, families in _FAMILIES.items() for family in families} | {
    family: GENERIC
    for family in _MISNAMED
    if not any(family in families for families in _FAMILIES.values())
}


def _plain(name: str) -> str:
    return name.removesuffix("Fast")


def is_known(name: str) -> bool:
    """Whether a `tokenizer_class` is one of those that this module has facts of."""
    return _plain(name) in _DEFAULTS or name in _GENERIC_NAMES


def loading_class(model_type: str, declared: str | None, *, byte_level: bool) -> str:
    """Return the class that `AutoTokenizer` loads a folder with, as transformers 5 chooses it.

    Args:
        model_type: Of config.json.
        declared: `tokenizer_class` of tokenizer_config.json, or else of config.json.
        byte_level: Whether the folder has a tokenizer.json that works on bytes, which
            `LlamaTokenizer` would replace by its own pieces.

    Returns:
        A name of this module's table, or `GENERIC` for all others.
    """
    registered = _REGISTERED.get(model_type)
    if declared is None:
        chosen = registered or GENERIC
    elif (
        _plain(declared) == "LlamaTokenizer" and byte_level and model_type not in _MISNAMED
    ) or registered == GENERIC:
        chosen = GENERIC
    elif registered is not None and model_type in _MISNAMED:
        chosen = registered
    else:
        chosen = _plain(declared)
    return chosen if chosen in _DEFAULTS else GENERIC


def default_tokens(name: str) -> Mapping[str, str]:
    """Return role to text of the tokens that a class has where no file names others."""
    return {role: text for role, text in _DEFAULTS.get(name, {}).items() if text}


def has_class(model_type: str, declared: str | None) -> bool:
    """Whether transformers has a class of its own for a tokenizer that also names foreign code."""
    known = declared is not None and _plain(declared) in {*_DEFAULTS, *_GENERIC_NAMES}
    return known or model_type in _REGISTERED
