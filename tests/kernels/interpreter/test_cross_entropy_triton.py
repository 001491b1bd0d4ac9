"""linear_cross_entropy in Triton's interpreter."""

import pytest
import torch
from oracle import TYPES, no_worse

from onevocab.kernels import tuning
from onevocab.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, ops_triton


@pytest.fixture(autouse=True)
def small_blocks():
    torch.manual_seed(0)
    with tuning.forced(cross_entropy={"BLOCK": 16}):
        yield


def some(rows, vocabulary, dim=8, dropped=0.4):
    hidden, head = torch.randn(rows, dim), torch.randn(vocabulary, dim)
    targets, weights = torch.randint(0, vocabulary, (rows,)), torch.rand(rows) + 0.1
    weights[torch.rand(rows) < dropped] = 0
    weights[0] = 0.7
    return hidden, head, targets, weights


def loss_of(function, targets, weights, z_loss, **more):
    def call(hidden, head):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = function(hidden, head, targets, weights.to(wide), z_loss, **more)
        return sums.loss * 3, sums.nll.detach() + 0 * sums.loss  # so that nll too is compared with the oracle

    return call


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("rows,vocabulary", [(1, 2), (5, 16), (9, 17), (12, 45)])
def test_loss_and_gradients(rows, vocabulary, kind, z_loss):
    hidden, head, targets, weights = some(rows, vocabulary)
    no_worse(loss_of(linear_cross_entropy, targets, weights, z_loss, chunk=4, backend="triton"),
             loss_of(linear_cross_entropy_reference, targets, weights, z_loss), hidden, head, kinds=kind)  # fmt: skip


def test_the_gradient_of_the_z_loss_alone():
    """The z-loss part of the gradient is the difference of two gradients, and linear in the coefficient."""
    hidden, head, targets, weights = some(6, 20)

    def gradients(function, z_loss, **more):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        return torch.autograd.grad(function(*leaves, targets, weights, z_loss, **more).loss, leaves)

    with_z, without = (gradients(linear_cross_entropy, z, backend="triton") for z in (0.5, 0.0))
    exact, exact_without = (gradients(linear_cross_entropy_reference, z) for z in (0.5, 0.0))
    for a, b, c, d in zip(with_z, without, exact, exact_without, strict=True):
        assert (c - d).abs().max() > 0.1
        torch.testing.assert_close(a - b, c - d, rtol=1e-4, atol=1e-5)


def test_bfloat16_hidden_and_a_float32_head():
    hidden, head, targets, weights = some(9, 33)
    hidden = hidden.bfloat16()
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(*leaves, targets, weights, 1e-2, chunk=4, backend="triton")
    ours.loss.backward()
    exact = [hidden.double().requires_grad_(), head.bfloat16().double().requires_grad_()]
    loss = linear_cross_entropy_reference(*exact, targets, weights, 1e-2).loss
    loss.backward()
    assert ours.loss.dtype == leaves[1].grad.dtype == torch.float32
    assert (ours.loss - loss).abs() < 5e-3 * loss
    for a, b in zip(leaves, exact, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-2 * b.grad.abs().max()


def test_rows_that_do_not_count_are_never_looked_at():
    hidden, head, targets, weights = some(7, 11)
    weights[3], hidden[3], targets[3] = 0, float("nan"), -1
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    sums = linear_cross_entropy(*leaves, targets, weights, 1e-3, backend="triton")
    sums.loss.backward()
    assert torch.isfinite(sums.loss) and torch.isfinite(head.grad).all()
    assert (hidden.grad[weights == 0] == 0).all() and (sums.nll[weights == 0] == 0).all()
    assert not sums.nll.requires_grad

    nothing = linear_cross_entropy(*leaves, targets, torch.zeros(7), backend="triton")
    assert nothing.loss == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing.loss, leaves))


def test_targets_outside_the_vocabulary():
    hidden, head, targets, weights = some(3, 5, dropped=0)
    for bad in (5, -1):
        targets[1] = bad
        with pytest.raises(IndexError, match="do not fit 5 ids"):
            linear_cross_entropy(hidden, head, targets, weights, backend="triton")


def test_sharp_and_constant_logits():
    hidden, head, targets, weights = some(4, 40, dropped=0)
    for x in (hidden * 1e4, torch.zeros_like(hidden), -1e4 * torch.ones_like(hidden)):
        exact = linear_cross_entropy_reference(x.double(), head.double(), targets, weights.double(), 1e-4)
        ours = linear_cross_entropy(x, head, targets, weights, 1e-4, backend="triton")
        torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-4)


def test_a_vocabulary_of_256_000_and_the_block_of_the_table():
    with tuning.forced(cross_entropy={"BLOCK": 8192}):
        hidden, head, _, weights = some(3, 256_000, dim=2, dropped=0)
        targets = torch.tensor([0, 255_999, 8192])
        no_worse(loss_of(linear_cross_entropy, targets, weights, 1e-3, backend="triton"),
                 loss_of(linear_cross_entropy_reference, targets, weights, 1e-3), hidden, head)  # fmt: skip


def test_inputs_that_are_not_contiguous_and_targets_in_int32():
    hidden, head, targets, weights = some(6, 9, dim=8)
    expected = linear_cross_entropy_reference(hidden, head, targets, weights)
    wide = torch.randn(6, 2, 8)
    wide[:, 1] = hidden
    got = linear_cross_entropy(wide[:, 1], head.t().contiguous().t(), targets.int(), weights, backend="triton")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_needed(needed):
    hidden, head, targets, weights = some(6, 20)
    leaves = [x.requires_grad_(need) for x, need in zip((hidden, head), needed, strict=True)]
    sums = linear_cross_entropy(*leaves, targets, weights, 1e-2, chunk=2, backend="triton")
    assert sums.loss.requires_grad == any(needed)
    wanted = [x for x in leaves if x.requires_grad]
    if wanted:
        ours = torch.autograd.grad(sums.loss, wanted)
        exact = torch.autograd.grad(linear_cross_entropy_reference(*leaves, targets, weights, 1e-2).loss, wanted)
        torch.testing.assert_close(ours, exact)


def test_a_second_backward_is_refused_not_wrong():
    hidden, head, targets, weights = some(4, 6)
    loss = linear_cross_entropy(hidden.requires_grad_(), head, targets, weights, backend="triton").loss * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_registration():
    hidden, head, targets, weights = some(5, 20)
    args = (hidden.requires_grad_(), head.requires_grad_(), targets, weights, 1e-3, 2, True, True)
    torch.library.opcheck(ops_triton.linear_cross_entropy, args)


def test_one_graph_when_compiled():
    hidden, head, targets, weights = some(5, 20)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]

    def loss(hidden, head):
        return linear_cross_entropy(hidden * 2, head, targets, weights, 1e-3, chunk=2, backend="triton").loss * 3

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, plain = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(ours, plain)


def test_gradients_are_bitwise_the_same_again():
    hidden, head, targets, weights = some(9, 20)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    first, second = (
        torch.autograd.grad(linear_cross_entropy(*leaves, targets, weights, 1e-3, 4, "triton").loss, leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
