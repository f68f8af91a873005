"""CUDA without a GPU: tensors that have a device, a dtype and a shape but no values, and a record of every place where
the host would wait for the device.

``FakeTensorMode`` raises where tensors of two devices meet. Where a value or a shape depends on data, the mode
:class:`Waits` notes who asked and answers with a made-up one, so that the code runs on.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parent.parent

aten = torch.ops.aten
# Kernels that read a value or a size back to the host on CUDA, and what a reader would call them.
READS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "masked_select": "boolean index",
    "bincount": "bincount",
    "multinomial": "multinomial",
    "isin": "isin",
    "equal": "equal",
    "repeat_interleave": "repeat_interleave",
    "nms": "nms",
}
_SCALARS = {torch.bool: True, torch.int64: 2, torch.int32: 2}


def _made_up_size(number: int) -> int:
    """What a mask of ``number`` elements selects: the same for all masks of one length."""
    return math.ceil(number / 2)


def _reads_nothing(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a kernel of ``READS`` was called in the form that stays on the device."""
    if name == "multinomial":
        return bool(kwargs.get("replacement", len(args) > 2 and args[2]))
    return name == "repeat_interleave" and kwargs.get("output_size") is not None


class Waits(TorchDispatchMode):
    """Records where the host waits for a (fake) GPU.

    Attributes:
        places: from (file, function) of ``lt_det`` to what it does there. What Detectron2 does itself is left out.
    """

    def __init__(self):
        super().__init__()
        self.places: dict[tuple[str, str], set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1].removesuffix("_")
        on_gpu = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cuda"]
        if name in ("index", "index_put", "_unsafe_index", "_index_put_impl") and on_gpu:
            return self._index(func, name, args, kwargs)
        if name in ("_to_copy", "copy", "_copy_from"):
            source, target = (args[1], args[0]) if name != "_to_copy" else (args[0], None)
            device = kwargs.get("device") if target is None else target.device
            if device is not None and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                kinds = {source.device.type, torch.device(device).type}
                # A number on the host that becomes a fill is none: torch makes it on the device.
                if kinds == {"cpu", "cuda"}:
                    self._note("copy to the host" if source.device.type == "cuda" else "copy from the host")
        elif name in READS and not _reads_nothing(name, args, kwargs):
            if on_gpu:  # on the host nothing waits, but fake tensors have no answer there either
                self._note(READS[name])
            return self._answer(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _index(self, func, name, args, kwargs):
        indices = [i for i in args[1] if i is not None]
        if any(i.device.type == "cpu" for i in indices):
            self._note("copy from the host")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            fill = "put" in name and not (len(args) > 3 and args[3]) and args[2].numel() == 1
            if not (fill and args[2].device.type == "cpu"):  # that one is a masked_fill
                self._note("boolean index")
            indices = []
            for i in args[1]:
                if i is not None and i.dtype in (torch.bool, torch.uint8):
                    size = _made_up_size(i.numel())
                    indices += [torch.zeros(size, dtype=torch.int64, device=i.device) for _ in range(i.dim())]
                else:
                    indices.append(i)
            args = (args[0], indices, *args[2:])
        return func(*args, **kwargs)

    def _answer(self, func, name, args, kwargs):
        x = args[0]
        if name == "_local_scalar_dense":
            return _SCALARS.get(x.dtype, 0.5)
        if name == "nonzero":
            return torch.zeros(_made_up_size(x.numel()), x.dim(), dtype=torch.int64, device=x.device)
        if name == "nms":
            return torch.zeros(_made_up_size(x.shape[0]), dtype=torch.int64, device=x.device)
        if name == "bincount":
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 0) or 5
            return torch.zeros(size, dtype=torch.int64, device=x.device)
        if name == "masked_select":
            return x.new_zeros(_made_up_size(x.numel()))
        if name in ("_unique2", "unique_consecutive"):
            size, long = _made_up_size(x.numel()), {"dtype": torch.int64, "device": x.device}
            return x.new_zeros(size), torch.zeros(x.shape, **long), torch.zeros(size, **long)
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if "detectron2" in path.parts:
                return
            if path.is_relative_to(REPO / "lt_det"):
                self.places[path.relative_to(REPO).as_posix(), frame.f_code.co_name].add(what)
                return
            frame = frame.f_back


# ------------------------------------------------------------------------------------------ the backward pass


