"""Scripts that do not know hf_lopt, run by ``-m hf_lopt.launch``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lopt.hf import launch


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """launch.main changes the process for the script, which normally is all that the process does."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_script(capsys):
    launch.main([str(SCRIPTS / "show_main.py"), "--optim", "velo"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "__main__",
        "argv": [str(SCRIPTS / "show_main.py"), "--optim", "velo"],
        "path": str(SCRIPTS),
        "registered": True,
    }


def test_module(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    launch.main(["-m", "show_main", "--optim", "velo"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "__main__" and shown["argv"] == [str(SCRIPTS / "show_main.py"), "--optim", "velo"]


def test_exit_status_passes_through():
    with pytest.raises(SystemExit) as raised:
        launch.main([str(SCRIPTS / "show_main.py"), "--fail"])
    assert raised.value.code == 3


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_without_a_script_it_says_how(arguments):
    with pytest.raises(SystemExit, match="accelerate launch"):
        launch.main(arguments)


def test_a_missing_script_is_named():
    with pytest.raises(SystemExit, match="no_such.py"):
        launch.main(["no_such.py"])


def test_help(capsys):
    launch.main(["--help"])
    assert "python -m hf_lopt.launch script.py" in capsys.readouterr().out


def test_missing_transformers_is_said(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        launch.main(["script.py"])


@pytest.mark.slow
def test_accelerate_launch_trains_an_unmodified_script(tmp_path):
    script = SCRIPTS / "train_unmodified.py"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    command += ["-m", "hf_lopt.launch", str(script), f"--output_dir={tmp_path}", "--optim=velo"]
    command += ["--optim_args=weights=bundled", "--max_steps=2", "--logging_steps=1", "--report_to=none"]
    command += ["--save_strategy=no", "--use_cpu=true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_CONFIG_FILE"] = str(tmp_path / "none.yaml")  # not the configuration of whoever runs this
    (tmp_path / "none.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n")
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    numbers = ["lopt/lr_mult_max", "lopt/lr_mult_mean", "lopt/lr_mult_min", "lopt/update_rms"]
    assert found == {
        "optimizer": "VeLO",
        "steps": 2,
        "logged": sorted([*numbers, *numbers, "lopt/weights"]),
        "argv": str(script),
        "neighbour": 42,
        "main": str(script),
    }
