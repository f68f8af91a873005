"""Statistics that losses accumulate: two ranks see what one process would."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lt_det.losses import LOSS_REGISTRY

K = 5
LOSSES = [
    ("Seesaw", {}),
    ("SoftmaxPCB", {}),
    ("EQLv2", {}),
    ("LOCE", {}),
    ("BalancedSoftmax", {"prior": "online"}),
    ("LogitAdjusted", {"prior": "online", "background": "prior"}),
]


def batches(name, options):
    """Three steps of (scores, labels) of both ranks; in the last, the second rank has no RoI at all."""
    generator = torch.Generator().manual_seed(0)
    width = LOSS_REGISTRY.get(name)(K, **options).num_outputs(K)
    for sizes in ((20, 30), (7, 1), (9, 0)):
        yield [
            (torch.randn(n, width, generator=generator), torch.randint(0, K + 1, (n,), generator=generator))
            for n in sizes
        ]


def train(name, options, choose):
    loss = LOSS_REGISTRY.get(name)(K, **options)
    for ranks in batches(name, options):
        loss(*choose(ranks))
    return loss.state_dict()


def train_with_memory(choose):
    """LOCE's memory: the features are four of the scores. Small, so that old features make room."""
    loss = LOSS_REGISTRY.get("LOCE")(K, memory_size=3)
    loss.remember_features(4)
    for ranks in batches("LOCE", {}):
        scores, labels = choose(ranks)
        torch.manual_seed(int(scores.shape[0]))  # ranks draw different features
        loss(scores, labels, features=scores[:, :4], classify=lambda x: torch.cat([x, x[:, :2]], dim=1))
    return loss.state_dict()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    states = [train(name, options, lambda ranks: ranks[rank]) for name, options in LOSSES]
    states.append(train_with_memory(lambda ranks: ranks[rank]))
    torch.save(states, os.path.join(folder, f"{rank}.pth"))
    dist.destroy_process_group()


def together(ranks):
    return tuple(torch.cat(parts) for parts in zip(*ranks))


def test_two_ranks_equal_one_process(server):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, args=(folder,), nprocs=2, start_method="forkserver")
        by_rank = [torch.load(Path(folder) / f"{rank}.pth") for rank in (0, 1)]
    for index, (name, options) in enumerate(LOSSES):
        expected = train(name, options, together)
        assert expected, f"{name} accumulates nothing"
        for states in by_rank:
            torch.testing.assert_close(
                states[index], expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )
    # What is kept is the same everywhere; what each rank draws from it is not, and goes into all ranks' mean scores.
    first, second = (states[-1] for states in by_rank)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    memory = train_with_memory(together)
    assert memory["memory.filled"].tolist() == [3] * K
    assert not torch.equal(first["mean_score"], memory.pop("mean_score"))
    for name, value in memory.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=0)
