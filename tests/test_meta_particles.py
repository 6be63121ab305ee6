"""Particles: each follows the trajectory of an optimizer of its own; restarts, failures and stacks of runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lopt import LearnedOptimizer
from hf_lopt.kernels import ops
from hf_lopt.meta import config, data, fresh_tasks, tasks, theta
from hf_lopt.meta.particles import IN_TURN, TOGETHER, Particles, supported


P, STEPS = 3, 8
LR, HORIZONS = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([10, 20, 30])
TASK = tasks.mlp("small", (8, 6, 5, 4), tasks.named("functions_mlp").data, tasks.squared_error, "tanh", batch=16)


def thetas(rule):
    """Weights that differ between particles."""
    generator = torch.Generator().manual_seed(1)
    start = theta.starting_weights(rule, "constructed")
    return {
        name: torch.stack(
            [
                leaf + (0.0 if "decays" in name else 1e-3 * torch.randn(leaf.shape, generator=generator))
                for _ in range(P)
            ]
        )
        for name, leaf in start.items()
    }


def gradients(task, params, batch):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = task.losses(leaves, batch)
    return dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True)), losses.detach()


@pytest.mark.parametrize("rule", [*TOGETHER, *IN_TURN])
def test_a_particle_follows_an_optimizer_of_its_own(rule):
    """With a weight, learning rate and horizon of its own, and a start in the middle of the others' runs."""
    generator = torch.Generator().manual_seed(0)
    weights, lr = thetas(rule), LR * (1.0 if supported(rule).own_schedule else 3e-3)
    samples = TASK.samples()
    begin = [0, 3, 0]
    starts = {name: p + 0.1 for name, p in TASK.start(P, generator).items()}
    batches = [samples.batch(P, TASK.batch, generator) for _ in range(STEPS)]

    particles = Particles(rule, TASK.shapes, P, {"weight_decay": 0.1})
    particles.set_weights(weights)
    particles.restart(range(P), starts)
    for t, batch in enumerate(batches):
        late = [i for i in range(P) if begin[i] == t and t]
        particles.restart(late, {name: p[late] for name, p in starts.items()})
        particles.update(*gradients(TASK, particles.params, batch), lr, HORIZONS)

    for i in range(P):
        params = {name: nn.Parameter(p[i].clone()) for name, p in starts.items()}
        horizon = {"num_training_steps": HORIZONS[i].item()} if supported(rule).needs_horizon else {}
        own = {name: leaf[i] for name, leaf in weights.items()}
        optimizer = LearnedOptimizer(
            params.values(), rule, weights=own, lr=lr[i].item(), axis_order="jax", weight_decay=0.1, **horizon
        )
        for batch in batches[begin[i] :]:
            optimizer.zero_grad()
            loss = TASK.losses(
                {k: p.unsqueeze(0) for k, p in params.items()}, tuple(x[i : i + 1] for x in batch)
            ).sum()
            loss.backward()
            optimizer.step(loss)
        for name, p in params.items():
            assert (p - starts[name][i]).abs().max() > 1e-4
            torch.testing.assert_close(particles.params[name][i], p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["velo", "celo"])
