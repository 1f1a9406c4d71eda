"""diffusers' LLaDA2Pipeline decodes a converted folder as it is, and writes what we write."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="diffusers is not installed: make test-serving fetches it",
)
BLOCK, NEW = 4, 11


@pytest.fixture(scope="module")
def pipeline_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Path], tuple[Any, Any, Any]]]:
    """Yield what makes a pipeline, its model and its tokenizer of a folder, as strangers do."""
    import transformers

    diffusers: Any = importlib.import_module("diffusers")

    def made(folder: Path) -> tuple[Any, Any, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        scheduler = diffusers.BlockRefinementScheduler(block_length=BLOCK)
        pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe, model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield made


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_pipeline_writes_what_we_write(
    family: str, converted: Callable[..., Path], pipeline_of: Any
) -> None:
    pipe, model, tokenizer = pipeline_of(converted(family))
    draw = torch.Generator().manual_seed(0)
    mask = model.config.mask_token_id
    for length in (2 * BLOCK, 2 * BLOCK + 3):
        prompt = torch.randint(3, len(tokenizer) - 1, (1, length), generator=draw)
        for threshold in (1.0, 0.9, 0.05):
            # Its defaults edit what is written, and draw.
            written = pipe(
                input_ids=prompt,
                gen_length=NEW,
                block_length=BLOCK,
                num_inference_steps=BLOCK,
                threshold=threshold,
                temperature=0.0,
                sampling_method="greedy",
                editing_threshold=None,
                eos_early_stop=False,
                eos_token_id=-1,
                output_type="seq",
                mask_token_id=mask,
            ).sequences[0]
            ours = model.generate(
                prompt,
                max_new_tokens=NEW,
                max_denoising_steps=BLOCK,
                confidence_threshold=threshold,
                eos_token_id=None,
            )[0, length:]
            assert written.tolist()[-NEW:] == ours.tolist()
            assert mask not in written.tolist()


def test_what_the_page_shows_runs(converted: Callable[..., Path], pipeline_of: Any) -> None:
    """Beside the fixture's modules: the folder's code is what it was above."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    (shown,) = [
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LLaDA2" in code
    ]
    code = shown.replace('"smollm2-bd3lm"', repr(str(converted("llama"))))
    found: dict[str, Any] = {}
    exec(code.replace("gen_length=64", "gen_length=8"), found)
    (text,) = found["text"].texts
    assert text
