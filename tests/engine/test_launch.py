"""Processes of a run: torchrun, several machines, processes that are killed, Ctrl-C."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time

import pytest
import torch
from detectron2.engine import HookBase
from torchrun_launcher import torchrun

from lt_det.data import build_train_loader, register_dataset
from lt_det.engine import LongTailTrainer, argument_parser
from lt_det.engine.launch import _processes_per_machine, launch_main, started_by_torchrun
from lt_det.tool import run_tool

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the launcher would take NCCL and the GPUs")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.1)
    return [pid for pid in pids if is_alive(pid)]


# ---- torchrun

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_environment(monkeypatch):
    assert not started_by_torchrun({}) and not started_by_torchrun({"MASTER_ADDR": "a"})
    assert started_by_torchrun(ENVIRONMENT)
    with pytest.raises(ValueError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        started_by_torchrun({"RANK": "0", "WORLD_SIZE": "2"})
    assert (
        _processes_per_machine(ENVIRONMENT) == 4
        and _processes_per_machine({**ENVIRONMENT, "LOCAL_WORLD_SIZE": "2"}) == 2
    )
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is 3 and WORLD_SIZE 4"):
        _processes_per_machine({**ENVIRONMENT, "LOCAL_WORLD_SIZE": "3"})


def test_torchrun_and_num_gpus_disagree(monkeypatch, capsys):
    for name, value in {**ENVIRONMENT, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launch_main(print, argument_parser().parse_args(["--num-gpus", "8"]))
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 processes on each of 2 machines" in line and "--num-gpus 8" in line


class _Watched(HookBase):
    """Writes the losses of every iteration and the data workers' ids as a line of json, and kills its process before
    the iteration ``die``."""

    def __init__(self, path: str, die: int | None):
        self._path, self._die = path, die

    def before_step(self):
        if self.trainer.iter == self._die:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self):
        losses = {name: value for name, (value, _) in self.trainer.storage.latest().items() if "loss" in name}
        workers = [child.pid for child in multiprocessing.active_children()]
        with open(self._path, "a") as f:
            f.write(json.dumps([self.trainer.iter, losses, workers]) + "\n")


def _as_rank(environment, tool, arguments, paths, log, watched=None):
    """A process as torchrun starts it, in which the tool runs; ``watched``: arguments of such a hook."""
    multiprocessing.set_start_method("fork", force=True)  # the command line's; this process has got its parent's
    os.environ.update(environment)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    register_dataset("tiny_train", *paths)
    if watched is not None:
        build_hooks = LongTailTrainer.build_hooks
        LongTailTrainer.build_hooks = lambda self: [*build_hooks(self), _Watched(*watched)]
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


@needs_cpu
def test_a_killed_rank_of_a_training_and_resume(server, tiny_options, tiny_paths, repo_dir, tmp_path):
    """Two ranks of tools/train_net.py over loopback. One is killed in mid-run: the other one ends soon, says why in one
    line, and leaves no process behind. ``--resume`` of both then ends as a run that nobody disturbed, bit for bit."""
    data = [str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root)]
    options = ["--config-file", str(repo_dir / "configs/glyph_softmax.yaml"), *tiny_options, "DATALOADER.NUM_WORKERS"]
    options += ["1", "SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "(5,)", "SOLVER.CHECKPOINT_PERIOD", "2"]

    def run(name, output, die=None, more=()):
        """Exit codes, what was said on the consoles, {iteration: losses} of rank 0, and the ids of data workers."""
        port = free_port()
        ranks, logs, records = [], [], []
        for rank in (0, 1):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
            variables = {key: str(value) for key, value in {**variables, "MASTER_PORT": port}.items()}
            logs.append(tmp_path / f"{name}.{rank}.log")
            records.append(tmp_path / f"{name}.{rank}.jsonl")
            arguments = [*more, *options, "OUTPUT_DIR", str(tmp_path / output)]
            ranks.append(
                server.Process(
                    target=_as_rank,
                    args=(variables, str(repo_dir / "tools/train_net.py"), arguments, data, str(logs[-1])),
                    kwargs={"watched": (str(records[-1]), die if rank == 1 else None)},
                )
            )
            ranks[-1].start()
        for rank in ranks:
            rank.join(200)
        said = [log.read_text() for log in logs]
        assert not any(rank.is_alive() for rank in ranks), said
        lines = [[json.loads(line) for line in record.read_text().splitlines()] for record in records]
        workers = {worker for of_rank in lines for line in of_rank for worker in line[2]}
        return [rank.exitcode for rank in ranks], said, {i: losses for i, losses, _ in lines[0]}, workers

    codes, said, whole, _ = run("whole", "whole")
    assert codes == [0, 0] and list(whole) == list(range(6)), said
    codes, said, killed, workers = run("killed", "killed", die=3)
    assert codes == [1, -signal.SIGKILL], said
    assert said[0].splitlines()[-1].startswith("train_net: ConnectionError: process 0 lost another process"), said[0]
    assert "--resume" in said[0] and "Traceback" not in said[0]
    assert len(workers) == 2 and not wait_until_gone(workers, 15)
    codes, said, resumed, _ = run("again", "killed", more=["--resume"])
    assert codes == [0, 0], said
    assert list(killed) == [0, 1, 2] and list(resumed) == [2, 3, 4, 5]  # from the checkpoint behind iteration 1
    assert all(whole[i] == losses for of in (killed, resumed) for i, losses in of.items())
    ends = [torch.load(tmp_path / output / "model_final.pth") for output in ("whole", "killed")]
    assert all(torch.equal(ends[0]["model"][k], v) for k, v in ends[1]["model"].items())


@needs_cpu
def test_torchrun_on_two_machines_restarts_after_a_kill(server, tiny_options, tiny_paths, repo_dir, tmp_path):
    """Two of torchrun's launchers over loopback. One of the two processes is killed; both are started again, and the
    run ends as one that nobody disturbed, by processes in whose environment torchrun's variables are."""
    data = [str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root)]
    common = ["--config-file", str(repo_dir / "configs/glyph_softmax.yaml"), *tiny_options]
    common += ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR"]
    logs = [tmp_path / f"{n}.log" for n in range(4)]

    nodes = []
    port = free_port()
    for node in (0, 1):
        how = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--monitor-interval", "0.2"]
        how += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
        arguments = (how, data, (1, 2), [*common, str(tmp_path / "killed")], str(logs[node]))
        nodes.append(server.Process(target=torchrun, args=arguments))
        nodes[-1].start()

    port = free_port()
    ranks = []
    for rank in (0, 1):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in variables.items()}
        arguments = (
            str(repo_dir / "tools/train_net.py"),
            [*common, str(tmp_path / "whole")],
            data,
            str(logs[2 + rank]),
        )
        ranks.append(server.Process(target=_as_rank, args=(variables, *arguments)))
        ranks[-1].start()
    for process, log in zip([*ranks, *nodes], [*logs[2:], *logs[:2]]):
        process.join(200)
        assert process.exitcode == 0, log.read_text()[-4000:]

    ends = [torch.load(tmp_path / out / "model_final.pth") for out in ("whole", "killed")]
    assert all(torch.equal(ends[0]["model"][k], v) for k, v in ends[1]["model"].items())
    assert ends[0]["run"]["processes"] == ends[1]["run"]["processes"] == 2
    assert ends[0]["iteration"] == ends[1]["iteration"] == 3
    # One run and not two in one folder; after the kill it went on from the checkpoint.
    assert (tmp_path / "killed/log.txt.rank1").is_file()
    # Process 0 may or may not have finished its checkpoint when process 1 died.
    starts = re.findall(r"Starting training from iteration (\d)", (tmp_path / "killed/log.txt").read_text())
    assert starts[0] == "0" and len(starts) > 1 and set(starts[1:]) <= {"1", "2"}


