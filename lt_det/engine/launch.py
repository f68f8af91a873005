"""From one command to the processes of a run: this one, Detectron2's launcher, torchrun, or Slurm's srun."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from lt_det.arguments import argument_parser
from lt_det.processes import end_with_parent
from lt_det.tool import INTERRUPTED, run_tool

# Seconds that processes get, after Ctrl-C, to say what was kept and to end by themselves.
INTERRUPT_PATIENCE = 5.0
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How gloo and NCCL say that another process is gone.
_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process exited",
)
_GONE += ("timed out waiting", "connection refused", "nccl communicator was aborted", "watchdog caught collective")


def launch_main(run_one: Callable[[argparse.Namespace], object], args: argparse.Namespace | None = None) -> None:
    """Run a tool's main function in as many processes as its command line, or the environment, asks for.

    With torchrun's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``, and
    ``LOCAL_WORLD_SIZE`` unless all processes are on one machine) this process is one of a run's; otherwise
    ``--num-gpus`` processes are started here, on each of ``--num-machines``, by Detectron2's launcher. A run that
    torchrun starts again goes on from its last checkpoint.

    Args:
        run_one: called with ``args`` in each process.
        args: with Detectron2's arguments; by default those of this process's command line.
    """

    def start() -> None:
        options = argument_parser().parse_args() if args is None else args
        if started_by_torchrun(os.environ):
            _run_as_rank(run_one, options)
        elif options.num_gpus * options.num_machines > 1:
            _start_processes(run_one, options)
        else:
            run_one(options)

    run_tool(start)


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or what speaks its language, started this process.

    Raises:
        ValueError: if ``RANK`` and ``WORLD_SIZE`` are set and what belongs to them is not.
    """
    missing = [name for name in _TORCHRUN if name not in environment]
    if "RANK" in environment and "WORLD_SIZE" in environment and missing:
        raise ValueError(
            f"the environment has RANK and WORLD_SIZE but not {', '.join(missing)}; start the processes by torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    return not missing


def _processes_per_machine(environment: Mapping[str, str]) -> int:
    world = int(environment["WORLD_SIZE"])
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    if local < 1 or world % local:
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {local} and WORLD_SIZE {world}: every machine must have the same number of processes"
        )
    return local


def _run_as_rank(run_one: Callable, args: argparse.Namespace) -> None:
    """This process is one of torchrun's."""
    local_size = _processes_per_machine(os.environ)
    world, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if args.num_gpus not in (1, local_size) or args.num_machines not in (1, world // local_size):
        raise ValueError(
            f"torchrun has started {local_size} processes on each of {world // local_size} machines, and the command "
            f"line says --num-gpus {args.num_gpus} --num-machines {args.num_machines}; leave these two to torchrun"
        )
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        args.resume = True  # what the processes before this one have done is kept
    end_with_parent()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
    store, rank, world = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    store = _store_of_this_start(store, rank, world)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=DEFAULT_TIMEOUT
    )
    comm.create_local_process_group(local_size)
    comm.synchronize()
    _guarded(run_one, args)


def _store_of_this_start(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store in which nothing is older than this start of the processes.

    When torchrun starts processes again it may give them the store of those before, with the addresses of the dead, and
    neither a restart count nor a round that all machines agree on. So process 0 names a part, and hands the name to
    each other process under a word that this one has just made up; what it reads first may be the word of a dead one.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"lt_det/word/{rank}", word)
        name = store.get(f"lt_det/name/{word}").decode()
        store.set(f"lt_det/seen/{name}/{rank}", "1")
        return dist.PrefixStore(f"lt_det/{name}", store)
    told: set[str] = set()
    waiting = set(range(1, world))
    deadline = time.monotonic() + DEFAULT_TIMEOUT.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"lt_det/word/{other}"]):
                theirs = store.get(f"lt_det/word/{other}").decode()
                if theirs not in told:
                    store.set(f"lt_det/name/{theirs}", word)
                    told.add(theirs)
            if store.check([f"lt_det/seen/{word}/{other}"]):
                waiting.discard(other)
        if waiting:
            if time.monotonic() > deadline:
                raise ConnectionError(f"processes {sorted(waiting)} of {world} did not come within {DEFAULT_TIMEOUT}")
            time.sleep(0.05)
    return dist.PrefixStore(f"lt_det/{word}", store)


def _start_processes(run_one: Callable, args: argparse.Namespace) -> None:
    """Detectron2's launcher, and an end of all processes if one of them, or this one, ends."""
    try:
        launch(
            _guarded_child,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(run_one, args),
        )
    except KeyboardInterrupt:
        told = [child.exitcode for child in _end_children(INTERRUPT_PATIENCE)]
        if INTERRUPTED in told:
            sys.exit(INTERRUPTED)  # process 0 has said what was kept
        raise
    except torch.multiprocessing.ProcessExitedException as error:
        _end_children()
        code = error.exit_code
        if code == INTERRUPTED:
            sys.exit(INTERRUPTED)
        if code != 1:  # with 1 the process has said what was wrong
            how = error.signal_name or f"status {code}"
            print(
                f"{os.path.basename(sys.argv[0])}: process {error.error_index} of this machine was ended ({how}), so "
                "all were; go on with --resume",
                file=sys.stderr,
            )
        sys.exit(1)


def _end_children(patience: float = 0.0) -> list[multiprocessing.Process]:
    """End the processes that were started here: after ``patience`` seconds by SIGTERM, then by SIGKILL."""
    children = multiprocessing.active_children()
    for end, seconds in ((None, patience), ("terminate", 5.0), ("kill", 5.0)):
        deadline = time.monotonic() + seconds
        for child in children:
            if end and child.is_alive():
                getattr(child, end)()
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
    return children


def _guarded_child(run_one: Callable, args: argparse.Namespace) -> None:
    end_with_parent()
    _guarded(run_one, args)


def _guarded(run_one: Callable, args: argparse.Namespace) -> None:
    """One process of several: what ended it is said once, by the first that knows."""

    def one() -> object:
        try:
            result = run_one(args)
            if dist.is_initialized():
                dist.destroy_process_group()
            return result
        except KeyboardInterrupt:
            if comm.get_rank() > 0:
                sys.exit(INTERRUPTED)  # process 0 says it
            raise
        except (RuntimeError, dist.DistError) as error:
            text = str(error).lower()
            if not any(sign in text for sign in _GONE):
                raise
            raise ConnectionError(
                f"process {comm.get_rank()} lost another process of the run, whose own message says why; go on with "
                f"--resume ({str(error).splitlines()[0][:160]})"
            ) from None
        except Exception:
            if comm.get_rank() > 0:
                time.sleep(2)  # the same happened in process 0, which has told it by now, and ends this one
            raise

    run_tool(one)
