"""Class-wise queues: sizes by the formula, bookkeeping against insertion one by one."""

import copy
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt_det.losses.queues import ClassQueues, queue_sizes

WIDTH = 3


class SlowQueues:
    """A deque a class."""

    def __init__(self, sizes):
        self.queues = [deque(maxlen=size) for size in sizes]

    def insert(self, features, labels, box_ids):
        for feature, label, box_id in zip(features.tolist(), labels.tolist(), box_ids.tolist()):
            self.queues[label].append((box_id, feature))


def held(queues):
    """The (box id, feature) pairs of each class, oldest first."""
    classes = []
    for c, size in enumerate(queues.sizes.tolist()):
        first, filled, position = (int(t[c]) for t in (queues.offsets, queues.filled, queues.position))
        slots = [first + (position - filled + i) % size for i in range(filled)]
        classes.append([(int(queues.box_ids[s]), queues.keys[s].tolist()) for s in slots])
    return classes


def draw_rows(labels, first_id):
    """Features that say which row they are."""
    ids = torch.arange(first_id, first_id + len(labels))
    return ids[:, None].float() + torch.arange(WIDTH) / 4, torch.tensor(labels, dtype=torch.int64), ids


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    batches=st.lists(st.lists(st.integers(0, 4), max_size=25), max_size=6),
)
def test_same_as_insertion_one_by_one(sizes, batches):
    queues, slow, inserted = ClassQueues(sizes, WIDTH), SlowQueues(sizes), 0
    for labels in batches:
        rows = draw_rows([label % len(sizes) for label in labels], inserted)
        inserted += len(labels)
        queues.insert(*rows)
        slow.insert(*rows)
        assert held(queues) == [list(queue) for queue in slow.queues]
        keys, offsets, box_ids = queues.contents()
        assert offsets.diff().tolist() == [len(queue) for queue in slow.queues]
        for c, queue in enumerate(slow.queues):
            of_class = slice(offsets[c], offsets[c + 1])
            assert sorted(zip(box_ids[of_class].tolist(), keys[of_class].tolist())) == sorted(queue)
        assert queues.full == all(len(queue) == queue.maxlen for queue in slow.queues)


def test_the_last_of_an_overflowing_batch_are_kept():
    queues = ClassQueues([2, 1], WIDTH)
    queues.insert(*draw_rows([0, 1, 0, 0, 1, 0, 0], 10))
    assert [[box_id for box_id, _ in rows] for rows in held(queues)] == [[15, 16], [14]]
    assert queues.position.tolist() == [1, 0] and queues.full


def test_the_order_of_rows_does_not_matter():
    """Rows come in another order from another number of ranks."""
    features, labels, ids = draw_rows([0, 1, 0, 0, 1, 0, 0, 1], 10)
    one, other = ClassQueues([3, 2], WIDTH), ClassQueues([3, 2], WIDTH)
    shuffled = torch.tensor([5, 0, 7, 2, 4, 6, 1, 3])
    one.insert(features, labels, ids)
    other.insert(features[shuffled], labels[shuffled], ids[shuffled])
    assert held(one) == held(other)


def test_layout():
    queues = ClassQueues(torch.tensor([2, 1, 3]), WIDTH)
    assert queues.keys.shape == (6, WIDTH) and queues.keys.is_contiguous()
    assert queues.offsets.tolist() == [0, 2, 3, 6]
    assert queues.class_of_slot.tolist() == [0, 0, 1, 2, 2, 2]
    assert (queues.box_ids == -1).all() and not queues.full
    keys, offsets, box_ids = queues.contents()
    assert keys.shape == (0, WIDTH) and offsets.tolist() == [0, 0, 0, 0] and box_ids.shape == (0,)


