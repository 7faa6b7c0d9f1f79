"""Opacus itself: the same clipped sums and noisy steps from the same gradients, the same epsilon from the same plan."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from confrere.privacy import epsilon
from confrere.privacy.mechanism import Mechanism, clipped_sum, noisy_mean
from confrere.privacy.noise import Source

IMAGES, TOKENS, WIDTH, RANK, CLASSES = 70, 5, 12, 3, 4


class Adapted(nn.Module):
    """A frozen layer with a low-rank branch over tokens, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(tokens) + self.b(self.a(tokens))).mean(1))


def case() -> tuple[Adapted, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = Adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    # Of very different size, so that some gradients are clipped and others are not.
    size = torch.logspace(-1, 1, IMAGES)[:, None, None]
    tokens = size * torch.randn(IMAGES, TOKENS, WIDTH, generator=generator)
    return model, tokens, torch.randint(CLASSES, (IMAGES,), generator=generator)


def ours(model: Adapted, tokens: Tensor, labels: Tensor, clip: float) -> dict[str, Tensor]:
    def loss(params: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, one), label)

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    counts = torch.ones(IMAGES, 1)
    return clipped_sum(loss, fixed, trained, tokens[:, None], labels[:, None], counts, clip)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of Opacus' own hooks
@pytest.mark.parametrize("clip", [0.1, 1.0, 1e6])
def test_clipped_sums_and_steps_are_those_of_opacus(clip: float) -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, tokens, labels = case()
    theirs = GradSampleModule(copy.deepcopy(model))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimiser = DPOptimizer(
        torch.optim.SGD(trained, lr=1.0), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=IMAGES
    )
    nn.functional.cross_entropy(theirs(tokens), labels).backward()
    norms = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in trained]).sum(0).sqrt()
    assert clip == 1e6 or (norms > clip).any()
    optimiser.pre_step()
    found = ours(model, tokens, labels, clip)
    mechanism = Mechanism(unit="record", units=IMAGES, rate=1.0, sigma=0.0, clip=clip, noise_seed=1)
    step = noisy_mean(found, mechanism, Source(1))
    assert len(trained) == len(found) == 4
    for name, parameter in theirs._module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name].float(), parameter.summed_grad, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(step[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")  # it is the same order for both
@pytest.mark.slow
def test_epsilon_is_that_of_opacus_by_renyi_divergence() -> None:
    """G22, on 200 plans."""
    from opacus.accountants import RDPAccountant

    plans = itertools.product((0.7, 1.0, 1.6, 3.0, 8.0), (0.01, 0.05, 0.2, 0.5, 0.9), (1, 30, 200, 1500), (1e-3, 1e-5))
    most, count = 0.0, 0
    for sigma, rate, steps, delta in plans:
        book = RDPAccountant()
        book.history = [(sigma, rate, steps)]
        theirs = book.get_epsilon(delta, alphas=range(2, 65))
        ours = epsilon(sigma, rounds=steps, delta=delta, rate=rate, accountant="rdp")
        if theirs > 0.2:
            assert ours == pytest.approx(theirs, rel=1e-3), (sigma, rate, steps, delta)
            most, count = max(most, abs(ours / theirs - 1)), count + 1
        else:  # we also try larger orders, which are the best ones here
            assert 0 <= ours <= theirs * 1.001, (sigma, rate, steps, delta)
    print(f"\nG22: {count} of 200 plans above 0.2: at most {most:.0e} from Opacus; the others not above it")


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.1, 0.05, 400), (0.8, 0.02, 200), (4.0, 0.5, 60)])
def test_epsilon_is_that_of_opacus_by_privacy_loss(sigma: float, rate: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant

    book = PRVAccountant()
    book.history = [(sigma, rate, steps)]
    theirs = book.get_epsilon(1e-5, eps_error=0.005)
    assert epsilon(sigma, rounds=steps, delta=1e-5, rate=rate) == pytest.approx(theirs, abs=0.006)


@pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")  # of how far Opacus looks, not of its epsilon
@pytest.mark.slow
def test_epsilon_that_runs_print_is_that_of_opacus_by_privacy_loss() -> None:
    """G22, on 24 plans: dp-accounting's PLD, which runs print, beside Opacus' PRV and the error it is asked for."""
    from opacus.accountants import PRVAccountant

    beyond, plans = [], list(itertools.product((0.8, 1.5, 4.0), (0.02, 0.1, 0.3, 0.6), (30, 200)))
    for sigma, rate, steps in plans:
        ours = epsilon(sigma, rounds=steps, delta=1e-5, rate=rate)
        book, error = PRVAccountant(), min(0.01, max(0.001, ours / 1000))
        book.history = [(sigma, rate, steps)]
        theirs = book.get_epsilon(1e-5, eps_error=error)  # the upper end: what it estimates, and its error
        beyond.append((abs(ours - theirs) - error) / theirs)
        assert beyond[-1] < 1e-3, (sigma, rate, steps)
    print(f"\nG22: {len(plans)} plans, PLD at most {max(beyond):.1e} of epsilon beyond what PRV says it may be off")
