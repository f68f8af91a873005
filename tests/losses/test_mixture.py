"""log S_c against the equation in float64, key by key, and against what algebra says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lt_det.gml.mixture import NO_BOX, log_mixture_likelihood
from lt_det.losses.gml import MIN_TEMPERATURE

R, D = 7, 5
LENGTHS = [3, 0, 1, 6, 2]
K, M = len(LENGTHS), sum(LENGTHS)


def unit(rows, generator, dtype=torch.float64, width=D):
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True)).to(dtype)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def naive(queries, keys, offsets, temperature, query_box_ids=None, key_box_ids=None):
    """The equation, a row and a class at a time, differentiable by autograd."""
    table = []
    for r, q in enumerate(queries):
        row = []
        for c in range(len(offsets) - 1):
            products = []
            for m in range(int(offsets[c]), int(offsets[c + 1])):
                if query_box_ids is None or int(query_box_ids[r]) != int(key_box_ids[m]):
                    products.append((q * keys[m]).sum() / temperature[c])
            if products:
                row.append(torch.stack(products).exp().mean().log())
            else:
                row.append(q.new_tensor(-math.inf))
        table.append(torch.stack(row))
    return torch.stack(table)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    temperature = 0.05 + 0.3 * torch.rand(K, generator=generator, dtype=torch.float64)
    return unit(R, generator), unit(M, generator), offsets_of(LENGTHS), temperature


# Row 0 shares a box with a key of class 0, row 1 with the only key of class 2, row 2 with all keys of class
# 4, row 3 with two keys of class 3, the others with none.
QUERY_IDS = torch.tensor([10, 20, 30, 40, 50, 50, 60])
KEY_IDS = torch.tensor([1, 10, 2, 20, 3, 40, 4, 40, 5, 6, 30, 30])
OWN = {"query_box_ids": QUERY_IDS, "key_box_ids": KEY_IDS}


@pytest.mark.parametrize("ids", [{}, OWN], ids=["all", "own"])
def test_value_and_gradient(case, ids):
    *tensors, offsets, temperature = case
    results = []
    for function in (log_mixture_likelihood, naive):
        q, k, t = (x.clone().requires_grad_() for x in (*tensors, temperature))
        log_s = function(q, k, offsets, t, **ids)
        finite = log_s.isfinite()
        weight = torch.arange(R * K, dtype=torch.float64).reshape(R, K).sin()
        (torch.where(finite, log_s, 0.0) * weight).sum().backward()
        results.append((log_s.detach(), q.grad, k.grad, t.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert results[0][0].shape == (R, K) and (results[0][0][:, 1] == -math.inf).all()
    if ids:
        assert results[0][0][1, 2] == results[0][0][2, 4] == -math.inf
        assert results[0][0].isfinite().sum() == R * (K - 1) - 2


@pytest.mark.parametrize("width", [(), (1,), (K,)])
def test_gradcheck(case, width):
    queries, keys, offsets, _ = case
    temperature = torch.full(width, 0.2, dtype=torch.float64)
    occupied = [0, 2, 3, 4]

    def function(q, k, t):
        # Finite entries: finite differences of infinity are not defined.
        log_s = log_mixture_likelihood(q, k, offsets, t, query_box_ids=QUERY_IDS, key_box_ids=KEY_IDS)
        return torch.where(log_s.isfinite(), log_s, 0.0)[:, occupied]

    inputs = [x.clone().requires_grad_() for x in (queries, keys, temperature)]
    assert gradcheck(function, inputs)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    rows=st.integers(0, 4),
    query_ids=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
    key_ids=st.lists(st.integers(-1, 3), min_size=20, max_size=20),
    seed=st.integers(0, 5),
)
def test_any_layout(lengths, rows, query_ids, key_ids, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = unit(rows, generator), unit(sum(lengths), generator)
    query_ids, key_ids = torch.tensor(query_ids[:rows], dtype=torch.int64), torch.tensor(key_ids[: len(keys)])
    key_ids = key_ids.to(torch.int64)
    temperature = torch.full((len(lengths),), 0.1, dtype=torch.float64)
    actual = log_mixture_likelihood(
        queries, keys, offsets_of(lengths), temperature, query_box_ids=query_ids, key_box_ids=key_ids
    )
    assert actual.shape == (rows, len(lengths))
    if rows:
        apart = torch.where(query_ids == NO_BOX, -100, query_ids)  # NO_BOX is equal to nothing
        expected = naive(queries, keys, offsets_of(lengths), temperature, apart, key_ids)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_one_key_a_class_is_the_cosine_over_the_temperature(case):
    queries, keys, _, temperature = case
    log_s = log_mixture_likelihood(queries, keys[:K], torch.arange(K + 1), temperature)
    torch.testing.assert_close(log_s, queries @ keys[:K].T / temperature)


def test_repeating_keys_changes_nothing(case):
    queries, keys, offsets, temperature = case
    twice = log_mixture_likelihood(queries, keys.repeat_interleave(2, 0), 2 * offsets, temperature)
    torch.testing.assert_close(twice, log_mixture_likelihood(queries, keys, offsets, temperature))


def test_infinite_entries_have_no_gradient(case):
    queries, keys, offsets, temperature = case
    inputs = [x.clone().requires_grad_() for x in (queries, keys, temperature)]
    log_s = log_mixture_likelihood(inputs[0], inputs[1], offsets, inputs[2])
    log_s.sum().backward()  # minus infinity, with a gradient of one on every entry
    assert all(x.grad.isfinite().all() for x in inputs)
    assert inputs[2].grad[1] == 0


@pytest.mark.parametrize("length", [1, 5000])
def test_float32_over_the_whole_range(length):
    """From the same vector to the opposite one, at the lowest temperature."""
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    queries = torch.stack([angle.cos(), angle.sin()], dim=1)
    generator = torch.Generator().manual_seed(0)
    spread = 0.1 * torch.rand(length, generator=generator, dtype=torch.float64)
    keys = torch.stack([spread.cos(), spread.sin()], dim=1)
    offsets, temperature = torch.tensor([0, length]), torch.tensor([MIN_TEMPERATURE], dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        q, k, t = (x.to(dtype).requires_grad_() for x in (queries, keys, temperature))
        log_s = log_mixture_likelihood(q, k, offsets, t)
        log_s.sum().backward()
        results.append([x.double() for x in (log_s.detach(), q.grad, k.grad, t.grad)])
    products = queries @ keys.T / MIN_TEMPERATURE
    expected = products.logsumexp(dim=1, keepdim=True) - math.log(length)
    torch.testing.assert_close(results[1][0], expected, rtol=1e-12, atol=1e-10)
    for actual, exact in zip(*results):
        torch.testing.assert_close(actual, exact, rtol=2e-4, atol=2e-4 * exact.abs().max().item())


def test_underflow_stays_finite():
    """Vectors longer than a unit, as rounding or a user may make them: no NaN, no infinity."""
    q, k = torch.tensor([[-3.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 0.0]], requires_grad=True)
    log_s = log_mixture_likelihood(q, k, torch.tensor([0, 1]), 0.05)
    log_s.sum().backward()
    assert log_s.isfinite().all() and q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype):
    queries, keys, offsets, temperature = case
    half = [x.to(dtype).requires_grad_() for x in (queries, keys)]
    full = [x.detach().float().requires_grad_() for x in half]
    expected = log_mixture_likelihood(*full, offsets, temperature.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = log_mixture_likelihood(*half, offsets, temperature.float())
        actual[:, 0].sum().backward()  # within autocast, as few do
    expected[:, 0].sum().backward()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    for x, y in zip(half, full):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad, y.grad.to(dtype))


def test_memory_kept_for_the_backward_pass():
    """One tensor as large as (R, M); besides, only what is there anyway and what is of the size of (R, K)."""
    generator = torch.Generator().manual_seed(0)
    rows, lengths = 64, [40] * 50
    queries, keys = unit(rows, generator, torch.float32), unit(2000, generator, torch.float32)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        log_mixture_likelihood(queries.requires_grad_(), keys.requires_grad_(), offsets_of(lengths), 0.1)
    large = rows * 2000 * 4
    assert sum(size >= large for size in saved.values()) == 1
    assert max(saved.values()) == large


def test_no_rows_and_no_keys(case):
    queries, keys, offsets, temperature = case
    q = queries[:0].clone().requires_grad_()
    k = keys.clone().requires_grad_()
    log_mixture_likelihood(q, k, offsets, temperature).sum().backward()
    assert q.grad.shape == (0, D) and (k.grad == 0).all()
    q = queries.clone().requires_grad_()
    log_s = log_mixture_likelihood(q, keys[:0], torch.zeros(K + 1, dtype=torch.int64), temperature)
    assert (log_s == -math.inf).all()
    torch.where(log_s.isfinite(), log_s, 0.0).sum().backward()
    assert (q.grad == 0).all()


def test_bad_arguments(case):
    queries, keys, offsets, temperature = case
    with pytest.raises(ValueError, match="agree in d"):
        log_mixture_likelihood(queries[:, :3], keys, offsets, temperature)
    with pytest.raises(ValueError, match=r"scalar or have shape \(5,\)"):
        log_mixture_likelihood(queries, keys, offsets, temperature[:3])
    with pytest.raises(ValueError, match="below 0.03 underflow.*0.01"):
        log_mixture_likelihood(queries, keys, offsets, 0.01)
    with pytest.raises(ValueError, match="go together"):
        log_mixture_likelihood(queries, keys, offsets, temperature, query_box_ids=QUERY_IDS)
    with pytest.raises(ValueError, match="box ids must have shapes"):
        log_mixture_likelihood(queries, keys, offsets, temperature, query_box_ids=QUERY_IDS[:2], key_box_ids=KEY_IDS)
