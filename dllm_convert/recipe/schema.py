"""The recipe's fields: what a conversion is asked to do, validated and frozen."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dllm_convert.common.counts import LARGEST_COUNT, LARGEST_SEED, LARGEST_TOKENS, LONGEST_MINUTES
from dllm_convert.common.terms import ActsOn, Divergence, Kernel, Target
from dllm_convert.recipe.contradiction import UnsoundError
from dllm_convert.recipe.decoding import SETTINGS, Order, Remasking, Sampler, Verifier
from dllm_convert.recipe.engines import Serve
from dllm_convert.recipe.rules import contradictions

Method = Literal["full", "lora", "none"]
Checkpointing = Literal["auto", "off", "selective", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Gpu = Literal["A100 80GB", "H100 80GB", "H200 141GB", "B200 180GB"]
"""GPUs that hours are estimated for: those of `planning/devices.py`."""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
Name = Annotated[str, Field(pattern=r"\S")]
"""A text that names something: a path, an id, a branch."""
INCIDENTAL = ("save_steps", "keep_checkpoints", "log_steps", "report_to")
"""Fields of `training` that say what a run keeps and shows, not what it makes."""
NonNegativeFloat = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MaskToken(_Section):
    """Which token becomes the mask; both empty means the rules of `mask_token.py` decide."""

    token: str | None = Field(
        None, description="text of an existing or new token to use as the mask"
    )
    id: int | None = Field(
        None, ge=0, le=LARGEST_COUNT, description="id of the embedding row to use as the mask"
    )


class Noise(_Section):
    """The forward process."""

    schedule: Literal["linear", "cosine", "polynomial", "learned"] = Field(
        "linear",
        description="alpha(t): linear 1-t, cosine 1-cos(pi/2(1-t)), polynomial 1-t^power, learned "
        "1-t^w with a w of each class of words (MD4)",
    )
    classes: PositiveInt | None = Field(
        None,
        description="classes of words by their frequency in the training text, which has each as "
        "often; schedule learned only",
    )
    exponent_rate: float | None = Field(
        None, gt=0, le=1, description="AdamW's rate for log w; schedule learned only"
    )
    power: float = Field(2.0, gt=0, description="exponent of the polynomial schedule")
    kernel: Kernel = Field(
        "absorbing",
        description="absorbing: a token becomes the mask; uniform: any other token; neighbours: "
        "one whose embedding is near, and then any other (D3PM)",
    )
    neighbours: PositiveInt | None = Field(
        None, description="nearest words that one is joined to; kernel neighbours only"
    )
    jumps: float | None = Field(
        None,
        gt=0,
        le=64,
        description="times a word becomes a near one until t = 1, if nothing replaces it; kernel "
        "neighbours only",
    )
    discrete_steps: PositiveInt | None = Field(
        None, description="T of D3PM's discrete-time bound; empty: continuous time"
    )
    min_time: float = Field(1e-3, ge=0, lt=1, description="lower end of the interval of t")
    max_time: float = Field(1.0, gt=0, le=1, description="upper end of the interval of t")
    draw: Literal["time", "count", "draft"] = Field(
        "time",
        description="time: draw t, mask each token with 1-alpha(t); count: draw how many of a "
        "block's tokens are masked, the same bound with less variance; draft: masks behind clean "
        "tokens, up to block_size - 1, as lossless decoding has them (keeps the base; no bound)",
    )
    position_bias: float = Field(
        0.0,
        description="mask later tokens of a block first, with weight exp(bias * (1 - t) * i) "
        "(Efficient-DLM); not 0: the loss is no bound any more",
    )
    views: PositiveInt = Field(
        1, description="draws of noise per sequence and step; bd3lm: they share the clean stream"
    )
    complementary: bool = Field(
        False,
        description="train on every mask and on its complement (Fast-dLLM v2): twice the views",
    )

    @property
    def masks(self) -> bool:
        """Whether noise is a mask; else it is other tokens, and the mask is never shown."""
        return self.kernel == "absorbing"


class Columns(_Section):
    """What the columns of a conversation are called, where they have names of their own.

    Named are `prompt` and `completion`, or Alpaca's `instruction` and `output`; others beside them.
    """

    prompt: Name | None = Field(None, description="column of the question, beside completion")
    completion: Name | None = Field(None, description="column of the answer, beside prompt")
    instruction: Name | None = Field(None, description="column of the task, beside output")
    output: Name | None = Field(None, description="column of the answer, beside instruction")
    input: Name | None = Field(None, description="column of what an instruction is about")
    history: Name | None = Field(
        None, description="column of earlier [question, answer] pairs, beside instruction"
    )
    system: Name | None = Field(None, description="column of the system prompt")
    tools: Name | None = Field(None, description="column of the tools that may be called")

    @property
    def named(self) -> dict[str, str]:
        """Column of each part that has a name of its own."""
        return {part: column for part, column in self if column is not None}


class MixedText(_Section):
    """One text of a mixture."""

    source: Name = Field(description="pydoc; files, folders or globs; or a Hub dataset id")
    weight: float = Field(gt=0, description="share of the sequences, over the sum of all weights")
    subset: Name | None = Field(None, description="subset (configuration) of a Hub dataset")
    split: Name = Field("train", description="split, or a slice of one")
    revision: Name | None = Field(None, description="branch, tag or commit of a Hub dataset")
    text_field: str | None = Field(None, description="column; empty means data.text_field")
    containing: Name | None = Field(None, description="text; empty means data.containing")


class WrittenByBase(_Section):
    """Text that the base writes before it is trained (FLARE, arXiv 2606.01774)."""

    prompts: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="questions and beginnings of data.source that the base answers and goes on "
        "from before training; what it writes is trained on, not data.source. 0: none",
    )
    prompt_tokens: PositiveInt = Field(32, description="tokens of a document's beginning")
    max_new_tokens: PositiveInt = Field(
        256, description="tokens of an answer or a continuation at most; a chat's has to end"
    )
    temperature: NonNegativeFloat = Field(
        1.0, description="of its sampling; 1: its own distribution, 0: the likeliest token"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="share of the likeliest tokens drawn from")
    batch_size: PositiveInt = Field(16, description="prompts per forward")


class Data(_Section):
    """Training text and how it is cut."""

    source: Name = Field(
        "pydoc",
        description="pydoc; files, folders or globs; or a Hub dataset id. NAME:SPLIT[:10%] a part, "
        "NAME:0.7,NAME:0.3 a mixture",
    )
    mixture: tuple[MixedText, ...] = Field(
        (),
        description="texts that are mixed: `source` and `weight` of each, and `subset`, `split`, "
        "`revision`, `text_field`, `containing` where it has them; data.source is then their names",
    )
    subset: Name | None = Field(None, description="subset (configuration) of a Hub dataset")
    split: Name = Field(
        "train",
        description="split of a Hub dataset, or of one in a folder; train[:10%], train[100:500]: a "
        "slice of its rows",
    )
    containing: Name | None = Field(
        None,
        description="only documents that contain this text; of a chat, those in which the "
        "assistant says it",
    )
    revision: Name | None = Field(None, description="branch, tag or commit of a Hub dataset")
    text_field: str = Field(
        "text",
        description="column or JSON key of the text or of the messages; where it is missing: "
        "messages, conversations, prompt and completion, or instruction, input and output",
    )
    columns: Columns = Columns()
    streaming: Literal["auto", "on", "off"] = Field(
        "auto",
        description="off: tokenise before training, into a file; on: while training; auto: on for "
        "a Hub dataset larger than a long training needs",
    )
    sequence_length: PositiveInt = Field(256, description="tokens per training sequence")
    held_out_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of documents never trained on, chosen by their content"
    )
    held_out_sequences: PositiveInt = Field(16, description="held-out sequences that are measured")
    held_out_source: Name | None = Field(
        None, description="measure on these files or this Hub dataset, hold nothing out of source"
    )
    held_out_split: Name | None = Field(
        None, description="split of held_out_source, or of source, to measure on"
    )
    write_with_base: WrittenByBase = WrittenByBase()
    max_documents: PositiveInt | None = Field(None, description="read at most this many documents")
    allow_epochs: bool = Field(
        False, description="read the text more than 20 times, which is refused otherwise"
    )
    scored_turns: Literal["all", "last"] = Field(
        "all", description="which turns of the assistant are learnt from in a chat"
    )
    fill_blocks: Literal["auto", "on", "off"] = Field(
        "auto",
        description="bd3lm: fill a document's last block with masks that are not scored "
        "(Fast-dLLM v2); auto: chats only",
    )
    supervise_padding: bool = Field(
        False,
        description="fill with end tokens that are masked and scored instead, up to the block "
        "(bd3lm) or the whole sequence (mdlm, LLaDA)",
    )

    @property
    def texts(self) -> tuple[tuple[Fraction, Data], ...]:
        """Share of the sequences, exact and one in sum, and what is read, of each text."""
        if not self.mixture:
            return ((Fraction(1), self),)
        # As they were typed: 0.1 is a tenth.
        weights = [Fraction(repr(text.weight)) for text in self.mixture]
        return tuple(
            (weight / sum(weights), self.model_copy(update={**own, "mixture": ()}))
            for weight, own in zip(weights, map(_own_fields, self.mixture), strict=True)
        )


def _own_fields(text: MixedText) -> dict[str, Any]:
    fields = text.model_dump(exclude={"weight"})
    inherited = ("text_field", "containing")
    return {k: v for k, v in fields.items() if v is not None or k not in inherited}


class Lora(_Section):
    """LoRA (arXiv 2106.09685) and what else stays trainable beside it."""

    rank: PositiveInt = Field(64, description="rank of the update matrices")
    alpha: PositiveInt | None = Field(None, description="scaling numerator; empty means 2 * rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    embeddings: Literal["mask_row", "full"] = Field(
        "full", description="train the whole embedding and head, or the mask's row only"
    )
    norms: bool = Field(True, description="train the normalisation layers")
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of LoRA; empty means training.learning_rate"
    )
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: frozen weights in 4 bits (QLoRA); needs a CUDA GPU and bitsandbytes",
    )
    acts_on: ActsOn = Field(
        "all",
        description="noisy: the base stays as it is and reads clean tokens, the adapter and a mask "
        "vector act on noisy ones and lie beside it (bd3lm); all: merged into the weights",
    )
    noisy_norms: bool = Field(
        False,
        description="beside a kept base: noisy tokens have the weights of its norms scaled, by "
        "factors that are trained and lie with the adapter",
    )


class Distilled(_Section):
    """What is learnt from the base's own predictions (Hinton et al., arXiv 1503.02531)."""

    weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the loss that draws predictions towards the base's of the next "
        "token, which it makes from clean text; 0: none",
    )
    divergence: Divergence = Field(
        "forward_kl",
        description="forward_kl: KL(base || model); reverse_kl: KL(model || base); "
        "total_variation: half the sum of differences",
    )
    temperature: float = Field(1.0, gt=0, description="softens both distributions")
    top_k: PositiveInt | None = Field(
        None, description="words of the base's that count, renormalised; empty: all"
    )


