"""The training loop. It knows no method by name: a method turns a batch into a loss, the loop does the rest.

A step is: views in, `method(batch)`, backward (DDP averages the gradients), the penalty's analytic gradient, clipping,
the optimizer, `method.on_step_end`. Nothing in it waits for the device. Every random choice is a function of
(seed, step, purpose), so a run resumed from a checkpoint repeats the uninterrupted run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, GradientAccumulationPlugin
from torch import Tensor, nn

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.errors import InputError, NonFiniteLossError
from hf_ssl_or.launcher import cpu_is_forced, refuse_launcher_settings
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec
from hf_ssl_or.training import fsdp
from hf_ssl_or.training.arguments import SSLTrainingArguments
from hf_ssl_or.training.checkpoint import CheckpointStore, load_optimizer, optimizer_tensors
from hf_ssl_or.training.lock import RunLock
from hf_ssl_or.training.log import Meter, MetricLog
from hf_ssl_or.training.memory import keep_freed_memory
from hf_ssl_or.training.monitor import Monitor
from hf_ssl_or.training.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from hf_ssl_or.training.progress import Clock, RunProgress
from hf_ssl_or.training.saving import BackgroundSaver
from hf_ssl_or.training.signals import StopRequest, TrainingInterrupted


class SSLTrainer:
    """Pretrains the encoder of a method on views of images.

    With `sharding: full` and several processes, what is trained is a sharded copy of the method, `trained`; the method
    itself, whole on each process, gets the weights of its encoder at every evaluation and at the end.

    Args:
        method: The method with its encoder, see `hf_ssl_or.methods`.
        arguments: Settings of the loop.
        images: Training images; training never reads their labels.
        run_dir: Folder of the run.
        views: Augmentation of each view, one per view.
        local_views: Augmentation of smaller views, for methods with multi-crop.
        orthogonality: Penalty on the encoder's weights; None for none.
        bank_images: Labeled images that vote in the monitor's kNN; None takes `images`.
        test_images: Labeled images that the monitor's kNN classifies; None for no kNN.
        recipe: What made this run, as JSON-able data; a checkpoint of another recipe is refused.
    """

    def __init__(
        self,
        method: SSLMethod,
        arguments: SSLTrainingArguments,
        images: ImageSet,
        run_dir: str | Path,
        *,
        views: Sequence[ViewSpec],
        local_views: Sequence[ViewSpec] = (),
        orthogonality: OrthogonalityConfig | None = None,
        bank_images: ImageSet | None = None,
        test_images: ImageSet | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.arguments, self.images, self.run_dir, self.recipe = arguments, images, Path(run_dir), recipe or {}
        self.accelerator = build_accelerator(arguments, self.run_dir)
        self.method = self._prepare_method(method)
        self.trained = fsdp.shard(method, self.device, compile=arguments.compile) if self.sharded else self.method
        self.optimizer = build_optimizer(self.trained, arguments.optimizer, batch_size=arguments.batch_size)
        self.wrapped_optimizer = self.accelerator.prepare(self.optimizer)
        self.model = self.accelerator.prepare_model(self.trained, evaluation_mode=self.sharded)  # then without DDP
        self.encoder.to(self.device)
        self.regularizer = OrthogonalityRegularizer(
            self.trained.encoder, orthogonality or OrthogonalityConfig(penalty="none")
        )
        self.loader = ViewLoader(
            images,
            views,
            local_views=local_views,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.total_steps = arguments.max_steps or arguments.epochs * self.loader.steps_per_epoch
        self.warmup_steps = round(arguments.optimizer.warmup_epochs * self.loader.steps_per_epoch)
        self.monitor = Monitor(images, bank_images or images, test_images, arguments, self.accelerator.device)
        if arguments.keep_best == "knn" and self.monitor.test is None:
            raise InputError("training.keep_best: knn needs labeled training and test images; rankme needs none")
        self.store = CheckpointStore(self.run_dir, keep_last=arguments.keep_last)
        self.saver = BackgroundSaver(self.store)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.meter = Meter()
        self.all_finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is being trained, whole; while sharded training runs, as it was at the last evaluation."""
        return self.method.encoder

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def sharded(self) -> bool:
        """Whether this process trains a part of each weight; alone it has all of them."""
        return self.arguments.sharding == "full" and self.accelerator.num_processes > 1

    def _prepare_method(self, method: SSLMethod) -> SSLMethod:
        arguments = self.arguments
        images = arguments.batch_size // self.accelerator.num_processes
        use_global_batch_norm(method, images_per_view=images if arguments.batch_norm == "per_view" else None)
        method.prepare_chunks(arguments.forward_chunks, recompute_blocks=arguments.gradient_checkpointing)
        if arguments.channels_last:
            method.use_channels_last()
        if arguments.compile and not self.sharded:
            for encoder in method.encoders():
                encoder.compile()  # in place: the names in the state dict do not change
        return method.train()

    def train(self, *, resume: bool = False, on_start: Callable[[], None] = lambda: None) -> None:
        """Runs to the end, writing metrics, spectra and checkpoints into the run folder.

        Processes stay connected, so that the encoder can be evaluated; `accelerator.end_training()` parts them.

        Args:
            resume: Continues from the newest valid checkpoint; without one, starts at step 0.
            on_start: Called by the main process once the folder is this run's and locked, before the first step.

        Raises:
            InputError: The folder is not this run's, or is in use, or cannot be written.
            NonFiniteLossError: The loss became NaN or infinite.
            TrainingInterrupted: A signal asked the run to stop; the state is saved.
        """
        with self._locked(), StopRequest(self.accelerator) as stop_request:
            start = self._resume() if resume else 0
            if self.accelerator.is_main_process:
                on_start()
            self.accelerator.init_trackers("hf_ssl_or", config=flatten(self.recipe))
            self._offload_encoder()
            with self.saver:
                self._run(start, stop_request)
            if self.accelerator.is_main_process:
                self.store.clean()  # a run that was killed in its very last save has none that would
            self._update_encoder()

    def _run(self, start: int, stop_request: StopRequest) -> None:
        log = MetricLog(self.run_dir / "metrics.jsonl", self.accelerator, start)
        clock = Clock(self.loader, self.arguments.batch_size)
        with RunProgress(start, self.total_steps, enabled=self.accelerator.is_main_process) as progress:
            for batch in self.loader.batches(start, self.total_steps):
                self.training_step(batch)
                clock.tick()
                progress.advance()
                done = batch.step + 1
                if done % self.arguments.log_every == 0 or done == self.total_steps:
                    values = self._fetch(done) | clock.read() | {"epoch": done / self.loader.steps_per_epoch}
                    log.write("train", batch.step, values)
                    progress.show(values)
                stop = stop_request.asked(done)
                self._maybe_evaluate_and_save(done, stop, log, progress)
                clock.resume()
                if stop and done < self.total_steps:
                    raise TrainingInterrupted(f"stopped by {stop_request.name} after step {done}; its state is saved")

    def _maybe_evaluate_and_save(self, done: int, stop: bool, log: MetricLog, progress: RunProgress) -> None:
        """Does what is due after `done` steps: evaluates the encoder, saves a checkpoint, marks the best one."""
        arguments, last = self.arguments, done == self.total_steps
        epoch, rest = divmod(done, self.loader.steps_per_epoch)
        look = arguments.monitor_every and (last or (rest == 0 and epoch % arguments.monitor_every == 0))
        values: dict[str, float] = {}
        if look:
            self._update_encoder()
            values = self.monitor.evaluate(self.encoder, self.run_dir / "spectra" / f"step-{done}.npz")
            self._offload_encoder()
            log.write("monitor", done - 1, values)
            progress.show_monitor(values)
        if arguments.save_steps is not None:
            save = done % arguments.save_steps == 0
        else:
            save = rest == 0 and epoch % arguments.save_every == 0
        name = arguments.keep_best
        best = (values[name], name) if name in values else None
        if save or last or stop or best is not None:
            self._save(done, best)
        if last or stop:
            self.saver.wait()
            self.accelerator.wait_for_everyone()

    def training_step(self, batch: MultiViewBatch) -> SSLOutput:
        """One optimizer step on this process's part of the global batch; waits for nothing."""
        arguments, step = self.arguments, batch.step
        torch.manual_seed(hashed_seed(arguments.seed, "step", step, self.accelerator.process_index))
        factor = learning_rate(step, self.total_steps, self.warmup_steps, arguments.optimizer)
        set_learning_rate(self.optimizer, factor)
        output = self.model(batch)
        self.accelerator.backward(output.loss)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()  # the penalty's gradient is not scaled
        self.regularizer.set_progress(step, self.total_steps)
        penalty = self.regularizer.add_gradients()
        values = {"loss": output.loss, **output.terms, "penalty": penalty}
        if arguments.max_grad_norm is not None:
            values["grad_norm"] = clip_gradients(self.parameters, arguments.max_grad_norm)
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        self.trained.on_step_end(step, self.total_steps)
        self.all_finite = self.all_finite & torch.isfinite(output.loss.detach()) & torch.isfinite(penalty)
        self.meter.add({name: value.detach() for name, value in values.items()})
        return output

    def _update_encoder(self) -> None:
        """Brings a sharded run's weights to the whole encoder, and that to the device."""
        if self.sharded:
            fsdp.update_full(self.encoder.to(self.device), self.trained.encoder)

    def _offload_encoder(self) -> None:
        if self.sharded:
            self.encoder.cpu()

    def _fetch(self, done: int) -> dict[str, float]:
        """Brings the means since the last line to the host."""
        self._check_finite(done)
        self.saver.check()
        return {**self.meter.fetch(), "lr": self.optimizer.param_groups[0]["lr"]}

    def _check_finite(self, done: int) -> None:
        if not self.all_finite:
            raise self._not_finite("the loss is", done)

    def _check_weights(self, weights: dict[str, Tensor], done: int) -> None:
        """Refuses to save NaN: a gradient may be it where the loss is not, and the loss shows it a step later."""
        finite = [weight.isfinite().all() for weight in weights.values() if weight.is_floating_point()]
        if finite and not torch.stack(finite).all():
            raise self._not_finite("weights are", done)

    def _not_finite(self, what: str, done: int) -> NonFiniteLossError:
        self.saver.wait()
        last = self.store.latest()
        good = f"last good checkpoint: {last}" if last else "no checkpoint was saved yet"
        return NonFiniteLossError(f"{what} not finite at or before step {done}; lower the learning rate; {good}")

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self, done: int, best: tuple[float, str] | None) -> None:
        self._check_finite(done)
        groups, state = self._state()
        if self.sharded:
            groups = fsdp.gather_groups(groups, keep=self.accelerator.is_main_process)
        self._check_weights(groups.get("method", {}), done)
        if self.accelerator.is_main_process:
            self.saver.save(done, groups, state, best=best)

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors, entries = optimizer_tensors(self.optimizer)
        groups = {
            "method": self.trained.state_dict(),
            "optimizer": tensors,
            "orthogonality": self.regularizer.state_dict(),
        }
        scaler = self.accelerator.scaler
        scaler_state = scaler.state_dict() if scaler is not None else {}
        known = {"recipe": self.recipe, "images": self.images.fingerprint}
        return groups, {"optimizer": entries, "scaler": scaler_state, **known}

    def _resume(self) -> int:
        path = self.store.latest()
        newest = torch.tensor(0 if path is None else int(path.name.removeprefix("step-")), device=self.device)
        if not bool((self.accelerator.gather(newest) == newest).all()):
            raise InputError(f"{self.run_dir}: machines see other checkpoints; use a folder that all of them share")
        if path is None:
            return 0
        groups, state = self.store.load(path)
        if difference := first_difference(state["recipe"], self.recipe):
            raise InputError(f"{path}: made by another recipe: {difference}; use another run folder, or this recipe")
        if state.get("images", self.images.fingerprint) != self.images.fingerprint:
            warnings.warn(f"{self.images.name}: other images than those that {path} was trained on", stacklevel=2)
        fsdp.load_full(self.trained, groups["method"])
        tensors = fsdp.shard_optimizer_tensors(self.optimizer, groups["optimizer"])
        load_optimizer(self.optimizer, tensors, state["optimizer"])
        self.regularizer.load_state_dict(groups["orthogonality"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return int(state["step"])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.accelerator.is_main_process:
            yield
            return
        with RunLock(self.run_dir):
            yield


def build_accelerator(arguments: SSLTrainingArguments, run_dir: Path) -> Accelerator:
    """Builds the Accelerator: DDP without buffer broadcasts (global statistics are equal on every process anyway).

    What it would take from the environment is given here, since the recipe alone decides.

    Raises:
        InputError: The environment or the hardware does not go with the recipe.
    """
    cpu = arguments.device == "cpu" or not torch.cuda.is_available() or cpu_is_forced()
    refuse_launcher_settings(
        device="cpu" if cpu else "cuda",
        mixed_precision=arguments.mixed_precision,
        accumulation_steps=arguments.forward_chunks,
    )
    if arguments.mixed_precision == "fp16" and cpu:
        raise InputError("training.mixed_precision: fp16 needs a GPU; use bf16 or no")
    if cpu:
        keep_freed_memory()
    return Accelerator(
        cpu=cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend=DynamoBackend.NO,
        log_with=list(arguments.trackers) or None,
        project_dir=str(run_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Names the first key where two recipes differ, with both values; None when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"


def flatten(nested: dict[str, Any], path: str = "") -> dict[str, str | int | float | bool]:
    """Flattens nested settings to dotted names, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in nested.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            flat |= flatten(value, name)
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
