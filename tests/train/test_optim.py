"""The optimizers' mathematics, and the parameter groups they treat differently."""

import copy
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
def test_orthogonalize_brings_large_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, before, vh = torch.linalg.svd(matrix, full_matrices=False)

    result = u.T @ orthogonalize(matrix) @ vh.T

    off_diagonal = result - result.diag().diag()
    assert off_diagonal.abs().max() < 1e-9  # the singular vectors stay
    after = result.diag()
    share = before / before.norm()
    is_large = share >= 1 / 50
    assert is_large.sum() > len(share) / 2
    assert ((after > 0.68) & (after < 1.21))[is_large].all()
    assert (after <= 3.4445**3 * share)[~is_large].all()


def test_muon_orthogonalizes_nesterov_momentum_and_holds_the_norm():
    generator = torch.Generator().manual_seed(1)
    kernel = torch.nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator))
    muon = Muon([{"params": [kernel], "muon": True}], lr=0.1, momentum=0.6)
    expected = kernel.detach().clone()
    velocity = torch.zeros_like(kernel)

    for _ in range(3):
        gradient = torch.randn(8, 3, 3, 3, generator=generator)
        kernel.grad = gradient.clone()
        muon.step()

        velocity = 0.6 * velocity + gradient
        update = orthogonalize((gradient + 0.6 * velocity).flatten(1)).view_as(expected)
        expected = expected * (8**0.5 / expected.norm()) - 0.1 * update
        assert torch.allclose(kernel, expected, atol=1e-5)


def make_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 5))


def run_steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    for step in range(4):
        parameter.grad = torch.arange(5.0) - step
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_updates_other_parameters_like_torch_sgd(momentum):
    parameter = make_parameter()
    group = {"params": [parameter], "weight_decay": 0.01}
    run_steps(Muon([group], lr=0.1, others_momentum=momentum), parameter)

    expected = make_parameter()
    nesterov = momentum > 0
    sgd = torch.optim.SGD([expected], 0.1, momentum, weight_decay=0.01, nesterov=nesterov)
    run_steps(sgd, expected)

    assert torch.allclose(parameter, expected)


def test_muon_updates_other_parameters_like_torch_adamw():
    parameter = make_parameter()
    group = {"params": [parameter], "weight_decay": 0.01}
    run_steps(Muon([group], lr=0.1, others="adamw"), parameter)

    expected = make_parameter()
    run_steps(torch.optim.AdamW([expected], 0.1, weight_decay=0.01), expected)

    assert torch.allclose(parameter, expected, atol=1e-6)


@pytest.mark.parametrize("others", ["sgd", "adamw"])
def test_muon_continues_exactly_from_its_state_dict(others):
    def build(kernel: torch.nn.Parameter, vector: torch.nn.Parameter) -> Muon:
        groups = [{"params": [kernel], "muon": True}, {"params": [vector]}]
        return Muon(groups, lr=0.1, others=others)

    def run(muon: Muon, steps: range) -> None:
        kernel, vector = (group["params"][0] for group in muon.param_groups)
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            kernel.grad = torch.randn(4, 2, 3, 3, generator=generator)
            vector.grad = torch.randn(5, generator=generator)
            muon.step()

    kernel = torch.nn.Parameter(torch.ones(4, 2, 3, 3))
    vector = make_parameter()
    muon = build(kernel, vector)
    run(muon, range(3))
    resumed_kernel = torch.nn.Parameter(kernel.detach().clone())
    resumed_vector = torch.nn.Parameter(vector.detach().clone())
    resumed = build(resumed_kernel, resumed_vector)
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))

    run(muon, range(3, 6))
    run(resumed, range(3, 6))

    assert torch.equal(resumed_kernel, kernel)
    assert torch.equal(resumed_vector, vector)


def test_groups_have_their_own_rates_and_decay_by_the_same_share():
    """A step takes off lr times weight_decay, which is the same for all groups that decay."""
    network = networks.build("convnet", 10, 1, 8)
    config = OptimizerConfig("sgd", lr=0.5, weight_decay=0.02, bias_lr=4, head_lr=0.25)
    groups = build_parameter_groups(network, config)
    assert [group["lr"] for group in groups] == [0.5, 2, 0.125]
    assert [group["weight_decay"] for group in groups] == [0.02, 0, 0.08]

    config = OptimizerConfig(
        "muon", lr=0.5, others_lr=0.1, weight_decay=0.02, bias_lr=4, decay_biases=True
    )
    groups = build_parameter_groups(network, config)
    assert [group["lr"] for group in groups] == [0.5, 0.4, 0.1]
    assert [group["weight_decay"] for group in groups] == [0, 0.005, 0.02]


COSINE = [0.2 + 0.4 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (ScheduleConfig("constant"), [1, 1, 1, 1, 1]),
        (ScheduleConfig("linear", final=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (ScheduleConfig("cosine", final=0.2), COSINE),
        (ScheduleConfig("step", milestones=(0.5, 0.75), gamma=0.1), [1, 1, 0.1, 0.01, 0.01]),
        (
            ScheduleConfig("linear", warmup=0.5, start=0.1),
            [0.1 + 0.9 / 3, 0.1 + 0.9 * 2 / 3, 1, 0.5, 0],
        ),
    ],
    ids=["constant", "linear", "cosine", "step", "warm-up"],
)
def test_schedules_follow_their_formulas(schedule, factors):
    assert [schedule.factor(step, 4) for step in range(5)] == pytest.approx(factors)


class OneWeight(L.LightningModule):
    """A module with one weight, whose gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.weights_after_steps: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def on_train_batch_end(self, *_: object) -> None:
        self.weights_after_steps.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("every_steps", [1, 2])
@pytest.mark.filterwarnings("ignore:::lightning")
def test_average_of_the_weights_follows_its_formula(tmp_path, every_steps):
    module = OneWeight()
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[WeightAverage(0.5, every_steps)],
    )
    data = torch.tensor([1.0, -2, 3, 5, -1, 2, 4, 1])

    trainer.fit(module, torch.utils.data.DataLoader(data))

    averaged = module.weights_after_steps[every_steps - 1 :: every_steps]
    average = averaged[0]
    for update, weight in enumerate(averaged, 1):
        decay = min(0.5, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weight
    assert module.weight.item() == pytest.approx(average, abs=1e-6)


# Parameters with several axes that are not kernels.
NOT_KERNELS = {
    "swin_tiny_patch4_window7_224": "relative_position_bias_table",
    "vit_tiny_patch16_224": "cls_token",
}


@pytest.mark.parametrize("name", NOT_KERNELS)
def test_only_kernels_are_orthogonalized_and_decay(name):
    with torch.device("meta"):
        network = networks.build(name, 10, 3, 224)
    name_of_id = {id(parameter): n for n, parameter in network.named_parameters()}
    names_of_groups: list[list[str]] = []
    for group in build_parameter_groups(network, OptimizerConfig("muon", weight_decay=0.1)):
        names_of_groups.append([name_of_id[id(parameter)] for parameter in group["params"]])

    kernels, vectors, heads = names_of_groups

    assert heads == ["head.weight"]
    assert len(kernels) + len(vectors) + 1 == len(name_of_id)
    assert all(kernel.endswith("weight") for kernel in kernels)
    assert all(network.get_parameter(kernel).ndim > 1 for kernel in kernels)
    with_several_axes = [v for v in vectors if network.get_parameter(v).ndim > 1]
    assert any(NOT_KERNELS[name] in vector for vector in with_several_axes)
    assert not any(vector.endswith("weight") for vector in with_several_axes)
