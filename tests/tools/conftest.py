"""Tools as users run them, in processes of their own."""

import pytest
from script_process import run_script


@pytest.fixture(scope="session")
def tool_options(tiny_paths, tiny_model_options):
    """KEY VALUE pairs for a run of 3 + 2 iterations on four categories, named by DATASETS.REGISTER."""
    entries = [(f"tools_{split}", str(p.json_file), str(p.image_root)) for split, p in tiny_paths.items()]
    return [
        *tiny_model_options, "DATASETS.REGISTER", str(entries),
        "DATASETS.TRAIN", "('tools_train',)", "DATASETS.TEST", "('tools_val',)", "INPUT.MIN_SIZE_TRAIN", "(64,)",
        "SOLVER.MAX_ITER", "3", "DECOUPLE.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run_tool(server, repo_dir, tmp_path_factory):
    """Run a tool as a user does, elsewhere than in the repository; returns what it printed."""

    def run(tool, *args, cwd, fails=False):
        log = tmp_path_factory.mktemp("printed") / "log.txt"
        script = str(repo_dir / "tools" / tool), [*map(str, args)], str(cwd), str(repo_dir), str(log)
        process = server.Process(target=run_script, args=script)
        process.start()
        process.join(300)
        printed = log.read_text()
        assert process.exitcode is not None and (process.exitcode != 0) == fails, printed[-8000:]
        return printed

    return run