class OnPolicy(_Section):
    """Learning from the base by what the model itself writes (OPDLM, arXiv 2606.06712)."""

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps, evenly spread, in which the model writes by its own "
        "decoding and learns what the base says at the masks it wrote through, and nothing of the "
        "data; 0: none",
    )
    prompt_tokens: PositiveInt = Field(
        32,
        description="tokens of a document's beginning that it goes on from; of a chat, what "
        "stands before its first answer",
    )
    new_tokens: PositiveInt = Field(64, description="tokens that it writes at most")
    temperature: NonNegativeFloat | None = Field(
        None, description="of its sampling; empty: generation.temperature"
    )


class BlockGrowth(_Section):
    """Blocks that grow before they have their size (LLaDA2, arXiv 2512.15745; NBDiff)."""

    steps: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="steps of all stages together, each as long as the others; 0: none. bd3lm",
    )
    sizes: tuple[PositiveInt, ...] = Field(
        (),
        description="tokens per block of each stage; empty: 1, 2, 4, ... below block_size (from 2 "
        "where the base is kept)",
    )


class Training(_Section):
    """Optimisation."""

    method: Method = Field("full", description="full, lora or none")
    steps: PositiveInt = Field(1000, description="optimizer steps")
    tokens: int | None = Field(
        None,
        gt=0,
        le=LARGEST_TOKENS,
        description="tokens of all steps over all processes, padding included: decides the number "
        "of steps; empty: steps does",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        le=LONGEST_MINUTES,
        description="training time: no more steps, and no longer a schedule, than fit into it",
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        4,
        description="sequences per device and forward; auto: as many of gradient_accumulation as "
        "fill the GPU's memory",
    )
    gradient_accumulation: PositiveInt = Field(1, description="forwards per optimizer step")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "cosine", description="shape of the learning rate after warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="AdamW second-moment decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, 2-norm")
    loss_weight: Literal["elbo", "uniform"] = Field(
        "elbo", description="elbo: -alpha'/(1-alpha) per masked token; uniform: 1"
    )
    auxiliary_loss_weight: NonNegativeFloat = Field(
        0.0,
        description="cross-entropy of the clean token beside the bound, whatever the time weighs "
        "there (D3PM's lambda)",
    )
    ar_loss_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of a next-token loss on the clean stream, which becomes strictly "
        "causal (bd3lm; Nemotron-Labs-Diffusion)",
    )
    confidence_loss_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of the entropy at masked tokens that are predicted right already, "
        "which lets more of them be decoded at once (LLaDA2's confidence-aware training)",
    )
    alignment_loss_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of 1 - cosine of hidden states and the base's at the same position, "
        "the mean over layers (REPR-ALIGN)",
    )
    distillation: Distilled = Distilled()
    on_policy: OnPolicy = OnPolicy()
    block_growth: BlockGrowth = BlockGrowth()
    attention_annealing_steps: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="open the causal attention over this many steps (DiffuLLaMA)",
    )
    mask_noise_std: NonNegativeFloat = Field(
        0.0, description="noise on the mask's embedding, times its standard deviation (LLaDA2)"
    )
    mask_noise_steps: int = Field(
        0, ge=0, le=LARGEST_COUNT, description="steps over which that noise fades"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="autocast dtype")
    gradient_checkpointing: Checkpointing = Field(
        "auto",
        description="activations computed again to save memory: selective all but matrix products "
        "and attention, full whole layers; auto: selective on a CPU, on a GPU off where they fit, "
        "else full",
    )
    optimizer: Optimizer = Field(
        "adamw",
        description="AdamW and its moments: in float32; in 8 bits; in 8 bits, in host memory where "
        "the GPU's is full (both bitsandbytes, on a GPU)",
    )
    attention: Literal["auto", "sdpa", "eager", "flex", "tiles"] = Field(
        "auto",
        description="implementation; auto: flex on a CUDA GPU, tiles on a CPU, else sdpa",
    )
    compile: bool = Field(False, description="torch.compile of the layers")
    save_steps: PositiveInt | None = Field(None, description="steps between resumable checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="resumable checkpoints to keep")
    log_steps: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="where else to log: tensorboard, wandb, trackio"
    )
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="seed of data order, noise and initialisation"
    )
    lora: Lora = Lora()
    keep_adapter: bool = Field(False, description="also write the LoRA adapter to adapter/")

    @property
    def keeps_base(self) -> bool:
        """Whether the base stays as it is beside an adapter that acts on noisy tokens only."""
        return self.method == "lora" and self.lora.acts_on == "noisy"

    @property
    def learns_from_base(self) -> bool:
        """Whether a forward of the base over clean text is part of every step, or of some."""
        learns = self.distillation.weight > 0 or self.alignment_loss_weight > 0
        return learns or self.on_policy.share > 0

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one process sees in an optimizer step."""
        return self.sequences_per_forward * self.gradient_accumulation

    @property
    def sequences_per_forward(self) -> int:
        """Sequences of one forward; the least there can be where the device is to decide."""
        return 1 if self.batch_size == "auto" else self.batch_size

    @property
    def learning_rate_field(self) -> str:
        """Field that holds the learning rate of the method that trains."""
        own = self.method == "lora" and self.lora.learning_rate is not None
        return "training.lora.learning_rate" if own else "training.learning_rate"

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after warm-up, of the method that trains."""
        own = self.lora.learning_rate if self.method == "lora" else None
        return self.learning_rate if own is None else own


