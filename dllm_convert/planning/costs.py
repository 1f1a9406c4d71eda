"""What a training costs: memory and floating-point operations, as pure functions.

Operations follow Kaplan et al. (arXiv 2001.08361, section 2.1): 2 per weight and token forward, 4
backward, of which 2 are the gradient of the weight; 4 per layer, query, key and channel of
attention forward and twice that backward. Block diffusion runs a clean stream beside the noisy ones
(BD3LM, 2503.09573). Logits are computed at scored positions only.

Memory is states (weights, gradients and two moments; Rajbhandari et al., ZeRO, 1910.02054, section
3.1) and what is kept for the backward pass (Korthikanti et al., 2205.05198), counted for what
`training/checkpointing.py` keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dllm_convert.planning.model_shape import ModelShape
from dllm_convert.planning.sharing import Sharing
from dllm_convert.planning.streams import Streams, streams, writing
from dllm_convert.recipe.schema import Recipe, Training

CPU_RUNTIME = 557_000_000
"""Bytes of a process that has imported what trains and holds no model: measured, Python 3.11 with
torch 2.13 for CPUs, transformers 5.23 and peft 0.21."""
GPU_RUNTIME = 1_000_000_000
"""Bytes that CUDA's context and its libraries' workspaces take on a GPU; assumed, not measured."""
HEAP_WASTE = 0.45
"""Bytes of C heap per byte of activations that nothing can use, on a CPU. A heap that keeps what is
freed (`allocator.py`) cannot move blocks, and glibc's aligned allocation needs a hole
larger than its block. Measured with mallinfo2 after the first forward of SmolLM2-135M: 0.42 in full
training, 0.53 with LoRA."""
_ALONE = Sharing()
_FLOAT32, _BF16 = 4, 2
_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes of AdamW's two moments for a parameter, on the device; paged ones are in host memory."""
_ZERO_BUCKET, _ZERO_LIVE = 500_000_000, 1_000_000_000
"""Numbers that DeepSpeed exchanges at once, and weights that stage 3 keeps together: its defaults
(reduce_bucket_size, stage3_max_live_parameters)."""
FORWARD_TOKENS = 20
"""Tokens whose products take as long as what any forward takes: reading the weights. On a CPU, by
what forwards of 1 to 32 tokens took (`modeling/published/drafting.py`); of a GPU assumed."""
_LOGITS_AT_ONCE = {True: 1 << 27, False: 1 << 25}
_SCORES_AT_ONCE = {True: 1 << 26, False: 1 << 20}
"""Entries of logits, and of their float32 copy, that the loss has at once on a GPU and on a CPU, as
`diffusion/losses.py` cuts them."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of training.

    Attributes:
        runtime: Interpreter and libraries; of a GPU its context.
        weights: Weights, those that are trained twice where LoRA copies them.
        teacher: A frozen copy of the base that a full training learns from; each device has all.
        gradients: Gradients at the end of the backward pass.
        moments: AdamW's two moments.
        activations: What the layers keep for the backward pass, with the weights' copies in
            bfloat16, and what the layer that is computed again takes above the logits, which have
            gone by then.
        logits: The piece of the logits that the loss has at once.
        vocabulary_gradients: Dense gradients of embedding and head while they are added.
        writing: What is there while the model writes what it is trained on, before anything is kept
            for a backward pass: keys and values, logits, and of shared weights all.
        exchanged: What is there of others: gathered weights, gradients copied to be exchanged.
        heap: What the C library holds and cannot use; 0 on a GPU.
        total: The peak: not the sum, since activations are gone when gradients are all there.
    """

    runtime: int
    weights: int
    teacher: int
    gradients: int
    moments: int
    activations: int
    logits: int
    vocabulary_gradients: int
    exchanged: int
    writing: int
    heap: int
    total: int

    def as_dict(self) -> dict[str, int]:
        """Return the fields, in bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def lora_parameters(shape: ModelShape, training: Training) -> int:
    """Parameters of the two matrices of LoRA (2106.09685): rank times inputs plus outputs."""
    return training.lora.rank * shape.adapted


def trainable_parameters(shape: ModelShape, training: Training) -> int:
    """Parameters that receive gradients, as `training/setup.py` chooses them."""
    if training.method == "none":
        return 0
    if training.method == "full":
        return shape.parameters
    lora = training.lora
    if training.keeps_base:
        norms = shape.stream_norms if lora.noisy_norms else 0
        return lora_parameters(shape, training) + shape.hidden + norms
    trained = lora_parameters(shape, training) + (shape.norms if lora.norms else 0)
    if lora.embeddings == "mask_row":
        return trained + shape.hidden
    biases = 0 if shape.tied else shape.head - shape.vocabulary_matrix
    return trained + shape.vocabulary_matrix * (1 if shape.tied else 2) + biases


def flops_per_token(shape: ModelShape, recipe: Recipe, *, sparse: bool) -> float:
    """Operations of forward and backward per clean token of text.

    For masked diffusion trained in full that is 6 (P + V h / 2) + 12 layers h L: P weights in the
    layers' matrices, logits at every second token. LoRA saves the weight gradients of frozen
    matrices, block diffusion runs about twice the tokens. Full checkpointing runs the layers
    forward once more; selective recomputation runs no matrix product again and counts as free.

    Args:
        shape: The model.
        recipe: The resolved recipe.
        sparse: Whether attention skips pairs that nobody sees.
    """
    training, run = recipe.training, streams(recipe, sparse=sparse, cached=shape.cached)
    lora = training.method == "lora"
    matrices = 2.0 * shape.matrices * run.tokens
    attention = 4.0 * shape.layers * shape.queries * run.pairs
    head = 2.0 * shape.vocabulary_matrix * run.scored
    layers = matrices * (2 if lora else 3) + attention * 3
    if lora:
        layers += 3 * 2.0 * lora_parameters(shape, training) * run.tokens
    head_trained = not lora or (training.lora.embeddings == "full" and not training.keeps_base)
    total = layers + head * (3 if head_trained else 2)
    if training.keeps_base:
        # The clean stream runs forward once; of it no gradient is asked for.
        read = 4.0 * shape.layers * shape.queries * run.read_pairs
        total += 2.0 * shape.matrices * run.read + read
    if training.learns_from_base:
        # The base predicts every token that is learnt; a gated one has read the text already.
        asked = head
        if not training.keeps_base:
            seen = recipe.data.sequence_length / (2 if sparse else 1)
            asked += run.clean * (2.0 * shape.matrices + 4.0 * shape.layers * shape.queries * seen)
        every = training.distillation.weight or training.alignment_loss_weight
        total += asked if every else training.on_policy.share * asked
    if training.gradient_checkpointing == "full" and not run.stops:
        total += matrices + attention
    if training.on_policy.share:
        wrote = writing(recipe)
        layers = 2.0 * shape.matrices * wrote.run + 4.0 * shape.layers * shape.queries * wrote.pairs
        total += training.on_policy.share * (layers + 2.0 * shape.vocabulary_matrix * wrote.logits)
    return total / run.clean


def idle_flops_per_token(shape: ModelShape, recipe: Recipe) -> float:
    """Operations that could have been made per clean token while weights are read.

    Behind a cache the base reads a text in small forwards, and the rows that begin between them are
    small ones, too, forward and backward.

    Args:
        shape: The model.
        recipe: The resolved recipe.
    """
    run = streams(recipe, sparse=True, cached=shape.cached)
    return 3 * run.stops * FORWARD_TOKENS * 2.0 * shape.matrices / run.clean


def activation_bytes(
    shape: ModelShape,
    training: Training,
    run: Streams,
    *,
    compute: int,
    residual: int,
    flex: bool,
    cast: bool,
    gpu: bool = False,
) -> tuple[int, int]:
    """Bytes that the layers keep for the backward pass, and of the layer that is computed again.

    Per token and layer, `selective` keeps what every matrix product and attention return and the
    layer's input; `full` keeps the input only. LoRA adds two small products to each adapted matrix,
    of which a kept base on a CPU has one in the same operation (`training/gated_linear.py`).
    Autocast keeps a copy of every matrix in its own type. Without flex a dense mask is held, of one
    byte a pair, and in the compute type inside attention.

    Args:
        shape: The model.
        training: Method and checkpointing.
        run: What one forward runs.
        compute: Bytes of a number that a matrix product returns.
        residual: Bytes of a number of the residual stream.
        flex: Whether the mask is held as blocks.
        cast: Whether autocast keeps a copy of every matrix.
        gpu: Whether it is a GPU.
    """
    outputs, copies = shape.outputs, float(shape.stored_matrices)
    if training.method == "lora":
        rank = training.lora.rank
        in_one = training.keeps_base and not gpu
        outputs += rank * shape.adapted_matrices + (0 if in_one else shape.adapted_outputs)
        copies += lora_parameters(shape, training)
    inputs = residual * shape.hidden * shape.layers
    # Attention also keeps the logarithm of each softmax's sum, per head, in float32.
    kept = compute * (outputs + shape.queries * shape.layers) + inputs
    kept += _FLOAT32 * shape.heads * shape.layers
    # Two norms and their inputs in float32, rotated queries and keys, the products of the gates.
    rest = (4 * _FLOAT32 + 2 * compute) * shape.hidden + 2 * compute * outputs / shape.layers
    if training.keeps_base and training.lora.noisy_norms:
        # What a norm returned, beside that times what noisy tokens have.
        rest += residual * shape.stream_norms / shape.layers
    held = {"off": kept + shape.layers * rest, "selective": kept, "full": inputs}
    again = {
        "off": 0.0,
        "selective": rest,
        "full": kept / shape.layers + rest,
    }
    how = training.gradient_checkpointing
    if run.stops:
        # Rows behind a cache are not computed again.
        how = "off"
    elif how == "auto":
        # As on a CPU; whoever knows the device has chosen before, see `estimate.settled`.
        how = "selective"
    tokens = held[how] * run.tokens
    # Keys and values of a clean stream that runs beforehand; at most as wide as the queries.
    tokens += 2 * compute * shape.queries * shape.layers * (0 if run.stops else run.read)
    # Every row behind a cache has those of its own before it, and states that it began with.
    tokens += 2 * compute * shape.copied * (run.read + run.copied) if run.stops else 0
    tokens += 2 * _FLOAT32 * shape.states * run.rows if run.stops else 0
    mask = 0 if flex or run.stops else run.rows * run.width**2 * (1 + compute)
    if training.keeps_base and not gpu:
        # Held in the compute type, see `training/gated_linear.py`; what they were loaded as stays
        # in the heap. The adapter's own copies are gone with the operation.
        copies = float(shape.stored_matrices)
    cast_weights = copies * compute if cast and how != "full" else 0.0
    # What is computed again lives together with its gradients.
    return round(tokens + mask + cast_weights), round(2 * again[how] * run.tokens)


def _weight_bytes(shape: ModelShape, training: Training, trained: int, *, frozen: int) -> int:
    """Bytes of the weights; LoRA trains copies, in float32, beside what is frozen."""
    if training.method == "full":
        return _FLOAT32 * shape.parameters
    everything = frozen * shape.parameters
    if training.lora.quantize == "nf4":
        # 4 bits and, with double quantisation, 0.127 for the scales (QLoRA, 2305.14314, section 3).
        everything -= round(shape.stored_matrices * (frozen - 4.127 / 8))
        # Norms, embeddings and head stay in float32 around them.
        everything += (_FLOAT32 - frozen) * (shape.parameters - shape.stored_matrices)
    return everything + _FLOAT32 * trained


def peak_memory(
    shape: ModelShape,
    recipe: Recipe,
    *,
    gpu: bool,
    bf16: bool,
    flex: bool,
    sharing: Sharing = _ALONE,
) -> Memory:
    """Estimate the peak of one device in training.

    The backward pass begins with all activations, the logits and the first gradient of the head;
    when they have gone, the last layer is computed again; it ends with all gradients. The largest
    of the three is the peak, above weights and moments.

    Args:
        shape: The model.
        recipe: Method `full` or `lora`, batch, length, checkpointing.
        gpu: Whether it is a GPU: its allocator wastes little, and LoRA freezes weights in bfloat16.
        bf16: Whether matrix products are computed in bfloat16.
        flex: Whether attention is flex attention.
        sharing: What it holds of a training that others take part in.
    """
    training, run = recipe.training, streams(recipe, sparse=flex, cached=shape.cached)
    trained = trainable_parameters(shape, training)
    frozen = _BF16 if gpu and bf16 else _FLOAT32
    compute = _BF16 if bf16 else _FLOAT32
    lora = training.method == "lora"
    # What is trained is float32, and so is what it adds to: the embeddings, if they are.
    whole = training.lora.embeddings == "full" and not training.keeps_base
    residual = frozen if lora and not whole else _FLOAT32
    weights = _weight_bytes(shape, training, trained, frozen=frozen)
    if sharing.zero:
        weights = compute * (shape.parameters + (trained if lora else 0))
    # Its copy has the type of the products, see `training/setup.py`.
    taught = training.learns_from_base and training.method == "full"
    teacher = compute * shape.parameters if taught else 0
    # DeepSpeed's gradients have the type of the products.
    gradients = (compute if sharing.zero else _FLOAT32) * trained
    moments = _moment_bytes(shape, training, trained)
    masters = _FLOAT32 * trained if sharing.zero else 0
    kept, again = activation_bytes(
        shape,
        training,
        run,
        compute=compute,
        residual=residual,
        flex=flex,
        # What FSDP gathers, and what DeepSpeed holds, is in the compute type already.
        cast=not sharing.zero and sharing.gathered is None and compute < residual,
        gpu=gpu,
    )
    if training.alignment_loss_weight:
        # Of every layer what the base has of all it reads, and of both what is compared.
        compared = compute * run.clean + 2 * _FLOAT32 * run.scored
        kept += round(shape.layers * shape.hidden * compared)
    logits = _logit_bytes(shape, run, compute=compute, gpu=gpu)
    activations = kept + max(again - logits, 0)
    vocabulary = _vocabulary_gradients(shape, training, compute)
    heap = 0 if gpu else round(HEAP_WASTE * (activations + logits))
    exchanged = _exchanged_bytes(shape, trained, sharing, compute=compute)
    weights = _share(weights, sharing.weights) + _share(masters, sharing.moments)
    gradients, moments = _share(gradients, sharing.gradients), _share(moments, sharing.moments)
    if "moments" in sharing.offload:
        # The copy that the optimizer steps lies beside its moments, and gets its gradients there.
        weights, gradients, moments = weights - _share(masters, sharing.moments), 0, 0
    if "weights" in sharing.offload:
        weights = 0
    runtime = GPU_RUNTIME if gpu else CPU_RUNTIME
    wrote = _writing_bytes(shape, recipe, sharing, compute=compute)
    above = max(max(activations + logits + heap, gradients) + vocabulary + exchanged, wrote)
    total = runtime + weights + teacher + moments + above
    return Memory(
        runtime=runtime,
        weights=weights,
        teacher=teacher,
        gradients=gradients,
        moments=moments,
        activations=activations,
        logits=logits,
        vocabulary_gradients=vocabulary,
        exchanged=exchanged,
        writing=wrote,
        heap=heap,
        total=total,
    )


def _writing_bytes(shape: ModelShape, recipe: Recipe, sharing: Sharing, *, compute: int) -> int:
    """Bytes of a decoding in training: keys and values at most as wide as queries, and logits."""
    if not recipe.training.on_policy.share:
        return 0
    wrote = writing(recipe)
    cached = recipe.target == "bd3lm"
    states = 2 * compute * shape.queries * shape.layers * wrote.rows * wrote.width * cached
    logits = (compute + _FLOAT32) * wrote.at_once * shape.vocabulary
    return states + logits + (compute * shape.parameters if sharing.weights > 1 else 0)


def _share(count: int, devices: int) -> int:
    """Return the largest of so many alike shares."""
    return -(-count // devices)


def _exchanged_bytes(shape: ModelShape, trained: int, sharing: Sharing, *, compute: int) -> int:
    """Bytes of what is there of others for a moment.

    FSDP gathers two layers or the vocabulary's matrix at a time, or keeps all weights; DDP copies
    gradients into buckets, which are as large as they are; DeepSpeed has buckets of a fixed size,
    and stage 3 keeps so many weights together.
    """
    if sharing.zero:
        buckets = compute * min(_ZERO_BUCKET, trained)
        return buckets + (compute * min(_ZERO_LIVE, shape.parameters) if sharing.gathered else 0)
    if sharing.gathered == "weights":
        return compute * shape.parameters
    if sharing.gathered == "layers":
        two_layers = 2 * shape.layer_parameters // shape.layers
        return compute * max(two_layers, shape.vocabulary_matrix)
    return _FLOAT32 * trained if sharing.buckets else 0


def _moment_bytes(shape: ModelShape, training: Training, trained: int) -> int:
    """Bytes of the optimizer's moments; transformers keeps those of embeddings in float32."""
    full, chosen = _MOMENTS["adamw"], _MOMENTS[training.optimizer]
    trains = training.lora.embeddings == "full" and not training.keeps_base
    whole = training.method == "full" or trains
    embedding = shape.embedding if whole and chosen < full else 0
    return full * embedding + chosen * (trained - embedding)


def _logit_bytes(shape: ModelShape, run: Streams, *, compute: int, gpu: bool) -> int:
    """Bytes of the logits that are there at once: they, and some of them in float32."""
    entries = min(run.scored * shape.vocabulary, max(_LOGITS_AT_ONCE[gpu], shape.vocabulary))
    scores = min(entries, max(_SCORES_AT_ONCE[gpu], shape.vocabulary)) if compute < _FLOAT32 else 0
    return round(compute * entries + _FLOAT32 * scores)


def _vocabulary_gradients(shape: ModelShape, training: Training, compute: int) -> int:
    """Bytes of the vocabulary's dense gradients that are in no other place.

    The head's is summed up in float32 from products in the compute type, beside a copy of the
    matrix in that; of a tied matrix the embedding's is added to it at the end.
    """
    copy = compute if compute < _FLOAT32 else 0
    if training.keeps_base or (training.method == "lora" and training.lora.embeddings != "full"):
        return copy * shape.vocabulary_matrix
    copies = _FLOAT32 + copy + (_FLOAT32 if shape.tied else 0)
    return copies * shape.vocabulary_matrix
