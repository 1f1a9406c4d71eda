"""What the fields of a recipe have to do with each other; each rule is written here once.

They need no checkpoint. What has to do with one is asked when a conversion is planned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import names_in, spelt
from dllm_convert.recipe.contradiction import Contradiction, Rule, clashes, idle
from dllm_convert.recipe.engines import NEEDS
from dllm_convert.recipe.text_rules import of_texts

if TYPE_CHECKING:
    from dllm_convert.recipe.schema import Noise, Recipe


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Yield what in a recipe does not go together."""
    yield from of_texts(recipe)
    yield from _serving(recipe)
    yield from _lengths(recipe)
    yield from _columns(recipe)
    yield from _noise(recipe)
    yield from _generation(recipe)
    yield from _beside(recipe)
    yield from _distillation(recipe)
    yield from _on_policy(recipe)
    yield from _alignment(recipe)
    yield from _growth(recipe)
    yield from _drafts(recipe)
    yield from _causal_blocks(recipe)
    yield from _kept_base(recipe)


def _serving(recipe: Recipe) -> Iterator[Contradiction]:
    if recipe.serve is None:
        return
    for name, need in NEEDS[recipe.serve].items():
        value = attrgetter(name)(recipe)
        if not need.met_by(value):
            yield Contradiction(
                f"serve: {recipe.serve} contradicts {name}: {value}, which was asked for: "
                f"{recipe.serve} {need.reason}",
                f"Leave {name} out, which makes it {need.value}; or ask for another engine",
                ("serve", name),
            )


def _columns(recipe: Recipe) -> Iterator[Contradiction]:
    named, pairs = recipe.data.columns.named, (("prompt", "completion"), ("instruction", "output"))
    if not named:
        return
    fields = tuple(f"data.columns.{part}" for part in named)
    given = [pair for pair in pairs if {*pair} & named.keys()]
    if len(given) != 1 or not {*given[0]} <= named.keys():
        yield Contradiction(
            f"data.columns names {', '.join(named)}, expected prompt and completion, or "
            "instruction and output",
            "--set data.columns.prompt=COLUMN --set data.columns.completion=COLUMN; messages and "
            "plain text are named with data.text_field",
            fields,
        )
    elif given[0] == pairs[0] and {"input", "history"} & named.keys():
        yield Contradiction(
            "data.columns.input and history stand beside instruction and output, and prompt and "
            "completion are named",
            "Name instruction and output instead",
            fields,
        )


