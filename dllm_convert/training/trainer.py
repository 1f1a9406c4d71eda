"""DiffusionTrainer: transformers' Trainer with a diffusion loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from dllm_convert.diffusion.attention import TILE, Rule
from dllm_convert.diffusion.cached import noisy_inputs, predict_behind_cache, read_in_turn
from dllm_convert.diffusion.corruption import ForwardProcess
from dllm_convert.diffusion.distillation import Lesson
from dllm_convert.diffusion.drafts import predict_drafts
from dllm_convert.diffusion.gated import (
    CleanReading,
    lesson_reading,
    predict_beside_base,
    with_lesson,
)
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.prediction import Prediction, predict
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.training.checkpoint_shards import load_optimizer_shards, load_shards
from dllm_convert.training.comparing import Comparer
from dllm_convert.training.counts import Counts
from dllm_convert.training.cpu_attention import TILED
from dllm_convert.training.data.mask_noise import MaskNoise
from dllm_convert.training.data.rows import collate
from dllm_convert.training.distributed import (
    check_strategy,
    device_of_shards,
    keeps_gathered,
    reduce_in_float32,
    share_no_weights,
)
from dllm_convert.training.drawing import Share, StepNoise
from dllm_convert.training.exponents import ExponentLearner
from dllm_convert.training.gated import load_states, read_clean, save_states
from dllm_convert.training.gpu_attention import FLEX
from dllm_convert.training.on_policy import OnPolicy, Writer
from dllm_convert.training.parts import Annealing, ForwardNoise, LossWeights
from dllm_convert.training.resume import is_fsdp_file, is_in_shards
from dllm_convert.training.shards import fill_shards, hand_over, is_empty, parameter_names
from dllm_convert.training.teacher import Teacher


class DiffusionTrainer(Trainer):
    """Trains what `objective` says, on the text the dataset holds.

    The optimised loss is the NELBO, or with uniform weights the mean cross-entropy at masked
    positions; the NELBO in nats per token is logged beside it either way (`nelbo`).

    Args:
        model: A diffusion class of this package, as `dllm_convert.load` returns it.
        args: transformers' arguments. `train_sampling_strategy="sequential"` repeats a run
            exactly; `remove_unused_columns` has to be False for rows with documents in them.
        objective: What is learnt; None reads it from the model's config.
        process: How text is corrupted.
        weights: What the optimised loss is made of.
        annealing: What fades over the first steps.
        on_policy: When the model writes itself what it is trained on; None for never.
        base: Frozen copy of the base that teaches (`weights.distillation`), in evaluation mode;
            None where the model holds its base, as one with adapters does.
        exponents: Those of a schedule that is learnt, and what trains them; None for another.
        weights_from: Folder of the weights of a model that has none yet: each process reads those
            it holds, once the model is sharded.
        **kwargs: Everything else that transformers' Trainer takes: `train_dataset` with a column
            `input_ids`, callbacks, optimizers. Rows with several documents have `segment_ids` and
            `position_ids` as well, and `loss_mask` says which tokens are learnt.
    """

    # The loss is a mean over the step; what the Trainer divides it by is multiplied in before.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        process: ForwardProcess | None = None,
        weights: LossWeights | None = None,
        annealing: Annealing | None = None,
        on_policy: OnPolicy | None = None,
        base: Any = None,
        exponents: ExponentLearner | None = None,
        weights_from: Path | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("data_collator", collate)
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False
        reduce_in_float32(self.accelerator)
        self._weights_from = weights_from if is_empty(self.model) else None
        self._moved: list[list[str]] = []
        if self._weights_from is not None:
            share_no_weights(self.accelerator)
        self._objective = objective or Objective.from_config(model.config)
        self._process = process or ForwardProcess()
        self._weights = weights or LossWeights()
        self._exponents = exponents
        if exponents is not None:
            exponents.total = self._total
            # Before what marks a checkpoint as whole.
            self.add_callback(exponents)
        self._annealing = annealing or Annealing()
        self._mask_noise = MaskNoise(
            self.model,
            self._objective.mask_token_id,
            std=self._annealing.mask_noise_std,
            steps=self._annealing.mask_noise_steps,
        )
        inner: Any = self.model
        self._flex = inner.config._attn_implementation in ("flex_attention", FLEX)
        self.sparse = self._flex or inner.config._attn_implementation == TILED
        self._teacher: Teacher | None = None
        if self._weights.distillation is not None:
            self._teacher = Teacher(
                inner,
                self._weights.distillation,
                self._objective.mask_token_id,
                copy=None if base is None else base.to(self.args.device),
                sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                aligns=self._weights.alignment > 0,
            )
        writer = None
        if on_policy is not None:
            kept = keeps_gathered(self.accelerator)
            writer = Writer(inner, on_policy, keeps_gathered=kept)
        self._noise = StepNoise(
            self._objective,
            self._process,
            self._weights,
            self._annealing,
            exponents=exponents,
            writer=writer,
            writing=self._writing,
        )
        self._block_masks: dict[str, tuple[Rule, Any]] = {}
        self.counts = Counts(self.args.device)
        self._comparer = Comparer(
            self.model,
            self._objective.mask_token_id,
            self._mask_noise,
            self.counts,
        )
        self.unsound = torch.zeros((), dtype=torch.bool, device=self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; refuse one that trains in another way than was asked for.

        After this the Trainer moves the model, which under FSDP2 has no weights yet.

        Raises:
            IncompatibleError: It does.
        """
        super().create_accelerator_and_postprocess()
        check_strategy(self.accelerator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer; remember what it moves where the model has no weights yet."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._weights_from is not None:
            self._moved = parameter_names(self.model, optimizer)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler: by then the model is sharded, and no checkpoint is read yet.

        Where it has no weights yet each process reads its own.
        """
        if self._weights_from is not None:
            model: Any = self.model
            fill_shards(model, self._weights_from, device_of_shards(self.accelerator))
            hand_over(model, self.optimizer, self._moved)
            self._mask_noise.measure()
            self._weights_from = None
        return super().create_scheduler(*args, **kwargs)

    def keep_to(self, at: int, steps: int) -> None:
        """Have what fades or grows over a share of the steps end with a time limit.

        Args:
            at: Steps after which the limit was known.
            steps: All steps that there are.
        """
        self._noise.keep_to(at, steps)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward; remember in `unsound` a loss that was not a number."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.unsound = self.unsound | ~loss.isfinite()
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the forwards of a step, and draw their noise: the loss is a mean over them."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        share = Share(self.args.seed, self.args.process_index, self.args.world_size)
        drawn = self._noise.draw(batches, self.state.global_step, share, self._total)
        return [{"noise": noise} for noise in drawn], counted

    @contextmanager
    def _writing(self, writer: Writer, objective: Objective) -> Iterator[None]:
        """Let a model write in the precision that it is trained in, and without a gradient."""
        with torch.no_grad(), self.accelerator.autocast(), writer.ready(objective):
            yield

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training rows, which stay on the CPU until they are laid out.

        A stream that one process reads for all of them goes over the devices, as NCCL wants it.
        """
        shared = self.args.world_size > 1 and isinstance(self.train_dataset, IterableDataset)
        placed, self.accelerator.device_placement = self.accelerator.device_placement, shared
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placed

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave a forward's noise where it is; `compute_loss` moves what it lays out."""
        return inputs

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Predict what was corrupted and compare; a scalar in nats."""
        noise: ForwardNoise = inputs["noise"]
        objective, weights = noise.objective, noise.weights
        if objective.behind == "cache":
            return self._loss_behind_cache(model, noise)
        forward, beside, lesson = self._lay_out(model, noise)
        # Averaged over processes by DDP or FSDP, divided by the accumulation by the Trainer.
        times = self.args.world_size * self.current_gradient_accumulation_steps
        weight = weights.weighed(forward.weight, objective.kernel)
        # Of each logit's loss in the whole: (n,) of corrupted tokens, (m,) of next ones.
        scale = weight * (times / noise.items)
        ar_scale = weights.ar * times / noise.texts
        mask = self._in_form("trained", forward)
        inputs = {**forward.inputs, **beside, "attention_mask": mask, "use_cache": False}
        if not objective.is_cross_entropy:
            loss, nats, output = self._divergence(model, inputs, forward, noise, scale, ar_scale)
        else:
            targets = torch.cat([forward.targets, forward.ar_targets])
            scales = torch.cat([scale, scale.new_full(forward.ar_targets.shape, ar_scale)])
            compared = self._comparer.run(
                model, inputs, targets, scales, corrupted=len(scale), lesson=lesson, noise=noise
            )
            loss, output, nats = compared.loss, compared.output, compared.nats[: len(scale)]
        self._count(noise, (nats.detach() * forward.weight).sum())
        return (loss, output) if return_outputs else loss

    def _divergence(
        self,
        model: Any,
        inputs: dict[str, Any],
        forward: Prediction,
        noise: ForwardNoise,
        scale: torch.Tensor,
        ar_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return the loss of what is no cross-entropy, in nats, each, (n,), and the output."""
        objective = noise.objective
        with self._mask_noise.at(noise.key, noise.now):
            output = model(**inputs)
        nats = self._nats(forward, output.logits, noise)
        loss = (nats * scale).sum()
        if noise.weights.auxiliary and not objective.masks:
            times = self.args.world_size * self.current_gradient_accumulation_steps
            clean = output.logits[: len(nats)]
            of_clean = cross_entropy(clean, forward.targets, objective.mask_token_id)
            loss = loss + noise.weights.auxiliary * times / noise.items * of_clean.sum()
        if ar_scale:
            loss = loss + ar_scale * forward.ar_nats(output.logits, objective).sum()
        return loss, nats, output

    def _nats(self, forward: Prediction, logits: torch.Tensor, noise: ForwardNoise) -> torch.Tensor:
        """Return what corrupted tokens cost, (n,); exponents that are learnt see it, too."""
        classes = noise.objective.classes
        if classes is None or self._exponents is None:
            return forward.nats(logits, noise.objective)
        nats, slopes = forward.class_nats(logits, classes, noise.objective.mask_token_id)
        if torch.is_grad_enabled():
            self._exponents.add(noise, nats.detach(), slopes)
        return nats

    def _loss_behind_cache(self, model: Any, noise: ForwardNoise) -> torch.Tensor:
        """Predict noisy rows, each behind its copy of the base's cache; a scalar in nats.

        Optimised is what `compute_loss` optimises where a mask keeps the rows apart.
        """
        objective = noise.objective
        laid_out = predict_behind_cache(noise.batch, noise.views, objective).to(self.args.device)
        times = self.args.world_size * self.current_gradient_accumulation_steps
        weight = noise.weights.weighed(laid_out.weight, objective.kernel)
        teacher = self._teacher if noise.weights.asks_base else None
        loss, total = weight.new_zeros(()), weight.new_zeros(())
        for turn in read_in_turn(model, laid_out, objective, teacher):
            total += len(noise.views) * turn.firsts.sum()
            if turn.rows is None:
                continue
            span = turn.span
            compared = self._comparer.run(
                model,
                noisy_inputs(turn.rows, turn.beside),
                laid_out.targets[span],
                weight[span] * (times / noise.items),
                corrupted=len(turn.rows.at),
                lesson=None if turn.lesson is None else noise.weights.of(turn.lesson),
                noise=noise,
            )
            loss = loss + compared.loss
            total += (compared.nats.detach() * laid_out.weight[span]).sum()
        if not laid_out.groups:
            # Nothing was masked: all that is trained has a gradient, and it is zero.
            for trained in adapter_parameters(self.model).values():
                loss = loss + 0 * trained.sum()
        self._count(noise, total)
        return loss

    def _count(self, noise: ForwardNoise, total: torch.Tensor) -> None:
        """Add up what the bound of a forward is; of what the model wrote there is none."""
        if not noise.own:
            self.counts.add(nats=total, scored=noise.scored)

    def _lay_out(
        self, model: Any, noise: ForwardNoise
    ) -> tuple[Prediction, dict[str, Any], Lesson | None]:
        """Return the forward that is trained, what else it is given, and what a teacher says.

        Where clean text is the base's it is read here, and what the base makes of the first token
        of each block is counted, once for each view.
        """
        batch, views, objective = noise.batch, noise.views, noise.objective
        device = self.args.device
        multiple = TILE if self._flex else WIDTH_MULTIPLE
        teacher = self._teacher if noise.weights.asks_base else None
        if not objective.is_gated:
            forward = predict(
                batch,
                views,
                objective,
                ar_loss=noise.weights.ar > 0,
                closed=noise.closed,
                multiple=multiple,
            )
            if teacher is None:
                return forward.to(device), {}, None
            asked = lesson_reading(batch, forward, multiple=multiple).to(device)
            taught = teacher.teach(model, asked, self._in_form("taught", asked))
            return forward.to(device), {}, noise.weights.of(taught)
        if self._process.draw == "draft":
            laid_out, forward = predict_drafts(batch, views, objective, multiple=multiple)
        else:
            laid_out, forward = predict_beside_base(
                batch, views, objective, whole=teacher is not None, multiple=multiple
            )
        if teacher is not None:
            laid_out = with_lesson(laid_out, forward)
        reading = laid_out.to(device)
        mask = self._in_form("read", reading)
        states, nats, lesson = read_clean(model, reading, mask, objective, teacher)
        if not noise.own:
            self.counts.add(nats=len(views) * nats.sum())
        if lesson is not None:
            lesson = noise.weights.of(lesson)
        return forward.to(device), {"past_key_values": states}, lesson

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained; of a gated model that is its adapter."""
        inner: Any = self.model
        if not self._objective.is_gated:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_states(inner, Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what `_save` wrote, or what processes that shared the weights did."""
        folder, model = Path(resume_from_checkpoint), self.model if model is None else model
        if is_in_shards(folder) and self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_in_shards(folder):
            load_shards(self, model, folder)
        elif self.is_fsdp_enabled and not is_fsdp_file(folder):
            raise IncompatibleError(
                f"{folder.name} holds the whole model, and these processes share its weights",
                hint="Go on as it was begun: in one process, or data parallel",
            )
        elif self._objective.is_gated:
            load_states(model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read moments and schedule, which processes that share weights wrote in parts."""
        if checkpoint is not None and self._exponents is not None:
            self._exponents.load(Path(checkpoint))
        shared = checkpoint is not None and is_in_shards(Path(checkpoint))
        if checkpoint is not None and shared and not self.is_fsdp_enabled:
            load_optimizer_shards(self, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add NELBO and divergences since the last line, over all processes, in nats per token.

        What drafts are trained on is no bound: there the loss says all there is.
        """
        if "loss" in logs:
            lesson = self._weights.distillation
            unasked = {
                "nelbo": self._process.draw == "draft",
                "divergence": lesson is None or not lesson.weight,
                "cosine": not self._weights.alignment,
            }
            found = self.counts.take(self._total)
            logs = logs | {name: v for name, v in found.items() if not unasked.get(name)}
            if self._annealing.blocks is not None:
                # Of the step that the line is about.
                logs = {
                    **logs,
                    "block_size": self._noise.objective_at(self.state.global_step - 1).size,
                }
        super().log(logs, *args, **kwargs)

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        if self.args.world_size == 1:
            return sums.clone()
        # Not every device counts in float64; up to 2^24 float32 counts exactly, per element.
        reduced: Any = self.accelerator.reduce(sums.float().to(self.args.device), "sum")
        return reduced.double().cpu()  # type: ignore[no-any-return]

    def _in_form(self, which: str, forward: Prediction | CleanReading) -> Any:
        """The mask as the model's attention reads it; a block mask is built when it changes."""
        if not self._flex:
            return forward.dense_mask()
        rule, held = forward.rule, self._block_masks.get(which)
        if held is None or not held[0].equals(rule):
            held = self._block_masks[which] = (rule, forward.block_mask())
        return held[1]
