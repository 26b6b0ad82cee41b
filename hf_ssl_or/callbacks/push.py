"""Pushes checkpoints to the Hub while training runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hf_ssl_or.callbacks.base import SSLCallback
from hf_ssl_or.hub.background import pushing_checkpoints


class PushCallback(SSLCallback):
    """Pushes the encoder after every checkpoint, in the background, where the settings ask for that."""

    def running(self, trainer: Any) -> AbstractContextManager[Any]:
        """Watches the folder of checkpoints on the main process."""
        args = trainer.args
        if args.push != "every" or not trainer.accelerator.is_main_process:
            return nullcontext()
        return pushing_checkpoints(trainer.run_dir, args.push_to, trainer.write_encoder)
