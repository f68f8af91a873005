"""The kernels: chunked evaluation, derivatives, memory kept for backward."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lt_det.losses import kernels
from lt_det.losses.bags import group_rows
from lt_det.losses.focal import focal_rows
from lt_det.losses.functional import add_rows, add_vector, subtract_target_margin


@pytest.fixture(params=[1, 200, 10**9], ids=["row by row", "some rows", "all rows"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", request.param)


def draw(num_rows=13, num_classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, num_classes, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    return logits.requires_grad_(), labels


def test_adjusted_cross_entropy_matches_autograd(chunk_bytes):
    logits, labels = draw()
    vector, matrix, margins = torch.randn(7).double(), torch.randn(4, 7).double(), torch.rand(7).double()
    index = torch.arange(13) % 4

    def adjust(z, rows):
        add_vector(vector)(z, rows)
        add_rows(matrix, index)(z, rows)
        subtract_target_margin(margins, labels)(z, rows)

    weights = torch.rand(13, dtype=torch.float64)
    actual = kernels.adjusted_cross_entropy(logits, labels, scale=1.7, adjust=adjust)
    shifted = 1.7 * logits + vector + matrix[index] - F.one_hot(labels, 7) * margins
    expected = F.cross_entropy(shifted, labels, reduction="none")
    torch.testing.assert_close(actual, expected)
    (a,) = torch.autograd.grad((actual * weights).sum(), logits)
    (e,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(a, e)


def grouped(logits, labels, weights=(1.0, 0.5)):
    """``group_rows`` over the odd and the even columns; a label of the other group is at position 0."""
    columns = [torch.arange(start, logits.shape[1], 2) for start in (1, 0)]
    targets = [torch.where(labels % 2 == 1, labels // 2, 0), torch.where(labels % 2 == 0, labels // 2, 0)]
    rows = torch.linspace(0, 1, len(labels), dtype=torch.float64)
    return group_rows(logits, columns, targets, [rows * w for w in weights])


def test_group_rows_matches_autograd(chunk_bytes):
    logits, labels = draw()
    actual = grouped(logits, labels)
    rows = torch.linspace(0, 1, 13, dtype=torch.float64)
    odd, even = logits[:, [1, 3, 5]], logits[:, [0, 2, 4, 6]]
    expected = rows * F.cross_entropy(odd, torch.where(labels % 2 == 1, labels // 2, 0), reduction="none")
    expected = expected + 0.5 * rows * F.cross_entropy(
        even, torch.where(labels % 2 == 0, labels // 2, 0), reduction="none"
    )
    torch.testing.assert_close(actual, expected)
    weights = torch.rand(13, dtype=torch.float64)
    for create_graph in (False, True):
        how = {"retain_graph": True, "create_graph": create_graph}
        (a,) = torch.autograd.grad((actual * weights).sum(), logits, **how)
        (e,) = torch.autograd.grad((expected * weights).sum(), logits, **how)
        torch.testing.assert_close(a, e)
    (a,) = torch.autograd.grad(a.pow(2).sum(), logits)
    (e,) = torch.autograd.grad(e.pow(2).sum(), logits)
    torch.testing.assert_close(a, e)


def test_binary_cross_entropy_matches_autograd(chunk_bytes):
    logits, labels = draw()
    labels = torch.where(torch.arange(13) % 3 == 0, 7, labels)
    negative, positive, vector = torch.rand(7).double(), torch.rand(7).double(), torch.randn(7).double()
    target = F.one_hot(labels, 8)[:, :7].double()
    weight = torch.where(target > 0, positive, negative)
    actual = kernels.binary_cross_entropy(
        logits,
        labels,
        scale=2.0,
        adjust=add_vector(vector),
        negative_weight=negative,
        positive_weight=positive,
    )
    expected = F.binary_cross_entropy_with_logits(2 * logits + vector, target, weight=weight, reduction="none").sum(1)
    torch.testing.assert_close(actual, expected)
    row_weights = torch.rand(13, dtype=torch.float64)
    (a,) = torch.autograd.grad((actual * row_weights).sum(), logits)
    (e,) = torch.autograd.grad((expected * row_weights).sum(), logits)
    torch.testing.assert_close(a, e)


def test_binary_cross_entropy_returns_its_derivative_without_grad_too():
    logits, labels = draw()
    value, derivative = kernels.binary_cross_entropy(logits.detach(), labels, return_gradient=True)
    (expected,) = torch.autograd.grad(kernels.binary_cross_entropy(logits, labels).sum(), logits)
    torch.testing.assert_close(derivative, expected)
    assert not value.requires_grad and not derivative.requires_grad


def test_create_graph_gives_second_derivatives():
    logits, labels = draw(num_rows=4)
    for kernel, plain in (
        (kernels.adjusted_cross_entropy, lambda z: F.cross_entropy(z, labels, reduction="none")),
        (
            kernels.binary_cross_entropy,
            lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(labels, 7).double(), reduction="none").sum(1),
        ),
    ):
        results = []
        for function in (lambda z: kernel(z, labels), plain):
            (gradient,) = torch.autograd.grad(function(logits).pow(2).sum(), logits, create_graph=True)
            (second,) = torch.autograd.grad(gradient.pow(2).sum(), logits)
            results.append(second)
        torch.testing.assert_close(*results)


def test_backward_twice_with_retain_graph():
    logits, labels = draw()
    for kernel in (kernels.adjusted_cross_entropy, kernels.binary_cross_entropy):
        loss = kernel(logits, labels).sum()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (again,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_extreme_logits():
    logits = torch.tensor([[200.0, -200.0, 0.0], [-3e38, 3e38, 0.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    loss = kernels.adjusted_cross_entropy(logits, labels)
    # The label's probability, exp(-400), is 0 in float32; its loss is still exact.
    torch.testing.assert_close(loss, torch.tensor([400.0, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    loss = kernels.binary_cross_entropy(logits.detach()[:1], labels[:1])
    torch.testing.assert_close(loss, torch.tensor([200.0 + 200.0 + 0.6931472]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus(dtype):
    z = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-700, 700, 101)]).to(dtype)
    x = z.double()
    expected = torch.where(x > 0, x + torch.log1p(torch.exp(-x.abs())), torch.log1p(torch.exp(-x.abs())))
    torch.testing.assert_close(
        kernels.softplus(z), expected.to(dtype), rtol=4e-7 if dtype == torch.float32 else 1e-12, atol=0
    )


@pytest.mark.parametrize(
    "kernel, reference, tensors",
    [
        (partial(kernels.adjusted_cross_entropy, adjust=add_vector(torch.randn(50))), F.cross_entropy, 1),
        (partial(focal_rows, alpha=0.25, gamma=2.0), None, 2),
        (grouped, F.cross_entropy, 1),
        (partial(kernels.binary_cross_entropy, adjust=add_vector(torch.randn(50))), None, 2),
    ],
)
def test_memory_kept_for_backward(kernel, reference, tensors):
    """As many (R, C) tensors as PyTorch's own losses keep: the log-softmax, or the logits and one more."""
    logits, labels = torch.randn(64, 50, requires_grad=True), torch.randint(0, 50, (64,))

    def kept(function):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(logits, labels)
        return sum(size >= logits.numel() * 4 for size in storages.values())

    assert kept(lambda z, y: kernel(z, y).mean()) == tensors
    if reference is not None:
        assert kept(reference) == tensors
