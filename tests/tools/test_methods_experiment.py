"""The experiment over methods and seeds: which runs, in which order, what is kept, and one on tiny data."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "tools/experiments"
sys.path.insert(0, str(EXPERIMENTS))

import runs  # noqa: E402
from tables import mean_and_deviation, paired, results_table  # noqa: E402

ROWS = """
- {method: softmax + RFS, config: configs/glyph_softmax.yaml}
- {method: stage two, config: configs/glyph_balanced_softmax.yaml, after: softmax + RFS, as: stage1}
- {method: sigmoid, config: configs/glyph_sigmoid.yaml, options: [SOLVER.BASE_LR, 0.01]}
- {method: calibrated, config: configs/glyph_norcal.yaml, after: softmax + RFS, as: evaluate}
"""


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(ROWS)
    return runs.read_rows(path)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainings: the commands in order of arrival. AP is 10 x seed + the number of the call."""
    commands = []

    def fake(command, **kwargs):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc", stderr="")
        if "box_accuracy.py" in command[1]:
            accuracy = {"all": 50.0, "r": None, "c": 40.0, "f": 60.0}
            (Path(command[2]) / "box_accuracy.json").write_text(json.dumps(accuracy))
            return subprocess.CompletedProcess(command, 0)
        commands.append(command)
        after = command[command.index("OUTPUT_DIR") :]
        options = dict(zip(after[::2], after[1::2]))
        if options.get("SOLVER.BASE_LR") == "broken":
            return subprocess.CompletedProcess(command, 3)
        folder = Path(options["OUTPUT_DIR"])
        (folder / "inference").mkdir()
        value = 10.0 * int(options["SEED"]) + len(commands)
        metrics = {m: value for m in runs.METRICS if m != "APr"}
        (folder / "inference/metrics.json").write_text(json.dumps({"bbox": metrics, "segm": metrics}))
        if "--eval-only" not in command:
            (folder / "model_final.pth").write_text("")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runs.subprocess, "run", fake)
    return commands


def folders(commands):
    return ["/".join(Path(c[c.index("OUTPUT_DIR") + 1]).parts[-2:]) for c in commands]


@pytest.mark.parametrize("table", sorted(p.name for p in EXPERIMENTS.glob("*.yaml")))
def test_tables_are_well_formed(table):
    assert runs.read_rows(EXPERIMENTS / table)[0].method == "softmax + RFS"


def test_all_rows_of_a_seed_come_before_the_next_seed(rows, trained, tmp_path):
    results = runs.Results(tmp_path / "r.json", rows)
    runs.Bench(rows, results, tmp_path / "out", []).run(rows, [1, 2])
    slugs = ["softmax_rfs", "stage_two", "sigmoid", "calibrated"]
    assert folders(trained) == [f"seed{seed}/{slug}" for seed in (1, 2) for slug in slugs]
    weights = str(tmp_path / "out/seed1/softmax_rfs/model_final.pth")
    assert trained[1][-4:] == ["DECOUPLE.START_ITER", "0", "MODEL.WEIGHTS", weights]
    assert "--eval-only" in trained[3] and "--eval-only" not in trained[1]
    assert trained[2][-2:] == ["SOLVER.BASE_LR", "0.01"]

    content = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["method"] for row in content] == [row.method for row in rows]
    assert content[0]["seeds"] == [1, 2] and content[0]["segm"]["AP"] == [11.0, 25.0]
    assert content[0]["segm"]["APr"] == [None, None]
    # Difference to the baseline by hand: 12 - 11 and 26 - 25.
    assert paired(content[1], content[0], "segm", "AP") == [1.0, 1.0]
    assert "| stage two" in results_table(content) and "+1.0 ± 0.0" in results_table(content)


def test_a_log_in_the_background_shows_what_is_done(rows, trained, tmp_path, capsys):
    """There is no bar where stderr is no terminal; a line tells each run, and the time left by those that are done."""
    rows = [dataclasses.replace(row, after="", role="") for row in rows[:2]]
    results = runs.Results(tmp_path / "r.json", rows)
    runs.Bench(rows, results, tmp_path / "out", []).run(rows, [1])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "softmax + RFS (seed 1): mask AP 11.0, 0.0 minutes; 00:00 left"
    assert second.startswith("stage two (seed 1): mask AP 12.0, ")


