"""A config is checked as a whole before data are read: misspelt names, impossible values, keys without effect."""

import logging

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from omegaconf import OmegaConf

from lt_det.config import get_lt_det_cfg
from lt_det.data import build_train_loader, register_dataset
from lt_det.engine import argument_parser, setup
from lt_det.engine.checks import check_config, given_keys, keys_without_effect
from lt_det.engine.checks_lazy import check_lazy_config, check_lazy_overrides
from lt_det.losses import GML, LDAM, Softmax
from lt_det.modeling import LongTailOutputLayers


@pytest.fixture
def checked(repo_dir):
    """``checked("KEY", value, ...)`` checks glyph_softmax with these changes."""

    def run(*changes, config="glyph_softmax"):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(repo_dir / f"configs/{config}.yaml"))
        cfg.merge_from_list(list(changes))
        check_config(cfg)
        return cfg

    return run


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("MODEL.LONG_TAIL.LOSS", "Seasaw"), ["MODEL.LONG_TAIL.LOSS", "did you mean Seesaw"]),
        (("DECOUPLE.LOSS", "balancedsoftmax"), ["DECOUPLE.LOSS", "BalancedSoftmax"]),
        (("META.LOSS", "Sigmiod"), ["META.LOSS", "Sigmoid"]),
        (
            ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorSampler"),
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "Known: ClassBalancedSampler"],
        ),
        (("DECOUPLE.SAMPLER_TRAIN", "ClassBalanced"), ["DECOUPLE.SAMPLER_TRAIN", "ClassBalancedSampler"]),
        (("META.SAMPLER", "Balanced"), ["META.SAMPLER", "Known: ClassBalancedSampler"]),
        (
            ("MODEL.ROI_MASK_HEAD.NAME", "NormalisedMaskRCNNConvUpsampleHead"),
            ["MODEL.ROI_MASK_HEAD.NAME", "did you mean Normalized"],
        ),
        (("MODEL.ROI_HEADS.NAME", "LongTailROIHead"), ["MODEL.ROI_HEADS.NAME", "did you mean LongTailROIHeads"]),
        (("MODEL.BACKBONE.NAME", "resnet_fpn"), ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]),
        (("MODEL.META_ARCHITECTURE", "GeneralisedRCNN"), ["MODEL.META_ARCHITECTURE", "did you mean GeneralizedRCNN"]),
        (("MODEL.LONG_TAIL.CALIBRATOR.NAME", "Norcal"), ["MODEL.LONG_TAIL.CALIBRATOR.NAME", "did you mean NorCal"]),
        (
            ("MODEL.LONG_TAIL.CALIBRATOR.NAME", "NorCal", "MODEL.LONG_TAIL.CALIBRATOR.TAU", 0.5),
            ["MODEL.LONG_TAIL.CALIBRATOR: NorCal has no option TAU", "GAMMA"],
        ),
        (("MODEL.LONG_TAIL.CLASSIFIER.NAME", "cosin"), ["MODEL.LONG_TAIL.CLASSIFIER.NAME", "did you mean cosine"]),
        (("MODEL.LONG_TAIL.MIN_COUNT", -5), ["MODEL.LONG_TAIL.MIN_COUNT must be at least 0, got -5"]),
        (("SOLVER.CHECKPOINT_PERIOD", 0), ["SOLVER.CHECKPOINT_PERIOD must be at least 1"]),
        (("DECOUPLE.MAX_ITER", 0), ["DECOUPLE.MAX_ITER must be at least 1"]),
        (("DATALOADER.NUM_WORKERS", -1), ["DATALOADER.NUM_WORKERS"]),
        (
            ("MODEL.LONG_TAIL.LOSS", "Seesaw", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            ["MODEL.LONG_TAIL.LOSS Seesaw has no effect", "set MODEL.ROI_HEADS.NAME to LongTailROIHeads"],
        ),
        (
            ("DECOUPLE.ENABLED", True, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
            ["DECOUPLE.ENABLED", "set MODEL.ROI_HEADS.NAME to LongTailCascadeROIHeads"],
        ),
        (
            ("MODEL.LONG_TAIL.CALIBRATOR.NAME", "TauNorm", "MODEL.META_ARCHITECTURE", "RetinaNet"),
            ["MODEL.LONG_TAIL.CALIBRATOR.NAME", "MODEL.META_ARCHITECTURE"],
        ),
        (
            ("MODEL.LONG_TAIL.LOSS", "GML", "MODEL.LONG_TAIL.CLASSIFIER.NAME", "linear"),
            ['MODEL.LONG_TAIL.CLASSIFIER.NAME is "linear"', "MODEL.LONG_TAIL.LOSS GML", "cosine"],
        ),
        (("DECOUPLE.FEATURE_CACHE.ENABLED", True), ["DECOUPLE.FEATURE_CACHE.ENABLED", "DECOUPLE.ENABLED True"]),
        (("TEST.BOUNDARY_AP", True, "MODEL.MASK_ON", False), ["TEST.BOUNDARY_AP", "MODEL.MASK_ON"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_errors_name_key_and_remedy(checked, changes, named):
    with pytest.raises(ValueError) as error:
        checked(*changes)
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)


def test_shipped_configs_have_no_key_without_effect(repo_dir):
    files = sorted(f for f in (repo_dir / "configs").rglob("*.yaml") if not f.name.startswith("Base-"))
    for file in files:
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(file))
        assert keys_without_effect(cfg, given_keys(str(file), ())) == [], file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("MODEL.LONG_TAIL.SEESAW.P", 0.5), "MODEL.LONG_TAIL.SEESAW.P has no effect: MODEL.LONG_TAIL.LOSS is Softmax"),
        (
            ("MODEL.LONG_TAIL.CLASSIFIER.SCALE", 30.0),
            "CLASSIFIER.SCALE has no effect: MODEL.LONG_TAIL.CLASSIFIER.NAME is not",
        ),
        (
            ("MODEL.LONG_TAIL.CALIBRATOR.TAU", 0.5),
            "CALIBRATOR.TAU has no effect: MODEL.LONG_TAIL.CALIBRATOR.NAME is empty",
        ),
        (("MODEL.LONG_TAIL.MASK_SCALE", 10.0), "MASK_SCALE has no effect: MODEL.ROI_MASK_HEAD.NAME is MaskRCNN"),
        (("DECOUPLE.BASE_LR", 0.5), "DECOUPLE.BASE_LR has no effect: DECOUPLE.ENABLED is False"),
        (("META.LR", 0.5), "META.LR has no effect: META.NAME is empty"),
        (("DRW.LR_FACTOR", 0.5), "DRW.LR_FACTOR has no effect: DRW.ENABLED is False"),
        (("TEACHER.MOMENTUM", 0.5), "TEACHER.MOMENTUM has no effect: MODEL.LONG_TAIL.LOSS is Softmax"),
        (
            ("DATALOADER.REPEAT_THRESHOLD", 0.5, "DATALOADER.SAMPLER_TRAIN", "TrainingSampler"),
            "REPEAT_THRESHOLD has no effect: DATALOADER.SAMPLER_TRAIN is TrainingSampler",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_keys_without_effect(checked, changes, message):
    (found,) = keys_without_effect(checked(*changes), changes[::2])
    assert message in found


def test_keys_with_effect_are_not_named(checked):
    changes = (
        "MODEL.LONG_TAIL.CALIBRATOR.NAME", "NorCal", "MODEL.LONG_TAIL.CALIBRATOR.GAMMA", 0.2,
        "MODEL.LONG_TAIL.CALIBRATOR.PRIOR", "sampled", "DATALOADER.REPEAT_THRESHOLD", 0.5, "DECOUPLE.ENABLED", True,
        "DECOUPLE.LOSS", "Seesaw", "DECOUPLE.BASE_LR", 0.5, "MODEL.LONG_TAIL.SEESAW.P", 0.5,
        "MODEL.LONG_TAIL.CLASSIFIER.NAME", "cosine", "MODEL.LONG_TAIL.CLASSIFIER.SCALE", 30.0,
    )  # fmt: skip
    assert keys_without_effect(checked(*changes), changes[::2]) == []
    # The default value is no wish.
    assert keys_without_effect(checked("META.LR", 0.01), ["META.LR"]) == []


def test_misspelt_keys(repo_dir, tmp_path, tiny_options):
    def run(*options, config=repo_dir / "configs/glyph_softmax.yaml"):
        setup(argument_parser().parse_args(["--config-file", str(config), *options]))

    with pytest.raises(
        KeyError, match="command line: there is no config key MODEL.LONGTAIL.LOSS; did you mean .*MODEL.LONG_TAIL.LOSS"
    ):
        run("MODEL.LONGTAIL.LOSS", "Seesaw")
    with pytest.raises(KeyError, match="SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER"):
        run("SOLVER.MAX_ITR", "5")
    with pytest.raises(ValueError, match="KEY VALUE pairs"):
        run("SOLVER.MAX_ITER")
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"_BASE_: {repo_dir}/configs/glyph_softmax.yaml\nMODEL:\n  LONG_TAIL:\n    CLASIFIER:\n      NAME: cosine\n"
    )
    with pytest.raises(
        KeyError,
        match=r"mine.yaml: .*MODEL.LONG_TAIL.CLASIFIER.NAME; did you mean MODEL.LONG_TAIL.CLASSIFIER.NAME|NAME",
    ):
        run(config=file)


def test_warnings_reach_the_log(repo_dir, tiny_options, tmp_path):
    config = repo_dir / "configs/glyph_softmax.yaml"
    setup(argument_parser().parse_args(["--config-file", str(config), *tiny_options, "META.LR", "0.5"]))
    for handler in logging.getLogger("lt_det").handlers:
        handler.flush()
    assert "META.LR has no effect: META.NAME is empty" in (tmp_path / "out/log.txt").read_text()


# ---- LazyConfig


@pytest.fixture
def lazy(tiny_paths):
    """A LazyConfig's skeleton; nothing of it is built."""
    for split, paths in tiny_paths.items():
        register_dataset(f"tiny_{split}", paths.json_file, paths.image_root)
    predictor = L(LongTailOutputLayers)(
        input_shape=ShapeSpec(channels=8),
        box2box_transform=None,
        num_classes="${..num_classes}",
        loss=L(Softmax)(num_classes="${...num_classes}"),
    )
    heads = L(StandardROIHeads)(
        num_classes=4, box_predictor=predictor, mask_head=L(MaskRCNNConvUpsampleHead)(num_classes="${..num_classes}")
    )
    records = L(get_detection_dataset_dicts)(names="tiny_train")
    train = L(build_train_loader)(dataset_dicts=records, sampler="TrainingSampler", total_batch_size=2)
    return OmegaConf.create(
        {
            "model": {"roi_heads": heads},
            "dataloader": {"train": train, "test": {"dataset": L(get_detection_dataset_dicts)(names="tiny_val")}},
            "train": {"max_iter": 5, "output_dir": "out", "init_checkpoint": "", "amp": {"enabled": False}},
        },
        flags={"allow_objects": True},
    )


def test_lazy_config_passes(lazy):
    check_lazy_config(lazy)
    check_lazy_overrides(
        lazy, ["train.max_iter=3", "train.seed=1", "dataloader.train.num_workers=2", "train.decouple.start_iter=1"]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_itr=3", "train has no 'max_itr'; did you mean max_iter"),
        ("dataloader.train.num_worker=2", "dataloader.train has no 'num_worker'; did you mean num_workers"),
        ("model.roi_heads.box_predictor.clasifier=cosine", "did you mean classifier"),
        ("trian.max_iter=3", "the config has no 'trian'; did you mean train"),
    ],
)
def test_lazy_overrides(lazy, override, message):
    with pytest.raises(KeyError, match=message):
        check_lazy_overrides(lazy, [override])
    with pytest.raises(ValueError, match="path.key=value"):
        check_lazy_overrides(lazy, ["SOLVER.MAX_ITER", "3"])


