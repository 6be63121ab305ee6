"""``import hf_lopt`` and what transformers knows after it; how TrainingArguments become an optimizer."""

import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_cases as cases
import hf_lopt
from hf_lopt import __main__ as report
from hf_lopt import rules, weights
from hf_lopt.hf import arguments, import_hook, limits, register
from hf_lopt.hf.callback import LearnedOptimizerCallback
from hf_lopt.hf.group_settings import settle
from hf_lopt.hf.policy import told


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[1]


def run_script(name, *script_arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPTS / name), *map(str, script_arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def chosen(args, model=None):
    """The class and keywords that Trainer gets, and what the user is told about them when training begins."""
    before = copy.deepcopy(args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert args == before
    policy = decided(args, model)
    return cls, keywords, [str(w.message) for w in caught] + list(told(policy, args.max_grad_norm))


def decided(args, model=None):
    """The decision for the optimizer that Trainer makes of ``args``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = keywords.pop("params", None) or [torch.nn.Parameter(torch.ones(3))]
        return settle(cls(groups, **keywords), args, model, None)


# ---- registration ---------------------------------------------------------------------------------------------------


def test_importing_is_light_and_order_does_not_matter():
    found = run_script("import_order.py")
    names = list(hf_lopt.available())
    assert found == {
        "light": True,
        "names": {name: name for name in names},
        "without_trainer": True,
        "callbacks": found["callbacks"],
        "handlers": names,
        "loader": "SourceFileLoader",
        "spec_loader": "SourceFileLoader",
    }
    assert found["callbacks"].count("LearnedOptimizerCallback") == 1


@pytest.mark.parametrize("name", rules.names())
def test_names_are_members(name):
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper())
    assert isinstance(member, OptimizerNames) and isinstance(member, str) and member in list(OptimizerNames)
    assert member == name and hash(member) == hash(name) and member.value == name
    assert copy.deepcopy(member) == name
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(member, protocol))) is str


def test_unknown_names_are_still_refused():
    with pytest.raises(ValueError, match="velocity"):
        OptimizerNames("velocity")


def test_registering_twice_changes_nothing():
    from accelerate import Accelerator

    before = (
        list(OptimizerNames),
        dict(getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", {})),
        list(transformers.trainer.DEFAULT_CALLBACKS),
        Accelerator.backward,
        list(sys.meta_path),
    )
    register.register()
    register.register()
    after = (
        list(OptimizerNames),
        dict(getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", {})),
        list(transformers.trainer.DEFAULT_CALLBACKS),
        Accelerator.backward,
        list(sys.meta_path),
    )
    assert before == after
    assert after[2].count(LearnedOptimizerCallback) == 1


def test_command_line_json_and_yaml(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    texts = {"output_dir": str(tmp_path), "optim": "velo", "optim_args": "weights=bundled", "use_cpu": True}
    (args,) = parser.parse_args_into_dataclasses([f"--{key}={value}" for key, value in texts.items()])
    (tmp_path / "a.json").write_text(json.dumps(texts))
    (from_json,) = parser.parse_json_file(str(tmp_path / "a.json"))
    (tmp_path / "a.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in texts.items()))
    (from_yaml,) = parser.parse_yaml_file(str(tmp_path / "a.yaml"))
    for each in (args, from_json, from_yaml):
        assert each.optim is OptimizerNames("velo")
        assert json.loads(each.to_json_string())["optim"] == each.to_sanitized_dict()["optim"] == "velo"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir=x", "--optim=velocity"])
    assert dataclasses.replace(args, seed=3).optim is args.set_optimizer(name="velo").optim is OptimizerNames("velo")


def test_training_args_open_without_the_plugin(tmp_path):
    args = cases.arguments(tmp_path)
    chosen(args, cases.tiny_llama())
    torch.save(args, tmp_path / "training_args.bin")
    assert run_script("without_plugin.py", tmp_path / "training_args.bin") == {
        "optim": "velo",
        "type": "str",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "as_dict": "velo",
    }


def test_older_transformers_get_a_wrapped_method():
    """4.57 to 5.1 have no table of handlers."""

    class OldTrainer:
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return "original", args

        def create_scheduler(self, num_training_steps, optimizer=None):
            return "scheduler"

        def call_model_init(self, trial=None):
            return None

    module = types.SimpleNamespace(Trainer=OldTrainer, DEFAULT_CALLBACKS=[])
    register._extend_trainer(module)
    register._extend_trainer(module)
    assert module.DEFAULT_CALLBACKS == [LearnedOptimizerCallback]
    for wrapped in (OldTrainer.get_optimizer_cls_and_kwargs, OldTrainer.create_scheduler):
        assert not hasattr(wrapped._hf_lopt_original, "_hf_lopt_original")
    args = cases.arguments("unused", optim="adamw_torch", optim_args=None)
    assert OldTrainer.get_optimizer_cls_and_kwargs(args) == ("original", args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls, keywords = OldTrainer().get_optimizer_cls_and_kwargs(cases.arguments("unused"), None)
    assert cls is hf_lopt.VeLO and keywords["lr"] == 1.0


@pytest.mark.skipif(
    not hasattr(transformers.trainer, "_OPTIMIZER_HANDLERS"), reason="transformers 4 has no such table"
)
@pytest.mark.parametrize(("version", "warns"), [("5.1.0", False), ("5.2.0", True), ("5.5.4", True), ("5.6.0", False)])
def test_versions_that_divide_twice_are_named(version, warns, monkeypatch):
    # By name: importing a submodule replaces the module that an earlier `import transformers` gave.
    monkeypatch.setattr("transformers.__version__", version)
    _, _, said = chosen(cases.arguments("unused", gradient_accumulation_steps=2))
    assert any("twice" in text for text in said) == warns
    _, _, said = chosen(cases.arguments("unused", gradient_accumulation_steps=1))
    assert not any("twice" in text for text in said)


def test_foreign_internals_give_a_warning_not_an_error():
    with pytest.warns(UserWarning, match="transformers.training_args.*OptimizerNames"):
        register._never_breaking(register._extend_names)(types.ModuleType("transformers.training_args"))


def test_a_name_that_is_taken_stays(monkeypatch):
    taken = types.SimpleNamespace(_OPTIMIZER_HANDLERS={"velo": "theirs"})
    with pytest.warns(UserWarning, match="already taken"):
        register._add_handlers(taken)
    assert taken._OPTIMIZER_HANDLERS["velo"] == "theirs"


# ---- the import hook ------------------------------------------------------------------------------------------------


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    """Makes a module on disk and registers an action for it; undone afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(name, source, action):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        import_hook.when_imported(name, action)

    yield make
    for name in names:
        sys.modules.pop(name, None)
        import_hook._FINDER.actions.pop(name)


def test_hook_acts_after_the_module_and_hides(hooked):
    seen = []
    hooked("hook_target_a", "VALUE = 1\n", lambda module: seen.append(module.VALUE))
    assert importlib.util.find_spec("hook_target_a") is not None and seen == []  # looking does not trigger it
    module = importlib.import_module("hook_target_a")
    assert seen == [1]
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    module.VALUE = 2
    importlib.reload(module)
    assert seen == [1, 1]


def test_hook_acts_at_once_on_what_is_imported():
    seen = []
    import_hook.when_imported("json", seen.append)
    import_hook._FINDER.actions.pop("json")
    assert seen == [json]


def test_hook_lets_errors_of_the_module_through(hooked):
    seen = []
    hooked("hook_target_b", "raise OSError('broken installation')\n", seen.append)
    with pytest.raises(OSError, match="broken installation"):
        importlib.import_module("hook_target_b")
    assert seen == [] and "hook_target_b" not in sys.modules


def test_hook_gets_along_with_other_hooks(hooked, monkeypatch):
    """A finder that asks all finders, as other packages' import hooks do."""

    class Other:
        @staticmethod
        def find_spec(name, path=None, target=None):
            specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not Other)
            return next((spec for spec in specs if spec is not None), None) if name == "hook_target_c" else None

    seen = []
    hooked("hook_target_c", "VALUE = 3\n", lambda module: seen.append(module.VALUE))
    monkeypatch.setattr(sys, "meta_path", [Other, *sys.meta_path])
    importlib.import_module("hook_target_c")
    assert seen == [3]
    assert importlib.util.find_spec("no_such_module_here") is None


# ---- optim_args -----------------------------------------------------------------------------------------------------


def test_optim_args_reach_the_constructor():
    expected = {
        "lr": 0.5,
        "num_training_steps": 7,
        "axis_order": "jax",
        "min_param_scale": 0.01,
        "bank_scale": 50.0,
        "max_nonfinite_steps": 3,
        "max_training_steps": 9,
        "state_dtype": "bfloat16",
        "stochastic_rounding": True,
    }
    assert set(expected) == set(rules.get("velo").defaults) - {"weights", "weight_decay"}
    text = ", ".join(f"{key}={value}" for key, value in (expected | {"weights": "bundled"}).items())
    cls, keywords, _ = chosen(cases.arguments("unused", optim_args=text))
    group = cls([torch.nn.Parameter(torch.ones(3))], **keywords).param_groups[0]
    assert {key: group[key] for key in expected} == expected and group["weights_source"] == "bundled:velo"


@pytest.mark.parametrize("name", rules.names())
def test_every_text_default_round_trips(name):
    """Each default, written as text, gives the default again."""
    rule = rules.get(name)
    defaults = {k: v for k, v in rule.defaults.items() if v is not None and k != "weight_decay"}
    given, schedule = arguments.read_optim_args(rule, ",".join(f"{key}={value}" for key, value in defaults.items()))
    assert given == defaults and {k: type(v) for k, v in given.items()} == {k: type(v) for k, v in defaults.items()}
    assert schedule == "auto"


def test_booleans_and_numbers_are_told_apart():
    rule = dataclasses.replace(rules.get("velo"), defaults={"lr": 1.0, "flag": True, "steps": None, "path": "x"})
    given, _ = arguments.read_optim_args(rule, "flag=False,steps=3,path=/some folder/a.state,lr=1e-2")
    assert given == {"flag": False, "steps": 3, "path": "/some folder/a.state", "lr": 0.01}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("beta=0.9", "beta.*num_training_steps.*schedule"),
        ("lr=fast", "lr.*fast"),
        ("lr=-1", "lr.*-1"),
        ("num_training_steps=2.5", "num_training_steps.*2.5"),
        ("num_training_steps=0", "num_training_steps.*0"),
        ("schedule=cosine", "schedule.*auto, keep"),
        ("axis_order=fortran", "axis_order.*fortran"),
        ("weight_decay=0.1", r"TrainingArguments\(weight_decay"),
        ("lr=1,lr=2", "twice"),
        ("lr", "lr"),
        ("weights=/no/such/file.state", "/no/such/file.state"),
    ],
)
def test_bad_optim_args(text, match, tmp_path):
    if text == "lr":  # transformers splits the text before anyone is asked
        with pytest.raises(ValueError, match="key=value"):
            arguments.parse_optim_args(text)
    args = cases.arguments(tmp_path, optim_args=text if "weights" in text else f"weights=bundled,{text}")
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(2))
    with pytest.raises(ValueError, match=match if text != "lr" else None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.create_optimizer()


# ---- learning rate and schedule -------------------------------------------------------------------------------------


@dataclasses.dataclass
class OtherDefaults(TrainingArguments):
    """As in TRL, whose arguments have defaults of their own."""

    learning_rate: float = 2e-5


@pytest.mark.parametrize(
    ("changes", "lr", "scheduler", "said"),
    [
        ({}, 1.0, "constant", ["learning_rate was not set (5e-05): lr is 1", "scheduler is constant,"]),
        ({"learning_rate": 0.3}, 0.3, "constant", ["scheduler is constant,"]),
        ({"learning_rate": 1e-4}, 1e-4, "constant", ["hardly move"]),
        ({"learning_rate": 0.01}, 0.01, "constant", ["hardly move"]),
        ({"lr_scheduler_type": "cosine"}, 1.0, "cosine", ["lr is 1", "cosine scheduler comes on top of VeLO's own"]),
        ({"warmup_steps": 2}, 1.0, "constant_with_warmup", ["constant_with_warmup"]),
        ({"learning_rate": 1.0, "lr_scheduler_type": "constant"}, 1.0, "constant", None),
        ({"optim_args": "lr=0.5,schedule=keep"}, 0.5, "linear", ["linear scheduler comes on top"]),
        ({"optim_args": "lr=0.2", "learning_rate": 0.1}, 0.2, "constant", ["gives way to lr=0.2 of optim_args"]),
        ({"optim_args": "schedule=keep"}, 1.0, "linear", ["lr is 1"]),
    ],
)
def test_lr_and_schedule(changes, lr, scheduler, said):
    text = "weights=bundled," + changes.pop("optim_args") if "optim_args" in changes else "weights=bundled"
    args = cases.arguments("unused", optim_args=text, **changes)
    model = cases.tiny_llama()
    _, keywords, warned = chosen(args, model)
    policy = decided(args, model)
    assert keywords["lr"] == policy.lr.value == lr and policy.schedule.value == scheduler
    assert len(warned) == (said is not None)
    for part in said or []:
        assert part in warned[0]
    if warned:
        assert "schedule=keep" in warned[0] and "max_grad_norm=1" in warned[0]


def test_a_learning_rate_of_optim_args_that_hardly_moves():
    args = cases.arguments("unused", optim_args="weights=bundled,lr=5e-5,schedule=keep")
    *_, conflict = chosen(args, cases.tiny_llama())[2]
    assert "group 0 has lr=5e-05" in conflict and "about 1 here" in conflict


def test_defaults_are_those_of_the_class_in_use():
    args = OtherDefaults("unused", optim="velo", optim_args="weights=bundled", use_cpu=True)
    assert chosen(args)[1]["lr"] == 1.0
    args = OtherDefaults("unused", optim="velo", optim_args="weights=bundled", use_cpu=True, learning_rate=5e-5)
    assert chosen(args)[1]["lr"] == 5e-5


def test_trainer_logs_and_follows_the_schedule(tmp_path):
    args = cases.arguments(tmp_path, max_steps=4, warmup_steps=2)
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(8))
    trainer.train()
    assert [row["learning_rate"] for row in trainer.state.log_history if "loss" in row] == [0.0, 0.5, 1.0, 1.0]


