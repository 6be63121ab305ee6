"""What a user sees of the package, as plain data: names, signatures, keys, shapes, dtypes, arguments, warnings.

    python frozen_interface.py RESULT    the interface of the package now, as JSON

It runs in its own process with a home without weights, because the warning about embedded weights comes once per
process and only where no published ones are at hand.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import frozen_kernels
import frozen_runs as runs
import hf_lopt


SHAPES = {"vector": (6,), "matrix": (9, 5), "4-D": (4, 3, 2, 2)}
# What optim_args may take besides keywords of constructors, and values of which one suits each argument.
OTHER_ARGUMENTS = ("base_width", "log_layers", "params", "rule", "schedule")
VALUES = ("1", "0.5", "true", "bundled", "keep", "torch", "float32", "auto")


# ---- names and signatures -------------------------------------------------------------------------------------------


def signature_of(function: Callable) -> list[list[Any]]:
    """[name, kind] or [name, kind, default] of every parameter, in order."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        default = [] if parameter.default is parameter.empty else [parameter.default]
        found.append([parameter.name, parameter.kind.name, *default])
    return found


def arguments(folder: str, rule: str, **changes: Any) -> TrainingArguments:
    settings = {"output_dir": folder, "optim": rule, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(**(settings | {"optim_args": "weights=bundled"} | changes))


def classes(folder: str) -> dict[str, Any]:
    """Constructors of the public classes, and of the class of every ``optim=`` name with its public bases."""
    public = {name: cls for name in hf_lopt.__all__ if inspect.isclass(cls := getattr(hf_lopt, name))}
    found = {name: signature_of(cls) for name, cls in public.items()}
    of_name = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rule in hf_lopt.available():
            cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(folder, rule), None)
            bases = sorted(name for name, base in public.items() if issubclass(cls, base))
            of_name[rule] = {"signature": signature_of(cls), "is_a": bases}
    return {"public": found, "of_optim_name": of_name}


def members() -> dict[str, Any]:
    """Methods and properties that LearnedOptimizer has beside, or instead of, those of torch.optim.Optimizer."""
    base, found = torch.optim.Optimizer, {}
    for name in dir(hf_lopt.LearnedOptimizer):
        member = inspect.getattr_static(hf_lopt.LearnedOptimizer, name)
        if name.startswith("_") or member is inspect.getattr_static(base, name, None):
            continue
        if isinstance(member, property):
            found[name] = "property, can be set" if member.fset else "property"
        elif callable(member):
            found[name] = signature_of(member)
    return found


# ---- state dicts ----------------------------------------------------------------------------------------------------


