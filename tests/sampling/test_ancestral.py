"""Ancestral sampling against chains that are enumerated by Bayes from the forward kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factory import FAMILIES
from tiny_decoders import MASK, Forwards, prompt, tiny

from dllm_convert.modeling.published.canvas import Canvas
from dllm_convert.modeling.published.decoding import decode_canvas
from dllm_convert.modeling.published.noising import Noising
from dllm_convert.modeling.published.options import DecodingOptions

WORDS = 5
"""Words of the tiny vocabulary; the mask is one more."""
State = tuple[int, ...]
Law = Mapping[State, float]
Chance = Callable[[State], torch.Tensor]
"""What a model predicts where a text is in a state: probabilities (new tokens, words)."""
SCHEDULES = {
    "linear": Noising(),
    "cosine": Noising("cosine"),
    "polynomial": Noising("polynomial", 3.0),
}
SETTINGS: dict[str, Any] = {"sampler": "ancestral", "temperature": 1.0, "eos_token_id": None}


def kept(noising: Noising, steps: int) -> list[float]:
    return [1 - float(noising.share(torch.tensor(n / steps).double())) for n in range(steps + 1)]


def chi_square(found: Law, expected: Law, draws: int) -> float:
    """Standard deviations by which Pearson's statistic is above its mean."""
    assert set(found) <= {state for state, chance in expected.items() if chance > 0}
    # Cells that expect few draws go together.
    cells: list[tuple[float, float]] = []
    few = [0.0, 0.0]
    for state, chance in expected.items():
        pair = found.get(state, 0) * draws, chance * draws
        if pair[1] < 5:
            few = [few[0] + pair[0], few[1] + pair[1]]
        else:
            cells.append(pair)
    cells += [(few[0], few[1])] if few[1] > 0 else []
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def frequencies(rows: torch.Tensor) -> Law:
    states, counts = rows.unique(dim=0, return_counts=True)
    return {
        tuple(state.tolist()): int(count) / len(rows)
        for state, count in zip(states, counts, strict=True)
    }


def products(parts: torch.Tensor) -> Iterator[tuple[State, float]]:
    """Every state with its probability where positions (n, words + 1) are independent."""
    may = [
        [(word, share) for word, share in enumerate(part) if share > 0] for part in parts.tolist()
    ]
    for choice in itertools.product(*may):
        yield tuple(word for word, _ in choice), math.prod(share for _, share in choice)


def run_chain(start: Law, steps: int, step: Callable[[State, int], torch.Tensor]) -> Law:
    now = dict(start)
    for number in range(steps, 0, -1):
        then: dict[State, float] = {}
        for state, chance in now.items():
            for new, share in products(step(state, number)):
                then[new] = then.get(new, 0) + chance * share
        now = then
    return now


def masked_chain(predict: Chance, noising: Noising, steps: int | None, new: int) -> Law:
    """MDLM's sampler: unmask with probability (alpha_s - alpha_t) / (1 - alpha_t).

    In continuous time one position after the other, in every order alike.
    """
    alpha = [] if steps is None else kept(noising, steps)

    def step(state: State, number: int) -> torch.Tensor:
        now, before = alpha[number], alpha[number - 1]
        opens = (before - now) / (1 - now)
        parts = torch.zeros(new, WORDS + 1).double()
        said = predict(state)
        for place, word in enumerate(state):
            if word == WORDS:
                parts[place, :WORDS] = opens * said[place]
                parts[place, WORDS] = 1 - opens if number > 1 else 0
            else:
                parts[place, word] = 1
        return parts

    masks = (WORDS,) * new
    if steps is not None:
        return run_chain({masks: 1.0}, steps, step)
    orders = list(itertools.permutations(range(new)))
    law: dict[State, float] = dict.fromkeys(itertools.product(range(WORDS), repeat=new), 0.0)
    for order, words in itertools.product(orders, law):
        state, chance = list(masks), 1 / len(orders)
        for place in order:
            chance *= float(predict(tuple(state))[place, words[place]])
            state[place] = words[place]
        law[words] += chance
    return law


def transition(keep: float) -> torch.Tensor:
    return keep * torch.eye(WORDS).double() + (1 - keep) / WORDS


def replaced_chain(predict: Chance, noising: Noising, steps: int, new: int) -> Law:
    """D3PM's: sum q(x_s, x_t | x_0) p(x_0 | x_t) over x_0, normalised, from transition matrices."""
    alpha = kept(noising, steps)

    def step(state: State, number: int) -> torch.Tensor:
        one = transition(alpha[number] / alpha[number - 1])
        before = transition(alpha[number - 1])
        said = predict(state)
        parts = torch.zeros(new, WORDS + 1).double()
        for place, word in enumerate(state):
            joint = (said[place] @ before) * one[:, word]
            parts[place, :WORDS] = joint / joint.sum()
        return parts

    states = itertools.product(range(WORDS), repeat=new)
    return run_chain({state: WORDS**-new for state in states}, steps, step)


