"""Tools as users run them, in processes of their own."""

import multiprocessing
import os
import runpy
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def tool_options(tiny_paths, tiny_model_options):
    """KEY VALUE pairs for a run of 3 + 2 iterations on four categories, named by DATASETS.REGISTER."""
    entries = [(f"tools_{split}", str(p.json_file), str(p.image_root)) for split, p in tiny_paths.items()]
    return [
        *tiny_model_options, "DATASETS.REGISTER", str(entries),
        "DATASETS.TRAIN", "('tools_train',)", "DATASETS.TEST", "('tools_val',)", "INPUT.MIN_SIZE_TRAIN", "(64,)",
        "SOLVER.MAX_ITER", "3", "DECOUPLE.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1",
    ]  # fmt: skip


def _run_script(path, args, folder, repo, log):
    """In a process of its own: what ``python path args`` does in ``folder``."""
    multiprocessing.set_start_method("fork", force=True)  # the command line's; this process has got its parent's
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.chdir(folder)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=repo)
    torch.set_num_threads(1)
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


@pytest.fixture(scope="session")
def run_tool(server, repo_dir, tmp_path_factory):
    """Run a tool as a user does, elsewhere than in the repository; returns what it printed."""

    def run(tool, *args, cwd, fails=False):
        log = tmp_path_factory.mktemp("printed") / "log.txt"
        script = str(repo_dir / "tools" / tool), [*map(str, args)], str(cwd), str(repo_dir), str(log)
        process = server.Process(target=_run_script, args=script)
        process.start()
        process.join(300)
        printed = log.read_text()
        assert process.exitcode is not None and (process.exitcode != 0) == fails, printed[-8000:]
        return printed

    return run
