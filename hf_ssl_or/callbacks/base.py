"""Callbacks: those of `transformers`, unchanged, and what ours add to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from hf_ssl_or.errors import InputError


class SSLCallback(TrainerCallback):
    """A `transformers.TrainerCallback` that may also measure the encoder, and hold something open while training runs.

    Every event gets, beside `args`, `state` and `control`, the keywords `model` (the method), `optimizer`,
    `lr_scheduler`, `train_dataloader` and `trainer`.
    """

    def running(self, trainer: Any) -> AbstractContextManager[Any]:
        """Returns a context that is entered before the first step and left after the last one, whatever happens."""
        return nullcontext()

    def measure(self, trainer: Any) -> dict[str, float]:
        """Returns named numbers about the encoder, when an evaluation is due; every process calls this."""
        return {}


class CallbackList:
    """Calls the events of several callbacks in their order.

    Args:
        callbacks: Objects, or classes that take no arguments.
        args: The run's settings.
        state: Progress of the run, in transformers' form.
        context: Returns the further keywords of every event.

    Raises:
        InputError: Something is no `TrainerCallback`.
    """

    def __init__(
        self, callbacks: Iterable[Any], *, args: Any, state: TrainerState, context: Callable[[], dict[str, Any]]
    ) -> None:
        self.items: list[TrainerCallback] = []
        self.args, self.state, self.control, self._context = args, state, TrainerControl(), context
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Adds a callback, or a class of one, behind the others."""
        made = callback() if isinstance(callback, type) and issubclass(callback, TrainerCallback) else callback
        if not isinstance(made, TrainerCallback):
            raise InputError(f"callbacks: {callback!r:.80} is no transformers.TrainerCallback; subclass that")
        self.items.append(made)

    def remove(self, callback: Any) -> None:
        """Removes a callback, or all of a class."""
        self.items = [c for c in self.items if c is not callback and type(c) is not callback]

    def call(self, event: str, **values: Any) -> None:
        """Calls one event; what a callback returns, if anything, is the control from then on."""
        context = self._context()
        for callback in self.items:
            result = getattr(callback, event)(self.args, self.state, self.control, **context, **values)
            if result is not None:
                self.control = result

    def begin_step(self) -> None:
        """Forgets what was asked for after the step before."""
        control = self.control
        control.should_log = control.should_evaluate = control.should_save = False

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the state of the callbacks that have one (transformers' `ExportableState`), in their order.

        Raises:
            InputError: A state is not plain data.
        """
        entries = []
        for callback in self.items:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                try:
                    entries.append({"class": name, "attributes": json.loads(json.dumps(state["attributes"]))})
                except (TypeError, ValueError, KeyError) as error:
                    raise InputError(f"callbacks: the state of {name} cannot be saved as JSON ({error})") from error
        return entries

    def load_state_dict(self, entries: list[dict[str, Any]]) -> None:
        """Puts back what `state_dict` returned; a callback that had no state keeps the one it has."""
        waiting = list(entries)
        for callback in self.items:
            found = next((entry for entry in waiting if entry["class"] == type(callback).__name__), None)
            if found is not None and isinstance(callback, ExportableState):
                waiting.remove(found)
                for name, value in found["attributes"].items():
                    setattr(callback, name, value)


class ScheduleCallback(SSLCallback):
    """Asks for a log line, an evaluation and a checkpoint when the settings say so."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sets what is due after this step."""
        done, last = state.global_step, state.global_step == state.max_steps
        epoch, rest = divmod(done, kwargs["trainer"].loader.steps_per_epoch)
        evaluated = args.monitor_every and rest == 0 and epoch % args.monitor_every == 0
        if args.save_steps is not None:
            saved = done % args.save_steps == 0
        else:
            saved = rest == 0 and epoch % args.save_every == 0
        control.should_log |= last or done % args.log_every == 0
        control.should_evaluate |= bool(evaluated or (last and args.monitor_every))
        control.should_save |= last or saved
