"""What tools/slurm_train.sbatch starts, with stand-ins for Slurm's own commands."""

import os
import subprocess


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_slurm_starts_torchrun_on_every_machine(repo_dir, tmp_path):
    script(tmp_path / "scontrol", 'test "$1 $2 $3" = "show hostnames n[7-9]" && printf "n7\\nn8\\nn9\\n"')
    script(tmp_path / "srun", 'test "$1" = --kill-on-bad-exit=1 && shift && exec "$@"')
    python = script(tmp_path / "python", 'echo "threads $OMP_NUM_THREADS"; printf "%s\\n" "$@"')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "SLURM_SUBMIT_DIR": "/repo",
        "SLURM_JOB_NODELIST": "n[7-9]", "SLURM_JOB_ID": "40017", "SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    command = [
        "bash",
        str(repo_dir / "tools/slurm_train.sbatch"),
        "--config-file",
        "a b.yaml",
        "OUTPUT_DIR",
        "/shared/x",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "threads 1", "-m", "torch.distributed.run",
        "--nnodes", "3", "--nproc-per-node", "4", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "n7:20017", "--rdzv-id", "40017",
        "/repo/tools/train_net.py", "--resume", "--config-file", "a b.yaml", "OUTPUT_DIR", "/shared/x",
    ]  # fmt: skip
    script(python, "exit 3")
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 3
