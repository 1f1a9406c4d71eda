"""A gated model: the base bit for bit on clean tokens, another model on noisy ones."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SourceFactory
from gated import ADAPTER, BLOCK, FAMILIES, gated_folder
from packaging.version import Version
from safetensors.torch import load_file, save_file

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.loading import load_checkpoint, load_model
from dllm_convert.modeling.published import modeling
from dllm_convert.modeling.published.gate import spread
from dllm_convert.modeling.published.gated import gated_mask

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Folder:
    """Return the gated conversion of a family; with `padded` its mask has a row of the base."""
    root = tmp_path_factory.mktemp("gated")
    made: set[str] = set()

    def get(family: str, *, padded: bool = False, draft: str = "auto") -> Path:
        place = root / f"{family}-{padded}-{draft}"
        if place.name not in made:
            source = source_cache(family, vocab_padding=8 if padded else 0)
            gated_folder(source, place, draft=draft)
            made.add(place.name)
        return place

    return get


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def own(folder: Path) -> Any:
    return load_checkpoint(folder).model


def texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 380, (rows, length), generator=torch.Generator().manual_seed(seed))


def last_block(ids: torch.Tensor, start: int) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) >= start).expand_as(ids)


@pytest.mark.parametrize("padded", [False, True], ids=["mask past the rows", "mask in a free row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_it_is_the_base_bit_for_bit(
    family: str, padded: bool, folder: Folder, source_cache: SourceFactory
) -> None:
    place = folder(family, padded=padded)
    base = source_cache(family, vocab_padding=8 if padded else 0)
    assert (place / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    theirs, ours = stock(place), own(place)
    assert type(theirs).__name__.startswith(("Llama", "Mistral", "Qwen"))
    assert not any("lora" in name for name, _ in theirs.named_parameters())
    ids = texts(3, 21)
    nowhere = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(ours(ids).logits, expected)
        # Under a mask, which the base needs none of, torch's kernel rounded otherwise before 2.8.
        near = (
            {"atol": 0, "rtol": 0}
            if Version(torch.__version__) >= Version("2.8")
            else {"atol": 1e-6, "rtol": 1e-5}
        )
        torch.testing.assert_close(ours(ids, noisy=nowhere).logits, expected, **near)
        # On from a cache, several tokens at once and one by one.
        caches = [theirs(ids[:, :9], use_cache=True), ours(ids[:, :9], use_cache=True)]
        for first, last in ((9, 17), (17, 18), (18, 19)):
            parts = [
                model(ids[:, first:last], past_key_values=cache.past_key_values, use_cache=True)
                for model, cache in zip((theirs, ours), caches, strict=True)
            ]
            assert torch.equal(parts[0].logits, parts[1].logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, folder: Folder) -> None:
    model, ids = own(folder("llama")), texts(2, 16)
    noisy = last_block(ids, 8)
    pad = torch.full((2, 5), 3)
    parts = [pad, ids] if side == "left" else [ids, pad]
    padded = torch.cat(parts, 1)
    mask = torch.cat([torch.full_like(part, int(part is ids)) for part in parts], 1)
    where = slice(5, None) if side == "left" else slice(0, 16)
    for chosen in (None, noisy):
        wide = None
        if chosen is not None:
            wide = torch.zeros_like(padded, dtype=torch.bool)
            wide[:, where] = chosen
        with torch.no_grad():
            alone = model(ids, noisy=chosen).logits
            beside = model(padded, attention_mask=mask, noisy=wide).logits[:, where]
        torch.testing.assert_close(alone, beside, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_clean_token_sees_an_adapter_or_a_noisy_token(family: str, folder: Folder) -> None:
    place = folder(family)
    model, base, ids = own(place), stock(place), texts(2, 24)
    mask = int(model.config.mask_token_id)
    noisy = last_block(ids, 16)
    masked = ids.clone()
    masked[:, 17] = mask
    masked[:, 20:23] = mask
    with torch.no_grad():
        expected = base(ids[:, :16]).logits
        found = model(masked, noisy=noisy).logits
        # What is clean is what it is without the noise.
        torch.testing.assert_close(found[:, :16], expected, atol=1e-5, rtol=0)
        # The adapter acts on noisy tokens, and the mask vector stands for the mask.
        clean = base(ids).logits
        assert (model(ids, noisy=noisy).logits[:, 16:] - clean[:, 16:]).abs().amin((0, 1)).max() > 0
        vector = model.get_input_embeddings().mask_vector
        vector += 1.0
        moved = (model(masked, noisy=noisy).logits - found).abs().amax((0, 2))
        assert moved[:16].eq(0).all()
        assert moved[16:].gt(1e-4).all()


@pytest.mark.parametrize("draft", ["open", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_who_sees_whom(family: str, draft: str, folder: Folder) -> None:
    """Change one token, see which positions move: against the rule, written out here once more."""
    model, ids = own(folder(family, draft=draft)), texts(1, 20)
    noisy = torch.zeros(20, dtype=torch.bool)
    noisy[10:] = True
    position = torch.arange(20)
    block = position // BLOCK
    for changed in range(20):
        other = ids.clone()
        other[0, changed] = ids[0, changed] % 300 + 7
        with torch.no_grad():
            rows = model(torch.cat([ids, other]), noisy=noisy.expand(2, -1)).logits
        moved = (rows[0] - rows[1]).abs().amax(-1) > 1e-5
        expected = noisy & (block == block[changed]) if noisy[changed] else position >= changed
        if draft == "causal":
            expected = expected & (position >= changed)
        # A clean token moves later clean ones and so all noisy ones behind it.
        assert moved.tolist() == expected.tolist(), changed


def test_threads_share_a_model_and_not_what_is_noisy(folder: Folder) -> None:
    model, ids = own(folder("llama")), texts(1, 24)
    noisy = last_block(ids, 16)
    with torch.no_grad():
        expected = {True: model(ids, noisy=noisy).logits, False: model(ids).logits}
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        # In the middle of a noisy forward the other thread runs a clean one.
        inside.set()
        assert done.wait(60)

    def run() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(ids, noisy=noisy).logits
        return found

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run)
        assert inside.wait(60)
        handle.remove()
        with torch.no_grad():
            clean = model(ids).logits
        done.set()
        assert torch.equal(job.result(), expected[True])
    assert torch.equal(clean, expected[False])


def test_the_mask_is_the_rule_for_any_draw() -> None:
    draws = torch.Generator().manual_seed(3)
    for _ in range(20):
        noisy = torch.rand(2, 13, generator=draws) < 0.5
        valid = torch.rand(2, 13, generator=draws) < 0.9
        positions = torch.arange(13).expand(2, -1)
        found = gated_mask(positions, valid, noisy, 4, 6)
        for row in range(2):
            for query in range(7, 13):
                for key in range(13):
                    if noisy[row, key]:
                        sees = bool(noisy[row, query]) and query // 4 == key // 4
                    else:
                        sees = key <= query
                    assert bool(found[row, query - 7, key]) == (sees and bool(valid[row, key]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_begins_every_block_with_the_bases_own_token(
    family: str, padded: bool, folder: Folder
) -> None:
    place = folder(family, padded=padded)
    model, base = own(place), stock(place)
    for length in (3, 8, 13):
        prompt = texts(3, length, seed=length)
        written = model.generate(prompt, max_new_tokens=27, eos_token_id=[])
        assert torch.equal(written[:, :length], prompt)
        assert not (written == model.config.mask_token_id).any()
        with torch.no_grad():
            logits = base(written).logits
        for start in range(length + -length % BLOCK, length + 27, BLOCK):
            never = model.generation_config.suppress_tokens or []
            logits[:, :, [*never, *([model.config.mask_token_id] if padded else [])]] = -torch.inf
            expected = logits[:, start - 1].argmax(-1)
            assert torch.equal(written[:, start], expected), start
        # A row is what it is alone.
        alone = model.generate(prompt[1:2], max_new_tokens=27, eos_token_id=[])
        assert torch.equal(alone[0], written[1])


def test_prompts_of_different_lengths(folder: Folder) -> None:
    model = own(folder("qwen3"))
    prompts = [texts(1, length, seed=length) for length in (2, 11, 17)]
    alone = [
        model.generate(p, max_new_tokens=20, eos_token_id=[])[0, p.shape[1] :] for p in prompts
    ]
    padded = torch.zeros(3, 17, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, 17 - prompt.shape[1] :] = prompt
        mask[row, 17 - prompt.shape[1] :] = 1
    together = model.generate(padded, attention_mask=mask, max_new_tokens=20, eos_token_id=[])
    assert torch.equal(together[:, 17:], torch.stack(alone))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"confidence_threshold": 0.05}, {"max_denoising_steps": 2}, {"eos_token_id": None}],
    ids=str,
)
def test_decoding_as_on_a_gpu_writes_the_same(
    padded: bool, settings: dict[str, Any], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own(folder("qwen2", padded=padded))
    prompts, mask = texts(3, 17, seed=5), torch.ones(3, 17, dtype=torch.long)
    mask[1, :8] = 0
    mask[2, :15] = 0
    written = []
    for queued in (False, True):
        monkeypatch.setattr(modeling, "is_queued", lambda device, options, way=queued: way)
        given = {"attention_mask": mask, "max_new_tokens": 21, **settings}
        written.append(model.generate(prompts, **given)[:, 17:])
    assert torch.equal(*written)


def test_without_our_code_it_writes_what_the_base_writes(
    folder: Folder, source_cache: SourceFactory
) -> None:
    prompt, plain = texts(1, 9), source_cache("llama")
    ours, theirs = stock(folder("llama")), stock(plain)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": None}
    settings["attention_mask"] = torch.ones_like(prompt)
    assert torch.equal(ours.generate(prompt, **settings), theirs.generate(prompt, **settings))


def test_its_own_code_loads_it(folder: Folder) -> None:
    place = folder("qwen2")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    ids, ours = texts(2, 16), own(place)
    noisy = last_block(ids, 8)
    assert loaded.is_gated
    assert not any(
        weight.requires_grad for name, weight in ours.named_parameters() if "lora" in name
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids, noisy=noisy).logits, ours(ids, noisy=noisy).logits)


def test_an_untrained_adapter_changes_noisy_tokens_by_their_mask_only(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    gated_folder(source_cache("llama"), tmp_path / "g", filled=False)
    model = own(tmp_path / "g")
    rows = model.get_input_embeddings().weight
    vector = model.get_input_embeddings().mask_vector
    torch.testing.assert_close(vector, rows.mean(0), atol=1e-6, rtol=0)
    ids = texts(1, 16)
    causal = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    with torch.no_grad():
        found = model(ids, noisy=torch.ones_like(ids, dtype=torch.bool), attention_mask=causal)
        torch.testing.assert_close(found.logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("missing", lambda states: {name: states[name] for name in sorted(states)[1:]}),
        (
            "unknown",
            lambda states: states | {"base_model.model.lm_head.lora_A.weight": torch.ones(1)},
        ),
        ("another shape", lambda states: {name: value[:1] for name, value in states.items()}),
    ],
)
def test_another_models_adapter_is_refused(
    name: str, damage: Callable[[Any], Any], tmp_path: Path, folder: Folder
) -> None:
    place = Path(shutil.copytree(folder("llama"), tmp_path / "broken"))
    save_file(damage(load_file(place / ADAPTER)), place / ADAPTER, {"format": "pt"})
    with pytest.raises(DataError, match="is not the adapter of this model"):
        load_checkpoint(place)


def test_a_lost_adapter_is_said(tmp_path: Path, folder: Folder) -> None:
    place = Path(shutil.copytree(folder("llama"), tmp_path / "lost"))
    shutil.rmtree(place / "adapter")
    with pytest.raises(DataError, match=r"has no adapter/adapter_model\.safetensors"):
        load_checkpoint(place)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"is_causal": False}, "is_causal"),
        ({"diffusion.context": "block"}, "context"),
        ({"diffusion.token_shift": False}, "token_shift"),
        ({"diffusion.acts_on": "some"}, "acts_on"),
        ({"diffusion.adapter_rank": 0}, "adapter_rank"),
        ({"diffusion.adapter_alpha": None}, "adapter_alpha"),
        ({"diffusion.adapter_targets": []}, "adapter_targets"),
        ({"mask_token_id": 3}, "mask_token_id"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(
    change: dict[str, Any], field: str, tmp_path: Path, folder: Folder
) -> None:
    place = Path(shutil.copytree(folder("llama"), tmp_path / "broken"))
    config = json.loads((place / "config.json").read_text())
    for name, value in change.items():
        part, _, key = name.rpartition(".")
        (config[part] if part else config)[key] = value
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match=field):
        load_checkpoint(place)


def test_what_a_gated_model_does_not_do(
    folder: Folder, tmp_path: Path, source_cache: SourceFactory
) -> None:
    model, prompt = own(folder("llama")), texts(1, 9)
    with pytest.raises(ValueError, match="guidance_scale hides the prompt"):
        model.generate(prompt, max_new_tokens=4, guidance_scale=2.0)
    with pytest.raises(ValueError, match="copy its folder"):
        model.save_pretrained(tmp_path / "saved")
    from conversion import convert

    plan = convert(source_cache("llama"), tmp_path / "opened", "bd3lm")
    opened = load_model(tmp_path / "opened", plan.adapter)
    assert not opened.is_gated
    with pytest.raises(ValueError, match="noisy is for a gated model"):
        opened(prompt, noisy=torch.ones_like(prompt, dtype=torch.bool))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (6, 5), (6, 3), (2, 3, 3), (1, 6, 5), (2, 3, 4, 5)], ids=str
)
@pytest.mark.parametrize("rows", [1, 2])
def test_which_numbers_of_a_layer_are_of_noisy_tokens(shape: tuple[int, ...], rows: int) -> None:
    """Whether a layer gets rows or one token behind the other, with any number of features."""
    noisy = torch.tensor([[False, True, True], [False, False, True]])[:rows, :, None]
    per_token = noisy.expand(2, -1, -1).flatten().tolist()
    found = spread(noisy, torch.zeros(shape)).expand(shape).reshape(6, -1)
    assert [row.all().item() for row in found] == per_token
    assert [row.any().item() for row in found] == per_token
