"""TRL, PEFT and sentence-transformers with a learned optimizer; all models are made on the spot."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import client_cases as clients
from hf_lopt.hf import loss_feed


datasets = pytest.importorskip("datasets", reason="needs: pip install 'hf_lopt[test]'")

SETTINGS = clients.SETTINGS


def small_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=256,
        pad_token_id=258,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tokenizer():
    return clients.byte_tokenizer()


@pytest.fixture
def pretrained(tmp_path: Path, tokenizer) -> str:
    """A folder with a small model, as a hub id would name it: it counts as pretrained."""
    folder = tmp_path / "model"
    small_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def counting(n: int = 48) -> list[str]:
    return [f"{i} then {i + 1}" for i in range(n)]


# ---- TRL


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trl_sft(tmp_path, tokenizer, packing):
    trl = pytest.importorskip("trl", reason="needs: pip install 'hf_lopt[test]'")
    data = datasets.Dataset.from_dict({"text": counting(96)})

    def make(folder):
        args = trl.SFTConfig(str(folder), max_length=32, packing=packing, gradient_checkpointing=False, **SETTINGS)
        return trl.SFTTrainer(small_llama(len(tokenizer)), args, train_dataset=data, processing_class=tokenizer)

    trainer = clients.train_and_resume(make, tmp_path / "out")
    # TRL's own default rate, 2e-5, is a default too: it became the optimizer's multiplier.
    assert clients.learned(trainer).param_groups[0]["lr"] == 1.0


def test_trl_sft_tells_the_optimizer_the_loss_of_the_answers(tmp_path, tokenizer):
    """With prompts that do not count and accumulation; TRL computes the loss itself."""
    trl = pytest.importorskip("trl", reason="needs: pip install 'hf_lopt[test]'")
    import hf_cases as cases

    data = datasets.Dataset.from_dict({"prompt": counting(48), "completion": [f" and {i}" for i in range(48)]})
    settings = SETTINGS | {"max_steps": 6, "save_strategy": "no", "gradient_accumulation_steps": 2}
    args = trl.SFTConfig(str(tmp_path), max_length=32, gradient_checkpointing=False, **settings)
    trainer = trl.SFTTrainer(small_llama(len(tokenizer)), args, train_dataset=data, processing_class=tokenizer)
    seen = cases.SeenLosses()
    trainer.add_callback(seen)
    trainer.train()
    assert seen.values == pytest.approx(clients.losses(trainer), abs=1e-3)


def test_trl_sft_with_adapters(tmp_path, tokenizer, pretrained):
    trl = pytest.importorskip("trl", reason="needs: pip install 'hf_lopt[test]'")
    peft = pytest.importorskip("peft", reason="needs: pip install 'hf_lopt[test]'")
    data = datasets.Dataset.from_dict({"text": counting()})

    def make(folder):
        torch.manual_seed(0)
        args = trl.SFTConfig(str(folder), max_length=32, gradient_checkpointing=False, **SETTINGS)
        adapters = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = LlamaForCausalLM.from_pretrained(pretrained)
        return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=adapters)

    trainer = clients.train_and_resume(make, tmp_path / "out", by=0.005)
    trainable = clients.trainable(trainer.model)
    assert all("lora_" in name for name in trainable)
    sizes = [state["min_param_scale"].item() for state in clients.learned(trainer).state.values()]
    wanted = [0.05 * (".lora_B." in name) for name in trainable]
    assert sorted(sizes) == pytest.approx(sorted(wanted))


def test_trl_dpo(tmp_path, tokenizer):
    """The preferred answer comes to be the more likely one; the loss starts at log 2."""
    trl = pytest.importorskip("trl", reason="needs: pip install 'hf_lopt[test]'")
    n = 48
    rows = {"prompt": counting(n), "chosen": [" yes yes"] * n, "rejected": [" no no"] * n}
    data = datasets.Dataset.from_dict(rows)

    def make(folder):
        settings = SETTINGS | {"gradient_checkpointing": False}
        args = trl.DPOConfig(str(folder), max_length=48, **settings)
        model, reference = (small_llama(len(tokenizer)) for _ in range(2))
        return trl.DPOTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer)

    trainer = clients.train_and_resume(make, tmp_path / "out")
    assert clients.losses(trainer)[0] == pytest.approx(0.6931, abs=0.01)
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[-1] > margins[0]


# ---- PEFT


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt"])
def test_peft_through_trainer(tmp_path, tokenizer, pretrained, kind):
    peft = pytest.importorskip("peft", reason="needs: pip install 'hf_lopt[test]'")
    configs = {
        "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
        "dora": peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    rows = clients.rising_rows()

    def make(folder):
        torch.manual_seed(0)
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(pretrained), configs[kind])
        return Trainer(model, TrainingArguments(str(folder), **SETTINGS), train_dataset=rows)

    trainer = clients.train_and_resume(make, tmp_path / "out", by=1e-4)
    saved = tmp_path / "out" / f"checkpoint-{clients.STEPS}"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    assert not any("embed_tokens" in name for name in clients.trainable(trainer.model))


# ---- sentence-transformers


def test_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="needs: pip install 'hf_lopt[test]'")
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    words = ["cat", "dog", "sun", "moon", "a", "the", "sees", "likes"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    verbs = ("sees", "likes")
    animals = [f"{a} {v} the {b}" for a in ("cat", "dog") for b in ("cat", "dog") for v in verbs]
    lights = [f"{a} {v} a {b}" for a in ("sun", "moon") for b in ("sun", "moon") for v in verbs]
    pairs = [(x, y, 1.0) for x, y in zip(animals, animals[::-1], strict=True)]
    pairs += [(x, y, 0.0) for x, y in zip(animals, lights, strict=True)]
    columns = dict(zip(("sentence1", "sentence2", "score"), zip(*pairs, strict=True), strict=True))
    data = datasets.Dataset.from_dict(columns)

    def make(folder):
        torch.manual_seed(0)
        model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
        args = library.SentenceTransformerTrainingArguments(str(folder), learning_rate=1.0, **SETTINGS)
        loss = CosineSimilarityLoss(model)
        return library.SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)

    trainer = clients.train_and_resume(make, tmp_path / "out", by=0.1)
    assert loss_feed.unwrap(trainer.optimizer).steps_done == clients.STEPS
    a, b, c = trainer.model.encode(["cat sees the dog", "dog likes the cat", "sun sees a moon"])
    assert a @ b > a @ c
