"""The LazyConfigs, made small: they train, detect, resume, and take lt_det's losses, samplers and calibrators."""

import json
import math
from functools import partial

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from fvcore.common.param_scheduler import ConstantParamScheduler

from lt_det.data import InstanceAwareRepeatFactorSampler, instance_aware_repeat_factors, register_dataset
from lt_det.engine import argument_parser, from_lazy
from lt_det.engine.checks_lazy import check_lazy_config
from lt_det.engine.from_lazy import images_from_lazy
from lt_det.engine.lazy import LazyTrainer, main_lazy, train_lazy
from lt_det.engine.logit_moments import fit_moments
from lt_det.losses import LDAM, BalancedSoftmax
from lt_det.modeling import LongTailRCNNWithTTA, NorCal, box_predictors, dataset_statistics
from lt_det.modeling.calibrators import read_moments

TINY = [
    "dataloader.train.dataset_dicts.names=tiny_train", "dataloader.test.dataset.names=tiny_val",
    "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64", "model.roi_heads.num_classes=4",
    "model.proposal_generator.post_nms_topk=[30,20]", "model.roi_heads.batch_size_per_image=16",
    "train.max_iter=2", "train.init_checkpoint=", "train.device=cpu", "train.amp.enabled=False",
    "train.checkpointer.period=1",
    "lr_multiplier.warmup_length=0.1", "optimizer.lr=0.0001",
]  # fmt: skip
CASCADE = [
    *TINY, "model.backbone.bottom_up.stages.depth=18", "model.roi_heads.mask_head.conv_dims=[16,16]",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "model.pixel_std=[1e3,1e3,1e3]",
    # By the recipe's scale of 20, random weights may give background all RoIs, and there is nothing to detect.
    *(f"model.roi_heads.box_predictors.{stage}.classifier_options.scale=1.0" for stage in range(3)),
]  # fmt: skip
VITDET = [
    *TINY, "model.backbone.net.img_size=64", "model.backbone.net.embed_dim=16", "model.backbone.net.depth=2",
    "model.backbone.net.num_heads=2", "model.backbone.net.window_size=2", "model.backbone.net.window_block_indexes=[0]",
    "model.backbone.square_pad=64", "model.roi_heads.box_head.conv_dims=[16]",
    "model.roi_heads.mask_head.conv_dims=[16,16]",
    "train.ddp.fp16_compression=False",
    "model.roi_heads.box_predictor.loss.statistics.name=tiny_train", "model.roi_heads.box_predictor.loss.num_sampled=3",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
    *(f"dataloader.train.mapper.augmentations.1.target_{side}=64" for side in ("height", "width")),
    "dataloader.train.mapper.augmentations.2.crop_size=[64,64]",
]  # fmt: skip
CONFIGS = {"cascade_mask_rcnn_R_50_FPN_lvis": CASCADE, "mask_rcnn_vitdet_b_lvis": VITDET}


def needs_timm(name):
    if "vitdet" in name:
        pytest.importorskip("timm", reason="Detectron2's ViT needs timm")
        pytest.importorskip("shapely", reason="cropping polygon masks needs shapely")


@pytest.fixture(autouse=True)
def tiny_data(tiny_paths):
    for split, paths in tiny_paths.items():
        register_dataset(f"tiny_{split}", paths.json_file, paths.image_root)


@pytest.fixture
def load(repo_dir, tmp_path):
    def build(name, *overrides):
        needs_timm(name)
        cfg = LazyConfig.load(str(repo_dir / f"configs/lazy/{name}.py"))
        if "cascade" in name:
            del cfg.model.backbone.bottom_up.stages.stride_in_1x1  # ResNet-18 has no 1x1 in its blocks
            for head in cfg.model.roi_heads.box_heads:
                head.fc_dims = [32]
            for predictor in cfg.model.roi_heads.box_predictors:
                predictor.input_shape = ShapeSpec(channels=32)
        return LazyConfig.apply_overrides(cfg, [*CONFIGS[name], f"train.output_dir={tmp_path}/out", *overrides])

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe(repo_dir, name):
    """What the file says without a change: LVIS, its repeat factors, its number of classes."""
    needs_timm(name)
    cfg = LazyConfig.load(str(repo_dir / f"configs/lazy/{name}.py"))
    assert cfg.model.roi_heads.num_classes == 1203
    assert cfg.dataloader.train.sampler == "RepeatFactorTrainingSampler"
    assert cfg.dataloader.train.sampler_options.repeat_threshold == 0.001
    assert cfg.dataloader.train.dataset_dicts.names == "lvis_v1_train"
    assert name in cfg.train.output_dir
    model = instantiate(cfg.model)
    sizes = {p.cls_score.out_features for p in box_predictors(model)}
    assert sizes == {1205 if "cascade" in name else 1204}
    assert instantiate(cfg.lr_multiplier)(0.5) == 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_evaluates_and_resumes(load, name, tmp_path):
    first = train_lazy(load(name))
    storage = first.storage.latest()
    losses = {k: v[0] for k, v in storage.items() if "loss" in k}
    assert all(math.isfinite(v) for v in losses.values()) and any(k.startswith("loss_cls") for k in losses)
    assert ("loss_cls_objectness_stage2" in losses) == ("cascade" in name)
    metrics = json.loads((tmp_path / "out/inference/metrics.json").read_text())
    assert {"AP", "APr", "APc", "APf"} <= set(metrics["bbox"]) & set(metrics["segm"])
    after = {k: v.clone() for k, v in first.model.state_dict().items()}

    # As if it had been stopped after the first iteration.
    (tmp_path / "out/last_checkpoint").write_text("model_0000000.pth")
    second = train_lazy(load(name), resume=True)
    assert second.start_iter == 1 and second.storage.latest()["total_loss"] == storage["total_loss"]
    assert all(torch.equal(v, after[k]) for k, v in second.model.state_dict().items())
    first.model.eval()
    with torch.no_grad():
        output = first.model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "height": 64, "width": 64}])
    assert output[0]["instances"].has("pred_masks")


