from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from hf_ssl_or.callbacks.checkpoints import BackgroundSaver
from hf_ssl_or.errors import InputError
from hf_ssl_or.training.checkpoint import CheckpointStore


class SlowStore(CheckpointStore):
    """Writes when it is told to."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.go = threading.Event()

    def write(self, step, groups, state):
        assert self.go.wait(30)
        return super().write(step, groups, state)


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"method": {"w": torch.full((64, 8), value).T}, "optimizer": {"m": torch.full((3,), value)}}


def test_what_is_saved_is_the_state_at_the_call_and_not_what_training_made_of_it(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    state = weights(1.0)
    with BackgroundSaver(store) as saver:
        saver.save(1, state, {"note": "one"}, best=(0.5, "rankme"))
        saver.check()
        assert store.steps() == []  # the loop continues while nothing is written
        for tensors in state.values():
            for tensor in tensors.values():
                tensor.fill_(2.0)
        store.go.set()
        saver.save(2, state, {"note": "two"}, best=(0.4, "rankme"))  # waits, then takes the same memory again
        first = {name: tensor for name, tensor in saver._copy["method"].items()}
        saver.save(3, weights(3.0), {"note": "three"})
        assert all(saver._copy["method"][name] is tensor for name, tensor in first.items())
    assert store.steps() == [1, 2, 3]  # the first is the best
    for step, note in ((1, "one"), (2, "two"), (3, "three")):
        groups, found = store.load(store.folder / f"step-{step}")
        assert found == {"note": note, "step": step}
        assert torch.equal(groups["method"]["w"], torch.full((8, 64), float(step)))
        assert torch.equal(groups["optimizer"]["m"], torch.full((3,), float(step)))
    assert store.best() == {"step": 1, "value": 0.5, "name": "rankme"}


def test_another_shape_or_type_gets_memory_of_its_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=None)
    with BackgroundSaver(store) as saver:
        for step, tensor in enumerate([torch.ones(4), torch.ones(5), torch.ones(5, dtype=torch.bfloat16)]):
            saver.save(step, {"method": {"w": tensor}}, {})
    kept = [store.load(store.folder / f"step-{step}")[0]["method"]["w"] for step in range(3)]
    assert [tensor.shape[0] for tensor in kept] == [4, 5, 5] and kept[2].dtype == torch.bfloat16


def test_a_failed_save_is_raised_by_the_next_look_at_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with BackgroundSaver(CheckpointStore(tmp_path)) as saver:
        saver.save(1, weights(1.0), {})
        with pytest.raises(InputError, match="step 1 cannot be saved"):
            saver.wait()
        saver.check()  # said once
        saver.save(2, weights(1.0), {})
        with pytest.raises(InputError, match="step 2 cannot be saved"):
            saver.save(3, weights(1.0), {})
    with (
        pytest.raises(InputError, match="step 4 cannot be saved"),
        BackgroundSaver(CheckpointStore(tmp_path)) as saver,
    ):
        saver.save(4, weights(1.0), {})


def test_an_error_of_training_is_not_hidden_by_one_of_saving(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(ZeroDivisionError), BackgroundSaver(CheckpointStore(tmp_path)) as saver:
        saver.save(1, weights(1.0), {})
        raise ZeroDivisionError