def _setting(name: str, default: Any = None, **bounds: Any) -> Any:
    return Field(default, description=SETTINGS[name].described, **bounds)


class Generation(_Section):
    """Denoising defaults written to generation_config.json; `decoding.py` says what they do."""

    max_new_tokens: PositiveInt = _setting("max_new_tokens", 128)
    max_denoising_steps: PositiveInt | None = _setting("max_denoising_steps")
    confidence_threshold: float | None = _setting("confidence_threshold", gt=0, le=1)
    temperature: NonNegativeFloat = _setting("temperature", 0.0)
    verify_with: Verifier | None = _setting("verify_with")
    sampler: Sampler | None = _setting("sampler")
    entropy_bound: NonNegativeFloat | None = _setting("entropy_bound")
    unmasking: Order | None = _setting("unmasking")
    remasking: Remasking | None = _setting("remasking")
    remasking_ratio: float | None = _setting("remasking_ratio", ge=0, lt=1)
    top_k: PositiveInt | None = _setting("top_k")
    top_p: float | None = _setting("top_p", gt=0, le=1)
    min_p: float | None = _setting("min_p", ge=0, le=1)
    guidance_scale: NonNegativeFloat | None = _setting("guidance_scale")
    block_length: PositiveInt | None = _setting("block_length")
    sub_block_size: PositiveInt | None = _setting("sub_block_size")
    approximate_cache: bool = _setting("approximate_cache", False)


