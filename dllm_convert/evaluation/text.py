"""Held-out text: the conversion's NELBO against the base's own NLL, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dllm_convert.card.base import data_kind, data_names
from dllm_convert.common.console import Reporter
from dllm_convert.diffusion.likelihood import autoregressive_nll, nelbo
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.evaluation.base_found import check_base
from dllm_convert.evaluation.request import Request
from dllm_convert.evaluation.subject import EvaluatedCheckpoint
from dllm_convert.modeling.loading import load_complete
from dllm_convert.recipe.contradiction import UnsoundError
from dllm_convert.recipe.recorded import recorded_recipe
from dllm_convert.recipe.schema import Columns, Data
from dllm_convert.recipe.splits import NamedText, Rows, sliced
from dllm_convert.recipe.texts import fields_of_text
from dllm_convert.source.tokenizer_loading import load_tokenizer
from dllm_convert.training.data.formats import format_of

PROBE = "def main():\n    print('naïve', 1234.5)  # Two  spaces"
"""Text that two vocabularies are unlikely to cut alike."""


class Stock(torch.nn.Module):
    """A stock causal model, called as `autoregressive_nll` calls a conversion.

    Args:
        model: Of `AutoModelForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        *,
        logits_at: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> SimpleNamespace:
        """Return logits at flat positions only, shape (positions, rows).

        Args:
            logits_at: Flat positions, shape (positions,).
            attention_mask: Who sees whom, bool, shape (batch, 1, length, length); None is causal.
            **inputs: What else the model takes.
        """
        # Padding that sees nothing would be NaN, and so would what multiplies it by zero.
        if attention_mask is not None:
            width, device = attention_mask.shape[-1], attention_mask.device
            own = torch.eye(width, dtype=torch.bool, device=device)
            inputs["attention_mask"] = attention_mask | own
        logits = self.model(**inputs).logits
        return SimpleNamespace(logits=logits.flatten(0, 1)[logits_at])


def measure_text(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Measure all of a text; of the text that the model was trained on, what was held out of that.

    Sequences are as long as in training. The bound is a mean over `settings.draws` draws of noise.

    Args:
        request: What is to be evaluated; `data` names the text.
        reporter: Progress.

    Returns:
        `source` (without paths of this machine), `held_out` (whether documents were left out
        because they were trained on), `draws`, `data` (counts), `nelbo`, and `nll` if there is a
        base.

    Raises:
        DataError: There is no such text, or no manifest that says how sequences were cut.
        IncompatibleError: The base has another vocabulary.
    """
    from dllm_convert.training.data.text import text_to_measure

    check_base(request)
    recipe = recorded_recipe(request.checkpoint)
    given, data = str(request.data), None
    if recipe.training.method != "none":
        data = _trained_on(given, recipe.data)
    trained_on = data is not None
    if data is None:
        # Names of columns may serve another text as well; subset and split are of that one.
        other: dict[str, Any] = {
            "subset": None,
            "split": "train",
            "revision": None,
            "max_documents": None,
        }
        other |= {"held_out_source": None, "held_out_split": None, "mixture": ()}
        other |= {"containing": None, **_one_text(given)}
        if given == "pydoc" or format_of(Path(given)) == "text":
            other["columns"] = Columns()
        data = recipe.data.model_copy(update=other)
    if request.text_field is not None:
        data = data.model_copy(update={"text_field": request.text_field})
    recipe = recipe.model_copy(update={"data": data})
    subject = EvaluatedCheckpoint.load(request.checkpoint, block_size=request.settings.block_size)
    batches, facts = text_to_measure(recipe, subject.tokenizer, reporter, held_out=trained_on)
    draws = request.settings.draws
    names = ", ".join(
        name + (f" ({text.split})" if "[" in text.split else "")
        for _, text in recipe.data.texts
        for name in data_names(text.source, data_kind(text.source))
    )
    counts = {key: value for key, value in facts.items() if type(value) is int}
    found: dict[str, Any] = {
        "source": names, "held_out": trained_on, "draws": draws, "data": counts,
    }  # fmt: skip
    which = "held out of" if trained_on else "all of"
    documents = f"{facts['documents']} document{'s' if facts['documents'] != 1 else ''}"
    reporter.line(f"{which} {names}: {documents}, {facts['tokens']} tokens")
    with reporter.task("measure the NELBO", total=len(batches) * draws) as task:
        bound = nelbo(
            subject.model,
            batches,
            subject.objective,
            seed=request.settings.seed,
            draws=draws,
            task=task,
        )
    found["nelbo"] = bound.as_dict()
    if request.base is not None:
        found["nll"] = _base_nll(request.base, subject, batches, reporter)
    return found


def _one_text(line: str) -> dict[str, Any]:
    """Return the fields of `data` that a line stands for.

    Raises:
        DataError: It can be read in two ways, or is a mixture.
    """
    try:
        fields = fields_of_text(line)
        sliced(str(fields.get("split", "")))
    except UnsoundError as error:
        raise DataError(error.found.message, hint=error.found.hint) from error
    except ValueError as error:
        raise DataError(str(error), hint="Write the part so, or leave it out") from error
    if "mixture" in fields:
        raise DataError(
            f"--data {line} is a mixture, and one text is measured at a time",
            hint="Measure each of them; or the mixture that was trained on, by its own name",
        )
    return fields


def _trained_on(given: str, data: Data) -> Data | None:
    """Return what was trained on, if a text is named as that, or one text of it, was.

    What it is cannot be seen.
    """
    if given == data.source:
        return data
    named = _one_text(given)
    for _, text in data.texts:
        if Path(named["source"]).absolute() != Path(text.source).absolute():
            continue
        if all(getattr(text, name) == named[name] for name in named.keys() - {"source"}):
            return text.model_copy(update={"source": named["source"]})
        split, rows = sliced(named.get("split") or text.split)
        known, trained = sliced(text.split)
        if split != known or named.get("subset") not in (None, text.subset):
            continue
        # Documents that were held out of it are known by the name that was trained on alone.
        shared = (rows or Rows()).overlaps(trained or Rows())
        if shared is None:
            raise DataError(
                f"--data {given}: whether it holds what was trained on ({text.split}) depends on "
                "the number of rows",
                hint="Give both slices in rows, or both in percent",
            )
        if shared:
            whole = "is a part of what"
            part = whole if trained is None else f"holds some of {text.split}, which"
            trained_name = NamedText(str(named["source"]), named.get("subset"), text.split)
            raise DataError(
                f"--data {given} {part} was trained on",
                hint=f"--data {trained_name if trained else named['source']} measures what was "
                "held out of it",
            )
    return None


def _base_nll(
    base: str, subject: EvaluatedCheckpoint, batches: Sequence[TextBatch], reporter: Reporter
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    own = load_tokenizer(base)(PROBE, add_special_tokens=False)["input_ids"]
    if own != subject.encode(PROBE, special=False):
        raise IncompatibleError(
            f"{base} has another vocabulary than {subject.name}, so their nats per token cannot "
            "be compared",
            hint="Give the model that was converted",
        )
    model = load_complete(
        AutoModelForCausalLM,
        base,
        device=str(subject.model.device),
        dtype=subject.model.dtype,
        # Some families have no sdpa.
        attn_implementation=subject.model.config._attn_implementation,
        trust_remote_code=False,
    )
    rows = int(model.config.get_text_config().vocab_size)
    with reporter.task("measure the base's NLL", total=len(batches)) as task:
        found = autoregressive_nll(
            Stock(model), batches, rows, behind=subject.objective.behind, task=task
        )
        return dict(found.as_dict())
