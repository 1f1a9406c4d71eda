"""SGLang's own classes on the CPU: imported in a process of its own, see `engines.py`.

Theirs are the model's class and how it loads weights, its layers, rotary embedding and logits, the
pool of keys and values, attention over it, and the sampler, LowConfidence. Ours is what their
scheduler does on a GPU: which block is next, and where it lies in the pool.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_convert.serving.engines import MASK
from dllm_convert.serving.own_weights import load_whole

_ROOM = 256
"""Tokens that the pool of keys and values has room for."""
_NEVER_RUN = ("IPython", "torchvision", "triton", "vllm")
"""Imported by SGLang for GPUs; where one is not installed, a module without content stands in."""
_HOMES = {"SDARForCausalLM": "sdar", "LLaDA2MoeModelLM": "llada2"}
"""Architecture to the module of its class: SGLang's registry imports every model it knows."""
_SAMPLER = "LowConfidence"


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of which every attribute can be had, and called as a decorator."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return how a module that is not installed is made."""
        if name.partition(".")[0] not in _NEVER_RUN:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        """Return an empty module."""
        return _Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        """Fill in nothing."""


class _Nothing:
    """Stands in for decorators, types, bases and functions that are never called on a CPU."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        decorates = len(given) == 1 and callable(given[0]) and not named
        return given[0] if decorates else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class _Empty(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # Whatever looks like a class has to be one: it is named in annotations and isinstance.
        made = type(name, (), {}) if name.lstrip("_")[:1].isupper() else _Nothing()
        setattr(self, name, made)
        return made


class _Batch:
    """A batch of one block; whatever is not set is None."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        return None


def _start() -> None:
    """Prepare SGLang for one process and no GPU, once."""
    if any(isinstance(finder, _Absent) for finder in sys.meta_path):
        return
    missing = [name for name in _NEVER_RUN if importlib.util.find_spec(name) is None]
    if missing:
        sys.meta_path.append(_Absent())
        if "torchvision" in missing:
            # transformers looks for its files, which are found here, and would use it.
            for home in ("transformers.utils", "transformers.utils.import_utils"):
                utils: Any = importlib.import_module(home)
                utils.is_torchvision_available = lambda: False
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        os.environ.setdefault(name, value)
    torch.set_default_dtype(torch.float32)


def _distribute(out: Path) -> None:
    """Make the groups of processes that SGLang's layers ask for, once: of this process alone."""
    if torch.distributed.is_initialized():
        return
    context: Any = importlib.import_module("sglang.srt.runtime_context")
    arguments: Any = importlib.import_module("sglang.srt.server_args")
    state: Any = importlib.import_module("sglang.srt.distributed.parallel_state")
    asked = arguments.ServerArgs(
        model_path=str(out),
        device="cpu",
        trust_remote_code=True,
        attention_backend="torch_native",
    )
    context.reset_context()
    context.publish(asked, role="test", ranks=context.SpawnRanks(world_rank=0))
    home: Any = torch.distributed
    home.init_process_group("gloo", store=home.HashStore(), rank=0, world_size=1)
    state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    state.initialize_model_parallel(backend="gloo")


