"""Load a converted checkpoint for training and choose what is trainable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.hollow import emptied, hollow_model
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.devices import Device, this_cpu
from dllm_convert.planning.estimate import FLEX_SINCE, chosen_attention, has_flex, settled
from dllm_convert.recipe.schema import Recipe, Training
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.cpu_attention import register_tiles
from dllm_convert.training.distributed import shards_weights
from dllm_convert.training.gated import train_adapter
from dllm_convert.training.gpu_attention import register_flex
from dllm_convert.training.masters import keep_masters
from dllm_convert.training.reporting import is_installed
from dllm_convert.training.shards import fill_trained_rows


def attention_implementation(recipe: Recipe, adapter: Adapter) -> str:
    """Choose how attention is computed in training.

    Flex attention skips the blocks of the two-stream mask that nobody sees; it is made for GPUs,
    tiles for CPUs.

    Raises:
        IncompatibleError: The recipe names an implementation that the family does not have.
    """
    chosen = recipe.training.attention
    if chosen == "auto" and adapter.measured is not None:
        return adapter.implementations[0]
    if chosen in ("sdpa", "tiles") and "sdpa" not in adapter.implementations:
        raise IncompatibleError(
            f"training.attention={chosen}, which {adapter.stock_class} does not have",
            hint=f"Use --set training.attention={adapter.implementations[0]}",
        )
    if adapter.local is not None and chosen == "flex":
        raise IncompatibleError(
            f"training.attention=flex takes one mask for all layers, and {adapter.stock_class} has "
            "layers with a window",
            hint="Use --set training.attention=sdpa",
        )
    has_any = torch.accelerator.is_available()
    found = chosen_attention(recipe, cuda=torch.cuda.is_available(), cpu=not has_any)
    if found == "tiles":
        return register_tiles()
    if found == "flex" and adapter.local is not None:
        return "sdpa"
    return register_flex() if found == "flex" else found


def is_quantized(training: Training) -> bool:
    """Whether the frozen weights are held in 4 bits."""
    return training.method == "lora" and training.lora.quantize != "none"


def require_devices(training: Training) -> None:
    """Refuse what cannot run here: flex attention and QLoRA without a GPU.

    Raises:
        IncompatibleError: There is no GPU, or bitsandbytes is not installed.
    """
    trains = training.method != "none"
    if trains and training.attention == "flex" and not has_flex():
        raise IncompatibleError(
            f"training.attention=flex needs torch {FLEX_SINCE} or newer, found {torch.__version__}",
            hint="pip install -U torch, or --set training.attention=sdpa",
        )
    if trains and training.attention == "flex" and not torch.accelerator.is_available():
        raise IncompatibleError(
            "training.attention=flex needs a GPU: torch has no backward of it on a CPU",
            hint="Use --set training.attention=sdpa",
        )
    missing = None
    if not torch.cuda.is_available():
        missing = "a CUDA GPU, and there is none"
    elif not is_installed("bitsandbytes"):
        missing = "bitsandbytes, which is not installed (pip install bitsandbytes)"
    if missing is not None and is_quantized(training):
        raise IncompatibleError(
            f"training.lora.quantize={training.lora.quantize} needs {missing}",
            hint="Leave it out: LoRA without it holds the frozen weights in 16 bits on a GPU",
        )
    if missing is not None and trains and training.optimizer != "adamw":
        raise IncompatibleError(
            f"training.optimizer={training.optimizer} needs {missing}",
            hint="Leave it out: adamw keeps its moments in float32",
        )


def settled_plan(plan: ConversionPlan) -> ConversionPlan:
    """Choose what the recipe leaves to the device, for the one that trains here."""
    if not torch.cuda.is_available():
        device = this_cpu()
    else:
        card = torch.cuda.get_device_properties(torch.accelerator.current_device_index())
        bf16 = use_bf16(plan.recipe.training)
        device = Device(card.name, 0, card.total_memory, gpu=True, bf16=bf16, source="this machine")
    return replace(plan, recipe=settled(plan.shape, plan.recipe, device, plan.launch.sharing))


def transplant(trained: Any, fresh: Any) -> Any:
    """Put the adapter of a PEFT model, and what was trained beside it, onto another base.

    Args:
        trained: PEFT model over a quantised base.
        fresh: The same PEFT model over the base in full precision.

    Returns:
        `fresh`, ready to be merged.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(fresh, get_peft_model_state_dict(trained))
    return fresh


def training_dtype(training: Training) -> torch.dtype:
    """Type the weights are trained in.

    Full training keeps float32 weights under bf16 autocast: pure bf16 loses updates smaller than
    1/256 of a weight. Frozen weights under LoRA need no such care where memory is scarce.
    """
    if training.method == "lora" and torch.cuda.is_available() and use_bf16(training):
        return torch.bfloat16
    return torch.float32


