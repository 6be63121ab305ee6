"""Doors that know how often a run sees its samples: loops of Accelerate and Lightning, whose loaders have a length."""

import copy
import warnings

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

import hf_lopt
from hf_lopt.hf.replace import Options, Replacer


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SAMPLES = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))  # five batches of two


def adapted(steps):
    """A model with an adapter, whose steps follow the epochs, and its optimizer."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    return model, hf_lopt.VeLO(model.parameters(), num_training_steps=steps, weights="bundled")


def by_hand(steps, epochs):
    """What lr counts, by the constants in the documentation."""
    return min(max(1000 / steps, 1.0) ** 0.5, 5.0) * min(max(4 / epochs, 0.1), 1.0)


@pytest.mark.parametrize(("steps", "window", "epochs"), [(500, 1, 100), (60, 2, 20), (60, 4, 30), (12, 2, 4)])
def test_accelerate_knows_the_epochs(steps, window, epochs):
    """Five batches are five steps, three, or two: a last window is short."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    model, learned = adapted(steps)
    loader = DataLoader(SAMPLES, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, learned, loader)
    assert learned.num_epochs == 0.0
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert learned.num_epochs == optimizer.num_epochs == epochs
    assert learned.length_multiplier == pytest.approx(by_hand(steps, epochs), rel=1e-6)


@pytest.mark.parametrize("how", ["said", "in the middle", "stream", "no loader", "longer"])
def test_what_accelerate_knows_of_the_epochs(how):
    accelerator = Accelerator(cpu=True)
    model, learned = adapted(100)
    samples = SAMPLES
    if how == "said":
        learned.num_epochs = 5
    if how == "stream":

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(SAMPLES)

        samples = Stream()
    model, optimizer, loader = accelerator.prepare(model, learned, DataLoader(samples, batch_size=2))
    if how == "in the middle":
        loader = accelerator.skip_first_batches(loader, 3)
    for x in SAMPLES.split(2) if how == "no loader" else loader:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    steps = 100
    if how == "longer":
        steps = optimizer.num_training_steps = 200
    epochs = {"said": 5, "in the middle": 20, "longer": 40}.get(how, 0)
    assert learned.num_epochs == epochs
    assert learned.length_multiplier == pytest.approx(by_hand(steps, epochs or 1), rel=1e-6)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("steps", [100, 200])
def test_an_accelerate_loop_that_is_resumed(knows, steps):
    """For longer: at the epochs of that length. Where the checkpoint lacks its epochs, the loop tells them again."""

    def loop(steps, state=None):
        accelerator = Accelerator(cpu=True)
        model, learned = adapted(steps)
        if state is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of two lengths
                learned.load_state_dict(state)
        model, optimizer, loader = accelerator.prepare(model, learned, DataLoader(SAMPLES, batch_size=2))
        for x in loader:
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return learned

    state = copy.deepcopy(loop(100).state_dict())
    if not knows:  # formats that keep what a new optimizer has, too
        del state["param_groups"][0]["num_epochs"]
    resumed = loop(steps, state)
    assert resumed.length_multiplier == pytest.approx(by_hand(steps, steps / 5), rel=1e-6)
    assert resumed.num_epochs == (steps / 5 if knows or steps == 200 else 0)


def test_a_script_in_which_velo_takes_the_place_of_adamw_knows_the_epochs():
    options = Options(optim_args="weights=bundled")
    options.add("AdamW=velo")
    accelerator = Accelerator(cpu=True)
    with Replacer(options):
        model, _ = adapted(1)
        replaced = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        scheduler = transformers.get_linear_schedule_with_warmup(replaced, 0, 100)
        loader = DataLoader(SAMPLES, batch_size=2)
        model, optimizer, loader, scheduler = accelerator.prepare(model, replaced, loader, scheduler)
        for x in loader:
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert replaced.num_epochs == 20
    assert replaced.length_multiplier == pytest.approx(by_hand(100, 20), rel=1e-6)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("window", [1, 2])
def test_lightning_knows_the_epochs(automatic, window):
    """In manual optimization every batch counts as a step: what a loop makes of them it does not say."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.model, self.learned = adapted(60)

        def training_step(self, batch, index):
            loss = self.model(batch).square().mean()
            if not automatic:
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()
            return loss

        def configure_optimizers(self):
            return self.learned

    module, data = Module(), DataLoader(SAMPLES, batch_size=2)
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
    accumulated = {"accumulate_grad_batches": window} if automatic else {}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet, **accumulated)
    trainer.fit(module, data)
    epochs = 20 if automatic and window == 2 else 12
    assert module.learned.num_epochs == epochs
    assert module.learned.length_multiplier == pytest.approx(by_hand(60, epochs), rel=1e-6)
