"""Processes of a run: torchrun, several machines, processes that are killed, Ctrl-C."""

import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from detectron2.engine import HookBase

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


def _as_rank(environment, tool, arguments, paths, log):
    os.environ.update(environment)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    register_dataset("tiny_train", *paths)
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


@needs_cpu
def test_torchrun_on_two_machines_restarts_after_a_kill(server, tiny_options, tiny_paths, repo_dir, tmp_path):
    """Two of torchrun's launchers over loopback. One of the two processes is killed; both are started again, and the
    run ends as one that nobody disturbed, by processes in whose environment torchrun's variables are."""
    data = [str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root)]
    common = ["--config-file", str(repo_dir / "configs/glyph_softmax.yaml"), *tiny_options]
    common += ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR"]
    logs = [tmp_path / f"{n}.log" for n in range(4)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_dir)}
    nodes = []
    port = free_port()
    for node in (0, 1):
        how = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--monitor-interval", "0.2"]
        how += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
        script = [str(repo_dir / "tests/engine/torchrun_script.py"), *data, "1,2", *common, str(tmp_path / "killed")]
        with open(logs[node], "w") as log:
            command = [sys.executable, "-m", "torch.distributed.run", *how, *script]
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

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
    for process, log in zip(ranks, logs[2:]):
        process.join(200)
        assert process.exitcode == 0, log.read_text()[-4000:]
    for process, log in zip(nodes, logs):
        assert process.wait(timeout=400) == 0, log.read_text()[-4000:]

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