def _lengths(recipe: Recipe) -> Iterator[Contradiction]:
    block, length = recipe.block_size, recipe.data.sequence_length
    if recipe.target == "mdlm" and block is not None:
        yield Contradiction(
            f"block_size {block} is for bd3lm, the target is mdlm",
            "Leave the block size out, or use --to bd3lm",
            ("target", "block_size"),
        )
    elif recipe.target == "bd3lm" and block is None:
        yield Contradiction(
            "bd3lm needs a block size", "Add --block 32, for instance", ("target", "block_size")
        )
    elif block is not None and length % block:
        nearest = max(block, length // block * block)
        yield Contradiction(
            f"block size {block} does not divide data.sequence_length {length}: a training "
            "sequence must be a whole number of blocks",
            f"--set data.sequence_length={nearest}, or another block size",
            ("block_size", "data.sequence_length"),
        )


def _in_full(noise: Noise) -> str:
    """Return all that a kernel or a schedule asks for and a recipe has not, as it is typed."""
    missing: list[str] = []
    if noise.schedule == "learned":
        missing += ["noise.classes=8"] if noise.classes is None else []
        missing += ["noise.exponent_rate=0.01"] if noise.exponent_rate is None else []
    if noise.kernel == "neighbours":
        missing += ["noise.neighbours=8"] if noise.neighbours is None else []
        missing += ["noise.jumps=4"] if noise.jumps is None else []
    if not noise.masks:
        missing += ["noise.discrete_steps=1000"] if noise.discrete_steps is None else []
    missing += ["noise.draw=time"] if noise.draw != "time" else []
    missing += ["noise.complementary=false"] if noise.complementary else []
    return " ".join(f"--set {field}" for field in missing) + ", for instance"


def _noise(recipe: Recipe) -> Iterator[Contradiction]:
    noise, training = recipe.noise, recipe.training
    if noise.min_time >= noise.max_time:
        yield Contradiction(
            f"noise.min_time {noise.min_time} is not below noise.max_time {noise.max_time}",
            "Times lie in (0, 1], the smaller one first",
            ("noise.min_time", "noise.max_time"),
        )
    kernel = noise.kernel
    walks = {"noise.neighbours": noise.neighbours, "noise.jumps": noise.jumps}
    for name, value in walks.items():
        if (value is None) is (kernel == "neighbours"):
            yield Contradiction(
                f"noise.kernel is {kernel}, and {name} is {'missing' if value is None else value}",
                _in_full(noise)
                if value is None
                else f"--set {name}=null, or --set noise.kernel=neighbours",
                ("noise.kernel", name),
            )
    yield from _learned(recipe)
    if kernel != "absorbing":
        if noise.discrete_steps is None:
            yield Contradiction(
                f"the {kernel} kernel has a bound in discrete time only",
                _in_full(noise),
                ("noise.kernel", "noise.discrete_steps"),
            )
        of_masks = {
            "noise.draw": noise.draw != "time",
            "noise.position_bias": noise.position_bias != 0,
            "noise.complementary": noise.complementary,
            "training.loss_weight": training.loss_weight != "elbo",
            "training.mask_noise_steps": training.mask_noise_steps > 0,
        }
        for name, found in of_masks.items():
            if found:
                yield Contradiction(
                    f"{name} is about masked tokens, and the {kernel} kernel masks none",
                    f"Leave {name} at its default, or noise.kernel at absorbing",
                    (name, "noise.kernel"),
                )
    elif noise.discrete_steps is not None and (noise.complementary or noise.draw == "count"):
        other = "noise.complementary" if noise.complementary else "noise.draw=count"
        yield Contradiction(
            f"noise.discrete_steps and {other} exclude each other: the one draws times from a "
            "grid, the other has its own",
            "Leave noise.discrete_steps out",
            ("noise.discrete_steps", other.partition("=")[0]),
        )
    if training.ar_loss_weight and recipe.target == "mdlm":
        yield Contradiction(
            "training.ar_loss_weight needs a clean stream, which mdlm does not have",
            "--to bd3lm, or leave training.ar_loss_weight out",
            ("training.ar_loss_weight", "target"),
        )


def _learned(recipe: Recipe) -> Iterator[Contradiction]:
    """What a schedule that is learnt (`noise.schedule: learned`) needs."""
    noise, training, learns = recipe.noise, recipe.training, recipe.noise.schedule == "learned"
    for name, value in {"classes": noise.classes, "exponent_rate": noise.exponent_rate}.items():
        if (value is None) is learns:
            yield Contradiction(
                f"noise.schedule is {noise.schedule}, and noise.{name} is "
                f"{'missing' if value is None else value}",
                _in_full(noise)
                if value is None
                else f"--set noise.{name}=null, or --set noise.schedule=learned",
                ("noise.schedule", f"noise.{name}"),
            )
    if not learns:
        return
    terms = "the bound of such a schedule is no cross-entropy"
    rules: tuple[Rule, ...] = (
        ("training.method", training.method == "none", "nothing is trained",
         "--set noise.schedule=linear"),
        ("noise.kernel", not noise.masks, "it is about when a token is masked",
         "--set noise.kernel=absorbing"),
        ("noise.draw", noise.draw != "time", "it is about the times", "--set noise.draw=time"),
        ("noise.discrete_steps", noise.discrete_steps is not None,
         "its bound is one of continuous time", "Leave noise.discrete_steps out"),
        ("noise.complementary", noise.complementary,
         "what one draw leaves is no draw of another time", "Leave noise.complementary out"),
        ("noise.position_bias", noise.position_bias != 0,
         "the loss would be no bound, of which the exponents are learnt",
         "Leave noise.position_bias out"),
        ("training.loss_weight", training.loss_weight != "elbo",
         "the loss would be no bound, of which the exponents are learnt",
         "--set training.loss_weight=elbo"),
        ("training.auxiliary_loss_weight", training.auxiliary_loss_weight > 0, terms,
         "Leave training.auxiliary_loss_weight out"),
        ("training.confidence_loss_weight", training.confidence_loss_weight > 0, terms,
         "Leave training.confidence_loss_weight out"),
        ("training.distillation.weight", training.distillation.weight > 0, terms,
         "Leave training.distillation out"),
        ("training.alignment_loss_weight", training.alignment_loss_weight > 0, terms,
         "Leave training.alignment_loss_weight out"),
        ("training.lora.acts_on", training.keeps_base,
         "beside a kept base the first token of a block has no noise to learn of",
         "--set training.lora.acts_on=all"),
        ("data.streaming", recipe.data.streaming == "on",
         "words are counted before training", "--set data.streaming=off"),
    )  # fmt: skip
    yield from clashes("noise.schedule=learned", rules)


def _beside(recipe: Recipe) -> Iterator[Contradiction]:
    """What losses beside the bound need."""
    noise, training = recipe.noise, recipe.training
    beside = {
        "training.loss_weight": (
            training.loss_weight == "uniform", "every masked token weighs the same already"),
        "noise.draw": (noise.draw == "draft", "drafts are trained on no bound"),
        "training.method": (training.method == "none", "nothing is trained"),
    }  # fmt: skip
    for name, (found, why) in beside.items():
        if training.auxiliary_loss_weight and found:
            yield Contradiction(
                f"training.auxiliary_loss_weight and {name} do not go together: {why}",
                "Leave training.auxiliary_loss_weight out",
                ("training.auxiliary_loss_weight", name),
            )
    replaces = not noise.masks
    if training.confidence_loss_weight and (replaces or training.method == "none"):
        yield Contradiction(
            "training.confidence_loss_weight asks predictions of masked tokens to be surer, and "
            + (f"the {noise.kernel} kernel masks none" if replaces else "nothing is trained"),
            "Leave training.confidence_loss_weight out",
            ("training.confidence_loss_weight", "noise.kernel" if replaces else "training.method"),
        )


def _distillation(recipe: Recipe) -> Iterator[Contradiction]:
    """What learning from the base needs."""
    chosen, field = recipe.training.distillation, "training.distillation"
    if not chosen.weight and not recipe.training.on_policy.share:
        yield from idle(chosen, field, "weight", 0.5)
        return
    rules: tuple[Rule, ...] = (
        ("training.method", recipe.training.method == "none",
         "nothing is trained", f"Leave {field} out"),
        ("noise.kernel", not recipe.noise.masks,
         "the base's prediction of a token takes the place of the token in a cross-entropy, and "
         f"the bound of the {recipe.noise.kernel} kernel is none", "--set noise.kernel=absorbing"),
    )  # fmt: skip
    if chosen.weight:
        yield from clashes(f"{field}.weight", rules)
    if chosen.divergence == "reverse_kl" and chosen.top_k is not None:
        yield Contradiction(
            f"{field}.divergence=reverse_kl and {field}.top_k do not go together: it is infinite "
            "where the base gives a word no chance",
            f"Leave {field}.top_k out, or --set {field}.divergence=forward_kl",
            (f"{field}.divergence", f"{field}.top_k"),
        )


def _on_policy(recipe: Recipe) -> Iterator[Contradiction]:
    """What learning by what the model itself writes needs."""
    training, noise, generation = recipe.training, recipe.noise, recipe.generation
    chosen, field = training.on_policy, "training.on_policy"
    if not chosen.share:
        yield from idle(chosen, field, "share", 0.5)
        return
    rules: tuple[Rule, ...] = (
        ("training.method", training.method == "none", "nothing is trained", f"Leave {field} out"),
        ("noise.kernel", not noise.masks,
         "what the model writes through is told by which tokens are masked, and the "
         f"{noise.kernel} kernel masks none", "--set noise.kernel=absorbing"),
        ("noise.schedule", noise.schedule == "learned",
         "of what the model wrote there is no bound that exponents could be learnt by",
         "--set noise.schedule=linear"),
        ("noise.draw", noise.draw == "draft",
         "drafts are verified by the base, and what is written is the base's own text",
         "--set data.write_with_base.prompts=1000 trains on that"),
        ("training.attention_annealing_steps", training.attention_annealing_steps > 0,
         "the model writes with the attention that it ends with",
         "Leave training.attention_annealing_steps out"),
        ("training.compile", training.compile,
         "a text that grows would have every width of it compiled",
         "Leave training.compile out"),
        ("generation.sampler", generation.sampler is not None and chosen.temperature == 0,
         "a sampler draws every token, and on_policy.temperature is 0",
         f"--set {field}.temperature=1"),
        ("generation.remasking", generation.remasking is not None,
         "the masks it writes through are told by when each token was written, for good",
         "Leave generation.remasking out"),
        ("generation.verify_with", generation.verify_with is not None,
         "what is verified is another's text, and its drafts are of one step",
         "Leave generation.verify_with out; sample takes --verify-with"),
    )  # fmt: skip
    yield from clashes(f"{field}.share", rules)
    length, whole = recipe.data.sequence_length, chosen.prompt_tokens + chosen.new_tokens
    if whole > length:
        yield Contradiction(
            f"{field}.prompt_tokens {chosen.prompt_tokens} and new_tokens {chosen.new_tokens} "
            f"are {whole} tokens, more than data.sequence_length {length}",
            f"--set data.sequence_length={_blocks_of(recipe.block_size, whole)}, or fewer of them",
            (f"{field}.prompt_tokens", f"{field}.new_tokens", "data.sequence_length"),
        )


def _blocks_of(block: int | None, tokens: int) -> int:
    """Return the least number of tokens that is enough, and a whole number of blocks."""
    return tokens if block is None else -(-tokens // block) * block


def _alignment(recipe: Recipe) -> Iterator[Contradiction]:
    """What comparing hidden states with the base's needs."""
    training, field = recipe.training, "training.alignment_loss_weight"
    if not training.alignment_loss_weight:
        return
    rules: tuple[Rule, ...] = (
        ("training.method", training.method == "none", "nothing is trained", f"Leave {field} out"),
        ("noise.kernel", not recipe.noise.masks,
         f"it compares what a mask stands for, and the {recipe.noise.kernel} kernel has none",
         "--set noise.kernel=absorbing"),
        ("token_shift", recipe.token_shift == "drop",  # noqa: S105
         "without the shift a position stands for its own token, and one of the base for the next",
         "--set token_shift=keep"),
        ("training.compile", training.compile,
         "what stands between compiled layers is not seen", "Leave training.compile out"),
    )  # fmt: skip
    yield from clashes(field, rules)


def _growth(recipe: Recipe) -> Iterator[Contradiction]:
    """What blocks that grow need."""
    growth, field, block = recipe.training.block_growth, "training.block_growth", recipe.block_size
    if not growth.steps:
        yield from idle(growth, field, "steps", 100)
        return
    steps, length = recipe.training.steps, recipe.data.sequence_length
    rules: tuple[Rule, ...] = (
        ("target", recipe.target == "mdlm", "mdlm has no blocks", "--to bd3lm --block 32"),
        ("training.method", recipe.training.method == "none", "nothing is trained",
         f"Leave {field} out"),
        ("noise.draw", recipe.noise.draw == "draft",
         "a draft of few tokens is drawn beside long ones anyway", f"Leave {field} out"),
        ("block_size", block is not None and not recipe.growing_sizes,
         "there is no smaller block to begin with", "A larger --block"),
        # What a budget in tokens comes to is known when it is shared out (`budget.py`).
        ("training.steps", recipe.training.tokens is None and growth.steps >= steps,
         f"blocks would grow for {growth.steps:,} of {steps:,} steps and never have their size",
         f"--set {field}.steps={max(1, steps // 2)}, or more --steps"),
    )  # fmt: skip
    yield from clashes(f"{field}.steps", rules)
    names = (f"{field}.sizes", "block_size", "data.sequence_length")
    for size in growth.sizes:
        fits = block is None or not block % size or not size % block
        if length % size or not fits:
            yield Contradiction(
                f"{field}.sizes has {size}, which has to divide data.sequence_length {length}, and "
                f"to divide the block size {block} or be a multiple of it",
                f"--set {field}.sizes='[]' doubles it up to the block size",
                names,
            )
        elif size == 1 and recipe.training.keeps_base:
            yield Contradiction(
                f"{field}.sizes has 1, and the base that is kept predicts the first token of every "
                "block: there would be nothing to train",
                f"Begin {field}.sizes with 2",
                (f"{field}.sizes", "training.lora.acts_on"),
            )
    if growth.steps < len(recipe.growing_sizes):
        yield Contradiction(
            f"{field}.steps {growth.steps} is less than a step for each of the sizes "
            f"{', '.join(map(str, recipe.growing_sizes))}",
            f"--set {field}.steps={10 * len(recipe.growing_sizes)}, for instance",
            (f"{field}.steps", f"{field}.sizes"),
        )


def _drafts(recipe: Recipe) -> Iterator[Contradiction]:
    """What training to draft (`noise.draw: draft`) needs."""
    if recipe.noise.draw != "draft":
        return
    noise = recipe.noise
    rules: tuple[Rule, ...] = (
        ("training.lora.acts_on", not recipe.training.keeps_base,
         "drafts are verified by a base that stays as it is", "--keep-base"),
        ("block_size", (recipe.block_size or 1) < 2,
         "a block holds the base's own token and at least one draft", "--block 4"),
        ("noise.complementary", noise.complementary,
         "all that is drafted is masked", "Leave noise.complementary out"),
        ("noise.views", noise.views > 1,
         "a text has one draw of groups", "Leave noise.views out"),
        ("noise.position_bias", noise.position_bias != 0,
         "all that is drafted is masked", "Leave noise.position_bias out"),
    )  # fmt: skip
    yield from clashes("noise.draw=draft", rules)


def _causal_blocks(recipe: Recipe) -> Iterator[Contradiction]:
    """What strictly causal blocks (`block_attention: causal`) rule out."""
    if recipe.block_attention != "causal":
        return
    training = recipe.training
    rules: tuple[Rule, ...] = (
        ("target", recipe.target == "mdlm", "mdlm has no blocks", "--to bd3lm --block 4"),
        ("training.attention_annealing_steps", training.attention_annealing_steps > 0,
         "nothing is opened, step by step or otherwise",
         "Leave training.attention_annealing_steps out"),
    )  # fmt: skip
    yield from clashes("block_attention=causal", rules)


def _kept_base(recipe: Recipe) -> Iterator[Contradiction]:
    """What an adapter that acts on noisy tokens only (`--keep-base`) rules out."""
    if not recipe.training.keeps_base:
        if recipe.training.lora.noisy_norms:
            yield Contradiction(
                "training.lora.noisy_norms is of noisy tokens beside a base that stays, and here "
                "all tokens have the same weights",
                "--keep-base, or training.lora.norms, which trains those of all tokens",
                ("training.lora.noisy_norms", "training.lora.acts_on"),
            )
        return
    field, training = "training.lora.acts_on", recipe.training
    out = f"--set {field}=all trains an adapter that is merged into the weights"
    guidance = recipe.generation.guidance_scale
    rules = (
        ("target", recipe.target == "mdlm",
         "the base reads clean tokens, and mdlm has none", "--to bd3lm --block 32"),
        ("token_shift", recipe.token_shift == "drop",  # noqa: S105
         "the base predicts the next token, so the token shift is kept",
         "--set token_shift=keep"),
        ("noise.kernel", not recipe.noise.masks,
         f"a vector of its own stands for the mask, and the {recipe.noise.kernel} kernel has none",
         "--set noise.kernel=absorbing"),
        ("training.ar_loss_weight", training.ar_loss_weight > 0,
         "a next-token loss trains what reads clean tokens, and that is the base, which stays",
         "Leave training.ar_loss_weight out"),
        ("training.attention_annealing_steps", training.attention_annealing_steps > 0,
         "only noisy tokens of one block see ahead, and nothing is opened step by step",
         "Leave training.attention_annealing_steps out"),
        ("training.compile", training.compile,
         "a compiled layer is not told which tokens are noisy", "Leave training.compile out"),
        ("training.lora.dropout", training.lora.dropout > 0,
         "the gated adapter has no dropout", "Leave training.lora.dropout out"),
        ("generation.guidance_scale", guidance not in (None, 1),
         "guidance hides the prompt behind masks, and the base, which reads it, knows no mask",
         "Leave generation.guidance_scale out"),
    )  # fmt: skip
    for name, found, why, hint in rules:
        if found:
            yield Contradiction(
                f"{field}=noisy (--keep-base) does not go with {name}: {why}",
                f"{hint}; or {out}",
                (field, name),
            )


def _generation(recipe: Recipe) -> Iterator[Contradiction]:
    chosen = recipe.generation
    if chosen.verify_with == "self" and not recipe.training.ar_loss_weight:
        yield Contradiction(
            "generation.verify_with=self needs a model that goes on from clean tokens by itself",
            "--set training.ar_loss_weight=1.0 trains that beside the denoising",
            ("generation.verify_with", "training.ar_loss_weight"),
        )
    if chosen.verify_with == "base" and not recipe.training.keeps_base:
        yield Contradiction(
            "generation.verify_with=base needs a base that the training leaves as it is",
            "--keep-base trains an adapter that acts on noisy tokens only",
            ("generation.verify_with", "training.lora.acts_on"),
        )
    if chosen.sampler and recipe.noise.kernel == "neighbours":
        yield Contradiction(
            "generation.sampler and noise.kernel=neighbours do not go together: its reverse "
            "multiplies with a matrix of all words, which is only there in training",
            "Leave generation.sampler out",
            ("generation.sampler", "noise.kernel"),
        )
    found = decoding_contradictions(
        {name for name, value in chosen if value is not None},
        chosen,
        blocks=recipe.target == "bd3lm",
        masks=recipe.noise.masks,
    )
    for message, hint, names in found:
        yield Contradiction(
            spelt(message, "generation.{}".format), hint, tuple(f"generation.{n}" for n in names)
        )


def decoding_contradictions(
    given: Collection[str],
    settings: Any,
    *,
    blocks: bool,
    masks: bool,
    other_verifies: bool = False,
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield which settings of decoding do not go together, or do nothing beside the others.

    The published modelling file stands alone and refuses by itself what it cannot compute; here
    that is refused before there is a model, and what would do nothing besides.

    Args:
        given: Settings that somebody chose.
        settings: All of them, by attribute, as they will be used.
        blocks: Whether the model has blocks of its own (bd3lm).
        masks: Whether it was trained with a mask (the absorbing kernel).
        other_verifies: Whether another model verifies what this one drafts; thresholds and steps
            are of the drafts then.

    Yields:
        What is wrong, the settings in backquotes (`errors.spelt`); what to change; the settings.
    """
    warmer, fewer = "--set generation.temperature=0.7, for instance", "Leave one out"
    for name in ("top_k", "top_p", "min_p"):
        if name in given and not settings.temperature:
            message = f"`{name}` does nothing without a `temperature` above 0"
            yield message, warmer, (name, "temperature")
    if settings.sampler and not settings.temperature:
        message = "`sampler` draws every token, and needs a `temperature` above 0: 1 is exact"
        yield message, "--set generation.temperature=1", ("sampler", "temperature")
    wrong: dict[str, object] = {
        "`block_length` is for mdlm": settings.block_length and blocks,
        "`sub_block_size` is for bd3lm": settings.sub_block_size and not blocks,
        "`remasking` and `sub_block_size` do not go together": settings.remasking
        and settings.sub_block_size,
        "`approximate_cache` needs `block_length`": settings.approximate_cache
        and not settings.block_length,
        "`remasking` and `block_length` do not go together": settings.remasking
        and settings.block_length,
        "`remasking_ratio` does nothing without `remasking`": "remasking_ratio" in given
        and settings.remasking_ratio
        and not settings.remasking,
        "`guidance_scale` hides the prompt behind masks, which only the absorbing kernel has": (
            settings.guidance_scale not in (None, 1) and not masks
        ),
    }
    wrong |= _beside_a_verifier(given, settings, other_verifies=other_verifies)
    for name in ("confidence_threshold", "entropy_bound", "unmasking"):
        wrong[f"`{name}` does nothing beside `sampler`, which ranks nothing"] = (
            name in given and settings.sampler
        )
    for name in ("remasking", "verify_with", "block_length", "sub_block_size"):
        wrong[f"`{name}` and `sampler` do not go together: each says what a step writes"] = (
            getattr(settings, name) and settings.sampler
        )
    for message, found in wrong.items():
        if found:
            yield message, fewer, names_in(message)


def _beside_a_verifier(
    given: Collection[str], settings: Any, *, other_verifies: bool
) -> dict[str, object]:
    """Return what is wrong beside who verifies, the model itself or another, to whether it is."""
    wrong: dict[str, object] = {}
    idle = ["entropy_bound", "unmasking", "sub_block_size"]
    why = "where another model verifies"
    if not other_verifies:
        idle = ["max_denoising_steps", "confidence_threshold", *idle]
        why = "beside `verify_with`, which decides itself how to draft"
    for name in idle:
        wrong[f"`{name}` does nothing {why}"] = (
            name in given
            and getattr(settings, name) is not None
            and (settings.verify_with or other_verifies)
        )
    changed = {
        "guidance_scale": settings.guidance_scale not in (None, 1),
        "remasking": settings.remasking,
        "sampler": settings.sampler,
    }
    for name, found in changed.items():
        wrong[f"`{name}` makes another text than the model that verifies: leave it out"] = (
            found and other_verifies
        )
    return wrong
