"""What lm-eval asks, as tokens: texts whose ends are scored, and which question they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.evaluation.continuation import Continuation, cut_left
from dllm_convert.evaluation.subject import EvaluatedCheckpoint
from dllm_convert.modeling.published.limits import context_of, has_position_table


def most_tokens(subject: EvaluatedCheckpoint, wanted: int | None, reporter: Reporter) -> int:
    """Return the most tokens of a text: the checkpoint's context, or what is wanted instead.

    Args:
        subject: The checkpoint.
        wanted: lm-eval's `max_length`.
        reporter: Warned where more is wanted than the model was trained on.

    Raises:
        DataError: It has no room for a token and what follows it.
        IncompatibleError: It is more than the model has positions for.
    """
    if wanted is None:
        return subject.context
    if wanted < 2:
        raise DataError(f"max_length is {wanted}, expected at least 2: a token and what follows it")
    known = context_of(subject.model)
    if known is not None and wanted > known:
        told = f"max_length is {wanted}, and the context is {known} tokens"
        if has_position_table(subject.model):
            raise IncompatibleError(
                f"{told}: the model has no positions behind it", hint=f"Give at most {known}"
            )
        reporter.warn(f"{told}: behind it the model was never trained")
    return wanted


def scored_text(
    subject: EvaluatedCheckpoint, request: Any, context: int, *, begins: bool
) -> Continuation:
    """Tokenise a request.

    Args:
        subject: The checkpoint.
        request: lm-eval's, with a context and a continuation.
        context: Most tokens of a text.
        begins: Whether the context stands at the beginning of a text.

    Raises:
        DataError: The continuation has no tokens.
        IncompatibleError: The continuation alone is longer than the context.
    """
    given, scored = subject.encode_pair(*request.args, special=begins)
    if len(scored) >= context:
        # Cut, it would be likelier than one that fits; cut to nothing, certain.
        raise IncompatibleError(
            f"a continuation of {len(scored)} tokens (task {request.task_name}, item "
            f"{request.doc_id}) does not fit into a context of {context} behind at least one token",
            hint="Leave the task out for this model",
        )
    return Continuation((*given, *scored), len(given), item_of(request))


def cut_to(
    texts: Sequence[Continuation], context: int, reporter: Reporter
) -> tuple[Continuation, ...]:
    """Leave out the beginnings of texts longer than the context, and say of how many."""
    told_of_cuts([len(text.tokens) for text in texts], context, reporter)
    return tuple(cut_left(text, context) for text in texts)


def told_of_cuts(lengths: Sequence[int], room: int, reporter: Reporter) -> None:
    """Say how many texts lose their beginning, if any do."""
    longer = sum(length > room for length in lengths)
    if longer:
        reporter.warn(
            f"{longer} of {len(lengths)} texts lose their beginning: they are longer than the "
            f"{room} tokens there is room for, the longest has {max(lengths)}"
        )


def whole_text(subject: EvaluatedCheckpoint, request: Any) -> list[int]:
    """Tokenise a text that is scored as a whole; nothing but white space may have no tokens.

    Raises:
        DataError: It has none.
    """
    text = request.args[0]
    tokens = subject.encode(text, special=False)
    if not tokens and text.strip():
        raise DataError(
            f"the text {text[:40]!r} has no tokens in this model's vocabulary, so it has no "
            "likelihood",
            hint="Leave the item out",
        )
    return tokens


def asks_for_the_likeliest(asked: Mapping[str, Any]) -> bool:
    """Whether a task says that nothing is to be drawn, rather than saying nothing of it."""
    temperature = asked.get("temperature")
    return asked.get("do_sample") is False or (temperature is not None and not temperature)


def item_of(request: Any) -> int:
    """Number the question a request belongs to.

    By its task and place where lm-eval says them: other questions may have the same context, and
    the choices of one may have different ones. Requests without any context are a question of their
    own beside those with one (`acc_mutual_info`).
    """
    given = request.args[0]
    if request.doc_id is None:
        return item_number(given)
    return item_number(f"{request.task_name} {request.doc_id} {bool(given)}")


def item_number(text: str) -> int:
    """Number a question by what names it.

    Its noise is then the same for every model, whatever else is asked, in which order, in batches
    of what size and on how many processes.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of some strings."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