def test_no_gradient_and_the_dtype_of_the_queue():
    queues = ClassQueues([2, 2], WIDTH, dtype=torch.bfloat16)
    features = (torch.rand(3, WIDTH) + 1 / 3).requires_grad_()
    queues.insert(features, torch.tensor([1, 0, 1]), torch.arange(3))
    keys, _, box_ids = queues.contents()
    assert keys.dtype == torch.bfloat16 and not keys.requires_grad
    assert torch.equal(keys, features.detach()[box_ids].bfloat16())


@given(
    counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=30),
    base=st.integers(1, 5),
    spare=st.integers(0, 500),
    factor=st.sampled_from([2, 8, 1024]),
)
def test_sizes(counts, base, spare, factor):
    total = base * len(counts) + spare
    sizes = queue_sizes(counts, total, base)
    assert sizes.dtype == torch.int64 and int(sizes.sum()) == total
    for size, count in zip(sizes.tolist(), counts):
        assert abs(size - (base + spare * count / sum(counts))) < 1 + 1e-9
        assert size >= base
    ordered = [size for _, size in sorted(zip(counts, sizes.tolist()))]
    assert all(a <= b + 1 for a, b in zip(ordered, ordered[1:]))
    assert torch.equal(queue_sizes([count * factor for count in counts], total, base), sizes)


def test_sizes_by_hand():
    # 10 - 3 = 7 slots shared by 6 : 3 : 1 are 4.2, 2.1, 0.7; what is left goes to the largest remainder.
    assert queue_sizes([6, 3, 1], 10, 1).tolist() == [5, 3, 2]
    # Equal remainders: the first class.
    assert queue_sizes([1, 1], 5, 1).tolist() == [3, 2]


def test_impossible_sizes():
    with pytest.raises(ValueError, match=r"GML.QUEUE_SIZE \(queue_size\) is 8.*GML.QUEUE_BASE.*take 9"):
        queue_sizes([1, 2, 3], 8, 3)
    with pytest.raises(ValueError, match="QUEUE_BASE.*at least 1"):
        queue_sizes([1, 2, 3], 8, 0)
    with pytest.raises(ValueError, match=r"class_counts.*1 \(0\)"):
        queue_sizes([1, 0, 3], 8, 1)
    with pytest.raises(ValueError, match="positive"):
        ClassQueues([2, 0], WIDTH)
    with pytest.raises(ValueError, match="float16"):
        ClassQueues([2, 1], WIDTH, dtype=torch.float16)


def test_bad_rows():
    queues = ClassQueues([2, 1], WIDTH)
    features, labels, box_ids = draw_rows([0, 1], 0)
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        queues.insert(features[:, :2], labels, box_ids)
    with pytest.raises(ValueError, match="labels must have shape"):
        queues.insert(features, labels[:1], box_ids)
    with pytest.raises(ValueError, match="box_ids must have shape"):
        queues.insert(features, labels, box_ids[:1])
    for label in (-1, 2):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
            queues.insert(features, torch.tensor([0, label]), box_ids)
    assert not queues.filled.any()


def test_state_dict_continues():
    queues = ClassQueues([2, 3], WIDTH)
    queues.insert(*draw_rows([0, 1, 0, 1, 0], 0))
    state = copy.deepcopy(queues.state_dict())
    assert set(state) == {"keys", "box_ids", "filled", "position", "sizes"}
    resumed = ClassQueues([2, 3], WIDTH)
    resumed.load_state_dict(state)
    for other in (queues, resumed):
        other.insert(*draw_rows([1, 1, 0], 5))
    assert held(resumed) == held(queues)
    with pytest.raises(RuntimeError, match="QUEUE_SIZE or GML.QUEUE_BASE have changed"):
        ClassQueues([3, 2], WIDTH).load_state_dict(state)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 70), (torch.bfloat16, 35)])
def test_memory_for_lvis(dtype, limit):
    queues = ClassQueues(queue_sizes(torch.logspace(0, 5, 1203), 16384, 3), 1024, dtype=dtype)
    size = sum(buffer.numel() * buffer.element_size() for buffer in queues.buffers())
    assert size < limit * 1e6
    assert queues.megabytes == pytest.approx(size / 1e6)