def _launch(script, arguments, log):
    with open(log, "w") as f:
        os.dup2(f.fileno(), 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@needs_cpu
def test_a_killed_process_ends_those_on_other_machines(server, repo_dir, tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    script = str(repo_dir / "tests/engine/launch_script.py")
    two = [str(pids), "--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--machine-rank"]
    logs = [tmp_path / f"{n}.log" for n in (0, 1)]
    launchers = [server.Process(target=_launch, args=(script, [*two, str(n)], str(log))) for n, log in enumerate(logs)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join(240)
    said = [log.read_text() for log in logs]
    assert [launcher.exitcode for launcher in launchers] == [1, 1], said
    assert (
        "process 0 lost another process of the run" in said[0] and "--resume" in said[0] and "Traceback" not in said[0]
    )
    assert "SIGKILL" in said[1] and "--resume" in said[1] and "Traceback" not in said[1]
    everyone = [int(p.name) for p in pids.iterdir()]
    assert len(everyone) == 4 and not wait_until_gone(everyone, 10)


# ---- killed and interrupted processes, forked from a server that has imported everything


class _Big:
    """A batch that does not fit into a pipe, so that a worker hangs where it hands it over."""

    def __call__(self, record):
        return {"image": bytes(10**6), **record}  # tensors would go by shared memory


def _load_forever(pids):
    multiprocessing.set_start_method("fork", force=True)
    torch.multiprocessing.set_sharing_strategy("file_system")
    records = [{"file_name": str(i), "image_id": i, "width": 8, "height": 8} for i in range(1000)]
    loader = build_train_loader(records, _Big(), "TrainingSampler", total_batch_size=2, num_workers=2, seed=1)
    batches = iter(loader)
    next(batches)
    with open(pids, "w") as f:
        f.write(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    time.sleep(600)


def test_data_workers_end_with_a_killed_trainer(server, tmp_path):
    pids = tmp_path / "pids"
    trainer = server.Process(target=_load_forever, args=(str(pids),))
    trainer.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (pids.exists() and pids.read_text()):
        time.sleep(0.1)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2 and all(map(is_alive, workers))
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    left = wait_until_gone(workers, 15)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


class _Interrupt(HookBase):
    def after_step(self):
        if self.trainer.iter == 3:
            os.kill(os.getpid(), signal.SIGINT)


def _train_and_interrupt(tool, arguments, paths, log):
    with open(log, "w") as f:
        os.dup2(f.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    register_dataset("tiny_train", *paths)
    build_hooks = LongTailTrainer.build_hooks
    LongTailTrainer.build_hooks = lambda self: [*build_hooks(self), _Interrupt()]
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


def test_ctrl_c_ends_with_one_line(server, tiny_options, tiny_paths, repo_dir, tmp_path):
    paths = (str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root))
    config = str(repo_dir / "configs/glyph_softmax.yaml")
    arguments = ["--config-file", config, *tiny_options, "SOLVER.CHECKPOINT_PERIOD", "2"]
    log = tmp_path / "stderr"
    process = server.Process(
        target=_train_and_interrupt, args=(str(repo_dir / "tools/train_net.py"), arguments, paths, str(log))
    )
    process.start()
    process.join(120)
    said = log.read_text()
    assert process.exitcode == 130, said
    lines = [line for line in said.splitlines() if line and "CUDA" not in line]
    (line,) = lines
    assert "interrupted" in line and "model_0000003.pth" in line and "--resume" in line


# ---- errors in one line


def test_errors_of_users_and_bugs(capsys, tmp_path):
    def refuse():
        from lt_det.declaration import check_name

        check_name("A.KEY", "nmae", ["name"])

    def unwritable():
        open(tmp_path / "absent" / "file", "w")

    def bug():
        {}["a"]

    for main, parts in (
        (refuse, ["ValueError: A.KEY", "did you mean name"]),
        (unwritable, ["FileNotFoundError", "absent/file"]),
    ):
        with pytest.raises(SystemExit) as end:
            run_tool(main, name="a_tool")
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("a_tool: ") and all(part in line for part in parts)
    with pytest.raises(KeyError):
        run_tool(bug)
    assert run_tool(lambda: 5) == 5


def test_traceback_on_request(monkeypatch):
    from lt_det.declaration import check_name

    monkeypatch.setenv("LT_DET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="A.KEY"):
        run_tool(lambda: check_name("A.KEY", "b", ["a"]))


def test_errors_of_data_workers(capsys):
    def damaged(record):
        from lt_det.engine.checks import check_at_least

        check_at_least("A.KEY", -1, 0)

    def bug(record):
        raise ValueError("a bug elsewhere")

    records = [{"file_name": str(i), "image_id": i, "width": 8, "height": 8} for i in range(4)]

    def load(mapper):
        next(iter(build_train_loader(records, mapper, "TrainingSampler", total_batch_size=2, num_workers=1, seed=1)))

    with pytest.raises(SystemExit):
        run_tool(lambda: load(damaged), name="a_tool")
    assert capsys.readouterr().err.splitlines() == ["a_tool: ValueError: A.KEY must be at least 0, got -1"]
    with pytest.raises(ValueError, match="a bug elsewhere"):
        run_tool(lambda: load(bug))