def predictor(model: Any, ids: torch.Tensor) -> Chance:
    """What a model of `WORDS` words predicts behind a prompt, without a cache; memoised."""
    known: dict[State, torch.Tensor] = {}
    length, shift = ids.shape[1], int(model.config.diffusion["token_shift"])

    @torch.no_grad()
    def predict(state: State) -> torch.Tensor:
        if state not in known:
            text = torch.cat([ids[0], torch.tensor(state)])[None]
            logits = model(text, use_cache=False).logits[0, :, :WORDS].softmax(-1)
            known[state] = logits[length - shift : length - shift + len(state)].double()
        return known[state]

    return predict


def small(family: str, block: int | None = None, **section: Any) -> Any:
    """A tiny model of five words and a mask that knows its noise."""
    model = tiny(family, block=block, vocab_size=WORDS + 1)
    model.config.diffusion |= section
    return model


def drawn(model: Any, ids: torch.Tensor, new: int, rows: int, **settings: Any) -> torch.Tensor:
    torch.manual_seed(1)
    found: torch.Tensor = model.generate(
        ids.expand(rows, -1), max_new_tokens=new, **SETTINGS, **settings
    )
    return found[:, ids.shape[1] :]


def few_words(length: int) -> torch.Tensor:
    return prompt(length) % WORDS


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("schedule", "steps"), [("linear", 1), ("cosine", 3), ("polynomial", 4)])
def test_masks_open_as_in_the_published_sampler(family: str, schedule: str, steps: int) -> None:
    noising = SCHEDULES[schedule]
    model = small(family, noise_schedule=schedule, noise_power=noising.power)
    ids, draws = few_words(4), 4000
    found = frequencies(drawn(model, ids, 2, draws, max_denoising_steps=steps))
    law = masked_chain(predictor(model, ids), noising, steps, 2)
    assert sum(law.values()) == pytest.approx(1)
    assert abs(chi_square(found, law, draws)) < 4
    # The test sees a difference where there is one: all at once is another law.
    other = masked_chain(predictor(model, ids), noising, 1, 2)
    assert steps == 1 or chi_square(found, other, draws) > 6 or family in ("bert", "roberta")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("steps", [2, None])
def test_blocks_are_drawn_one_behind_the_other(family: str, steps: int | None) -> None:
    """The prompt's tail stands in the first block; its law is that of a text without a cache."""
    model = small(family, block=2)
    ids, draws = few_words(3), 6000
    rows = drawn(model, ids, 5, draws, max_denoising_steps=steps)
    for first in (0, 1, 3):
        # Behind the likeliest beginning, which most of the draws have.
        last = first + (1 if first == 0 else 2)
        law = masked_chain(predictor(model, ids), Noising(), steps, last - first)
        assert abs(chi_square(frequencies(rows[:, first:last]), law, len(rows))) < 4
        likeliest = torch.tensor(max(law, key=lambda state: law[state]))
        rows = rows[(rows[:, first:last] == likeliest).all(-1)]
        ids = torch.cat([ids, likeliest[None]], 1)


@pytest.mark.parametrize(
    ("family", "block", "schedule", "steps"),
    [
        ("llama", None, "linear", 1),
        ("llama", None, "cosine", 3),
        ("qwen3", 2, "polynomial", 3),
        ("bert", None, "linear", 2),
    ],
)
def test_replaced_tokens_go_back_by_bayes(
    family: str, block: int | None, schedule: str, steps: int
) -> None:
    noising = SCHEDULES[schedule]
    facts = {"noise_schedule": schedule, "noise_power": noising.power, "noise_kernel": "uniform"}
    model = small(family, block, **facts, discrete_steps=steps)
    ids, draws = few_words(6), 4000
    # Their own T, which nobody has to say.
    rows = drawn(model, ids, 2, draws)
    law = replaced_chain(predictor(model, ids), noising, steps, 2)
    assert abs(chi_square(frequencies(rows), law, draws)) < 4


def test_noise_behind_the_last_new_token_of_a_block_changes_with_the_rest() -> None:
    """A block of two of which one is asked for is the law of all of them, summed over those."""
    model = small("llama", 2, noise_kernel="uniform", discrete_steps=3)
    ids, draws = few_words(4), 4000
    rows = drawn(model, ids, 1, draws)
    law: dict[State, float] = {}
    for state, chance in replaced_chain(predictor(model, ids), Noising(), 3, 2).items():
        law[state[:1]] = law.get(state[:1], 0) + chance
    assert abs(chi_square(frequencies(rows), law, draws)) < 4