def test_embedded_weights_fine_tune_at_their_own_multiplier(tmp_path):
    cases.tiny_llama().save_pretrained(tmp_path)
    pretrained = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    finetune = rules.get("velo").load_weights("bundled").finetune_lr
    args = cases.arguments("unused")
    _, keywords, warned = chosen(args, pretrained)
    assert keywords["lr"] == finetune
    assert len(warned) == 1 and str(tmp_path) in warned[0] and "1 would be the value from scratch" in warned[0]

    # What was chosen for one model is not taken for the user's wish with the next.
    assert chosen(args, cases.tiny_llama())[1]["lr"] == 1.0
    assert chosen(args, pretrained)[1]["lr"] == finetune
    # The user's wish wins, as does the copy inside a wrapper.
    assert chosen(cases.arguments("unused", learning_rate=0.5), pretrained)[1]["lr"] == 0.5
    assert chosen(cases.arguments("unused", optim_args="weights=bundled,lr=1"), pretrained)[1]["lr"] == 1.0
    assert chosen(cases.arguments("unused"), torch.nn.Sequential(pretrained))[1]["lr"] == finetune


def test_adapters_start_from_scratch(tmp_path):
    """On a pretrained model as on any other; their least size is decided with that of all tensors."""
    peft = pytest.importorskip("peft")
    cases.tiny_llama().save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    _, keywords, _ = chosen(cases.arguments("unused"), model)
    assert keywords["lr"] == 1.0 and "min_param_scale" not in keywords
    _, keywords, _ = chosen(cases.arguments("unused", optim_args="weights=bundled,min_param_scale=0"), model)
    assert keywords["min_param_scale"] == 0.0
    _, keywords, _ = chosen(cases.arguments("unused", optim="small_fc_lopt"), model)
    assert keywords["lr"] == 1.0 and "min_param_scale" not in keywords


