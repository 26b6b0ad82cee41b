"""What all tests share: no network, one thread where processes share the machine, a fresh Accelerator state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here, and threads of several workers wait spinning

import pytest
from accelerate.state import AcceleratorState, GradientState

# Files of more than 15 s, the longest first: with several workers none of them is left for the end. They are the slow
# lane: `make fast` leaves them out.
SLOW = [
    "world_size",
    "one_way_to_pixels",
    "export",
    "resume",
    "dying_processes",
    "elastic",
    "clients",
    "push",
    "fsdp",
    "saved_as_itself",
    "verify",
    "fsdp_any_encoder",
    "foreign_encoders",
    "front_door",
    "adapters",
    "stream_training",
    "embedding",
    "html",
    "worked_scripts",
    "regularizer",
    "foreign_models",
    "metrics",
    "fine_tune",
    "other_channels",
    "card",
    "killed_runs",
    "stopped_runs",
    "fuzz_encoder_configs",
    "fuzz_run_folders",
    "remote_code",
    "model_cards",
    "transformers_contract",
    "evaluator",
    "stream",
    "sweep",
    "forms",
    "any_module",
    "encoder_loading",
    "trainer",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also the variants that a change rarely breaks alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("exhaustive"):
        items[:] = [item for item in items if item.get_closest_marker("exhaustive") is None]
    place = {f"test_{name}": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))
    for item in items:
        if item.path.stem in place:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_accelerator_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SSL_OR_CACHE", str(tmp_path_factory.getbasetemp() / "image_cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real image sets, one parquet folder each; tests that need it are skipped where it is absent."""
    repository = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("HF_SSL_OR_DATA", repository.parent / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip("no real image sets: set HF_SSL_OR_DATA to a folder that holds cifar10/")
    return folder