def test_a_runs_commit_is_that_of_its_start(rows, trained, tmp_path, monkeypatch):
    """The checkout may have moved on at its end, or on the day when its result is read."""
    commits = iter(["first", "second"])
    monkeypatch.setattr(runs, "_commit", lambda: next(commits))
    results = runs.Results(tmp_path / "r.json", rows)
    runs.Bench(rows, results, tmp_path / "out", []).run(rows[:1], [1])
    results = runs.Results(tmp_path / "another.json", rows)
    runs.Bench(rows, results, tmp_path / "out", []).run(rows[:1], [1])
    assert len(trained) == 1 and results.content()["rows"][0]["commit"] == ["first"]


def test_two_processes_add_to_one_file(rows, trained, tmp_path):
    """Of two seeds, say: neither loses what the other has added since it began."""
    path = tmp_path / "r.json"
    both = [runs.Results(path, rows) for _ in range(2)]
    for row in rows[:2]:
        for seed, results in enumerate(both, start=1):
            runs.Bench(rows, results, tmp_path / "out", []).run([row], [seed])
    assert [row["seeds"] for row in json.loads(path.read_text())["rows"]] == [[1, 2], [1, 2]]


def test_accuracy_on_boxes(rows, trained, tmp_path):
    """It is kept with the run, and the file can be read and added to again."""
    path = tmp_path / "r.json"
    for seed in (1, 2):
        results = runs.Results(path, rows)
        runs.Bench(rows, results, tmp_path / "out", [], box_accuracy=True).run(rows[:2], [seed])
    content = json.loads(path.read_text())["rows"]
    assert content[1]["box_accuracy"] == {"all": [50.0] * 2, "r": [None] * 2, "c": [40.0] * 2, "f": [60.0] * 2}


def test_what_is_known_is_not_run_again_but_what_it_needs_is(rows, trained, tmp_path):
    path = tmp_path / "r.json"
    runs.Bench(rows, runs.Results(path, rows), tmp_path / "out", []).run(rows[:1], [1])
    trained.clear()
    runs.Bench(rows, runs.Results(path, rows), tmp_path / "out", []).run(rows[:2], [1])
    assert folders(trained) == ["seed1/stage_two"]  # its stage 1 lies there
    trained.clear()
    # On another day, without the folders: the model that a missing row needs is trained again, and only that.
    runs.Bench(rows, runs.Results(path, rows), tmp_path / "other", []).run(rows, [1])
    assert folders(trained) == ["seed1/sigmoid", "seed1/softmax_rfs", "seed1/calibrated"]


def test_rows_beside_each_other_wait_for_what_they_need(rows, trained, tmp_path):
    runs.Bench(rows, runs.Results(tmp_path / "r.json", rows), tmp_path / "out", [], jobs=3).run(rows, [1])
    order = folders(trained)
    assert sorted(order) == ["seed1/calibrated", "seed1/sigmoid", "seed1/softmax_rfs", "seed1/stage_two"]
    assert order.index("seed1/softmax_rfs") < min(order.index("seed1/stage_two"), order.index("seed1/calibrated"))