@pytest.mark.parametrize("rule", ["velo", "celo2"])
def test_fine_tuning_is_the_same_with_published_weights(rule, monkeypatch):
    bundled = rules.get(rule).load_weights("bundled")
    published = weights.Weights(bundled.theta, f"someone/{rule}", bundled.sha256, "published")
    model = cases.tiny_llama()
    _, scratch, _ = chosen(cases.arguments("unused", optim=rule), model)
    model.config._name_or_path = "someone/model"
    _, with_bundled, _ = chosen(cases.arguments("unused", optim=rule), model)
    monkeypatch.setattr(weights, "load", lambda *args, **kwargs: published)
    _, keywords, warned = chosen(cases.arguments("unused", optim=rule, optim_args=None), model)
    assert keywords.pop("weights") is published
    assert {key: with_bundled[key] for key in keywords} == keywords and keywords["lr"] < scratch["lr"]
    assert any("someone/model" in text for text in warned)


def test_rules_without_a_schedule_keep_that_of_trainer(monkeypatch):
    """Their lr is a step size: the rule's recommendation instead of AdamW's default."""
    velo = rules.get("velo")
    rule = dataclasses.replace(velo, own_schedule=False, defaults=dict(velo.defaults) | {"lr": 3e-4})
    monkeypatch.setitem(rules._RULES, "velo", rule)
    args = cases.arguments("unused")
    _, keywords, warned = chosen(args)
    assert keywords["lr"] == 3e-4 and decided(args).schedule.value == "linear"
    assert len(warned) == 1 and "what VeLO is used with" in warned[0]
    assert chosen(cases.arguments("unused", learning_rate=1e-4))[2] == []


