"""LogN's moments: those of the logits that the pass sees, where they are kept, and who takes them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from lt_det.engine import LongTailCheckpointer, argument_parser, main
from lt_det.engine.from_yaml import images_from_config
from lt_det.engine.logit_moments import complete_calibrators, fit_moments
from lt_det.modeling import LogN, box_predictors
from lt_det.modeling.calibrators import read_moments

CASCADE = (
    "MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6, 0.7),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
)  # fmt: skip


def detector(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    for predictor in box_predictors(model):
        torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
        torch.nn.init.constant_(predictor.cls_score.bias, 100.0)  # where float32 squares would lose the deviation
    return model


@pytest.mark.parametrize("heads", [(), CASCADE], ids=["standard", "cascade"])
def test_moments_are_those_of_the_logits(tiny_cfg, heads):
    cfg = tiny_cfg("DECOUPLE.ENABLED", False, *heads)
    model = detector(cfg)
    model.backbone.requires_grad_(False)
    model.proposal_generator.eval()
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = [[] for _ in box_predictors(model)]
    hooks = [
        p.cls_score.register_forward_hook(lambda module, args, out, k=k: seen[k].append(out.double().numpy()))
        for k, p in enumerate(box_predictors(model))
    ]
    found = fit_moments(partial(images_from_config, cfg), model)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(seen)
    for moments, logits in zip(found, seen):
        z = np.concatenate(logits)[:, : cfg.MODEL.ROI_HEADS.NUM_CLASSES]
        assert moments.rois == len(z) > 50
        np.testing.assert_allclose(moments.mean, z.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.std, z.std(0, ddof=1), rtol=1e-9)
    assert before == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    fewer = fit_moments(partial(images_from_config, cfg), model, images=2)
    assert fewer[0].rois < found[0].rois and fewer[0].classifier == found[0].classifier


def test_a_class_that_never_varies(tiny_cfg):
    cfg = tiny_cfg("DECOUPLE.ENABLED", False)
    model = detector(cfg)
    box_predictors(model)[0].cls_score.weight.data[1] = 0
    with pytest.raises(ValueError, match=r"logits of the classes \[1\] do not vary"):
        fit_moments(partial(images_from_config, cfg), model)


def test_evaluation_takes_them_once(tiny_cfg, tiny_options, repo_dir, load_script, tmp_path, monkeypatch, capsys):
    """Evaluation without the file makes it, the next one reads it, and other weights are an error; the tool makes it
    too."""
    cfg = tiny_cfg("DECOUPLE.ENABLED", False)
    model = detector(cfg)
    LongTailCheckpointer(model, str(tmp_path)).save("model")
    weights, path = str(tmp_path / "model.pth"), tmp_path / "model.logn.json"
    words = [*tiny_options, "DATASETS.TEST", "('tiny_val',)", "MODEL.WEIGHTS", weights]
    parse = argument_parser().parse_args
    main(parse(["--eval-only", "--config-file", str(repo_dir / "configs/glyph_logn.yaml"), *words]))
    written = path.read_text()
    assert [m.classifier for m in read_moments(path)] == [
        m.classifier for m in fit_moments(partial(images_from_config, cfg), model)
    ]
    results = json.loads((tmp_path / "out/inference/metrics.json").read_text())

    monkeypatch.setattr("lt_det.engine.logit_moments.fit_moments", None)  # not needed again
    main(parse(["--eval-only", "--config-file", str(repo_dir / "configs/glyph_logn.yaml"), *words]))
    assert json.loads((tmp_path / "out/inference/metrics.json").read_text()) == results
    monkeypatch.undo()

    calibrator = LogN(weights=weights)
    box_predictors(model)[0].cls_score.weight.data += 1
    with pytest.raises(ValueError, match="of a classifier with other weights than .*delete that file"):
        complete_calibrators(partial(images_from_config, cfg), model, [calibrator], weights)

    path.unlink()
    tool = load_script("tools/fit_logn.py")
    tool.main(tool.parse(["--config-file", str(repo_dir / "configs/glyph_softmax.yaml"), *words]))
    assert path.read_text() == written and "RoIs" in capsys.readouterr().out