class Recipe(_Section):
    """A resolved recipe: the file, its presets, the flags and `--set`, in that order."""

    name: str | None = Field(None, description="name of the recipe file")
    description: str | None = Field(None, description="one line for `dllm-convert recipes`")
    references: tuple[str, ...] = Field((), description="where the settings come from")
    source: Name = Field(description="Hub id, folder or .gguf file")
    revision: Name | None = Field(None, description="branch, tag or commit of a Hub source")
    allow_pickle: bool = Field(False, description="read weights that are pickles (.bin)")
    license: str | None = Field(None, description="licence id of the base, if known")
    parameters: int | None = Field(
        None,
        gt=0,
        le=LARGEST_TOKENS,
        description="weights of the base, about, for the table of `dllm-convert recipes`; a plan "
        "counts them",
    )
    device: Gpu | None = Field(None, description="GPU whose hours that table says; decides nothing")
    target: Target = Field(description="mdlm or bd3lm")
    block_size: PositiveInt | None = Field(None, description="tokens per block, bd3lm only")
    token_shift: Literal["keep", "drop"] = Field(
        "keep", description="keep: position i is predicted from the hidden state of i-1, as AR"
    )
    block_attention: Literal["auto", "open", "causal"] = Field(
        "auto",
        description="bd3lm: whom a noisy token sees of its block: open: all of it; causal: what "
        "stands before it, and clean tokens as well see nothing ahead (I-DLM); auto: open where "
        "the family's attention can be opened",
    )
    sliding_window: Literal["open", "refuse"] = Field(
        "open", description="open a sliding window to full attention, or refuse the conversion"
    )
    allow_generic: bool = Field(
        False, description="convert a family without an adapter if it passes what is measured"
    )
    serve: Serve | None = Field(
        None,
        description="engine that is to serve the result: chooses target, token shift and AR loss "
        "so that it can, and refuses what it could not read",
    )
    mask_token: MaskToken = MaskToken()
    noise: Noise = Noise()
    data: Data = Data()
    training: Training = Training()
    generation: Generation = Generation()

    @model_validator(mode="after")
    def _sound(self) -> Self:
        """Refuse fields that contradict each other: a recipe that exists is sound.

        Raises:
            UnsoundError: There are such, which pydantic reports as a `value_error`.
        """
        for found in contradictions(self):
            raise UnsoundError(found)
        return self

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """Return the fields that what comes out depends on; the others may change in between.

        How a step's sequences are shared out over processes and forwards is not among them: each
        has its place in the text, and its noise, wherever it is computed.

        Args:
            processes: How many train together.
        """
        # What `serve` chooses stands in the fields themselves.
        hidden = {*INCIDENTAL, "batch_size", "gradient_accumulation"}
        incidental: Any = {"training": hidden, "allow_pickle": True, "serve": True}
        # What these say is shown, and decides nothing.
        incidental |= {"parameters": True, "device": True}
        found = self.model_dump(mode="json", exclude=incidental)
        found["training"]["sequences_per_step"] = self.training.sequences_per_step * processes
        return found

    @property
    def reads_causally(self) -> bool:
        """Whether a clean token of bd3lm sees of its own block only what stands before it."""
        training = self.training
        asked = self.block_attention == "causal" or training.keeps_base
        return asked or training.ar_loss_weight > 0

    @property
    def growing_sizes(self) -> tuple[int, ...]:
        """Tokens per block of each stage before blocks have their size; empty for none."""
        growth, block = self.training.block_growth, self.block_size
        if not growth.steps or block is None:
            return ()
        if growth.sizes:
            return growth.sizes
        sizes, left, factor = [1], block, 2
        while left > 1:
            while left % factor:
                factor += 1
            left //= factor
            sizes.append(sizes[-1] * factor)
        # Of a block that a kept base begins there is nothing to learn in one of a single token.
        return tuple(size for size in sizes[:-1] if size > self.training.keeps_base)

    @property
    def training_tokens(self) -> int:
        """Tokens that all planned steps see on one device, padding included."""
        sequences = self.training.steps * self.training.sequences_per_step
        return sequences * self.data.sequence_length