EXPONENTS, CLASSES = (0.5, 1.0, 3.0), ((1, 4), (0,))
OWN = torch.tensor([EXPONENTS[one] for one in (1, 0, 2, 2, 0)]).double()
"""Exponent of each word."""


def class_chain(predict: Chance, steps: int | None, new: int) -> Law:
    """MD4's reverse: a mask is word k, and opens with probability 1 - (s/t)^{w_k}.

    In continuous time a mask opens into k at rate w_k mu_k / t, and of several one is the next.
    """

    def step(state: State, number: int) -> torch.Tensor:
        parts = torch.zeros(new, WORDS + 1).double()
        said = predict(state)
        for place, word in enumerate(state):
            if word == WORDS:
                opens = 1 - torch.tensor((number - 1) / number).double() ** OWN
                parts[place, :WORDS] = said[place] * opens
                parts[place, WORDS] = 1 - parts[place].sum() if number > 1 else 0
            else:
                parts[place, word] = 1
        return parts

    if steps is not None:
        return run_chain({(WORDS,) * new: 1.0}, steps, step)
    law: dict[State, float] = {}
    now: dict[State, float] = {(WORDS,) * new: 1.0}
    while now:
        state, chance = now.popitem()
        masks = [place for place, word in enumerate(state) if word == WORDS]
        if not masks:
            law[state] = law.get(state, 0) + chance
            continue
        rates = predict(state)[masks] * OWN
        for number, place in enumerate(masks):
            for word in range(WORDS):
                share = float(rates[number, word] / rates.sum())
                opened = (*state[:place], word, *state[place + 1 :])
                now[opened] = now.get(opened, 0) + chance * share
    return law


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize(("family", "block"), [("llama", None), ("qwen3", 2)])
def test_words_open_by_their_class(family: str, block: int | None, steps: int | None) -> None:
    facts = {"noise_exponents": list(EXPONENTS), "noise_classes": [list(ids) for ids in CLASSES]}
    model = small(family, block, noise_schedule="learned", **facts)
    ids, draws = few_words(4), 5000
    rows = drawn(model, ids, 2, draws, max_denoising_steps=steps)
    law = class_chain(predictor(model, ids), steps, 2)
    assert sum(law.values()) == pytest.approx(1)
    assert abs(chi_square(frequencies(rows), law, draws)) < 4
    # The test sees what the exponents do, but where all masks open in one step.
    plain = masked_chain(predictor(model, ids), Noising(), steps, 2)
    assert steps == 1 or chi_square(frequencies(rows), plain, draws) > 6


def test_one_exponent_is_the_schedule_of_all_words() -> None:
    model = small("llama", noise_schedule="learned", noise_exponents=[1.0], noise_classes=[])
    ids, draws = few_words(4), 4000
    rows = drawn(model, ids, 2, draws, max_denoising_steps=3)
    law = masked_chain(predictor(model, ids), Noising(), 3, 2)
    assert abs(chi_square(frequencies(rows), law, draws)) < 4


def test_no_forward_is_run_for_steps_that_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"noise_exponents": list(EXPONENTS), "noise_classes": [list(ids) for ids in CLASSES]}
    model = small("llama", 4, noise_schedule="learned", **facts)
    seen = Forwards(monkeypatch, model)
    model.generate(few_words(4), max_new_tokens=8, max_denoising_steps=500, seed=0, **SETTINGS)
    assert len(seen.shapes) <= 1 + 8


JOINT = torch.tensor(
    [[0.30, 0.02, 0.0], [0.03, 0.0, 0.25], [0.10, 0.28, 0.02]], dtype=torch.float64
)
"""How likely two words are together: what a perfect denoiser knows."""