def test_a_weight_decay_left_alone_becomes_the_rules_own(monkeypatch):
    velo = rules.get("velo")
    rule = dataclasses.replace(velo, defaults=dict(velo.defaults) | {"weight_decay": 0.1})
    monkeypatch.setitem(rules._RULES, "velo", rule)
    args = cases.arguments("unused")
    _, keywords, warned = chosen(args, cases.tiny_llama())
    assert "weight_decay was not set (0): it is 0.1, what VeLO is used with" in warned[0]
    assert {group["weight_decay"] for group in keywords["params"]} == {0.0, 0.1}
    _, keywords, warned = chosen(cases.arguments("unused", weight_decay=0.2), cases.tiny_llama())
    assert "weight_decay" not in warned[0] and {group["weight_decay"] for group in keywords["params"]} == {0.0, 0.2}


def test_other_processes_are_silent(tmp_path):
    args = cases.arguments(tmp_path, max_steps=1)
    trainer = Trainer(cases.tiny_llama(), args, train_dataset=cases.byte_rows(2))
    trainer.is_world_process_zero = lambda: False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "optim=" in str(w.message)]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_is_refused_and_fsdp2_is_not(version):
    wrap = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = cases.arguments("unused", fsdp=True, fsdp_config=wrap)
    if version == 2:
        assert Trainer.get_optimizer_cls_and_kwargs(args, cases.tiny_llama())[0] is hf_lopt.VeLO
        return
    with pytest.raises(ValueError, match="FSDP1.*DistributedDataParallel"):
        Trainer.get_optimizer_cls_and_kwargs(args, cases.tiny_llama())


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ({"fsdp": ["full_shard"], "fsdp_config": {}}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "FSDP1"),
    ],
)
def test_sharding_arguments_are_refused(args, match):
    with pytest.raises(ValueError, match=match):
        limits.check_arguments("VeLO", types.SimpleNamespace(**args))


# ---- python -m hf_lopt ----------------------------------------------------------------------------------------------


def test_report(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report.main()
    text = capsys.readouterr().out
    for expected in (
        f"hf_lopt          {hf_lopt.__version__}",
        torch.__version__,
        transformers.__version__,
        *(f"optim={name!r}" for name in hf_lopt.available()),
        rules.get("velo").load_weights("bundled").sha256,
        "kernels",
        "HF_HUB_OFFLINE",
    ):
        assert expected in text
