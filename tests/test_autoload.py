"""HF_LOPT_AUTOLOAD: the ``torch.backends`` entry point, in processes of their own.

The entry point is given to them as an installed distribution would give it, so that the tests need no installation.
"""

import builtins
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import hf_lopt_autoload
from hf_lopt.hf import import_hook


ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
LOADED = "import json, sys; print(json.dumps([name in sys.modules for name in ('hf_lopt', 'transformers')]))"


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """A folder with the metadata of a distribution that has the entry point of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entry = re.search(r'^\[project\.entry-points\."torch\.backends"\]\n(\w+) = "([\w:.]+)"$', text, re.MULTILINE)
    folder = tmp_path_factory.mktemp("site")
    metadata = folder / "hf_lopt_entry-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-lopt-entry\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{entry[1]} = {entry[2]}\n")
    found = [e for d in importlib.metadata.distributions(path=[str(folder)]) for e in d.entry_points]
    assert [e.load() for e in found] == [hf_lopt_autoload.load]
    return folder


def environment(distribution, setting, *first):
    paths = [*map(str, first), str(distribution), str(ROOT)]
    out = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out.pop(hf_lopt_autoload.VARIABLE, None)
    return out if setting is None else out | {hf_lopt_autoload.VARIABLE: setting}


def run(command, env, **options):
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@pytest.mark.parametrize(("setting", "loaded"), [(None, False), ("0", False), ("1", True)])
def test_only_when_asked_and_without_transformers(distribution, setting, loaded):
    result = run([sys.executable, "-c", f"import torch; {LOADED}"], environment(distribution, setting))
    assert json.loads(result.stdout) == [loaded, False]


def test_an_optimizer_is_known_without_an_import_of_ours(distribution, tmp_path):
    code = "from transformers import TrainingArguments as A; print(A('out', optim='velo', report_to=[]).optim.value)"
    result = run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], environment(distribution, "1"), cwd=tmp_path
    )
    assert result.stdout.split() == ["velo"]


def test_importing_hf_lopt_first_works(distribution):
    code = "import hf_lopt, torch; print(hf_lopt.available()[-1])"
    result = run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], environment(distribution, "1"))
    assert result.stdout.split() == ["velo_s"] and "could not be loaded" not in result.stderr


@pytest.mark.parametrize("options", [[], ["-W", "error"]], ids=["warnings", "errors"])
def test_a_broken_package_never_breaks_torch(distribution, tmp_path, options):
    (tmp_path / "hf_lopt").mkdir()
    (tmp_path / "hf_lopt" / "__init__.py").write_text("raise ValueError('of another age')")
    code = "import torch; print(float(torch.ones(2).sum()))"
    result = run([sys.executable, *options, "-c", code], environment(distribution, "1", tmp_path), cwd=tmp_path)
    assert result.stdout.split() == ["2.0"]
    assert "HF_LOPT_AUTOLOAD is set, but hf_lopt could not be loaded: ValueError: of another age" in result.stderr


BREAKAGES = {
    "SystemExit": "import sys; sys.exit(3)",
    "BaseException": "class Odd(BaseException): pass\nraise Odd('odd')",
    "no text": "class Mute(Exception):\n    def __str__(self): raise KeyError('no text')\nraise Mute",
    "SyntaxError": "def (",
}


@pytest.mark.parametrize(
    ("breakage", "stderr"), [*((breakage, "open") for breakage in BREAKAGES), ("SystemExit", "closed")]
)
def test_nothing_that_the_package_raises_breaks_torch(distribution, tmp_path, breakage, stderr):
    (tmp_path / "hf_lopt").mkdir()
    (tmp_path / "hf_lopt" / "__init__.py").write_text(BREAKAGES[breakage])
    command = f'"{sys.executable}" -W error -c "import torch; print(float(torch.ones(2).sum()))"'
    command += " 2>&-" if stderr == "closed" else ""
    result = run(["sh", "-c", command], environment(distribution, "1", tmp_path), cwd=tmp_path)
    assert result.stdout.split() == ["2.0"]
    assert ("could not be loaded" in result.stderr) == (stderr == "open")


@pytest.mark.parametrize("stderr", [None, "closed"])
@pytest.mark.parametrize("action", ["default", "error"])
def test_the_warning_itself_never_fails(monkeypatch, tmp_path, stderr, action):
    """Standard error as ``pythonw`` has it, and closed behind the interpreter's back."""
    monkeypatch.setenv(hf_lopt_autoload.VARIABLE, "1")
    monkeypatch.delitem(sys.modules, "hf_lopt")
    monkeypatch.setattr(builtins, "__import__", failing_import(ValueError("broken")))
    if stderr is not None:
        stderr = open(tmp_path / "stderr", "w")
        stderr.close()
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: sys.stderr.write("x"))
        monkeypatch.setattr(sys, "stderr", stderr)
        hf_lopt_autoload.load()