def test_a_failure_stops_what_starts_from_it_alone(rows, trained, tmp_path, capsys):
    """A row that diverges at night costs its own numbers, and those of its second stage."""
    rows[0] = dataclasses.replace(rows[0], options=["SOLVER.BASE_LR", "broken"])
    bench = runs.Bench(rows, runs.Results(tmp_path / "r.json", rows), tmp_path / "out", [])
    with pytest.raises(RuntimeError) as error:
        bench.run(rows, [1])
    assert folders(trained) == ["seed1/softmax_rfs", "seed1/sigmoid"]
    first, *others = str(error.value).splitlines()
    assert "seed1/softmax_rfs" in first and "exit status 3; see " in others[0]
    assert others[1:] == [f"{row.method} (seed 1) starts from softmax + RFS, which failed" for row in rows if row.after]
    assert "exit status 3" in capsys.readouterr().err  # at once, too
    assert [row["method"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["sigmoid"]


def test_a_failure_keeps_what_is_done(rows, trained, tmp_path):
    bench = runs.Bench(rows, runs.Results(tmp_path / "r.json", rows), tmp_path / "out", [])
    bench.run(rows[:1], [1])
    bench.options = ["SOLVER.BASE_LR", "broken"]
    with pytest.raises(RuntimeError, match="exit status 3; see .*stdout.txt"):
        bench.run(rows, [1])
    assert [row["method"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["softmax + RFS"]


def test_results_of_another_definition_are_refused_until_forgotten(rows, trained, tmp_path):
    path = tmp_path / "r.json"
    runs.Bench(rows, runs.Results(path, rows), tmp_path / "out", []).run(rows[2:3], [1])
    changed = [*rows[:2], runs.Row("sigmoid", "configs/glyph_sigmoid.yaml"), rows[3]]
    with pytest.raises(ValueError, match="--forget sigmoid"):
        runs.Results(path, changed)
    runs.Results(path, [row for row in changed if row.method != "sigmoid"]).forget(["sigmoid"])
    assert json.loads(path.read_text()) == {"rows": []}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{method: a, config: configs/nowhere.yaml}", "nowhere.yaml, which does not exist"),
        ("{method: a, config: configs/glyph_softmax.yaml, optoins: [A, 1]}", "optoins"),
        ("{method: a, config: configs/glyph_softmax.yaml, options: [A]}", "not pairs"),
        ("{method: a, config: configs/glyph_softmax.yaml, after: b, as: stage1}", "an earlier row"),
        ("{method: sigmoid, config: configs/glyph_softmax.yaml}", "two rows"),
    ],
)
def test_bad_tables_are_refused(entry, message, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(f"{ROWS}- {entry}\n")
    with pytest.raises(ValueError, match=message):
        runs.read_rows(path)


def test_mean_and_deviation_by_hand():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([1.0, None], sign=True) == "+1.0"
    assert mean_and_deviation([None]) == "-"


def test_columns_of_what_was_not_measured_are_left_out():
    row = {"method": "a", "seeds": [1, 2], "seconds": 60.0, "bbox": {"AP": [1.0, 3.0]}}
    row["segm"] = {"AP": [1.0, 3.0], "APr": [1.0, 3.0], "APc": [1.0, 3.0], "APf": [1.0, 3.0], "AP-fixed": [None, None]}
    assert "AP-fixed" not in results_table([row])
    row["segm"]["AP-fixed"] = [None, 7.5]
    assert "mask AP-fixed" in results_table([row]) and "| 7.5 " in results_table([row])


def test_trains_a_tiny_table(run_tool, load_script, tool_options, tmp_path, monkeypatch, capsys):
    """Its trainings are forked from a process that has imported what they need."""

    def fork(command, *, cwd=None, stdout=None, **kwargs):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc", stderr="")
        stdout.write(run_tool(Path(command[1]).relative_to(EXPERIMENTS.parent), *command[2:], cwd=cwd))
        return subprocess.CompletedProcess(command, 0)

    def table(*more):
        monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, command), *map(str, more)])
        load_script("tools/experiments/methods.py").main()
        return capsys.readouterr().out

    monkeypatch.setattr(runs.subprocess, "run", fork)
    (tmp_path / "rows.yaml").write_text(ROWS)
    command = ["--rows", tmp_path / "rows.yaml", "--json", tmp_path / "r.json", "--output-dir", tmp_path / "out"]
    command += ["--seeds", 1]
    printed = table("--methods", "stage two", "calibrated", "--box-accuracy", "--opts", *tool_options)
    content = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["method"] for row in content] == ["softmax + RFS", "stage two", "calibrated"]
    assert all(row["segm"]["AP-fixed"][0] is not None and row["seconds"] > 0 for row in content)
    assert 0 <= content[1]["box_accuracy"]["all"][0] <= 100
    assert results_table(content) in printed
    assert results_table(content) in table("--table")


def test_runs_are_processes_of_one_thread(tmp_path):
    """What they print is appended to their log, and their failure names it."""
    command = [sys.executable, "-c", "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.getcwd()); sys.exit({})"]
    runs._run([*command[:2], command[2].format(0)], tmp_path / "log.txt")
    with pytest.raises(RuntimeError, match="exit status 3; see .*log.txt"):
        runs._run([*command[:2], command[2].format(3)], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == f"1 {runs.ROOT}\n" * 2
