"""Ways of training that learned optimizers refuse, with the setting that asked for them and what to use instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import TrainingArguments

_FLAT = "the statistics of a learned optimizer belong to whole tensors, but {owner} hands it flattened pieces of them"
_USE = (
    "Train with FSDP2 (fsdp_config version 2), with DistributedDataParallel (torchrun or accelerate launch "
    "--multi_gpu, without --fsdp and --deepspeed) or in one process."
)


def _refuse(name: str, setting: str, reason: str) -> None:
    raise ValueError(f"{name} cannot train with {setting}: {reason}. {_USE}")


def _refuse_fsdp(name: str, setting: str, version: int) -> None:
    if version == 1:
        _refuse(name, f"FSDP1 ({setting})", _FLAT.format(owner="FSDP1"))


def check_arguments(name: str, args: TrainingArguments) -> None:
    """Refuse what ``TrainingArguments`` ask for, and what the launcher's environment does.

    Accelerate drops FSDP on CPU without a word, so the arguments are read as well as its state.

    Raises:
        ValueError: for DeepSpeed, FSDP1 and Megatron-LM.
    """
    if getattr(args, "deepspeed", None):
        _refuse(name, "DeepSpeed (TrainingArguments(deepspeed=...))", _FLAT.format(owner="ZeRO"))
    if getattr(args, "fsdp", None):
        config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        # Trainer's own default: version 2 since it stopped taking a list of options, 1 before.
        version = int(config.get("version", config.get("fsdp_version", 2 if args.fsdp is True else 1)))
        _refuse_fsdp(name, "TrainingArguments(fsdp=...)", version)
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized():
        check_accelerator_state(name, AcceleratorState())


def check_accelerator_state(name: str, state: Any) -> None:
    """Refuse what an ``AcceleratorState`` was set up for, by arguments, plugins or ``accelerate launch``.

    Raises:
        ValueError: for DeepSpeed, FSDP1 and Megatron-LM.
    """
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    if kind == "DEEPSPEED":
        _refuse(name, "DeepSpeed (Accelerate's distributed_type DEEPSPEED)", _FLAT.format(owner="ZeRO"))
    if kind == "MEGATRON_LM":
        _refuse(name, "Megatron-LM (Accelerate's distributed_type MEGATRON_LM)", _FLAT.format(owner="Megatron-LM"))
    if kind == "FSDP":
        _refuse_fsdp(name, "Accelerate's distributed_type FSDP", getattr(state.fsdp_plugin, "fsdp_version", 1))
