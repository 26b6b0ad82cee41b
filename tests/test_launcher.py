from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from hf_ssl_or import evaluate
from hf_ssl_or.errors import InputError
from hf_ssl_or.launcher import cpu_is_forced, refuse_launcher_settings
from hf_ssl_or.training.accelerator import build_accelerator
from hf_ssl_or.training.arguments import SSLTrainingArguments

CONFIGURATIONS = sorted((Path(__file__).parent.parent / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.forward_chunks"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.mixed_precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "training.mixed_precision"),
        ("ACCELERATE_DOWNCAST_BF16", "1", "training.mixed_precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.compile"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "training.device"),
        ("ACCELERATE_USE_FSDP", "true", "training.fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "training.fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "training.fsdp"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "training.fsdp"),
    ],
)
def test_what_the_recipe_does_not_ask_for_is_refused(variable, value, key, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^{variable}={value}: .*{key}$"):
        build_accelerator(SSLTrainingArguments(device="cpu"), tmp_path)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_MIXED_PRECISION", "BF16"),
        ("ACCELERATE_DOWNCAST_BF16", "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_TORCH_DEVICE", "cpu:0"),
        ("ACCELERATE_USE_FSDP", "False"),
        ("ACCELERATE_USE_DEEPSPEED", ""),
    ],
)
def test_what_the_recipe_asks_for_and_defaults_pass_and_change_nothing(variable, value, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, value)
    arguments = SSLTrainingArguments(device="cpu", mixed_precision="bf16", forward_chunks=4)
    accelerator = build_accelerator(arguments, tmp_path)
    assert accelerator.gradient_accumulation_steps == 1  # of accelerate's kind, which divides the loss
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.device.type == "cpu"


def launch_environment(*arguments: str) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of one process."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    if args.multi_gpu:
        return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith("ACCELERATE_")}
    _, environment = prepare_simple_launcher_cmd_env(args)
    return {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}


@pytest.mark.parametrize("arguments", [[], ["--cpu"], *(["--config_file", str(path)] for path in CONFIGURATIONS)])
def test_accelerate_launch_passes(arguments, monkeypatch, tmp_path):
    environment = launch_environment("--num_processes", "1", *arguments)
    assert "ACCELERATE_DYNAMO_BACKEND" in environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse_launcher_settings(device="cuda")
    assert cpu_is_forced() == ("--cpu" in arguments or arguments[-1:] == [str(CONFIGURATIONS[0])])
    assert build_accelerator(SSLTrainingArguments(device="cpu"), tmp_path).gradient_accumulation_steps == 1


def test_an_evaluation_refuses_them_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match="ACCELERATE_MIXED_PRECISION=bf16: the recipe decides"):
        evaluate._device()


def test_a_launcher_that_forbids_the_gpu_is_heard(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert evaluate._device().type == "cpu"
    assert build_accelerator(SSLTrainingArguments(), tmp_path).device.type == "cpu"