def test_other_losses_samplers_and_calibrators(load):
    cfg = load("mask_rcnn_vitdet_b_lvis")
    statistics = L(dataset_statistics)(name="tiny_train")
    predictor = cfg.model.roi_heads.box_predictor
    predictor.loss = L(BalancedSoftmax)(num_classes="${...num_classes}", statistics=statistics)
    predictor.calibrator = L(NorCal)(gamma=0.5, statistics=statistics)
    cfg.dataloader.train.sampler_options = None
    cfg.dataloader.train.sampler = L(InstanceAwareRepeatFactorSampler)(
        repeat_factors=L(instance_aware_repeat_factors)(
            dataset_dicts="${dataloader.train.dataset_dicts}", repeat_thresh=0.5
        ),
        seed=1,
    )
    trainer = train_lazy(cfg)
    (built,) = box_predictors(trainer.model)
    assert isinstance(built.loss, BalancedSoftmax) and built.calibrator.value == 0.5
    assert type(trainer.data_loader.sampler).__name__ == "InstanceAwareRepeatFactorSampler"
    assert built.calibrator.log_weights(4).shape == (4,)


def test_a_sampler_is_one_key(load):
    cfg = load("mask_rcnn_vitdet_b_lvis", "dataloader.train.sampler=InstanceAwareRepeatFactorSampler",
               "dataloader.train.sampler_options.repeat_threshold=0.5", "dataloader.train.seed=3")  # fmt: skip
    loader = instantiate(cfg.dataloader.train)
    records = instantiate(cfg.dataloader.train.dataset_dicts)
    assert type(loader.sampler) is InstanceAwareRepeatFactorSampler
    assert torch.equal(loader.sampler.repeat_factors, instance_aware_repeat_factors(records, 0.5))
    cfg.dataloader.train.sampler = "NoSuchSampler"
    with pytest.raises(Exception, match="is 'NoSuchSampler'.*Known: ClassBalancedSampler"):
        instantiate(cfg.dataloader.train)
    cfg.dataloader.train.sampler = "ClassBalancedSampler"
    with pytest.raises(
        ValueError, match="dataloader.train.sampler_options: ClassBalancedSampler has no option repeat_thr"
    ):
        check_lazy_config(cfg)
    cfg.dataloader.train.sampler = "MetaSampler"
    with pytest.raises(Exception, match="follows what the meta step"):
        instantiate(cfg.dataloader.train)
    cfg.dataloader.train.sampler = None
    with pytest.raises(Exception, match="sampler_options are for a sampler that is given by its name"):
        instantiate(cfg.dataloader.train)


def test_prior_of_the_sampler_in_use(tiny_paths):
    sampler, options = "InstanceAwareRepeatFactorSampler", {"repeat_threshold": 0.5}
    statistics = dataset_statistics("tiny_train", sampler=sampler, sampler_options=options)
    records = get_detection_dataset_dicts("tiny_train")
    factors = instance_aware_repeat_factors(records, 0.5)
    counts = torch.zeros(4, dtype=torch.float64)
    for record, factor in zip(records, factors.tolist()):
        for annotation in record["annotations"]:
            counts[annotation["category_id"]] += factor * (not annotation.get("iscrowd", 0))
    assert torch.allclose(torch.as_tensor(statistics().prior("sampled")), counts / counts.sum())
    loss = BalancedSoftmax(4, statistics=statistics, prior="sampled")
    assert "'sampled'" in loss.describe()
    assert torch.allclose(loss.adjustment()[:-1].double(), (4 * counts / counts.sum()).log(), atol=1e-6)


