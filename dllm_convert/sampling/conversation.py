"""A conversation with a diffusion model as a value: what was said, and how answers are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import DataError, RequestError

FORMAT = "dllm-convert chat 1"
"""What a saved conversation says it is."""


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        role: `user` or `assistant`.
        content: The text.
        facts: Of an answer, how it was decoded: fields of `Sample` besides its texts.
    """

    role: str
    content: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat(Printed):
    """A conversation. Every method returns another one and leaves this as it is.

    Attributes:
        turns: What was said, in order.
        system: What the system message says; None for none.
        settings: Settings of decoding, by the names that `generate` has for them.
        seed: Seed for temperatures above 0; answer n draws from `seed + n`.
        tries: Answers that were taken back to be written anew, which draw from other seeds.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    tries: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a chat template takes: `role` and `content` of each message."""
        said = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return [
            *([] if self.system is None else [{"role": "system", "content": self.system}]),
            *said,
        ]

    @property
    def waits(self) -> bool:
        """Whether the user spoke last."""
        return bool(self.turns) and self.turns[-1].role == "user"

    @property
    def next_seed(self) -> int | None:
        """Seed of the next answer."""
        return None if self.seed is None else self.seed + len(self.turns) // 2 + 1000 * self.tries

    def ask(self, text: str) -> Self:
        """Say something as the user; what was asked and not answered yet is replaced.

        Raises:
            RequestError: It is empty.
        """
        if not text.strip():
            raise RequestError("there is nothing in the message")
        before = self.turns[:-1] if self.waits else self.turns
        return replace(self, turns=(*before, Turn("user", text)), tries=0)

    def answer(self, text: str, facts: Mapping[str, Any] | None = None) -> Self:
        """Say something as the model.

        Raises:
            RequestError: Nothing was asked.
        """
        if not self.waits:
            raise RequestError("nothing was asked", hint="ask() comes first")
        return replace(self, turns=(*self.turns, Turn("assistant", text, dict(facts or {}))))

    def reopen(self) -> Self:
        """Take the last answer back, to have another one written.

        Raises:
            RequestError: There is none.
        """
        if not self.turns:
            raise RequestError("nothing was asked yet")
        if self.waits:
            return self
        return replace(self, turns=self.turns[:-1], tries=self.tries + 1)

    def undo(self) -> Self:
        """Take the last question and its answer back.

        Raises:
            RequestError: There is none.
        """
        if not self.turns:
            raise RequestError("nothing was said yet")
        return replace(self, turns=self.turns[: -1 if self.waits else -2], tries=0)

    def emptied(self) -> Self:
        """Begin anew, under the same system message and settings."""
        return replace(self, turns=(), tries=0)

    def under(self, system: str | None) -> Self:
        """Have another system message, or none."""
        return replace(self, system=system or None)

    def seeded(self, seed: int | None) -> Self:
        """Draw from another seed."""
        return replace(self, seed=seed)

    def decoded_with(self, **settings: Any) -> Self:
        """Have other settings of decoding; None switches off what the checkpoint has saved."""
        return replace(self, settings={**self.settings, **settings})

    def decoded_as_saved(self, *names: str) -> Self:
        """Leave settings of decoding to the checkpoint."""
        left = {name: value for name, value in self.settings.items() if name not in names}
        return replace(self, settings=left)

    def as_dict(self) -> dict[str, Any]:
        """Return what is saved of it."""
        return {"format": FORMAT, **asdict(self), "turns": [asdict(turn) for turn in self.turns]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], where: str) -> Self:
        """Read what `as_dict` gave.

        Args:
            saved: What was saved.
            where: The file, for the message.

        Raises:
            DataError: It is no conversation.
        """
        values = {name: value for name, value in saved.items() if name != "format"}
        turns = values.get("turns")
        right = (
            saved.get("format") == FORMAT
            and values.keys() == {entry.name for entry in fields(cls)}
            and isinstance(turns, list)
            and all(_is_turn(turn, number) for number, turn in enumerate(turns))
            and isinstance(values["settings"], dict)
            and isinstance(values["system"], str | None)
            and isinstance(values["seed"], int | None)
            and isinstance(values["tries"], int)
        )
        if not right:
            raise DataError(f"{where} is no conversation", hint="Give a file that /save wrote")
        return cls(**{**values, "turns": tuple(Turn(**turn) for turn in turns or ())})

    def as_blocks(self) -> Sequence[Block]:
        """Return who said what."""
        return [f"{message['role']}: {message['content']}" for message in self.messages]


def _is_turn(turn: Any, number: int) -> bool:
    return (
        isinstance(turn, dict)
        and turn.keys() == {"role", "content", "facts"}
        and turn["role"] == ("user", "assistant")[number % 2]
        and isinstance(turn["content"], str)
        and isinstance(turn["facts"], dict)
    )
