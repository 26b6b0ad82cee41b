"""The trainer. It knows no method by name: a method turns a batch into a loss, the loop does the rest.

A step is: views in, `method(batch)`, backward (DDP averages the gradients), the penalty's analytic gradient, clipping,
the optimizer, the penalty's own step, `method.on_step_end`. Nothing in it waits for the device. Every random choice is
a function of (seed, step, purpose), so a run resumed from a checkpoint repeats the uninterrupted run. All else is a
callback's.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from hf_ssl_or.callbacks.base import CallbackList, ScheduleCallback, SSLCallback
from hf_ssl_or.callbacks.checkpoints import CheckpointCallback
from hf_ssl_or.callbacks.metrics_log import Meter, MetricsLogCallback, read_history
from hf_ssl_or.callbacks.monitor import Monitor, MonitorCallback
from hf_ssl_or.callbacks.progress import Clock, ProgressCallback
from hf_ssl_or.callbacks.push import PushCallback
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.data.objects import load_eval_object
from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.errors import InputError, NonFiniteLossError
from hf_ssl_or.evaluation.collapse import weight_report
from hf_ssl_or.evaluation.evaluator import EvaluationArguments
from hf_ssl_or.hub.push import check_destination, push_to_hub
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.orthogonality.strength import rate_of
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.runs.results import Results
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec
from hf_ssl_or.training import finish, fsdp
from hf_ssl_or.training.accelerator import build_accelerator
from hf_ssl_or.training.arguments import SSLTrainingArguments
from hf_ssl_or.training.checkpoint import CheckpointStore, load_optimizer, optimizer_tensors, step_of
from hf_ssl_or.training.description import describe, first_difference, identity, write_recipe
from hf_ssl_or.training.lock import RunLock
from hf_ssl_or.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    weight_decay,
)
from hf_ssl_or.training.setup import (
    Views,
    default_folder,
    load_scheduler,
    load_sets,
    objects_of,
    penalty_settings,
    resolve_data,
    resolve_method,
    resolve_size_schedule,
    resolve_views,
    scheduler_state,
    stored_size,
    take_optimizer,
)
from hf_ssl_or.training.signals import StopRequest, TrainingInterrupted

_logger = logging.getLogger(__name__)


class SSLTrainer:
    """Pretrains an encoder on views of images, and leaves a run's folder.

        encoder = create_encoder("resnet18", stem="small", image_size=32)
        trainer = SSLTrainer(
            model=BYOL(encoder, projector_dim=256),
            args=SSLTrainingArguments(output_dir="runs/mine", epochs=100, batch_size=256),
            train_dataset="cifar10",
            orthogonality=OrthogonalityConfig(penalty="so"),
        )
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub("org/name")

    With `fsdp` and several processes, what is trained is a sharded copy of the method, `trained`; the method itself,
    full on each process, gets the weights of its encoder at every evaluation and at the end.

    Args:
        model: The method with its encoder, see `hf_ssl_or.methods`; its encoder may be any module.
        args: Settings of the loop.
        train_dataset: Images; training never reads their labels. A Hub id, a folder, a pattern or a list file; a list
            of paths, PIL images, arrays or tensors; a `datasets.Dataset`, `DatasetDict` or `IterableDataset`; a torch
            `Dataset`; or an `ImageSet`.
        eval_dataset: Labeled images to evaluate on: a `DatasetDict`, a pair (train, test) of whatever `train_dataset`
            takes, or one set that is split. None takes the splits of a `train_dataset` that has a name.
        method: Name of a method, instead of `model`.
        encoder: The encoder of `method`: a name, a Hub id, a folder or a module.
        views: Number of the method's own views; or one `ViewSpec` or callable per view. A callable gets one image of
            shape (1, C, H, W), see `hf_ssl_or.data.objects`.
        local_views: Specs of smaller views, for methods with multi-crop.
        size_schedule: Size of the views over the run, as pairs (share of the run, pixels): [(0, 16), (0.5, 32)], see
            `hf_ssl_or.recipe.ViewArguments`; None for one size.
        orthogonality: Penalty on the encoder's weights; None for none.
        evaluators: Names of evaluation protocols, or `Protocol` objects.
        evaluation: Further settings of the evaluation.
        callbacks: Callbacks for `transformers.Trainer`, or `SSLCallback` objects.
        optimizers: (optimizer, scheduler) of the method's parameters instead of `args.optimizer`; without a scheduler
            the learning rates follow the schedule of `args.optimizer`.
        data: Settings of the images, see `hf_ssl_or.data.arguments.DataArguments`.
        recipe: The run in plain data, where it comes from a recipe.
        accelerator: From `build_accelerator`, where it was needed before.

    Attributes:
        state: Progress, as callbacks see it; `log_history` is its list of log lines.

    Raises:
        InputError: Something does not fit; the message names it.
    """

    def __init__(
        self,
        model: SSLMethod | None = None,
        args: SSLTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        method: str | type[SSLMethod] | None = None,
        encoder: str | nn.Module | None = None,
        views: Views = None,
        local_views: Sequence[ViewSpec] = (),
        size_schedule: Sequence[Sequence[float]] | None = None,
        orthogonality: OrthogonalityConfig | Mapping[str, Any] | None = None,
        evaluators: Sequence[Any] | None = None,
        evaluation: EvaluationArguments | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        data: Any = None,
        recipe: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.args = args or SSLTrainingArguments()
        size = data.get("image_size") if isinstance(data, Mapping) else getattr(data, "image_size", None)
        method_object, objects = resolve_method(model, method, encoder, seed=self.args.seed, image_size=size)
        self.run_dir = Path(self.args.output_dir or default_folder(method_object))
        self.accelerator = accelerator or build_accelerator(self.args, self.run_dir)
        config: Any = method_object.encoder.config
        self.views = resolve_views(views, type(method_object), config.num_channels)
        self.local_views = list(local_views)
        data_arguments = resolve_data(train_dataset, data, method_object.encoder)
        self.size_schedule = resolve_size_schedule(
            size_schedule,
            self.views,
            self.local_views,
            encoder=method_object.encoder,
            image_size=data_arguments.image_size,
        )
        data_arguments = stored_size(data_arguments, self.views, (), size_schedule)
        with self.accelerator.local_main_process_first():  # which decodes the images for the others
            self.images, self.labeled = load_sets(train_dataset, eval_dataset, data_arguments, config.num_channels)
        self.orthogonality = penalty_settings(orthogonality)
        config.orthogonality = self.orthogonality
        self.evaluation, self.evaluators = evaluation or EvaluationArguments(), evaluators
        method_object.prepare(
            num_views=len(self.views), batch_size=self.args.batch_size, num_local_views=len(self.local_views)
        )
        self.recipe = recipe or describe(
            method_object,
            data=data_arguments
            if isinstance(train_dataset, str | Path)
            else replace(data_arguments, dataset=self.images.name),
            views=self.views,
            local_views=self.local_views,
            size_schedule=None if self.size_schedule is None else self.size_schedule.steps,
            orthogonality=self.orthogonality,
            training=self.args,
            evaluation=self.evaluation,
            objects=objects_of(objects, train_dataset, eval_dataset, self.views, optimizers, callbacks),
        )
        self._prepare(method_object, optimizers)
        if self.accelerator.is_main_process:
            for sentence in getattr(self.encoder, "left_out", ()):
                _logger.warning("encoder: %s", sentence)
        self.weights_before = weight_report(self.encoder)
        self.baselines: dict[str, Any] = {}
        self.train_seconds, self._stopped = 0.0, False
        self.results: Results | None = None
        own = (
            ScheduleCallback,
            self._monitor(),
            MetricsLogCallback,
            ProgressCallback,
            CheckpointCallback,
            PushCallback,
        )
        self.callbacks = CallbackList([*own, *callbacks], args=self.args, state=self.state, context=self._context)

    def _prepare(self, method: SSLMethod, optimizers: tuple[torch.optim.Optimizer | None, Any]) -> None:
        """Puts method, optimizer, penalty and loader into the form in which they train."""
        args, accelerator = self.args, self.accelerator
        self.method = self._prepare_method(method)
        self.trained = fsdp.shard(method, self.device, compile=args.compile) if self.sharded else self.method
        given, self.scheduler = optimizers
        if given is None:
            if self.scheduler is not None:
                raise InputError("optimizers: a scheduler needs its optimizer; give both")
            self.optimizer = build_optimizer(self.trained, args.optimizer, batch_size=args.batch_size)
        else:
            if args.optimizer.weight_decay_end is not None:
                raise InputError(
                    "training.optimizer.weight_decay_end: of the optimizers that recipes name; leave it at null, "
                    "and change the decay of yours in a callback"
                )
            self.optimizer = take_optimizer(given, self.scheduler, self.trained, fsdp=self.sharded)
        self.wrapped_optimizer = accelerator.prepare(self.optimizer)
        self.wrapped_model = accelerator.prepare_model(self.trained, evaluation_mode=self.sharded)  # then without DDP
        self.encoder.to(self.device)
        self.regularizer = OrthogonalityRegularizer(self.trained.encoder, self.orthogonality)
        self.loader = ViewLoader(
            self.images,
            self.views,
            local_views=self.local_views,
            batch_size=args.batch_size,
            seed=args.seed,
            device=self.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.total_steps = args.max_steps or args.epochs * self.loader.steps_per_epoch
        if self.size_schedule is not None:
            self.loader.follow(self.size_schedule, self.total_steps)
        self.warmup_steps = round(args.optimizer.warmup_epochs * self.loader.steps_per_epoch)
        if self.regularizer.decoupled:
            self.regularizer.follow(self._rate if self.scheduler is None else rate_of(self.scheduler))
        self.store = CheckpointStore(self.run_dir, keep_last=args.keep_last)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.meter, self.clock = Meter(), Clock(self.loader, args.batch_size)
        self.all_finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.state = TrainerState(
            max_steps=self.total_steps,
            num_train_epochs=-(-self.total_steps // self.loader.steps_per_epoch),
            train_batch_size=args.batch_size,
            logging_steps=args.log_every,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )

    def _prepare_method(self, method: SSLMethod) -> SSLMethod:
        args = self.args
        images = args.batch_size // self.accelerator.num_processes
        use_global_batch_norm(method, images_per_view=images if args.batch_norm == "per_view" else None)
        method.prepare_chunks(args.forward_chunks, recompute_blocks=args.gradient_checkpointing)
        if args.channels_last:
            method.use_channels_last()
        if args.compile and not self.sharded:
            for encoder in method.encoders():
                encoder.compile()  # in place: the names in the state dict do not change
        return method.train()

    def _monitor(self) -> MonitorCallback:
        train = self.labeled[0] if self.labeled else None
        monitor = Monitor(self.images, train, self.args, self.device)
        if self.args.keep_best == "knn" and monitor.knn_images is None:
            raise InputError("training.keep_best: knn needs labeled training images; rankme needs none")
        return MonitorCallback(monitor)

    def _context(self) -> dict[str, Any]:
        """What every event of a callback gets beside arguments, state and control."""
        return {
            "trainer": self,
            "model": self.method,
            "processing_class": None,
            "optimizer": self.optimizer,
            "lr_scheduler": self.scheduler,
            "train_dataloader": self.loader,
            "eval_dataloader": None,
        }

    @property
    def model(self) -> SSLMethod:
        """The method that is trained, with its encoder and heads."""
        return self.method

    @property
    def encoder(self) -> nn.Module:
        """The encoder, with full weights; while FSDP trains, as it was at the last evaluation."""
        return self.method.encoder

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def sharded(self) -> bool:
        """Whether this process trains a part of each weight; alone it has all of them."""
        return self.args.fsdp and self.accelerator.num_processes > 1

    @property
    def log_history(self) -> list[dict[str, float]]:
        """The log lines so far, each with its `step`; names of an evaluation begin with "eval_"."""
        return self.state.log_history

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, or a class of one."""
        self.callbacks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback, or all of a class."""
        self.callbacks.remove(callback)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> TrainOutput:
        """Runs to the end; writes recipe, metrics, spectra, checkpoints and the encoder into the run's folder.

        Processes stay connected, so that the encoder can be evaluated; `accelerator.end_training()` parts them.

        Args:
            resume_from_checkpoint: True continues from the newest valid checkpoint of the folder, and starts at step 0
                where there is none; a path continues from that checkpoint.

        Returns:
            `global_step`, `training_loss` (the mean of the last log line) and `metrics`, those of the last evaluation.

        Raises:
            InputError: The folder is not this run's, or is in use, or cannot be written.
            NonFiniteLossError: The loss became NaN or infinite.
            TrainingInterrupted: A signal asked the run to stop; the state is saved.
        """
        with self._locked(bool(resume_from_checkpoint)), StopRequest(self.accelerator) as stop_request:
            if self.evaluation.baselines and not self.baselines:
                self.baselines = finish.measure_baselines(self)
            start, stopped = self._resume(resume_from_checkpoint) if resume_from_checkpoint else (0, False)
            self.state.global_step, self.state.epoch = start, start / self.loader.steps_per_epoch
            if self.accelerator.is_main_process:
                write_recipe(self.recipe, self.run_dir / "recipe.yaml")
            self._offload_encoder()
            with ExitStack() as stack:
                for callback in self.callbacks.items:
                    if isinstance(callback, SSLCallback):
                        stack.enter_context(callback.running(self))
                self.callbacks.call("on_train_begin")
                started = time.perf_counter()
                if not stopped:
                    self._run(start, stop_request)
                self.train_seconds = time.perf_counter() - started
                self.callbacks.call("on_train_end")
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.store.clean()  # a run that was killed in its very last save has none that would
            self._update_encoder()
            self.save_model()
        return self._output()

    def _run(self, start: int, stop_request: StopRequest) -> None:
        per_epoch, state = self.loader.steps_per_epoch, self.state
        self.clock.resume()
        for batch in self.loader.batches(start, self.total_steps):
            if batch.step % per_epoch == 0:
                self.callbacks.call("on_epoch_begin")
            self.callbacks.begin_step()
            self.callbacks.call("on_step_begin")
            self.training_step(batch)
            self.clock.tick()
            state.global_step, state.epoch = batch.step + 1, (batch.step + 1) / per_epoch
            self.callbacks.call("on_step_end")
            if state.global_step % per_epoch == 0:
                self.callbacks.call("on_epoch_end")
            stop = self._log_evaluate_save(stop_request)
            self.clock.resume()
            if stop and stop_request.asked_by_signal and state.global_step < self.total_steps:
                self.callbacks.call("on_train_end")
                raise TrainingInterrupted(
                    f"stopped by {stop_request.name} after step {state.global_step}; its state is saved"
                )
            if stop:
                return

    def _log_evaluate_save(self, stop_request: StopRequest) -> bool:
        """Does what callbacks asked for after a step; says whether the run ends with it, on every process alike."""
        control = self.callbacks.control
        if control.should_log:
            self.log(self._fetch())
        if control.should_evaluate:
            self._evaluate()
        by_callback, agree = self.callbacks.control.should_training_stop, control.should_evaluate
        stop = stop_request.asked(self.state.global_step, by_callback, agree=agree)
        if self.callbacks.control.should_save or stop:
            self._stopped = stop and not stop_request.asked_by_signal
            self.callbacks.call("on_save")
        return stop

    def log(self, logs: dict[str, float]) -> None:
        """Hands numbers to the callbacks, and adds them to the history."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.callbacks.call("on_log", logs=logs)

    def _evaluate(self) -> None:
        self._update_encoder()
        values: dict[str, float] = {}
        for callback in self.callbacks.items:
            if isinstance(callback, SSLCallback):
                values |= callback.measure(self)
        self._offload_encoder()
        metrics = {f"eval_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.callbacks.call("on_evaluate", metrics=metrics)
        value, state = metrics.get(f"eval_{self.args.metric_for_best_model}"), self.state
        if value is not None and (state.best_metric is None or value > state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step

    def training_step(self, batch: MultiViewBatch) -> SSLOutput:
        """One optimizer step on this process's part of the global batch; waits for nothing."""
        args, step = self.args, batch.step
        torch.manual_seed(hashed_seed(args.seed, "step", step, self.accelerator.process_index))
        if self.scheduler is None:
            set_learning_rate(self.optimizer, self._rate(step))
        if args.optimizer.weight_decay_end is not None:
            set_weight_decay(self.optimizer, weight_decay(step, self.total_steps, args.optimizer))
        output = self.wrapped_model(batch)
        self.accelerator.backward(output.loss)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()  # the penalty's gradient is not scaled
        self.regularizer.set_progress(step, self.total_steps)
        penalty = self.regularizer.add_gradients()
        values = {"loss": output.loss, **output.terms}
        if args.max_grad_norm is not None:
            values["grad_norm"] = clip_gradients(self.parameters, args.max_grad_norm)
        self.callbacks.call("on_pre_optimizer_step")
        self.wrapped_optimizer.step()
        values["penalty"] = penalty = penalty + self.regularizer.step()  # one of them is 0
        if self.scheduler is not None:
            self.scheduler.step()
        self.callbacks.call("on_optimizer_step")
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        self.trained.on_step_end(step, self.total_steps)
        self.all_finite = self.all_finite & torch.isfinite(output.loss.detach()) & torch.isfinite(penalty)
        self.meter.add({name: value.detach() for name, value in values.items()})
        return output

    def _rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak, by the settings."""
        return learning_rate(step, self.total_steps, self.warmup_steps, self.args.optimizer)

    def _update_encoder(self) -> None:
        """Brings a sharded run's weights to the full encoder, and that to the device."""
        if self.sharded:
            fsdp.update_full(self.encoder.to(self.device), self.trained.encoder)

    def _offload_encoder(self) -> None:
        if self.sharded:
            self.encoder.cpu()

    def _fetch(self) -> dict[str, float]:
        """Brings the means since the last line to the host."""
        self._check_finite()
        values = {**self.meter.fetch(), "lr": self.optimizer.param_groups[0]["lr"]}
        last, optimizer = self.state.global_step - 1, self.args.optimizer
        if optimizer.weight_decay_end is not None:
            values["weight_decay"] = weight_decay(last, self.total_steps, optimizer)
        if self.size_schedule is not None:
            values["view_size"] = self.loader.view_size(last)
        return {**values, **self.clock.read()}

    def _check_finite(self) -> None:
        if not self.all_finite:
            raise self._not_finite("the loss is")

    def _check_weights(self, weights: dict[str, Tensor]) -> None:
        """Refuses to save NaN: a gradient may be it where the loss is not, and the loss shows it a step later."""
        finite = [weight.isfinite().all() for weight in weights.values() if weight.is_floating_point()]
        if finite and not torch.stack(finite).all():
            raise self._not_finite("weights are")

    def _not_finite(self, what: str) -> NonFiniteLossError:
        for callback in self.callbacks.items:
            if isinstance(callback, CheckpointCallback):
                callback.saver.wait()
        last, done = self.store.latest(), self.state.global_step
        good = f"last good checkpoint: {last}" if last else "no checkpoint was saved yet"
        return NonFiniteLossError(f"{what} not finite at or before step {done}; lower the learning rate; {good}")

    def _output(self) -> TrainOutput:
        history = self.state.log_history
        loss = next((line["loss"] for line in reversed(history) if "loss" in line), float("nan"))
        measured = next((line for line in reversed(history) if any(key.startswith("eval_") for key in line)), {})
        return TrainOutput(self.state.global_step, loss, dict(measured))

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def checkpoint(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Returns the state of the run, tensors and plain data; with FSDP gathered, on the main process alone.

        Raises:
            NonFiniteLossError: The loss or a weight is not finite.
        """
        self._check_finite()
        groups, state = self._state()
        if self.sharded:
            groups = fsdp.gather_groups(groups, keep=self.accelerator.is_main_process)
        self._check_weights(groups.get("method", {}))
        return groups, state

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors, entries = optimizer_tensors(self.optimizer)
        groups = {
            "method": self.trained.state_dict(),
            "optimizer": tensors,
            "orthogonality": self.regularizer.state_dict(),
        }
        scaler = self.accelerator.scaler
        state = {
            "optimizer": entries,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "scheduler": {} if self.scheduler is None else scheduler_state(self.scheduler),
            "callbacks": self.callbacks.state_dict(),
            "best_metric": self.state.best_metric,
            "best_global_step": self.state.best_global_step,
            "stopped": self._stopped,
            "recipe": identity(self.recipe),
            "images": self.images.fingerprint,
        }
        return groups, state

    def _resume(self, source: bool | str | Path) -> tuple[int, bool]:
        """Loads a checkpoint; returns its step, and whether a callback had ended the run there."""
        path = self.store.latest() if isinstance(source, bool) else Path(source)
        newest = torch.tensor(0 if path is None else step_of(path), device=self.device)
        if not bool((self.accelerator.gather(newest) == newest).all()):
            raise InputError(f"{self.run_dir}: machines see other checkpoints; use a folder that all of them share")
        if path is None:
            return 0, False
        groups, state = self.store.load(path)
        if difference := first_difference(state["recipe"], identity(self.recipe)):
            raise InputError(f"{path}: made by another recipe: {difference}; use another run folder, or this recipe")
        if state.get("images", self.images.fingerprint) != self.images.fingerprint:
            warnings.warn(f"{self.images.name}: other images than those that {path} was trained on", stacklevel=2)
        fsdp.load_full(self.trained, groups["method"])
        tensors = fsdp.shard_optimizer_tensors(self.optimizer, groups["optimizer"])
        load_optimizer(self.optimizer, tensors, state["optimizer"])
        self.regularizer.load_state_dict(groups["orthogonality"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None and state["scheduler"]:
            load_scheduler(self.scheduler, state["scheduler"])
        self.callbacks.load_state_dict(state["callbacks"])
        self.state.best_metric, self.state.best_global_step = state["best_metric"], state["best_global_step"]
        step = int(state["step"])
        self.state.log_history = read_history(self.run_dir / "metrics.jsonl", step)
        return step, bool(state["stopped"])

    @contextmanager
    def _locked(self, resume: bool) -> Iterator[None]:
        if not self.accelerator.is_main_process:
            yield
            return
        if not resume and self.store.steps():
            raise InputError(
                f"{self.run_dir}: holds a run; train(resume_from_checkpoint=True) continues it, or give "
                "another output_dir"
            )
        with RunLock(self.run_dir):
            yield

    # -- after training -----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Evaluates the encoder by the evaluators, and writes `results.json`.

        Args:
            eval_dataset: Other labeled images; then nothing is written.

        Returns:
            Named numbers, "eval_<protocol>_<metric>" and "eval_<collapse measure>"; the same on every process.
        """
        labeled = self.labeled
        if eval_dataset is not None:
            channels = self.images.preprocessing.num_channels
            arguments = resolve_data(eval_dataset, None, self.encoder)
            labeled = load_eval_object(eval_dataset, arguments, num_channels=channels, like=self.images.preprocessing)
        measured = finish.evaluate(self, labeled)
        if eval_dataset is None:
            self.results = finish.write_results(self, measured)
        metrics = finish.flat_metrics(measured)
        self.callbacks.call("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Writes the folder that `from_pretrained` loads; the main process writes.

        Args:
            output_dir: None takes `encoder` in the run's folder.
        """
        folder = self.run_dir / "encoder" if output_dir is None else Path(output_dir)
        if self.accelerator.is_main_process:
            self.write_encoder(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def write_encoder(self, folder: Path) -> None:
        """Writes the encoder as it is now: weights, configuration with provenance, image processor."""
        finish.write_encoder(
            self.encoder, folder, recipe=self.recipe, images=self.images, steps=self.state.global_step
        )

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> Any:
        """Pushes the run's encoder with its card and results, see `hf_ssl_or.hub.push.push_to_hub`.

        Args:
            repo_id: "owner/name"; None takes `args.push_to`.
            **options: Such as `private`, `revision`, `license`.
        """
        repo_id = repo_id or self.args.push_to
        if repo_id is None:
            raise InputError("push_to_hub: name the repository, owner/name")
        result = None
        if self.accelerator.is_main_process:
            check_destination(repo_id)
            result = push_to_hub(self.run_dir, repo_id, **options)
        self.accelerator.wait_for_everyone()
        return result