def test_tensors_may_have_floors_of_their_own(rule):
    """As many groups of an optimizer have; one tensor starts at zero."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: leaf.expand(2, *leaf.shape) for name, leaf in theta.starting_weights(rule, "constructed").items()}
    floors = {name: 0.0 for name in TASK.shapes} | {"layer2.w": 0.3, "layer0.b": 0.1}
    start = TASK.start(2, generator)
    start["layer2.w"].zero_()
    batch = TASK.samples().batch(2, TASK.batch, generator)
    particles = Particles(rule, TASK.shapes, 2, {"min_param_scale": floors})
    particles.set_weights(weights)
    particles.restart(range(2), start)
    for _ in range(3):
        particles.update(*gradients(TASK, particles.params, batch), torch.ones(2), torch.tensor([10, 10]))
    for i in range(2):
        params = {name: nn.Parameter(p[i].clone()) for name, p in start.items()}
        groups = [{"params": [p], "min_param_scale": floors[name]} for name, p in params.items()]
        own = {name: leaf[i] for name, leaf in weights.items()}
        optimizer = LearnedOptimizer(groups, rule, weights=own, axis_order="jax", num_training_steps=10)
        for _ in range(3):
            optimizer.zero_grad()
            one = {k: p.unsqueeze(0) for k, p in params.items()}
            loss = TASK.losses(one, tuple(x[i : i + 1] for x in batch)).sum()
            loss.backward()
            optimizer.step(loss)
        for name, p in params.items():
            torch.testing.assert_close(particles.params[name][i], p.detach(), rtol=1e-5, atol=1e-6)
        # Its step is a part of 0.3 times lr_mult / 1000, not of zero.
        assert particles.params["layer2.w"][i].abs().max() > 1e-4


@pytest.mark.parametrize("rule", ["celo2", "celo2_base", "small_fc_lopt"])
def test_stacks_of_runs_on_the_plain_kernels(rule):
    """The compiled kernels number results by slice; so do the plain ones."""
    generator = torch.Generator().manual_seed(2)
    weights, starts = thetas(rule), TASK.start(P, generator)
    batches = [TASK.samples().batch(P, TASK.batch, generator) for _ in range(3)]
    ends = []
    for plain in (False, True):
        particles = Particles(rule, TASK.shapes, P)
        particles.set_weights(weights)
        particles.restart(range(P), {name: p + 0.1 for name, p in starts.items()})
        for batch in batches:
            step = gradients(TASK, particles.params, batch)
            if plain:
                with ops.plain():
                    particles.update(*step, LR * 1e-2, HORIZONS)
            else:
                particles.update(*step, LR * 1e-2, HORIZONS)
        ends.append(particles.params)
    for name in starts:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["celo2", "velo"])
def test_a_particle_that_fails_leaves_the_others_alone(rule):
    generator = torch.Generator().manual_seed(3)
    weights, starts = thetas(rule), TASK.start(P, generator)
    batches = [TASK.samples().batch(P, TASK.batch, generator) for _ in range(4)]
    ends = []
    for fails in (False, True):
        particles = Particles(rule, TASK.shapes, P)
        particles.set_weights(weights)
        particles.restart(range(P), starts)
        for t, batch in enumerate(batches):
            own, losses = gradients(TASK, particles.params, batch)
            if fails and t == 1:
                own["layer1.w"][2, 0, 0] = float("inf")
            particles.update(own, losses, LR * 1e-2, HORIZONS)
        ends.append({name: p.clone() for name, p in particles.params.items()})
    assert particles.failed.tolist() == [False, False, True]
    for name, p in ends[1].items():
        assert torch.equal(p[:2], ends[0][name][:2])
        assert p[2].abs().max() < 0.1
    particles.restart([2], {name: p[2:] for name, p in starts.items()})
    assert not particles.failed.any() and torch.equal(particles.params["layer0.w"][2], starts["layer0.w"][2])


def test_what_particles_refuse():
    with pytest.raises(ValueError, match="train celo2"):
        Particles("elo_celo2", TASK.shapes, 2)
    with pytest.raises(ValueError, match="exp_multiplier"):
        Particles("small_fc_lopt", TASK.shapes, 2, {"exp_multiplier": 1.0})
    particles = Particles("small_fc_lopt", TASK.shapes, 2)
    weights = {
        n: torch.stack([leaf, leaf + 0.1]) for n, leaf in theta.starting_weights("small_fc_lopt", "bundled").items()
    }
    with pytest.raises(ValueError, match="decays"):
        particles.set_weights(weights)


@pytest.mark.parametrize("name", [*tasks.TASKS, *fresh_tasks.TASKS])
def test_losses_of_particles_are_independent(name):
    """A loss depends on its own copy only, and the model has a gradient in every parameter."""
    task, generator = (tasks.TASKS | fresh_tasks.TASKS)[name], torch.Generator().manual_seed(0)
    params = {k: p.requires_grad_() for k, p in task.start(2, generator).items()}
    batch = task.samples().batch(1, 4, generator)
    losses = task.losses(params, batch)
    assert losses.shape == (2,) and losses.isfinite().all()
    grads = torch.autograd.grad(losses[1], list(params.values()))
    for (key, p), g in zip(params.items(), grads, strict=True):
        assert g.shape == p.shape and not g[0].any(), key
        assert g[1].any() or key.endswith(".a"), key  # beside a zero B
    same = {k: p.detach()[:1].expand(2, *p.shape[1:]) for k, p in params.items()}
    alone = task.losses({k: p[:1] for k, p in same.items()}, batch)
    torch.testing.assert_close(task.losses(same, batch), alone.expand(2), rtol=1e-5, atol=1e-6)


def test_parts_have_no_sample_in_common():
    cut = ("digits_mlp", "characters", "functions_mlp", "waves_denoiser", "teacher_residual", "tumours_mlp")
    for name in (*cut, "code_lm", "names_gru"):
        parts = [tasks.named(name).data(part) for part in ("train", "validation", "test")]
        sizes = [len(part.inputs) for part in parts]
        whole = sum(sizes)
        starts = [part.inputs.storage_offset() // part.inputs.stride(0) for part in parts]
        assert all(a + n <= b for a, n, b in zip(starts, sizes, starts[1:], strict=False)) and starts[0] == 0
        assert whole >= 569 and all(0 < part.fresh < len(part.inputs) for part in parts)
    generator = torch.Generator().manual_seed(0)
    text = tasks.named("characters").data("train")
    inputs, targets = text.batch(2, 3, generator, fresh=True)
    assert inputs.shape == (2, 3, 16) and torch.equal(inputs[..., 1:], targets[..., :-1])


def test_some_test_tasks_have_data_of_their_own():
    """Half of them have nothing of what optimizers are trained and chosen on, but by another random seed or share."""

    def source(task):
        return getattr(task.data, "func", task.data)

    seen = {source(task) for part in ("train", "validation") for task in tasks.of_part(part)}
    others = [task.name for task in tasks.of_part("test") if source(task) not in seen]
    assert others == ["code_lm", "names_gru", "names_lora", "waves_denoiser", "teacher_residual", "tumours_mlp"]
    names = tasks.named("names_gru").samples().inputs
    assert {data.ALPHABET[i] for i in names.unique().tolist()} <= set("\n ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-()")


def test_no_configuration_trains_on_fresh_tasks():
    """They are test tasks with data of their own, which configurations do not know."""
    known = {getattr(task.data, "func", task.data) for task in tasks.TASKS.values()}
    for name, task in fresh_tasks.TASKS.items():
        assert task.part == "test" and task.data.func not in known
        with pytest.raises(ValueError, match=f"no task is called '{name}'"):
            config.from_dict({"rule": "celo2", "tasks": {name: 2}})


def test_the_state_space_is_a_recurrence():
    """One block, place by place: h <- exp(-rate) h + x, c · h + skip x, behind the gate."""
    task, generator = fresh_tasks.TASKS["filter_states"], torch.Generator().manual_seed(3)
    params = {key: p + 0.1 for key, p in task.start(1, generator).items()}
    x, _ = task.samples().batch(1, 5, generator)
    own = {key: p[0] for key, p in params.items()}
    u = x[0].unsqueeze(-1) @ own["in.w"] + own["in.b"]
    normed = u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * own["0.norm"]
    h, decay, outputs = torch.zeros(5, *own["0.c"].shape), torch.exp(-torch.exp(own["0.log_rate"] - 1.0)), []
    for t in range(x.shape[2]):
        h = decay * h + normed[:, t].unsqueeze(-1)
        outputs.append((own["0.c"] * h).sum(-1) + own["0.skip"] * normed[:, t])
    gated = torch.stack(outputs, 1) * F.silu(normed @ own["0.gate.w"] + own["0.gate.b"])
    expected = (u + gated @ own["0.out.w"] + own["0.out.b"]) @ own["head.w"] + own["head.b"]
    torch.testing.assert_close(task.model(params, x)[0], expected.squeeze(-1), rtol=1e-4, atol=1e-5)


def test_towers_find_the_other_view():
    """The loss is 0 where own views agree, and log B where all views are alike."""
    task = fresh_tasks.TASKS["views_towers"]
    same = torch.ones(1, 4, 4)
    targets = torch.zeros(1, 4, dtype=torch.int64)
    assert task.loss(same, targets).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert task.loss(100.0 * torch.eye(4).unsqueeze(0), targets).item() == pytest.approx(0.0, abs=1e-6)


def test_the_recurrent_model_is_that_of_torch():
    task, generator = tasks.named("names_gru"), torch.Generator().manual_seed(3)
    params = {key: p + 0.1 for key, p in task.start(1, generator).items()}
    x, _ = task.samples().batch(1, 5, generator)
    own = {key: p[0] for key, p in params.items()}
    theirs = nn.GRU(40, 40, batch_first=True)
    with torch.no_grad():
        for kind, layer in (("ih", "inputs"), ("hh", "state")):  # their gates are reset, update, new
            for letter in "wb":
                parts = own[f"{layer}.{letter}"].chunk(3, -1)
                name = f"{'weight' if letter == 'w' else 'bias'}_{kind}_l0"
                getattr(theirs, name).copy_(torch.cat(parts[::-1], -1).T if letter == "w" else torch.cat(parts[::-1]))
        states, _ = theirs(own["embedding"][x[0]])
        expected = states @ own["head.w"] + own["head.b"]
    torch.testing.assert_close(task.model(params, x)[0].view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_the_denoiser_convolves_like_torch():
    task, generator = tasks.named("waves_denoiser"), torch.Generator().manual_seed(3)
    params = {key: p + 0.1 for key, p in task.start(1, generator).items()}
    x = torch.randn(1, 4, 100, generator=generator)

    def convolved(layer, h):
        weight = params[f"{layer}.w"][0].T.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return F.conv2d(h, weight, params[f"{layer}.b"][0], padding=1)

    h = F.gelu(convolved("first", x[0].view(4, 1, 10, 10)))
    for layer in ("middle0", "middle1"):
        h = h + F.gelu(convolved(layer, h))
    expected = convolved("last", h).flatten(1)
    torch.testing.assert_close(task.model(params, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_residual_model_by_hand():
    task, generator = tasks.named("teacher_residual"), torch.Generator().manual_seed(3)
    params = {key: p + 0.1 for key, p in task.start(2, generator).items()}
    x = torch.randn(2, 4, 16, generator=generator)
    own = {key: p[1] for key, p in params.items()}
    h = F.linear(x[1], own["in.w"].T, own["in.b"])
    for i in range(3):
        normed = F.rms_norm(h, (28,), own[f"{i}.norm"], eps=1e-6)
        h = h + F.linear(F.silu(F.linear(normed, own[f"{i}.up.w"].T, own[f"{i}.up.b"])), own[f"{i}.down.w"].T)
        h = h + own[f"{i}.down.b"]
    expected = F.linear(F.rms_norm(h, (28,), own["norm"], eps=1e-6), own["out.w"].T, own["out.b"])
    torch.testing.assert_close(task.model(params, x)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "order"), [((3, 20, 30), "torch_stacked"), ((2, 3, 7, 5), "jax"), ((40, 6, 5), "jax")]
)
def test_a_stack_of_matrices_is_its_matrices(shape, order):
    """Celo2 normalises a stack matrix by matrix: if the factored axes are those of the matrix, it steps like the
    matrices by themselves, on the compiled kernels as on the plain ones."""
    generator = torch.Generator().manual_seed(4)
    start, grads = (torch.randn(*shape, generator=generator) for _ in range(2))
    ends = []
    for plain in (False, True):
        whole = nn.Parameter(start.clone())
        optimizer = LearnedOptimizer([whole], "celo2", weights="bundled", axis_order=order, weight_decay=0.1)
        for t in range(3):
            whole.grad = grads * (t + 1)
            if plain:
                with ops.plain():
                    optimizer.step()
            else:
                optimizer.step()
        ends.append(whole.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    if shape[0] < shape[-1]:
        matrices = [nn.Parameter(p) for p in start.flatten(0, -3).clone()]
        optimizer = LearnedOptimizer(matrices, "celo2", weights="bundled", axis_order=order[:5], weight_decay=0.1)
        for t in range(3):
            for p, g in zip(matrices, grads.flatten(0, -3), strict=True):
                p.grad = g * (t + 1)
            optimizer.step()
        one_by_one = torch.stack([p.detach() for p in matrices])
        torch.testing.assert_close(ends[0].flatten(0, -3), one_by_one, rtol=1e-4, atol=1e-6)