def test_an_interrupt_passes(monkeypatch):
    monkeypatch.setenv(hf_lopt_autoload.VARIABLE, "1")
    monkeypatch.delitem(sys.modules, "hf_lopt")
    monkeypatch.setattr(builtins, "__import__", failing_import(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        hf_lopt_autoload.load()


def failing_import(error):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "hf_lopt":
            raise error
        return real(name, *args, **kwargs)

    return fail


def test_hook_waits_for_a_module_that_is_being_executed(tmp_path, monkeypatch):
    """Asked for by something that the module itself imports, first of all for one that ends well, then for one that
    fails."""
    seen = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "hf_lopt_asks", type(sys)("hf_lopt_asks"))
    sys.modules["hf_lopt_asks"].ask = lambda name: import_hook.when_imported(
        name, lambda module: seen.append((name, module.END))
    )
    for name, last in (("hf_lopt_good", "END = 1"), ("hf_lopt_bad", "raise KeyError(1)")):
        (tmp_path / f"{name}.py").write_text(f"import hf_lopt_asks\nhf_lopt_asks.ask('{name}')\n{last}\n")
    try:
        good = importlib.import_module("hf_lopt_good")
        assert seen == [("hf_lopt_good", 1)] and type(good.__spec__).__name__ == "ModuleSpec"
        with pytest.raises(KeyError):
            importlib.import_module("hf_lopt_bad")
        assert len(seen) == 1
    finally:
        for name in ("hf_lopt_good", "hf_lopt_bad"):
            sys.modules.pop(name, None)
            import_hook._FINDER.actions.pop(name, None)


@pytest.mark.slow
def test_accelerate_launch_needs_no_module(distribution, tmp_path):
    script = SCRIPTS / "train_unmodified.py"
    (tmp_path / "none.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    command += [str(script), f"--output_dir={tmp_path}", "--optim=velo", "--optim_args=weights=bundled"]
    command += ["--max_steps=2", "--logging_steps=1", "--report_to=none", "--save_strategy=no", "--use_cpu=true"]
    env = environment(distribution, "1") | {"ACCELERATE_CONFIG_FILE": str(tmp_path / "none.yaml")}
    run(command, env, cwd=tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["optimizer"], found["steps"]) == ("VeLO", 2) and "lopt/weights" in found["logged"]


@pytest.mark.slow
def test_trl_sft_from_its_command_line(distribution, tmp_path):
    """TRL's own program: it starts accelerate, which starts the training script."""
    pytest.importorskip("trl", reason="needs: pip install 'hf_lopt[test]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    import client_cases as clients

    tokenizer = clients.byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"text": f"{i} and {i + 1} follow"}) + "\n" for i in range(32))
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    (tmp_path / "none.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    command = [sys.executable, "-m", "trl.cli.main", "sft", "--model_name_or_path", str(tmp_path / "model")]
    command += ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--optim", "velo"]
    command += ["--optim_args", "weights=bundled", "--max_steps", "3", "--per_device_train_batch_size", "2"]
    command += ["--logging_steps", "1", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    command += [
        "--dtype",
        "float32",
        "--save_steps",
        "3",
        "--max_length",
        "32",
        "--accelerate_config",
        str(tmp_path / "none.yaml"),
    ]
    env = environment(distribution, "1") | {"HF_HOME": str(tmp_path / "home")}
    run(command, env, cwd=tmp_path)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    assert len(rows) == 3 and all("lopt/update_rms" in row for row in rows)