def use_bf16(training: Training) -> bool:
    """Whether to autocast to bfloat16: where the hardware multiplies it natively."""
    if training.precision != "auto":
        return training.precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def make_trainable(model: Any, adapter: Adapter, training: Training) -> Any:
    """Prepare the model for the recipe's method.

    With LoRA (arXiv 2106.09685) the normalisation layers and the embeddings, or at least the mask's
    row, stay trainable: without them a conversion does not learn what the mask means.

    Args:
        model: Diffusion model.
        adapter: Its family.
        training: Method and LoRA settings.

    Returns:
        The model, or a PEFT model around it.
    """
    if training.method == "full":
        return keep_masters(emptied(model))
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
    from peft.utils.other import TrainableTokensWrapper

    lora = training.lora
    saved = list(adapter.norm_modules) if lora.norms else []
    tied = model.config.tie_word_embeddings
    rows = None
    if lora.embeddings == "full":
        saved += (
            [adapter.embedding_module] if tied else [adapter.embedding_module, adapter.head_module]
        )
    else:
        rows = {adapter.embedding_module: [model.config.mask_token_id]}
    # PEFT ties what it knows by name; the heads of encoders it does not know.
    tie = tied and lora.embeddings == "full"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=list(adapter.lora_targets),
        modules_to_save=saved or None,
        trainable_token_indices=rows,
        ensure_weight_tying=tie and adapter.embedding_module in EMBEDDING_LAYER_NAMES,
    )
    wrapped = get_peft_model(model, config)
    head = model.get_output_embeddings()
    if rows is not None and isinstance(head, TrainableTokensWrapper):
        # PEFT has a tied head follow the trained row. Nothing is read of the mask's logit, the
        # matrix would be copied for it in every forward, and the head's biases would be left out.
        model.set_output_embeddings(head.token_adapter.get_base_layer())
    if tie and not config.ensure_weight_tying:
        trained = model.get_input_embeddings().modules_to_save[wrapped.active_adapter]
        model.get_output_embeddings().weight = trained.weight
    return keep_masters(emptied(wrapped))


def count_trainable(model: Any) -> int:
    """Number of parameters that receive gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trainable_model(plan: ConversionPlan, untrained: Path) -> Any:
    """Load an untrained conversion as the recipe trains it.

    Args:
        plan: The conversion.
        untrained: Its checkpoint.

    Returns:
        The model; where several processes share its weights, without them (`shards.is_empty`).
    """
    training = plan.recipe.training
    attention = attention_implementation(plan.recipe, plan.adapter)
    dtype, base = training_dtype(training), None
    if shards_weights() and not is_quantized(training):
        base = hollow_model(untrained, plan.adapter, dtype=dtype, attention=attention)
    hollow = base is not None
    if base is None:
        base = load_model(
            untrained,
            plan.adapter,
            dtype=dtype,
            attention=attention,
            quantized=is_quantized(training),
        )
    if is_quantized(training):
        from peft import prepare_model_for_kbit_training

        # Norms, embeddings and head in float32 around the layers of 4 bits (QLoRA, 2305.14314).
        prepare: Any = prepare_model_for_kbit_training
        base = prepare(base, use_gradient_checkpointing=False)
    checkpoint_activations(base, training.gradient_checkpointing)
    if training.keeps_base:
        autocast = torch.bfloat16 if use_bf16(training) else None
        model = train_adapter(emptied(base), untrained, dtype=autocast)
    else:
        model = make_trainable(base, plan.adapter, training)
    if hollow:
        fill_trained_rows(model, untrained)
    if training.compile:
        compile_layers(base)
    return model


def teaching_copy(plan: ConversionPlan, untrained: Path) -> Any:
    """Load the base once more, frozen, where a full training learns from it; None elsewhere.

    A model with adapters holds its base: switched off, they leave it as it was.

    Args:
        plan: The conversion.
        untrained: Its checkpoint, whose causal reading is the base's.
    """
    training = plan.recipe.training
    if not training.learns_from_base or training.method != "full":
        return None
    copy = load_model(
        untrained,
        plan.adapter,
        dtype=torch.bfloat16 if use_bf16(training) else torch.float32,
        attention=attention_implementation(plan.recipe, plan.adapter),
    )
    return copy.requires_grad_(requires_grad=False)


def compile_layers(model: Any, **settings: Any) -> None:
    """Compile the layers of a model one by one: one compilation serves all that are alike.

    A whole model is compiled anew for every width of its rows, and takes minutes for it.

    Args:
        model: A transformers model.
        **settings: Of torch.compile.
    """
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    for layer in max(stacks, key=len, default=()):
        layer.compile(**settings)