class Perfect:
    """Reads a canvas of two positions as a model would that knows `JOINT`, and the time."""

    def __init__(self, model: Any, canvas: Canvas) -> None:
        self.canvas, self.read_so_far, self.alpha = canvas, 0, model.alpha

    def read(self, masked: torch.Tensor, window: torch.Tensor, everything: bool) -> torch.Tensor:
        canvas, words = self.canvas, len(JOINT)
        shown = canvas.read(canvas.index[:2].expand(len(canvas.rows), -1))
        canvas.forwards += 1
        # Of a position that holds noise: q(what the other one shows | its word), (rows, words).
        said = []
        for other in (1, 0):
            seen = shown[:, other]
            keep = 0.0
            if canvas.options.noise_tokens:
                keep = self.alpha[len(self.alpha) - 1 - self.read_so_far]
            given = keep * torch.eye(words).double() + (1 - keep) / words
            if not canvas.options.noise_tokens:
                given = torch.eye(words).double()
            given = torch.cat([given, torch.ones(words, 1).double()], 1)  # a mask says nothing
            joint = JOINT.T if other == 0 else JOINT
            said.append((joint @ given[:, seen]).T)
        self.read_so_far += 1
        chances = torch.stack(said, 1)[masked]
        chances = torch.cat([chances, torch.zeros(len(chances), 1).double()], -1)
        return chances.log()

    def select(self, kept: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_many_steps_of_a_perfect_denoiser_reach_the_joint_law(kernel: str, schedule: str) -> None:
    noising, draws, steps = SCHEDULES[schedule], 3000, 200
    words = len(JOINT)
    options = DecodingOptions(
        mask_token_id=words,
        max_new_tokens=2,
        sampler="ancestral",
        temperature=1.0,
        # Masks open in continuous time, the limit of many steps; tokens are replaced in many.
        max_denoising_steps=steps if kernel == "uniform" else None,
        noising=noising,
        noise_tokens=words + 1 if kernel == "uniform" else 0,
    )
    torch.manual_seed(2)
    model = SimpleNamespace(alpha=kept(noising, steps))
    empty = torch.zeros(draws, 0, dtype=torch.long), torch.zeros(draws, dtype=torch.long)
    decoded = decode_canvas(model, *empty, options, reader=Perfect)
    law = {(a, b): float(JOINT[a, b]) for a in range(words) for b in range(words)}
    independent = {(a, b): float(JOINT[a].sum() * JOINT[:, b].sum()) for a, b in law}
    found = frequencies(decoded.rows)
    if kernel == "uniform":
        # Of finitely many steps a little of what cannot be is left.
        rare = sum(share for state, share in found.items() if not law[state])
        assert rare < 0.01
        kept_states = {state: share for state, share in found.items() if law[state]}
        assert abs(chi_square(kept_states, law, draws)) < 4
    else:
        assert abs(chi_square(found, law, draws)) < 4
        assert decoded.forwards == 2
    mixed = {state: share for state, share in found.items() if independent[state]}
    assert chi_square(mixed, independent, draws) > 50


def test_no_forward_is_run_for_steps_that_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama", 4)
    seen = Forwards(monkeypatch, model)
    out = model.generate(
        few_words(4), max_new_tokens=8, max_denoising_steps=1000, seed=0,
        return_dict_in_generate=True, **SETTINGS,
    )  # fmt: skip
    assert out.forwards == len(seen.shapes) <= 1 + 8
    assert (out.sequences != MASK).all()


NOISES: dict[str, dict[str, Any]] = {
    "absorbing": {},
    "uniform": {"noise_kernel": "uniform", "discrete_steps": 6},
    "classes": {"noise_exponents": [0.5, 1.0, 3.0], "noise_classes": [[1, 4], [0]]},
    "classes in steps": {
        "noise_exponents": [0.5, 1.0, 3.0], "noise_classes": [[1, 4], [0]], "discrete_steps": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("noise", list(NOISES))
def test_a_row_draws_as_if_it_were_alone(block: int | None, noise: str) -> None:
    model = small("llama", block, **NOISES[noise])
    one, two = few_words(3), few_words(7)
    ids = torch.ones(2, 7, dtype=torch.long)
    mask = torch.zeros(2, 7, dtype=torch.long)
    ids[0, 4:], mask[0, 4:], ids[1], mask[1] = one[0], 1, two[0], 1
    settings = {**SETTINGS, "max_new_tokens": 9}
    together = model.generate(ids, attention_mask=mask, seed=[5, 6], **settings)
    for row, (text, seed) in enumerate([(one, 5), (two, 6)]):
        alone = model.generate(text, seed=seed, **settings)
        assert together[row, 7:].tolist() == alone[0, text.shape[1] :].tolist()
    again = model.generate(ids, attention_mask=mask, seed=[6, 7], **settings)
    assert not torch.equal(together, again)


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_what_is_ruled_out_is_not_drawn(kernel: str) -> None:
    model = small("llama", 4, noise_kernel=kernel, discrete_steps=5)
    rows = drawn(model, few_words(4), 8, 200, suppress_tokens=[0, 3])
    assert set(rows.unique().tolist()) == {1, 2, 4}
    ended = model.generate(
        few_words(4).expand(50, -1), max_new_tokens=12, seed=3,
        **{**SETTINGS, "eos_token_id": 2, "pad_token_id": 1},
    )[:, 4:]  # fmt: skip
    for row in ended.tolist():
        if 2 in row:
            assert set(row[row.index(2) + 1 :]) <= {1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "sampler draws every token"),
        ({"remasking": "random"}, "remasking and sampler do not go together"),
        ({"block_length": 4}, "block_length and sampler do not go together"),
        ({"sampler": "best"}, r"sampler is 'best', expected one of \['ancestral'\]"),
        ({"no_repeat_ngram_size": 2}, "in an order of its own"),
    ],
)
def test_what_does_not_go_with_a_sampler(settings: dict[str, Any], said: str) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match=said):
        model.generate(few_words(4), max_new_tokens=4, **{**SETTINGS, **settings})