def test_lazy_errors(lazy):
    def refused(message, **changes):
        cfg = LazyConfig.apply_overrides(OmegaConf.create(lazy, flags={"allow_objects": True}), [])
        for path, value in changes.items():
            OmegaConf.update(cfg, path.replace("__", "."), value, force_add=True)
        with pytest.raises(ValueError, match=message):
            check_lazy_config(cfg)

    predictor = "model__roi_heads__box_predictor"
    refused(
        "box_predictor.loss.max_margn: LDAM takes no 'max_margn'; did you mean max_margin",
        **{f"{predictor}__loss": L(LDAM)(num_classes=4, max_margn=1)},
    )
    refused(
        "box_predictor.loss.min_count must be at least 0",
        **{f"{predictor}__loss": L(LDAM)(num_classes=4, min_count=-5)},
    )
    refused(
        'classifier is "linear", but .*loss GML',
        **{f"{predictor}__loss": L(GML)(num_classes=4), f"{predictor}__classifier": "linear"},
    )
    refused("box_predictor.loss is 'Seasaw'.*did you mean Seesaw", **{f"{predictor}__loss": "Seasaw"})
    refused("box_predictor.num_classes is 3", **{f"{predictor}__num_classes": 3})
    refused("mask_head.num_classes is 5", model__roi_heads__mask_head__num_classes=5)
    refused("model.roi_heads.num_classes is 7, but data set 'tiny_train' has 4", model__roi_heads__num_classes=7)
    refused("dataloader.train.sampler is 'TrainSampler'.*TrainingSampler", dataloader__train__sampler="TrainSampler")
    refused("train.max_iter must be at least 1", train__max_iter=0)