def _gradients(outputs, inputs, grad_outputs=None) -> list[Tensor | None]:
    """What ``torch.autograd.grad`` returns, node by node: its engine wants a CUDA context for nodes on CUDA."""
    starts = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if grad_outputs is None:
        grad_outputs = [None] * len(starts)
    seeds = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    wanted: dict = defaultdict(list)
    for position, tensor in enumerate(inputs):
        wanted[_node(tensor)].append((position, tensor))
    order, seen = [], set()

    def visit(node):
        stack = [(node, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((n, False) for n, _ in node.next_functions if n is not None)

    pending: dict = defaultdict(dict)

    def add(node, slot, gradient):
        if gradient is not None:
            form = node._input_metadata[slot]  # the engine undoes broadcasting and promotion too
            gradient = gradient.sum_to_size(form.shape).to(form.dtype)
            known = pending[node].get(slot)
            pending[node][slot] = gradient if known is None else known + gradient

    found: list[Tensor | None] = [None] * len(inputs)
    with torch.no_grad():
        for output, seed in zip(starts, seeds):
            node, slot = _node(output)
            visit(node)
            add(node, slot, torch.ones_like(output) if seed is None else seed)
        for node in reversed(order):
            slots = pending.pop(node, {})
            for (n, slot), tensors in wanted.items():
                if n is node:
                    for position, _ in tensors:
                        found[position] = slots.get(slot)
            if not slots or type(node).__name__ == "AccumulateGrad":
                continue
            results = _call(node, [slots.get(i) for i in range(len(node._input_metadata))])
            for (following, slot), gradient in zip(node.next_functions, results):
                if following is not None:
                    add(following, slot, gradient)
    return found


def _node(tensor: Tensor):
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return torch.autograd.graph.get_gradient_edge(tensor).node, 0


_TENSOR_ARGUMENTS: dict = {}  # of nodes of Python functions: which of their arguments are tensors
_apply = vars(torch.autograd.Function)["apply"]  # a class method, of Python or of C by version


def _noting_apply(cls, *args, **kwargs):
    outputs = _apply.__get__(None, cls)(*args, **kwargs)
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    if first.grad_fn is not None:
        _TENSOR_ARGUMENTS[first.grad_fn] = [isinstance(a, Tensor) for a in args]
    return outputs


def _call(node, gradients: list[Tensor | None]) -> tuple:
    """A node's backward pass: the gradient for each of ``node.next_functions``."""
    if not hasattr(node, "_forward_cls"):
        results = node(*gradients)
        return results if isinstance(results, tuple) else (results,)
    full = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
        for g, m in zip(gradients, node._input_metadata)
    ]
    results = node._forward_cls.backward(node, *full)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(r for r, is_tensor in zip(results, _TENSOR_ARGUMENTS[node]) if is_tensor)


def _grad(outputs, inputs, grad_outputs=None, create_graph=False, allow_unused=False, **_):
    assert not create_graph, "no second derivative without the engine"
    several = not isinstance(inputs, Tensor)
    found = _gradients(outputs, list(inputs) if several else [inputs], grad_outputs)
    assert allow_unused or all(f is not None for f in found), "an input has no gradient"
    return tuple(found)


def backward(output: Tensor) -> None:
    """``output.backward()``: fill ``.grad`` of all parameters that it depends on."""
    nodes, seen, parameters = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            if type(node).__name__ == "AccumulateGrad":
                parameters.append(node.variable)
    for parameter, gradient in zip(parameters, _gradients(output, parameters)):
        if gradient is not None:
            assert (gradient.shape, gradient.device) == (parameter.shape, parameter.device), (gradient, parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _to(module: nn.Module, *args, **kwargs) -> nn.Module:
    """``module.to(...)``, which makes its real tensors fake; torch's own does not know how."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                wanted = dtype if old.is_floating_point() else None
                stays = device is None or device.type == old.device.type
                if isinstance(old, FakeTensor) and stays and wanted in (None, old.dtype):
                    continue
                fake = old if isinstance(old, FakeTensor) else mode.from_tensor(old)
                new = fake.detach().to(device, wanted)
                tensors[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return module


@contextmanager
def fake_cuda():
    """Within, ``device="cuda"`` makes fake tensors, ``module.to("cuda")`` works and so does ``torch.autograd.grad``."""
    with (
        FakeTensorMode(),
        mock.patch.object(nn.Module, "to", _to),
        mock.patch("torch.autograd.grad", _grad),
        mock.patch.object(Tensor, "backward", backward),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_noting_apply)),
    ):
        yield
    _TENSOR_ARGUMENTS.clear()
