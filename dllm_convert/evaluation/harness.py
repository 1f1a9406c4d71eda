"""A model for lm-evaluation-harness: `lm_eval --model dllm-convert`, without a fork.

Log-likelihoods are minus the estimated bound, so they are lower bounds; text is written by this
package's decoding. Importing this module registers the model with lm-eval.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dllm_convert.common.console import Reporter, Task
from dllm_convert.evaluation.asked import (
    asks_for_the_likeliest,
    cut_at,
    cut_to,
    item_number,
    item_of,
    most_tokens,
    scored_text,
    told_of_cuts,
    whole_text,
)
from dllm_convert.evaluation.continuation import Continuation, Estimator, verifier_nats
from dllm_convert.evaluation.effort import Effort
from dllm_convert.evaluation.ranking import Budget, Scored, score
from dllm_convert.evaluation.ranks import Ranks
from dllm_convert.evaluation.settings import Settings, find_settings, merge
from dllm_convert.evaluation.subject import EvaluatedCheckpoint
from dllm_convert.modeling.published.options import DecodingOptions
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.source.info import SourceInfo

AUTO_BATCH = 8
"""What `auto` stands for, as lm-eval lets one write it."""
_DECODING = {field.name for field in fields(DecodingOptions)}


@register_model("dllm-convert", "dllm_convert")
class DiffusionLM(LM):  # type: ignore[misc]
    """A converted checkpoint as lm-eval sees a model.

    Args:
        pretrained: Folder of the checkpoint.
        batch_size: Continuations, or prompts, per forward; `auto` is 8, and says so.
        device: Where to run; a GPU if there is one.
        dtype: Type of the weights.
        max_length: Most tokens of a text, instead of the checkpoint's context.
        published: Name of published settings to start from.
        max_batch_size: Taken for lm-eval's sake, not used.
        subject: A checkpoint that is loaded already.
        settings: Where to start from, instead of published ones.
        verifier: Another model, from its headers, that verifies where `verify_with` is "base".
        reporter: Progress; by default the first of several processes shows it.
        **given: Fields of `Settings`, and settings of decoding such as `confidence_threshold`.

    Raises:
        DataError: There is no such checkpoint, or max_length is below 2.
        IncompatibleError: It is no diffusion model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        published: str | None = None,
        max_batch_size: int | None = None,
        subject: EvaluatedCheckpoint | None = None,
        settings: Settings | None = None,
        verifier: SourceInfo | None = None,
        reporter: Reporter | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        self.settings = merge(settings or find_settings(published), given)
        self._ranks = Ranks.find(device)
        self._rank, self._world_size = self._ranks.rank, self._ranks.world
        self._device = self._ranks.device
        self.subject = subject or EvaluatedCheckpoint.load(
            Path(str(pretrained)),
            block_size=self.settings.block_size,
            device=str(self._ranks.device),
            dtype=dtype,
        )
        if verifier is not None:
            teller = reporter or Reporter(quiet=True)
            home = Path(str(pretrained)) if subject is None else None
            self.subject = self.subject.verified_by(verifier, teller, home)
        self.batch_size = AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.effort = Effort()
        # Whether contexts are conversations: their template has written how they begin.
        self._chats = False
        self.reporter = reporter or Reporter(quiet=self._rank != 0)
        if str(batch_size).startswith("auto"):
            self.reporter.line(
                f"batch_size {batch_size}: {self.batch_size} texts at once, no larger batch is "
                "looked for; give a number if there is memory for more"
            )
        wanted = None if max_length is None else int(max_length)
        self.context = most_tokens(self.subject, wanted, self.reporter)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's caches."""
        return self.subject.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.subject.model.parameters()),
            "dllm_convert": {"settings": str(self.settings), **self.effort.as_dict()},
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the prompt of its next turn."""
        self._chats = True
        return self.subject.chat(chat_history, answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` uses.

        lm-eval asks for it wherever prompts are conversations, those of its cache included.
        """
        self._chats = bool(chat_template)
        return self.subject.tokenizer.chat_template if chat_template else None

    def all_gather(self, tensor: Any) -> Any:
        """Concatenate a tensor over the processes."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect an object of every process on one of them."""
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self._ranks.barrier()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations: minus the estimated bound in nats, and whether greedy writes them.

        The choices of a question share their noise, and where their ranking is decided no more of
        it is drawn. A request that is asked twice is scored once: lm-eval repeats some to give
        every process as many. With `verify_with` the score is the verifier's own, exactly.
        """
        numbers: dict[tuple[int, str, str], int] = {}
        owners: list[int] = []
        texts: list[Continuation] = []
        characters: dict[int, int] = {}
        for request in requests:
            context, continuation = request.args
            item = item_of(request)
            number = numbers.setdefault((item, context, continuation), len(texts))
            owners.append(number)
            if number == len(texts):
                begins = not self._chats
                texts.append(scored_text(self.subject, request, self.context, begins=begins))
                characters[number] = len(continuation)
        cut = cut_to(texts, self.context, self.reporter)
        if self._is_verified:
            nats, greedy = self._verified(cut)
        else:
            nats = self._score(cut, characters).nats.tolist()
            greedy = self._greedy(cut)
        found = []
        for request, number in zip(requests, owners, strict=True):
            found.append((-nats[number], greedy[number]))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    @property
    def _is_verified(self) -> bool:
        """Whether a verifier stands for the model: its text, and its likelihood."""
        return bool(self.settings.generation.get("verify_with"))

    def _verified(self, texts: Sequence[Continuation]) -> tuple[list[float], list[bool]]:
        started = time.monotonic()
        with self.reporter.task("score", total=len(texts)) as task:
            nats, greedy = verifier_nats(
                *self.subject.scored_by, texts, batch_size=self.batch_size, task=task
            )
        self.effort.scoring_seconds += time.monotonic() - started
        return nats.tolist(), greedy

    def _score(self, texts: Sequence[Continuation], characters: dict[int, int] | None) -> Scored:
        settings, started = self.settings, time.monotonic()
        with self.reporter.task("score", total=len(texts) * settings.rounds) as task:
            found = score(
                self.subject.model,
                texts,
                self.subject.objective,
                Estimator(settings.masking, settings.draws, settings.seed, self.batch_size),
                Budget(settings.rounds, settings.confidence),
                characters=characters,
                task=task,
            )
        self.effort.draws += int(found.draws.sum())
        self.effort.most_draws += found.most * len(texts)
        self.effort.scoring_seconds += time.monotonic() - started
        return found

    def _greedy(self, texts: Sequence[Continuation]) -> list[bool]:
        """Whether decoding one token per forward writes the continuation."""
        siblings = Counter(text.item for text in texts)
        wanted = {
            "always": [True] * len(texts),
            "never": [False] * len(texts),
            "auto": [siblings[text.item] == 1 for text in texts],
        }[self.settings.greedy]
        if not any(wanted):
            return wanted
        with self.reporter.task("decode greedily", total=sum(wanted)) as task:
            return [
                wants and self._writes(text, task)
                for wants, text in zip(wanted, texts, strict=True)
            ]

    def _writes(self, text: Continuation, task: Task) -> bool:
        task.advance()
        if not text.scored:
            return True
        with packed_linears(self.subject.model):
            written = self.subject.continue_greedily(text.tokens[: text.start], text.scored)
        return written == text.tokens[text.start :]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows where they are longer than the context."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = whole_text(self.subject, request)
            for place, (given, scored) in enumerate(self._windows(tokens)):
                # Windows are no choices among which to rank: each is an item, all draws count.
                item = item_number(f"{place} {request.args[0]}")
                windows.append(Continuation((*given, *scored), len(given), item))
                owners.append(number)
        nats = [0.0] * len(requests)
        if self._is_verified:
            values, _ = self._verified(windows)
        else:
            values = self._score(windows, None).nats.tolist()
        for owner, value in zip(owners, values, strict=True):
            nats[owner] += value
        for request, value in zip(requests, nats, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -value)
        return [-value for value in nats]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            tokens, self.subject.first_token, max_seq_len=self.context - 1, context_len=1
        )
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write text after each context, up to the first of the task's stop strings."""
        found: dict[int, str] = {}
        seeds = self._seeds(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with self.reporter.task("write", total=len(requests)) as task:
            for batch, prompts in self._batches(requests, groups.values()):
                asked = requests[batch[0]].args[1]
                texts = self._write(prompts, asked, [seeds[n] for n in batch])
                for number, text in zip(batch, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                task.advance(len(batch))
        return [found[number] for number in range(len(requests))]

    def _batches(
        self, requests: Sequence[Any], groups: Iterable[Sequence[int]]
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield numbers and prompts of requests with the same settings, the longest first."""
        for numbers in groups:
            begins = not self._chats
            prompts = {n: self.subject.encode(requests[n].args[0], special=begins) for n in numbers}
            room = self.context - self._length(requests[numbers[0]].args[1])
            told_of_cuts([len(prompt) for prompt in prompts.values()], room, self.reporter)
            # Prompts of similar length side by side: padding costs as much as text.
            order = sorted(numbers, key=lambda n: -len(prompts[n]))
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                yield batch, [prompts[n] for n in batch]

    def _seeds(self, requests: Sequence[Any]) -> list[int]:
        """Return a seed per request: another one each time the same item is asked again."""
        asked: Counter[int] = Counter()
        seeds = []
        for request in requests:
            item = item_of(request)
            seeds.append((self.settings.seed + item + asked[item]) % 2**63)
            asked[item] += 1
        return seeds

    def _length(self, asked: Mapping[str, Any]) -> int:
        """How many tokens to write."""
        wanted = normalize_gen_kwargs(dict(asked), self.settings.max_new_tokens)
        return self.settings.length or int(wanted["max_gen_toks"])

    def _write(
        self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        wanted = normalize_gen_kwargs(dict(asked), self.settings.max_new_tokens)
        options = dict(self.settings.generation)
        options |= {name: wanted[name] for name in _DECODING & set(wanted) if wanted[name]}
        if asks_for_the_likeliest(asked) and not {"do_sample", "temperature"} & set(
            self.settings.generation
        ):
            # What the checkpoint does by itself may be to draw.
            options["temperature"] = 0.0
        started = time.monotonic()
        length = self._length(asked)
        with self.subject.packed():
            written = self.subject.write(prompts, length, seeds, self.context, **options)
        self.effort.writing_seconds += time.monotonic() - started
        self.effort.new_tokens += sum(written.new_tokens)
        self.effort.forwards += written.forwards
        self.effort.row_forwards += written.forwards * len(prompts)
        return [cut_at(text, wanted["until"]) for text in written.texts]