def kind_of(value: Any) -> Any:
    """Dtype and shape of a tensor, the value of a plain setting, else the name of the type."""
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), *value.shape]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def states(rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """A state dict after one step, and what the optimizer tells about it."""
    params = [nn.Parameter((0.3 * runs.numbers(s, 7, i)).to(dtype)) for i, s in enumerate(SHAPES.values())]
    for i, p in enumerate(params):
        p.grad = runs.numbers(p.shape, 8, i).to(dtype)
    settings = {"num_training_steps": runs.HORIZON} if "num_training_steps" in runs.settings_of(rule) else {}
    optimizer = hf_lopt.LearnedOptimizer(params, rule, weights="bundled", **settings)
    before = sorted(optimizer.param_groups[0])
    optimizer.step(2.5)
    saved = optimizer.state_dict()
    assert set(saved["param_groups"][0]) == set(before), "the keys of a group change with a step"
    return {
        "keys": sorted(saved),
        "param_group": {key: kind_of(value) for key, value in sorted(saved["param_groups"][0].items())},
        "state": {
            name: {key: kind_of(value) for key, value in sorted(saved["state"][i].items())}
            for i, name in enumerate(SHAPES)
        },
        "defaults": sorted(optimizer.defaults),
        "metrics": sorted(optimizer.metrics()),
        "report": {key: kind_of(value) for key, value in sorted(optimizer.report.items())},
    }


# ---- transformers ---------------------------------------------------------------------------------------------------


def tiny_model(pretrained: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.config._name_or_path = "some/model" if pretrained else ""
    return model


def takes(folder: str, rule: str, key: str) -> bool:
    """Whether ``optim_args`` takes the key, with one value or another."""
    for value in VALUES:
        with warnings.catch_warnings(), contextlib.suppress(ValueError, TypeError):
            warnings.simplefilter("ignore")
            text = f"{key}={value}" + ("" if key == "weights" else ",weights=bundled")
            Trainer.get_optimizer_cls_and_kwargs(arguments(folder, rule, optim_args=text), tiny_model(False))
            return True
    return False


def under_trainer(folder: str, rule: str) -> dict[str, Any]:
    """What Trainer makes of a name: arguments, groups and warnings, for a random and for a pretrained model."""
    found = {}
    for name, pretrained in (("random", False), ("pretrained", True)):
        args = arguments(folder, rule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cls, keywords = Trainer.get_optimizer_cls_and_kwargs(args, tiny_model(pretrained))
        groups = keywords.pop("params")
        found[name] = {
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": args.lr_scheduler_type.value,
            "weight_decay": args.weight_decay,
            "keywords": {key: kind_of(value) for key, value in sorted(keywords.items()) if key != "weights"},
            "weights": keywords["weights"].source,
            "groups": [
                [len(group["params"]), {key: value for key, value in sorted(group.items()) if key != "params"}]
                for group in groups
            ],
            "warnings": sorted({w.category.__name__ for w in caught}),
        }
        cls(groups, **keywords)
    return found


def optim_args(folder: str) -> dict[str, list[str]]:
    candidates = {key for rule in hf_lopt.available() for key in runs.settings_of(rule)} | set(OTHER_ARGUMENTS)
    candidates |= {"weights", "num_training_steps"}
    return {rule: [key for key in sorted(candidates) if takes(folder, rule, key)] for rule in hf_lopt.available()}


# ---- warnings and errors --------------------------------------------------------------------------------------------


def _velo(rule: str = "velo", weights: str = "bundled", **settings: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(runs.numbers((3, 2), 9))
    p.grad = runs.numbers((3, 2), 10)
    return p, hf_lopt.LearnedOptimizer([p], rule, weights=weights, **settings)


def longer_than_told() -> None:
    _, optimizer = _velo(num_training_steps=1)
    optimizer.step(1.0)
    optimizer.step(1.0)


def nonfinite_gradient() -> None:
    p, optimizer = _velo(num_training_steps=5)
    p.grad[0, 0] = math.inf
    optimizer.step(1.0)


def nonfinite_loss() -> None:
    _velo(num_training_steps=5)[1].step(math.nan)


def nonfinite_steps_in_a_row() -> None:
    _, optimizer = _velo(num_training_steps=5, max_nonfinite_steps=2)
    optimizer.step(math.nan)
    optimizer.step(math.nan)


def embedded_instead_of_published() -> None:
    _velo(weights="auto", num_training_steps=5)


def embedded_a_second_time() -> None:
    _velo(weights="auto", num_training_steps=5)


def published_not_at_hand() -> None:
    _velo(weights="published", num_training_steps=5)


def no_loss() -> None:
    _velo(num_training_steps=5)[1].step()


def no_horizon() -> None:
    _velo()[1].step(1.0)


def unknown_keyword() -> None:
    _velo(no_such_setting=1)


def unknown_keyword_of_a_class() -> None:
    hf_lopt.VeLO([nn.Parameter(torch.zeros(2))], no_such_setting=1)


def unknown_rule() -> None:
    _velo("no_such_rule")


def negative_lr() -> None:
    _velo(lr=-1.0)


def float64_parameter() -> None:
    hf_lopt.VeLO([nn.Parameter(torch.zeros(2, dtype=torch.float64))], weights="bundled")


def no_parameters() -> None:
    hf_lopt.VeLO([], weights="bundled")


def loss_of_two_numbers() -> None:
    _velo(num_training_steps=5)[1].observe_loss(torch.zeros(2))


def sparse_gradient() -> None:
    p, optimizer = _velo(num_training_steps=5)
    p.grad = p.grad.to_sparse()
    optimizer.step(1.0)


def setting_of_the_run_in_a_group() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "num_training_steps": 7}]
    hf_lopt.VeLO(groups, weights="bundled", num_training_steps=5)


def checkpoint_of_another_rule() -> None:
    _velo("celo", num_training_steps=5)[1].load_state_dict(_velo(num_training_steps=5)[1].state_dict())


def checkpoint_of_other_weights() -> None:
    saved = _velo(num_training_steps=5)[1].state_dict()
    saved["param_groups"][0]["weights_sha256"] = "0" * 64
    _velo(num_training_steps=5)[1].load_state_dict(saved)


def _trainer(rule: str = "velo", **changes: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Trainer.get_optimizer_cls_and_kwargs(arguments(folder, rule, **changes), tiny_model(False))


def learning_rate_left_alone() -> None:
    _trainer()


def learning_rate_and_schedule_set() -> None:
    _trainer(learning_rate=0.5, lr_scheduler_type="constant", optim_args="weights=bundled,schedule=keep")


def learning_rate_too_small() -> None:
    _trainer(learning_rate=1e-4)


def learning_rate_set_twice() -> None:
    _trainer(learning_rate=0.5, optim_args="weights=bundled,lr=0.25")


def weight_decay_in_optim_args() -> None:
    _trainer(optim_args="weights=bundled,weight_decay=0.1")


def unknown_optim_args() -> None:
    _trainer(optim_args="weights=bundled,no_such_setting=1")


SITUATIONS = (
    *(longer_than_told, nonfinite_gradient, nonfinite_loss, nonfinite_steps_in_a_row, embedded_instead_of_published),
    *(embedded_a_second_time, published_not_at_hand, no_loss, no_horizon, unknown_keyword, unknown_rule, negative_lr),
    *(unknown_keyword_of_a_class, float64_parameter, no_parameters, loss_of_two_numbers, sparse_gradient),
    *(setting_of_the_run_in_a_group, checkpoint_of_another_rule, checkpoint_of_other_weights),
    *(learning_rate_left_alone, learning_rate_and_schedule_set, learning_rate_too_small, learning_rate_set_twice),
    *(weight_decay_in_optim_args, unknown_optim_args),
)


def told(situation: Callable[[], None]) -> dict[str, Any]:
    """Categories of the warnings in a situation, and the type of its error, if there is one."""
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            situation()
        except Exception as raised:
            kinds = (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError, OSError)
            error = next((kind.__name__ for kind in kinds if isinstance(raised, kind)), type(raised).__name__)
    return {"warnings": [w.category.__name__ for w in caught], "error": error}


def interface() -> dict[str, Any]:
    """Everything that is frozen, section by section."""
    # First: this warning comes once per process.
    situations = {situation.__name__: told(situation) for situation in SITUATIONS}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        return {
            "names": {"available": list(hf_lopt.available()), "all": sorted(hf_lopt.__all__)},
            "classes": classes(folder),
            "members": members(),
            "functions": {name: signature_of(getattr(hf_lopt, name)) for name in ("available", "param_groups")},
            "states": {
                rule: {
                    "float32": (found := states(rule, torch.float32)),
                    "bfloat16 is alike": states(rule, torch.bfloat16) == found,
                }
                for rule in hf_lopt.available()
            },
            "optim_args": optim_args(folder),
            "trainer": {rule: under_trainer(folder, rule) for rule in hf_lopt.available()},
            "situations": situations,
        }


def measure(folder: Path) -> dict[str, Any]:
    """The interface as a new process finds it; ``folder`` is empty and takes its files."""
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "home" / "hub")}
    frozen_kernels.run_script(Path(__file__), folder / "interface.json", environment=home)
    return json.loads((folder / "interface.json").read_text())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(interface()))
