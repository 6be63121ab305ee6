"""The newest complete checkpoint of a Trainer: what a kill left half written is passed over, with the reason."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_lopt.hf.checkpoints import last_complete_checkpoint, why_incomplete


def save(folder: Path, step: int) -> Path:
    """What Trainer leaves, with weights in two files."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    weights = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    for key, name in weights["weight_map"].items():
        save_file({key: torch.ones(64, dtype=torch.float32)}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps(weights))
    (path / "config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"x": torch.ones(64, dtype=torch.float32)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(name: str):
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return damage


def remove(name: str):
    return lambda path: (path / name).unlink()


def write(name: str, text: str):
    return lambda path: (path / name).write_text(text)


def remove_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


DAMAGES = {
    "no state": (remove("trainer_state.json"), "no trainer_state.json"),
    "half a state": (cut("trainer_state.json"), "trainer_state.json is cut off"),
    "empty state": (write("trainer_state.json", ""), "trainer_state.json is cut off"),
    "other state": (write("trainer_state.json", "[]"), "how many steps"),
    "no weights": (remove_weights, "no weights"),
    "missing part": (remove("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
    "half a part": (cut("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors is cut off"),
    "empty part": (write("model-00001-of-00002.safetensors", ""), "00001-of-00002.safetensors is cut off"),
    "an index of nothing": (write("model.safetensors.index.json", "{}"), "names no files"),
    "half an optimizer": (cut("optimizer.pt"), "optimizer.pt is cut off"),
    "half a random state": (cut("rng_state.pth"), "rng_state.pth is cut off"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_passed_over_with_the_reason(damage: str, tmp_path: Path):
    complete, newest = save(tmp_path, 9), save(tmp_path, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_complete_checkpoint(tmp_path) == str(newest)
    break_it, reason = DAMAGES[damage]
    break_it(newest)
    with pytest.warns(UserWarning, match=f"checkpoint-10 is not a complete checkpoint.*{reason}"):
        assert last_complete_checkpoint(str(tmp_path)) == str(complete)


def test_folders_without_a_complete_checkpoint(tmp_path: Path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-4 .*trainer_state"):
        assert last_complete_checkpoint(tmp_path) is None


def test_weights_alone_are_complete(tmp_path: Path):
    """``save_only_model``: the state of the Trainer is still written last."""
    path = save(tmp_path, 1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).unlink()
    assert why_incomplete(path) is None


def test_shards_of_several_processes(tmp_path: Path):
    import torch.distributed.checkpoint as dcp

    path = save(tmp_path, 5)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"x": torch.ones(4096, dtype=torch.float32)}, checkpoint_id=path / name, no_dist=True)
    assert why_incomplete(path) is None
    shard = next((path / "optimizer_0").glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert "is cut off" in why_incomplete(path)
    shard.unlink()
    assert "is missing" in why_incomplete(path)
    shard.write_bytes(content)
    index = path / "optimizer_0" / ".metadata"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    assert ".metadata is cut off or damaged" in why_incomplete(path)
    index.unlink()
    assert "optimizer_0 has no .metadata" in why_incomplete(path)
    shutil.rmtree(path / "optimizer_0")
    assert why_incomplete(path) is None


def test_what_trainer_itself_writes_is_complete(tmp_path: Path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, optim="velo", report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 8
    transformers.Trainer(Model(), arguments, train_dataset=rows).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    cut("optimizer.pt")(tmp_path / "checkpoint-4")
    with pytest.warns(UserWarning, match="optimizer.pt is cut off"):
        found = last_complete_checkpoint(tmp_path)
    again = transformers.Trainer(Model(), arguments, train_dataset=rows)
    again.train(resume_from_checkpoint=found)
    assert again.state.global_step == 4