class Record(HookBase):
    def __init__(self):
        self.losses, self.lr = {}, {}

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.losses[self.trainer.iter], self.lr[self.trainer.iter] = latest["total_loss"][0], latest["lr"][0]


def two_stages(load):
    """Two iterations of the detector, three of its classifier alone with LDAM, re-weighted in the last."""
    cfg = load("mask_rcnn_vitdet_b_lvis", "train.max_iter=5", "dataloader.test.dataset.names=tiny_val")
    del cfg.dataloader["evaluator"]
    cfg.train.decouple = dict(
        start_iter=2,
        loss=L(LDAM)(num_classes="${model.roi_heads.num_classes}", statistics=L(dataset_statistics)(name="tiny_train")),
        reinit_classifier=True,
        sampler="ClassBalancedSampler",
        lr_multiplier=L(ConstantParamScheduler)(value=0.5),
    )
    cfg.train.drw = dict(start_iter=4, lr_factor=0.1)
    return cfg


def run(cfg, resume=False):
    trainer, record = LazyTrainer(cfg), Record()
    trainer.register_hooks([record])
    trainer.checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    trainer.train(trainer.iter + 1 if resume else 0, cfg.train.max_iter)
    return trainer, record


def test_two_stages_and_deferred_re_weighting(load, tmp_path):
    trainer, whole = run(two_stages(load))
    assert trainer.stage == 2 and type(trainer.data_loader.sampler).__name__ == "ClassBalancedSampler"
    (predictor,) = box_predictors(trainer.detector)
    assert type(predictor.loss) is LDAM and predictor.loss.drw_active
    assert whole.lr[2] == whole.lr[3] == pytest.approx(0.5e-4) and whole.lr[4] == pytest.approx(0.5e-5)
    stage1 = torch.load(tmp_path / "out/model_stage1.pth", weights_only=False)["model"]
    changed = {k for k, v in trainer.detector.state_dict().items() if k not in stage1 or not torch.equal(v, stage1[k])}
    assert changed and all(".cls_score." in k for k in changed)

    for last in (0, 2, 3):  # in stage 1, in stage 2, before re-weighting
        (tmp_path / "out/last_checkpoint").write_text(f"model_{last:07d}.pth")
        _, rest = run(two_stages(load), resume=True)
        assert rest.losses == {i: v for i, v in whole.losses.items() if i > last} and rest.lr[4] == whole.lr[4]

    # Stage 2 alone, from the finished model of stage 1.
    cfg = two_stages(load)
    cfg.train.init_checkpoint = str(tmp_path / "out/model_stage1.pth")
    cfg.train.decouple.start_iter = 0
    cfg.train.output_dir = str(tmp_path / "alone")
    cfg.train.drw = None
    trainer, alone = run(cfg)
    assert len(set(alone.losses.values())) == 5
    for name, value in trainer.detector.state_dict().items():
        assert ".cls_score." in name or torch.equal(value, stage1[name])


def test_phases_that_do_not_fit(load):
    for change, message in (
        (lambda train: train.decouple.pop("loss"), "needs loss="),
        (lambda train: train.decouple.update(start_iter=5), "needs loss="),
        (lambda train: train.decouple.update(start_iter=0), "set train.init_checkpoint"),
        (lambda train: train.decouple.update(reinit_classifier=False), "does not fit"),
        (lambda train: train.decouple.update(max_iter=3), "unknown keys max_iter"),
        (lambda train: train.decouple.loss.update(num_classes=9), r"LDAM: class statistics .* have shape \(4,\)"),
        (lambda train: train.drw.update(start_iter=1), "Federated, which cannot be re-weighted"),
        (lambda train: train.drw.update(start_iter=5), "start_iter must lie"),
        (lambda train: train.drw.update(lr_factor=0), "lr_factor be positive"),
    ):
        cfg = two_stages(load)
        change(cfg.train)
        with pytest.raises(ValueError, match=message):
            LazyTrainer(cfg)


LOGN = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from lt_det.modeling import LogN

