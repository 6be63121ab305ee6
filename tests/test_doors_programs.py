"""docs/in_your_program.md: every snippet that is not marked as run by hand or not run is run, section by section.

What the snippets call yours, such as ``model`` and ``loader``, is made here, small. A section whose library is missing
is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import hf_lopt


PAGE = Path(__file__).resolve().parents[1] / "docs" / "in_your_program.md"
STEPS = 8


def sections():
    """Title -> text."""
    _, *parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


SECTIONS = sections()


def blocks(title, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)


# ---- what is yours --------------------------------------------------------------------------------------------------


def regression():
    """A perceptron, and four batches of eight rows: four inputs and what to predict."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    inputs = torch.randn(32, 4)
    rows = torch.cat([inputs, inputs.sum(1, keepdim=True).tanh()], 1)
    return {
        "model": model,
        "loader": torch.utils.data.DataLoader(rows, batch_size=8),
        "hf_lopt": hf_lopt,
        "torch": torch,
    }


def pairs():
    yours = regression()
    rows = yours["loader"].dataset
    x, y = rows[:, :4], rows[:, 4:]
    xy = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    return yours | {"xy": xy, "x": x.numpy(), "y": y.numpy()}


def llama(vocabulary=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=vocabulary - 1, **sizes)
    )


def language():
    import transformers

    import client_cases

    yours = {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments, "hf_lopt": hf_lopt}
    return yours | {"model": llama(), "rows": client_cases.rising_rows()}


def texts():
    import datasets

    import client_cases

    tokenizer = client_cases.byte_tokenizer()
    rows = datasets.Dataset.from_dict({"text": [f"{i} then {i + 1}" for i in range(64)]})
    return {"model": llama(len(tokenizer)), "tokenizer": tokenizer, "texts": rows}


def adapted():
    import peft

    yours = language()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return yours | {"adapted": peft.get_peft_model(yours["model"], config)}


def encoder():
    import datasets
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sun", "moon"]
    Path("vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained("bert")
    BertTokenizerFast(vocab="vocab.txt").save_pretrained("bert")
    columns = {"sentence1": ["a cat", "a sun"] * 8, "sentence2": ["a dog", "a dog"] * 8, "score": [1.0, 0.0] * 8}
    return {"encoder": SentenceTransformer("bert", device="cpu"), "pairs": datasets.Dataset.from_dict(columns)}


def lightning():
    import lightning

    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return regression() | {"L": lightning, "quiet": quiet | {"enable_model_summary": False}}


def accelerate():
    from accelerate import Accelerator

    return regression() | {"accelerator": Accelerator(cpu=True)}


# Title -> (module that it needs, whether the loss comes by hooks that came with feed_loss, what is yours,
# where the optimizer is afterwards, its steps).
RUN = {
    "Trainer subclass": ("transformers", False, language, "trainer.optimizer", STEPS),
    "TRL": ("trl", False, texts, "trainer.optimizer", STEPS),
    "PEFT, LoRA+": ("peft", False, adapted, "trainer.optimizer", STEPS),
    "sentence-transformers": ("sentence_transformers", False, encoder, "trainer.optimizer", STEPS),
    "Lightning": ("lightning", True, lightning, "optimizer", 4),
    "Accelerate": ("accelerate", False, accelerate, "optimizer", 4),
    "ignite": ("ignite", True, pairs, "optimizer", 8),
    "skorch": ("skorch", False, pairs, "net.optimizer_", 8),
    "GradScaler": ("torch", False, regression, "optimizer", 4),
}


def learned(value):
    while not isinstance(value, hf_lopt.LearnedOptimizer):
        value = value.optimizer
    return value


@pytest.mark.parametrize("title", RUN)
def test_snippets_run(title, tmp_path, monkeypatch):
    """The blocks of a section, one after the other in one namespace. The optimizer has taken its steps in the end."""
    module, fed, yours, place, steps = RUN[title]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    if fed and not hasattr(hf_lopt, "feed_loss"):
        pytest.skip("needs hf_lopt.feed_loss and the hooks that came with it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if module not in ("torch", "ignite", "skorch", "lightning"):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    space = yours()
    for block in blocks(title):
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), space)
    optimizer = learned(eval(place, space))
    assert isinstance(optimizer, hf_lopt.VeLO)
    assert optimizer.steps_done == steps
    if title == "Lightning":
        # Two epochs of four batches: two windows of two in each; by hand a step for every batch.
        assert learned(space["trainer"].optimizers[0]).steps_done == 4
        assert learned(space["manual"].optimizers[0]).steps_done == 8
        optimizers = (learned(space[name].optimizers[0]) for name in ("trainer", "manual"))
        assert [optimizer.num_training_steps for optimizer in optimizers] == [4, 8]
    else:
        assert optimizer.num_training_steps == steps


def test_every_block_is_run_or_said_not_to_be():
    for title, text in SECTIONS.items():
        if title in RUN:
            assert blocks(title) and "*Not run.*" not in text and "*Run by hand*" not in text, title
        else:
            marked = "*Not run.*" in text or re.search(r"\*Run by hand\* with \w+ \d", text)
            assert not blocks(title) and (marked or "hf_lopt.launch" in text), title
        for block in blocks(title, "py"):
            compile(block, title, "exec")


def test_each_says_what_it_loses():
    for title, text in SECTIONS.items():
        assert text.count("*Loses:*") == 1, title


def test_the_names_of_the_doors():
    """The libraries that the page is for."""
    wanted = (
        "Trainer subclass, LLaMA-Factory, TRL, sentence-transformers, SetFit, Lightning, Accelerate, ignite, fastai"
    )
    assert {*wanted.split(", "), "PEFT, LoRA+", "skorch", "timm", "GradScaler", "torchtune"} <= set(SECTIONS)


def test_links_are_there_and_lead_here():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
    root = PAGE.parents[1]
    assert "docs/in_your_program.md" in (root / "README.md").read_text(encoding="utf-8")
    for name in ("getting_started", "trainer", "accelerate"):
        assert "(in_your_program.md" in (root / "docs" / f"{name}.md").read_text(encoding="utf-8"), name
