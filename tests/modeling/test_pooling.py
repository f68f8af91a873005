"""RoIAlign by points against torchvision's."""

import platform

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given
from hypothesis import strategies as st

from lt_det.modeling.pooling import LongTailROIAlign, pool_by_points

SIZE = (3, 5)


def assert_same(ours, theirs):
    """Bit for bit where compilers do not contract a product and a sum; in float64 the two are close anywhere."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if platform.machine() in ("x86_64", "AMD64"):
        assert torch.equal(ours, theirs)
    else:
        rtol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 9),
    rois=st.integers(0, 12),
    scale=st.sampled_from([1.0, 0.25, 1 / 32]),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_torchvision(seed, height, width, channels, rois, scale, ratio, aligned, dtype):
    """RoIs inside, across the border, outside, of no size and turned inside out; the gradient too."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, channels, height, width, generator=generator, dtype=dtype)
    corner = (torch.rand(rois, 2, generator=generator) * 1.6 - 0.3) * torch.tensor([width, height]) / scale
    extent = (torch.rand(rois, 2, generator=generator) ** 3 * 40 - 2).round(decimals=1)
    of_image = torch.randint(2, (rois, 1), generator=generator).float()
    boxes = torch.cat([of_image, corner, corner + extent], dim=1)
    stock, ours = (cls(SIZE, scale, ratio, aligned) for cls in (ROIAlign, LongTailROIAlign))
    assert ours._is_computed_here(maps, boxes)
    wanted = [maps.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        pooled = [align(leaf, boxes) for align, leaf in zip((ours, stock), wanted)]
    assert pooled[0].is_contiguous()
    assert_same(*pooled)
    grad = torch.randn(pooled[0].shape, generator=generator, dtype=dtype)
    for out in pooled:
        out.backward(grad)
    assert_same(*(leaf.grad for leaf in wanted))


def test_by_hand():
    """A RoI of one cell in the middle of four pixels: their mean. Moved by half a pixel: two of them."""
    maps = torch.tensor([[1.0, 2.0], [4.0, 9.0]]).reshape(1, 1, 2, 2)
    align = LongTailROIAlign((1, 1), 1.0, 1)
    assert align(maps, torch.tensor([[0.0, 0.5, 0.5, 1.5, 1.5]])).item() == 4
    assert align(maps, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.5]])).item() == 2.5


def test_gradient():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 0.5, 1.2, 5.0, 4.0], [1, -2.0, 3.0, 3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    align = LongTailROIAlign(SIZE, 1.0, 2)
    assert torch.autograd.gradcheck(lambda x: align(x, boxes), [maps])
    once = torch.autograd.grad(align(maps, boxes).square().sum(), [maps, boxes], create_graph=True, allow_unused=True)
    assert once[1] is None  # as torchvision's
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once[0].sum().backward()


def test_infinite_gradients_stay_where_they_are():
    """A point outside of the map has no part in it, not one of infinity times 0."""
    boxes = torch.tensor([[0.0, -9.0, -9.0, 2.0, 2.0]])
    grads = []
    for cls in (LongTailROIAlign, ROIAlign):
        maps = torch.zeros(1, 1, 4, 4, requires_grad=True)
        out = cls((3, 3), 1.0, 1)(maps, boxes)
        out.backward(torch.full_like(out, float("inf")))
        grads.append(maps.grad)
    assert grads[0].isfinite().any() and not grads[0].isfinite().all()
    torch.testing.assert_close(*grads, equal_nan=True)


def test_not_finite_and_other_types_go_to_torchvision():
    maps, box = torch.rand(1, 2, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    align = LongTailROIAlign(SIZE, 1.0, 0)
    assert align._is_computed_here(maps, box)
    assert not align._is_computed_here(maps, torch.full((1, 5), float("nan")))
    assert not align._is_computed_here(maps.half(), box)
    assert not align._is_computed_here(maps.to("meta"), box)
    traced = torch.jit.trace(align, (maps, box), check_trace=False)
    torch.testing.assert_close(traced(maps, box), align(maps, box))
    torch.testing.assert_close(torch.jit.script(align)(maps, box), align(maps, box))


def test_pooler_of_several_maps():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 4, 64 >> level, 96 >> level, generator=generator) for level in range(2)]
    corner = torch.rand(2, 30, 2, generator=generator) * 150
    extent = torch.rand(2, 30, 2, generator=generator) ** 2 * 250 + 1
    boxes = [Boxes(torch.cat([a, a + e], dim=1)) for a, e in zip(corner, extent)]
    how = {"scales": (1 / 4, 1 / 8), "sampling_ratio": 0, "canonical_level": 3}
    stock, ours = (ROIPooler(7, pooler_type="ROIAlignV2", **how) for _ in range(2))
    assert pool_by_points(ours) is ours and not torch.equal(stock(maps, boxes), torch.zeros(60, 4, 7, 7))
    assert_same(ours(maps, boxes), stock(maps, boxes))
    other = pool_by_points(ROIPooler(7, pooler_type="ROIPool", **how))
    assert not any(isinstance(m, LongTailROIAlign) for m in other.modules())


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_all_heads_have_it(kind, stock_cfg, swap):
    heads = build_model(swap(stock_cfg(kind), kind)).roi_heads
    aligns = [module for module in heads.modules() if isinstance(module, ROIAlign)]
    assert aligns and all(type(align) is LongTailROIAlign for align in aligns)