_cfg = LazyConfig.load({config!r})
model, optimizer, lr_multiplier, dataloader, train = (
    _cfg[k] for k in ("model", "optimizer", "lr_multiplier", "dataloader", "train")
)
model.roi_heads.box_predictor.calibrator = L(LogN)()
"""


def test_logn(repo_dir, load_script, tmp_path, monkeypatch):
    """Training leaves the moments beside its checkpoint, evaluation takes them from there, the tool takes the same."""
    needs_timm("vitdet")
    config, out = tmp_path / "logn.py", tmp_path / "out"
    config.write_text(LOGN.format(config=str(repo_dir / "configs/lazy/mask_rcnn_vitdet_b_lvis.py")))
    words = ["--config-file", str(config), *VITDET, f"train.output_dir={out}"]
    parse = argument_parser().parse_args
    trainer = main_lazy(parse(words))
    moments = out / "model_final.logn.json"
    assert read_moments(moments) == tuple(fit_moments(partial(images_from_lazy, trainer.cfg), trainer.detector))
    trained = json.loads((out / "inference/metrics.json").read_text())

    words.append(f"train.init_checkpoint={out}/model_final.pth")
    tool = load_script("tools/fit_logn.py")
    tool.main(tool.parse(["--output", str(tmp_path / "again.json"), *words]))
    assert (tmp_path / "again.json").read_text() == moments.read_text()

    monkeypatch.setattr("lt_det.engine.logit_moments.fit_moments", None)  # not needed again
    main_lazy(parse(["--eval-only", *words]))
    assert json.loads((out / "inference/metrics.json").read_text()) == trained
    moments.unlink()
    with pytest.raises(TypeError):
        main_lazy(parse(["--eval-only", *words]))


@pytest.mark.parametrize("name", CONFIGS)
def test_test_time_augmentation(load, name, tmp_path):
    """``train.test_aug``: of a sum of equal images the detections are those of one, with its own limits."""
    cfg = load(name, "train.test_aug.min_sizes=[64]", "train.test_aug.max_size=64", "train.test_aug.flip=False")
    trainer = train_lazy(cfg)
    plain, augmented = (f(cfg, trainer.detector) for f in (from_lazy.test_lazy, from_lazy.test_lazy_with_augmentation))
    assert set(plain) == {"bbox", "segm"} and set(augmented) == {"bbox_TTA", "segm_TTA"}
    assert augmented["segm_TTA"].keys() == plain["segm"].keys()
    assert json.loads((tmp_path / "out/inference_TTA/metrics.json").read_text()).keys() == {"bbox", "segm"}

    with torch.no_grad():
        image = instantiate(cfg.dataloader.test).dataset[0]
        trainer.detector.eval()
        whole = trainer.detector([image])[0]["instances"]
        options = dict(min_sizes=[64], max_size=64, flip=False)
        once = LongTailRCNNWithTTA.from_model(trainer.detector, **options)([image])[0]["instances"]
        assert len(once) and torch.equal(once.pred_classes, whole.pred_classes[: len(once)])
        predictor = box_predictors(trainer.detector)[-1]
        predictor.test_topk_per_image = 2
        fewer = LongTailRCNNWithTTA.from_model(trainer.detector, **options)([image])[0]["instances"]
        assert len(fewer) == 2


def test_test_time_augmentation_that_cannot_be(load):
    for overrides, message in (
        (["train.test_aug.min_size=64"], "train.test_aug: unknown keys min_size"),
        (["train.test_aug.min_sizes=[]"], "needs positive min_sizes"),
        (["train.test_aug.max_size=128"], "pads images to 64 x 64; set max_size to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyTrainer(load("mask_rcnn_vitdet_b_lvis", *overrides))


def test_command_line(repo_dir, tmp_path):
    needs_timm("vitdet")
    config = repo_dir / "configs/lazy/mask_rcnn_vitdet_b_lvis.py"
    out = f"train.output_dir={tmp_path}/out"
    overrides = [o for o in VITDET if "device" not in o and "amp" not in o]
    if torch.cuda.is_available():
        overrides += ["train.amp.enabled=False"]
    parse = argument_parser().parse_args
    main_lazy(parse(["--config-file", str(config), *overrides, out]))  # CPU where there is no GPU
    results = main_lazy(
        parse(
            [
                "--config-file",
                str(config),
                "--eval-only",
                *overrides,
                out,
                f"train.init_checkpoint={tmp_path}/out/model_final.pth",
            ]
        )
    )
    assert {"bbox", "segm"} == set(results)
    with pytest.raises(FileNotFoundError, match="no such file"):
        main_lazy(parse(["--config-file", str(tmp_path / "none.py")]))
    with pytest.raises(FileNotFoundError, match="train.init_checkpoint"):
        absent = ["train.init_checkpoint=absent.pth", f"train.output_dir={tmp_path}/other"]
        main_lazy(parse(["--config-file", str(config), *overrides, *absent]))
    with pytest.raises(ValueError, match="train.float32_precision.* is 'hihgest'"):  # newer Detectron2's field
        other = ["train.float32_precision=hihgest", f"train.output_dir={tmp_path}/third"]
        main_lazy(parse(["--config-file", str(config), *overrides, *other]))
    with pytest.raises(FileExistsError, match="holds a run already"):
        main_lazy(parse(["--config-file", str(config), *overrides, out]))
