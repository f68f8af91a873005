#!/usr/bin/env python
"""Time and memory of every loss in LOSS_REGISTRY against PyTorch's plain losses, in one run.

Softmax-type losses are compared with ``F.cross_entropy``, sigmoid-type ones with
``F.binary_cross_entropy_with_logits``, whose one-hot targets are made outside the timing, but count as its
memory. A repeat is one forward and backward of the reference, then one of the loss; times and
their ratios are medians over repeats.

Memory, in units of what the reference needs:

* kept for backward: bytes of the distinct storages that autograd saves (logits included where they are
  saved);
* peak: the largest sum of live allocations during forward and backward, above what was live before. On the
  CPU from the memory events of PyTorch's profiler, on a GPU from the caching allocator.

On a GPU the table also gives the achieved bandwidth, counting one read of the logits and one write of their
gradient, as a share of the bandwidth of a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from measuring import median_ratio, peak_bytes, synchronize
from tabulate import tabulate

from lt_det.io import write_json_atomically
from lt_det.losses import LOSS_REGISTRY
from lt_det.progress import progress_bar

FEATURES = 1024  # width of the classifier's input, for losses that keep some of it
SIGMOID_LOSSES = {
    "Sigmoid", "Federated", "BalancedSigmoid", "Focal", "EQL", "EQLv2", "DropLoss", "ACSL", "ECM",
}  # fmt: skip


def long_tail_statistics(num_classes: int, num_images: int = 100_170) -> SimpleNamespace:
    """Counts that fall off as LVIS v1's do: from 1 to about 15,000 images, most classes below 100."""
    image_count = torch.logspace(0, 4.2, num_classes).round()
    instance_count = (image_count * torch.linspace(1, 12, num_classes)).round()
    counts = {"image_count": image_count, "instance_count": instance_count}
    return SimpleNamespace(
        **counts,
        num_images=num_images,
        names=None,
        prior=lambda source: counts[source] / counts[source].sum(),
    )


def make_step(name: str, num_rows: int, num_classes: int, device: torch.device, counts=None):
    """(step of the loss, the same of its reference, the reference making its own targets, logits).

    A step takes logits and returns a scalar. ``counts`` are class statistics, by default
    :func:`long_tail_statistics`.
    """
    torch.manual_seed(0)
    counts = long_tail_statistics(num_classes) if counts is None else counts
    instances = torch.from_numpy(np.array(counts.instance_count, dtype=np.float64))
    labels = torch.multinomial(instances, num_rows, replacement=True)
    labels[torch.rand(num_rows) < 0.75] = num_classes  # Detectron2 samples a quarter foreground
    labels = labels.to(device)
    loss = LOSS_REGISTRY.get(name)(num_classes, statistics=counts)
    loss.remember_features(FEATURES)
    loss.to(device)
    loss.prepare()
    width = loss.num_outputs(num_classes)
    logits = (torch.randn(num_rows, width) + loss.initial_bias(num_classes)).to(device)
    if loss.wants_cosine:
        logits = logits.tanh()
    features = torch.randn(num_rows, FEATURES, device=device) if loss.wants_features else None
    classify = torch.nn.Linear(FEATURES, width, device=device)

    def step(z):
        value = loss(z, labels, features=features, classify=classify)
        return sum(value.values()) if isinstance(value, dict) else value

    if name in SIGMOID_LOSSES:

        def one_hot():
            targets = torch.zeros(num_rows, width, device=device)
            rows = (labels < width).nonzero().squeeze(1)
            targets[rows, labels[rows]] = 1.0
            return targets

        def reference(z, targets=None):
            targets = one_hot() if targets is None else targets
            return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / num_rows

        return step, partial(reference, targets=one_hot()), reference, logits

    def reference(z):
        return F.cross_entropy(z, labels)

    return step, reference, reference, logits


def timed(step, logits) -> float:
    z = logits.detach().requires_grad_()
    synchronize(logits.device)
    start = time.perf_counter()
    step(z).backward()
    synchronize(logits.device)
    return time.perf_counter() - start


def kept_bytes(step, logits) -> int:
    """Bytes that autograd keeps between forward and backward."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = step(logits.detach().requires_grad_())
    value.backward()
    return sum(storages.values())


def copy_seconds(logits, repeats: int) -> float:
    target = torch.empty_like(logits)

    def once():
        synchronize(logits.device)
        start = time.perf_counter()
        target.copy_(logits)
        synchronize(logits.device)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(max(5, repeats)))


def bench(name: str, num_rows: int, num_classes: int, device: torch.device, repeats: int) -> dict:
    step, reference, whole_reference, logits = make_step(name, num_rows, num_classes, device)
    for warmup in (reference, step):
        timed(warmup, logits)
    pairs = [(timed(reference, logits), timed(step, logits)) for _ in range(repeats)]
    reference_time, loss_time = (statistics.median(column) for column in zip(*pairs))
    peak_reference, peak = (
        peak_bytes(lambda f=f: f(logits.detach().requires_grad_()).backward(), device) for f in (whole_reference, step)
    )
    kept_reference, kept = kept_bytes(whole_reference, logits), kept_bytes(step, logits)
    row = {
        "loss": name,
        "reference": "binary_cross_entropy_with_logits" if name in SIGMOID_LOSSES else "cross_entropy",
        "time_ratio": median_ratio(*zip(*((ours, theirs) for theirs, ours in pairs))),
        "extra_memory_ratio": peak / peak_reference,
        "kept_memory_ratio": kept / kept_reference,
        "milliseconds": loss_time * 1e3,
        "reference_milliseconds": reference_time * 1e3,
        "peak_megabytes": peak / 2**20,
        "kept_megabytes": kept / 2**20,
        "device": str(device.type),
    }
    if device.type == "cuda":
        # A copy reads and writes the tensor once; so does the least possible forward and backward.
        row["bandwidth_share_of_copy"] = copy_seconds(logits, repeats) / loss_time
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes and fewer repeats (under a minute on two cores)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the table as json")
    parser.add_argument("--rows", type=int, help="RoIs (default 8192; quick 7168)")
    parser.add_argument("--classes", type=int, default=1203, help="foreground classes")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 15; quick 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, and cuda where there is one")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="default: all")
    args = parser.parse_args()
    # Not below 7168 rows: tensors under 32 MiB come from malloc's heap or from fresh pages by chance, which
    # makes times of one and the same operation differ by a factor of three.
    rows = args.rows or (7168 if args.quick else 8192)
    repeats = args.repeats or (5 if args.quick else 15)
    names = args.losses or [name for name, _ in LOSS_REGISTRY]
    devices = [args.device] if args.device else ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

    table = []
    for device in devices:
        for name in progress_bar(names, desc=f"losses on {device}", leave=False):
            table.append(bench(name, rows, args.classes, torch.device(device), repeats))
    print(
        f"({rows}, {args.classes + 1}) float32 logits, forward + backward, {torch.get_num_threads()}"
        f" thread(s), median of {repeats}"
    )
    keys = [
        "loss",
        "reference",
        "device",
        "milliseconds",
        "time_ratio",
        "extra_memory_ratio",
        "kept_memory_ratio",
    ]
    keys += ["bandwidth_share_of_copy"] if "cuda" in devices else []
    print(tabulate([[row.get(key) for key in keys] for row in table], headers=keys, floatfmt=".2f"))
    if args.json:
        write_json_atomically(args.json, {"rows": table})


if __name__ == "__main__":
    main()
