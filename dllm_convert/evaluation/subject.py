"""A checkpoint that is evaluated: its model, tokenizer and objective, and text as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dllm_convert.adapters import adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.common.terms import Behind
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.denoising import denoised
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.modeling.published.paired import StockModel
from dllm_convert.modeling.text_bounds import (
    conversation_ids,
    end_ids,
    first_token,
    open_ids,
    until_end,
)
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.sampling.pairing import load_verifier
from dllm_convert.source.chat_rendering import chat_text
from dllm_convert.source.context import ASSUMED_CONTEXT, context_length
from dllm_convert.source.info import SourceInfo


def scored_from(given: Sequence[int], whole: Sequence[int], continuation: str) -> int:
    """Return the first token of a text that belongs to its continuation.

    Args:
        given: Tokens of the beginning alone.
        whole: Tokens of the whole text.
        continuation: Its end; where it is not empty, it has at least one token.

    Raises:
        DataError: It has none.
    """
    start = len(given)
    if continuation and start >= len(whole):
        pairs = enumerate(zip(given, whole, strict=False))
        start = next((at for at, (one, other) in pairs if one != other), len(whole))
    if continuation and start >= len(whole):
        raise DataError(
            f"the continuation {continuation!r} has no tokens in this model's vocabulary, so it "
            "has no likelihood",
            hint="Leave the item out; as nothing it would be likelier than any other",
        )
    return start


@dataclass(frozen=True)
class Written:
    """A batch of texts that a model wrote.

    Attributes:
        texts: New text of each prompt, special tokens left out.
        new_tokens: Tokens written to each row, its end-of-text token included.
        forwards: Forward passes of the whole batch.
    """

    texts: tuple[str, ...]
    new_tokens: tuple[int, ...]
    forwards: int


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A converted checkpoint, loaded.

    Attributes:
        model: Diffusion model in evaluation mode.
        tokenizer: Its tokenizer.
        objective: What it was trained on.
        context: Most tokens it takes.
        name: What results are filed under.
        verifier: Another model, loaded, whose text is written where `verify_with` is "base"; None
            for none.
    """

    model: Any
    tokenizer: Any
    objective: Objective
    context: int
    name: str
    verifier: Any = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        block_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> EvaluatedCheckpoint:
        """Load a converted checkpoint; its own modelling code is not run.

        Args:
            folder: The checkpoint.
            block_size: Tokens per block, instead of the checkpoint's.
            device: Where to run; a GPU if there is one.
            dtype: Type of the weights; bfloat16 on a GPU, else float32.

        Raises:
            DataError: There is no such checkpoint.
            IncompatibleError: It is no diffusion model, or has no blocks whose size to change.
        """
        loaded = load_checkpoint(folder, device=device, dtype=dtype)
        model = loaded.model
        objective = Objective.from_config(model.config)
        if block_size is not None:
            if objective.target != "bd3lm":
                raise IncompatibleError(
                    f"{folder} is an MDLM checkpoint, which has no blocks",
                    hint="Leave the block size out",
                )
            objective = replace(objective, block_size=block_size)
            model.config.block_size = block_size
            model.config.diffusion = {**model.config.diffusion, "block_size": block_size}
            model.generation_config.block_size = block_size
        longest = context_length(loaded.config, loaded.adapter) or ASSUMED_CONTEXT
        return cls(
            model=model,
            tokenizer=loaded.tokenizer,
            objective=objective,
            context=longest,
            name=str(folder),
        )

    def verified_by(
        self, source: SourceInfo, reporter: Reporter, home: Path | None = None
    ) -> EvaluatedCheckpoint:
        """Return the same with another model beside it that verifies.

        Args:
            source: Which one, from its headers.
            reporter: Progress.
            home: As in `load_verifier`.

        Raises:
            DllmConvertError: It cannot be loaded, or does not fit.
        """
        verifier = load_verifier(self.model, self.tokenizer, source, reporter, home)
        config = verifier.config.to_dict()
        longest = context_length(config, adapter_of(config)) or self.context
        return replace(self, verifier=verifier, context=min(self.context, longest))

    @property
    def scored_by(self) -> tuple[Any, Behind]:
        """Who says how likely a text is where it is verified, and how clean tokens are read."""
        if self.verifier is None:
            return self.model, self.objective.behind
        # Whatever its attention is: every text is a row of its own.
        return StockModel(self.verifier), "cache"

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Decode with packed weights, of both models if there are two."""
        with packed_linears(self.model), ExitStack() as stack:
            if self.verifier is not None:
                stack.enter_context(packed_linears(self.verifier))
            yield

    @cached_property
    def first_token(self) -> int:
        """What stands before a text that has nothing before it.

        Raises:
            DataError: The tokenizer names no token that could.
        """
        found = first_token(self.tokenizer)
        if found is None:
            raise DataError(
                "the tokenizer has neither a beginning- nor an end-of-text token, so a text with "
                "nothing before it cannot be scored",
                hint="Give the text a beginning",
            )
        return found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokenise text, with what the tokenizer puts before it and without what it puts after.

        A text that begins with that token already gets no second.

        Args:
            text: Any text.
            special: Whether it stands at the beginning; not if a chat template wrote it.
        """
        return open_ids(self.tokenizer, text) if special else conversation_ids(self.tokenizer, text)

    def encode_pair(
        self, context: str, continuation: str, *, special: bool = True
    ) -> tuple[list[int], list[int]]:
        """Tokenise a text and tell its end from its beginning, which is never empty.

        Spaces at the end of the context belong to the continuation, as in lm-eval: most
        vocabularies have words with the space before them. Where the continuation melts into the
        last token of the context, what is scored begins with the first token that differs.

        Args:
            context: What is given.
            continuation: What is scored; nothing of it only where it is empty.
            special: Whether the context stands at the beginning; not if a chat template wrote it.

        Raises:
            DataError: A continuation that is not empty has no tokens.
        """
        stripped = context.rstrip()
        text = context[len(stripped) :] + continuation
        given: list[int] = []
        if stripped:
            given = self.encode(stripped, special=special)
            whole = self.encode(stripped + text, special=special)
        else:
            whole = self.encode(text, special=False)
            # A text that is begun already is not begun again.
            given = whole[:1] if whole[1:] and whole[0] == self.first_token else []
        start = scored_from(given, whole, continuation)
        return whole[:start] or [self.first_token], whole[start:]

    def chat(self, messages: Sequence[dict[str, str]], *, answer: bool = True) -> str:
        """Return a conversation as text.

        Args:
            messages: Turns, with `role` and `content`.
            answer: Whether the assistant's turn is to follow.

        Raises:
            DataError: The tokenizer has no chat template, or it refuses them.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.name} has no chat template",
                hint="Leave --apply_chat_template out, or evaluate a chat model",
            )
        return chat_text(
            self.tokenizer,
            messages,
            "the messages of a task",
            "Correct chat_template.jinja, or leave --apply-chat-template out",
            add_generation_prompt=answer,
            continue_final_message=not answer,
        )

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        seeds: Sequence[int],
        context: int | None = None,
        **options: Any,
    ) -> Written:
        """Write text after each prompt; every prompt as if it were alone.

        A prompt that leaves no room for the new tokens loses its beginning.

        Args:
            prompts: Tokens of each prompt.
            new: Tokens to write.
            seeds: Seed of each row.
            context: Most tokens of a text; the model's by default.
            **options: Settings of decoding.

        Raises:
            IncompatibleError: The context has no room for a prompt beside the new tokens.
        """
        context = context or self.context
        room = context - new
        if room < 1:
            raise IncompatibleError(
                f"{new} new tokens and a prompt do not fit into {context} tokens",
                hint=f"Write fewer, as in --set max_new_tokens={context // 2}",
            )
        cut = [list(prompt)[-room:] or [self.first_token] for prompt in prompts]
        width = max(map(len, cut))
        filler = options.get("pad_token_id") or self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[filler] * (width - len(prompt)) + prompt for prompt in cut])
        index = torch.arange(width)
        mask = torch.stack([index >= width - len(prompt) for prompt in cut]).long()
        if self.verifier is not None and options.get("verify_with") == "base":
            options["verify_with"] = self.verifier
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new,
            seed=list(seeds),
            return_dict_in_generate=True,
            **options,
        )
        rows = output.sequences[:, width:].tolist()
        ends = end_ids(self.model)
        ended = [until_end(row, ends) for row in rows]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ended]
        return Written(tuple(texts), tuple(map(len, ended)), int(output.forwards))

    def continue_greedily(self, prompt: Sequence[int], new: int) -> tuple[int, ...]:
        """Return what decoding one token per forward writes after a prompt."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        options = {"confidence_threshold": None, "max_denoising_steps": None, "temperature": 0.0}
        output = self.model.generate(ids, max_new_tokens=new, **options, **denoised(self.model))
        return tuple(output[0, len(prompt) :].tolist())
