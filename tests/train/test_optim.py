"""The optimizers' mathematics, and which parameters they treat how."""

import math

import pytest
import torch

from models import networks
from train.learning.ema import WeightAverage
from train.learning.muon import Muon, orthogonalize
from train.learning.optimizers import OptimizerConfig, build_parameter_groups
from train.learning.schedules import ScheduleConfig

import lightning as L  # isort: skip  (it needs what train declares beside a CPU torch)


@pytest.mark.parametrize("shape", [(64, 576), (16, 9), (128, 128)])
def test_singular_values_come_near_one_save_tiny_ones(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, before, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix) @ vh.T
    assert (found - found.diag().diag()).abs().max() < 1e-9  # the directions stay
    after, share = found.diag(), before / before.norm()
    assert ((after > 0.68) & (after < 1.21))[share >= 1 / 50].all()
    assert (after[share < 1 / 50] <= 3.4445**3 * share[share < 1 / 50]).all()
    assert (share >= 1 / 50).sum() > len(share) / 2


def test_muon_is_nesterov_momentum_orthogonalised_at_a_held_norm():
    generator = torch.Generator().manual_seed(1)
    kernel = torch.nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator))
    gradients = [torch.randn(8, 3, 3, 3, generator=generator) for _ in range(3)]
    expected, velocity = kernel.detach().clone(), torch.zeros_like(kernel)
    muon = Muon([{"params": [kernel], "muon": True}], lr=0.1, momentum=0.6)
    for gradient in gradients:
        kernel.grad = gradient.clone()
        muon.step()
        velocity = 0.6 * velocity + gradient
        update = (gradient + 0.6 * velocity).flatten(1)
        expected = expected * (8**0.5 / expected.norm()) - 0.1 * orthogonalize(update).view_as(
            expected
        )
        assert torch.allclose(kernel, expected, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_s_sgd_for_the_others_is_torch_s(momentum):
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    muon = Muon([{"params": [mine], "weight_decay": 0.01}], lr=0.1, others_momentum=momentum)
    sgd = torch.optim.SGD([theirs], 0.1, momentum, weight_decay=0.01, nesterov=momentum > 0)
    for step in range(4):
        for p, optimizer in ((mine, muon), (theirs, sgd)):
            p.grad = torch.arange(5.0) - step
            optimizer.step()
    assert torch.allclose(mine, theirs)


def test_muon_s_adamw_for_the_others_is_torch_s():
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    muon = Muon([{"params": [mine], "weight_decay": 0.01}], lr=0.1, others="adamw")
    adamw = torch.optim.AdamW([theirs], 0.1, weight_decay=0.01)
    for step in range(4):
        for p, optimizer in ((mine, muon), (theirs, adamw)):
            p.grad = torch.arange(5.0) - step
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_groups_learn_and_decay_at_rates_of_their_own():
    """Decay is what a step takes off in all: the rate of a group that learns faster is less by as much."""
    network = networks.build("convnet", 10, 1, 8)
    config = OptimizerConfig("sgd", lr=0.5, weight_decay=0.02, bias_lr=4, head_lr=0.25)
    kernels, vectors, head = build_parameter_groups(network, config)
    assert [group["lr"] for group in (kernels, vectors, head)] == [0.5, 2, 0.125]
    assert [group["weight_decay"] for group in (kernels, vectors, head)] == [0.02, 0, 0.08]
    config = OptimizerConfig(
        "muon", lr=0.5, others_lr=0.1, weight_decay=0.02, bias_lr=4, decay_biases=True
    )
    kernels, vectors, head = build_parameter_groups(network, config)
    assert [group["lr"] for group in (kernels, vectors, head)] == [0.5, 0.4, 0.1]
    assert [group["weight_decay"] for group in (kernels, vectors, head)] == [0, 0.005, 0.02]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (ScheduleConfig("constant"), [1, 1, 1, 1, 1]),
        (ScheduleConfig("linear", final=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (
            ScheduleConfig("cosine", final=0.2),
            [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(5)],
        ),
        (ScheduleConfig("step", milestones=(0.5, 0.75), gamma=0.1), [1, 1, 0.1, 0.01, 0.01]),
        (
            ScheduleConfig("linear", warmup=0.5, start=0.1),
            [0.1 + 0.9 / 3, 0.1 + 0.9 * 2 / 3, 1, 0.5, 0],
        ),
    ],
    ids=lambda given: given.name if isinstance(given, ScheduleConfig) else "",
)
def test_schedules_follow_their_formulas(schedule, shares):
    assert [schedule.factor(step, 4) for step in range(5)] == pytest.approx(shares)


class Line(L.LightningModule):
    """One weight, and gradients that are known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def on_train_batch_end(self, *_: object) -> None:
        self.seen.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.filterwarnings("ignore:::lightning")
def test_the_average_of_the_weights_follows_its_formula(tmp_path, every):
    module = Line()
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[WeightAverage(0.5, every)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.tensor([1.0, -2, 3, 5, -1, 2, 4, 1])))
    updates = module.seen[every - 1 :: every]
    average = updates[0]
    for count, weight in enumerate(updates, 1):
        decay = min(0.5, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    assert module.weight.item() == pytest.approx(average, abs=1e-6)


NO_KERNELS = {  # in networks whose parameters of several axes are not all kernels
    "convnext_tiny": "layer_scale",
    "swin_t": "relative_position_bias_table",
    "vit_b_32": "class_token",
}


@pytest.mark.parametrize("name", NO_KERNELS)
def test_only_what_maps_features_is_orthogonalised_and_decays(name):
    with torch.device("meta"):
        network = networks.build(name, 10, 3, 224)
    names = {id(p): n for n, p in network.named_parameters()}
    kernels, vectors, heads = (
        [names[id(p)] for p in group["params"]]
        for group in build_parameter_groups(network, OptimizerConfig("muon", weight_decay=0.1))
    )
    assert heads == ["head.weight"]
    assert len(kernels) + len(vectors) + 1 == len(names)
    assert all(n.endswith("weight") for n in kernels)
    assert all(network.get_parameter(n).ndim > 1 for n in kernels)
    several = {n for n in vectors if network.get_parameter(n).ndim > 1}
    assert any(NO_KERNELS[name] in n for n in several)
    assert not any(n.endswith("weight") for n in several)