@dataclass(frozen=True)
class _Model:
    """A model of SGLang with a pool of keys and values.

    Attributes:
        model: Its class's instance.
        attention: Attention over the pool.
        block: Tokens per block, as its server reads them.
        mask: Row of the mask, as its server has it.
    """

    model: Any
    attention: Any
    block: int
    mask: int

    def _batch(self, ids: Sequence[int], start: int) -> _Batch:
        modes: Any = importlib.import_module("sglang.srt.model_executor.forward_batch_info")
        end = start + len(ids)
        return _Batch(
            forward_mode=modes.ForwardMode.DLLM_EXTEND,
            input_ids=torch.tensor(list(ids)),
            positions=torch.arange(start, end),
            batch_size=1,
            return_logprob=False,
            is_extend_in_batch=True,
            mha_return_lse=False,
            extend_num_tokens=len(ids),
            out_cache_loc=torch.arange(start, end),
            req_pool_indices=torch.tensor([0]),
            seq_lens=torch.tensor([end]),
            extend_prefix_lens=torch.tensor([start]),
            extend_seq_lens=torch.tensor([len(ids)]),
            extend_start_loc=torch.tensor([0]),
        )

    def forward(self, batch: _Batch, pp_proxy_tensors: Any = None) -> Any:
        """Run one block behind those in the pool, as LowConfidence calls its runner."""
        context: Any = importlib.import_module("sglang.srt.model_executor.forward_context")
        self.attention.init_forward_metadata(batch)
        here = context.ForwardContext(attn_backend=self.attention)
        with torch.no_grad(), context.forward_context(here):
            found = self.model(batch.input_ids, batch.positions, batch)
        return types.SimpleNamespace(logits_output=found, can_run_graph=False)

    def logits(self, text: Sequence[int]) -> Any:
        """Return logits of a text, (length, rows), block by block through the pool."""
        ids = [self.mask if one == MASK else one for one in text]
        parts = [
            self.forward(self._batch(ids[start : start + self.block], start))
            for start in range(0, len(ids), self.block)
        ]
        return torch.cat([part.logits_output.full_logits for part in parts]).float().numpy()

    def write(self, prompt: Sequence[int], new: int, block: int, threshold: float) -> list[int]:
        """Return new tokens behind a prompt, as LowConfidence writes block after block."""
        algorithm: Any = importlib.import_module("sglang.srt.dllm.algorithm.low_confidence")
        config: Any = importlib.import_module("sglang.srt.dllm.config")
        sampler = algorithm.LowConfidence(
            config.DllmConfig(_SAMPLER, {"threshold": threshold}, block, self.mask, 1)
        )
        text, wanted = list(prompt), len(prompt) + new
        for start in range(0, wanted, block):
            given = text[start : start + block]
            batch = self._batch([*given, *[self.mask] * (block - len(given))], start)
            sampler.run(self, batch)
            text[start : start + block] = batch.input_ids.tolist()
        return text[len(prompt) : wanted]


def load(out: Path) -> _Model:
    """Load an export as SGLang does, in float32.

    Args:
        out: The export.

    Raises:
        ValueError: A parameter of its class is in no file.
    """
    _start()
    _distribute(out)
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    transformers: Any = importlib.import_module("transformers")
    config = transformers.PretrainedConfig.from_dict(raw)
    (architecture,) = raw["architectures"]
    home: Any = importlib.import_module(f"sglang.srt.models.{_HOMES[architecture]}")
    model = getattr(home, architecture)(config).eval()
    load_whole(model, out)
    asked = _asked_of_server(out)
    return _Model(model, _attention(raw), asked.block_size, asked.mask_id)


def _asked_of_server(out: Path) -> Any:
    """Return what SGLang's server makes of the launch command: block size and mask."""
    arguments: Any = importlib.import_module("sglang.srt.server_args")
    config: Any = importlib.import_module("sglang.srt.dllm.config")
    return config.DllmConfig.from_server_args(
        arguments.ServerArgs(
            model_path=str(out),
            device="cpu",
            trust_remote_code=True,
            dllm_algorithm=_SAMPLER,
            dllm_algorithm_config=str(out / "sglang_dllm.yaml"),
            attention_backend="torch_native",
        )
    )


def _attention(raw: dict[str, Any]) -> Any:
    pools: Any = importlib.import_module("sglang.srt.mem_cache.memory_pool")
    native: Any = importlib.import_module("sglang.srt.layers.attention.torch_native_backend")
    pool = pools.MHATokenToKVPool(
        size=_ROOM,
        page_size=1,
        dtype=torch.float32,
        head_num=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        layer_num=raw["num_hidden_layers"],
        device="cpu",
        enable_memory_saver=False,
    )
    places = types.SimpleNamespace(req_to_token=torch.arange(_ROOM)[None].int())
    return native.TorchNativeAttnBackend(
        types.SimpleNamespace(
            device="cpu",
            token_to_kv_pool=pool,
            req_to_token_pool=places,
            model_config=types.SimpleNamespace(),
            sliding_window_size=None,
        )
    )
