"""What a run says: little on the console, all in the file, valid json in metrics.json."""

import json
import logging
import warnings

import pytest
import torch
from detectron2.modeling import anchor_generator
from detectron2.utils import tracing
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from lt_det.engine import argument_parser, main
from lt_det.engine.logs import build_writers, mend_warnings, setup_logging


def test_console_and_file(tmp_path, capsys):
    file = setup_logging(str(tmp_path))
    assert setup_logging(str(tmp_path)) == file  # twice is once
    logging.getLogger("lt_det.engine").info("what is trained")
    logging.getLogger("lt_det.engine").debug("the whole config")
    logging.getLogger("detectron2.engine.defaults").info("Model:\n" + "layer\n" * 300)
    logging.getLogger("detectron2.utils.events").info(" eta: 0:00:01  iter: 19")
    logging.getLogger("fvcore.common.checkpoint").warning("\x1b[34mnot found:\x1b[0m\n" + "weight\n" * 50)
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        logging.getLogger("detectron2.engine.train_loop").exception("Exception during training:")
    console = capsys.readouterr().out
    assert console.count("what is trained") == 1 and "iter: 19" in console and "Exception during training" in console
    assert "layer" not in console and "whole config" not in console and "Traceback" not in console
    assert f"more lines in {file}" in console and console.count("weight") < 4 and "\x1b" not in console
    text = (tmp_path / "log.txt").read_text()
    assert text.count("layer") == 300 and text.count("weight") == 50 and "the whole config" in text
    assert "RuntimeError: a bug" in text and "\x1b" not in text and text.count("what is trained") == 1
    setup_logging(str(tmp_path), rank=1)
    logging.getLogger("lt_det").info("of rank 1")
    assert not capsys.readouterr().out and "of rank 1" in (tmp_path / "log.txt.rank1").read_text()


def test_a_table_of_results_is_printed_whole(tmp_path, capsys):
    setup_logging(str(tmp_path))
    logging.getLogger("lt_det.evaluation.evaluator").info("Evaluation:\n" + "row\n" * 9, extra={"whole": True})
    assert capsys.readouterr().out.count("row") == 9


def test_after_detectron2s_own_set_up(tmp_path, capsys):
    """Its handler abbreviates the names of loggers in the records, by which ours chooses."""
    setup_logger()
    setup_logging(str(tmp_path))
    logging.getLogger("detectron2.utils.events").info(" eta: 0:00:01  iter: 19")
    assert capsys.readouterr().out.count("iter: 19") == 1
    assert "detectron2.utils.events" in (tmp_path / "log.txt").read_text()


def test_metrics_are_valid_json(tmp_path):
    writer = build_writers(str(tmp_path), 10)[1]
    with EventStorage(0) as storage:
        for i in range(3):
            storage.iter = i
            storage.put_scalar("loss", float(i), smoothing_hint=False)
            if i == 1:
                storage.put_scalars(
                    **{"bbox/APr": float("nan"), "bbox/AP": 3.5, "inf": float("-inf")}, smoothing_hint=False
                )
            writer.write()
    writer.close()

    def refuse(constant):
        pytest.fail(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert lines[1]["bbox/APr"] is None and lines[1]["bbox/AP"] == 3.5 and lines[1]["inf"] is None


def test_known_warnings(caplog):
    """Mended at their cause: Detectron2's functions give the same and torch has nothing to say."""
    arguments = ([3, 5], 8, 0.5, torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, x = torch.meshgrid(torch.arange(4.0, 24, 8), torch.arange(4.0, 40, 8))
    mend_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = anchor_generator._create_grid_offsets(*arguments)
    assert torch.equal(got[0], x.reshape(-1)) and torch.equal(got[1], y.reshape(-1))
    with caplog.at_level(logging.WARNING):
        assert tracing.is_fx_tracing() is False
    assert not caplog.records

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mend_warnings()
        torch.utils.data.DataLoader([0], num_workers=10_000)
    assert not caught

    class Seen(torch.nn.Module):
        def forward(self, x):
            seen.append(tracing.is_fx_tracing())
            return x

    seen = []
    torch.fx.symbolic_trace(Seen())
    assert seen == [True]


def test_few_lines_before_the_first_iteration(tiny_options, repo_dir, tmp_path, capfd):
    config = ["--config-file", str(repo_dir / "configs/glyph_balms.yaml")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(argument_parser().parse_args([*config, *tiny_options, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]))
    out, err = capfd.readouterr()
    lines = (out + err).splitlines()
    before = next(i for i, line in enumerate(lines) if "Starting training from iteration" in line)
    assert before < 40, lines[:before]
    told = "\n".join(lines[:before])
    for part in (
        "tiny_train",
        "Softmax",
        "BalancedSoftmax",
        "image_count",
        "RepeatFactorTrainingSampler",
        "log.txt",
        "MetaReweighter",
    ):
        assert part in told, part
    assert any("eta:" in line and "iter:" in line for line in lines[before:]) and "\x1b" not in out
    ours = [w for w in caught if "meshgrid" in str(w.message) or "empty slice" in str(w.message)]
    assert not ours and "is_fx_tracing" not in err
    log = (tmp_path / "out/log.txt").read_text()
    assert "Running with full config" in log and "GeneralizedRCNN(" in log and "\x1b" not in log
