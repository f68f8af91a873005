"""The meta step and the feature cache in whole runs."""

import csv
import errno
import logging

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from lt_det.data import build_train_mapper, load_train_dicts
from lt_det.engine import LongTailTrainer
from lt_det.engine.feature_cache import FeatureCache, cache_key, cached_records, open_feature_cache
from lt_det.engine.from_yaml import feature_cache_options
from lt_det.meta import MetaDecoupledClassifier, build_meta_loss
from lt_det.modeling import DecoupledClassifier, build_loss

REWEIGHTER = ("META.NAME", "MetaReweighter")
SAMPLER = ("META.NAME", "MetaSampler")
IMAGE_SAMPLER = (*SAMPLER, "DECOUPLE.SAMPLER_TRAIN", "MetaSampler")
LEARNERS = pytest.mark.parametrize(
    "learner", [REWEIGHTER, SAMPLER, IMAGE_SAMPLER], ids=["reweighter", "roi_sampler", "image_sampler"]
)


def weights(trainer):
    return {k: v.clone() for k, v in trainer.detector.state_dict().items()}


@LEARNERS
def test_rates_are_learned_and_shown(tiny_cfg, train, learner, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lt_det"), "propagate", True)
    with caplog.at_level(logging.INFO, "lt_det"):
        cfg = tiny_cfg(*learner, "META.LR", 0.1)
        trainer, record = train(cfg)
    rates = trainer.meta.learner.rates
    assert (rates != 0.5).any() and sorted(record.losses) == list(range(9))
    stage1 = torch.load(f"{cfg.OUTPUT_DIR}/model_stage1.pth")["model"]
    after = trainer.detector.state_dict()
    assert after.keys() == stage1.keys()  # a checkpoint of the model is the model, and no more
    assert all(("cls_score" in k) == (not torch.equal(after[k], stage1[k])) for k in after)

    assert "mean rates: rare" in caplog.text
    rows = list(csv.DictReader(open(f"{cfg.OUTPUT_DIR}/meta_rates.csv")))
    assert [float(row["rate"]) for row in rows] == pytest.approx(rates.tolist(), abs=1e-6)
    assert [row["image_count"] for row in rows] == ["2", "4", "8", "12"] and rows[0]["frequency"] == "r"
    picture = open(f"{cfg.OUTPUT_DIR}/meta_rates.png", "rb").read()
    assert picture.startswith(b"\x89PNG")
    assert trainer.storage.latest()["meta/rate_r"][0] == pytest.approx(rates[:3].mean().item())


def test_equal_rates_are_no_weights(tiny_cfg, train, tmp_path):
    """With a learning rate of nothing, the run is the one without a meta step, image by image."""
    with_meta, record = train(tiny_cfg(*REWEIGHTER, "META.LR", 1e-30))
    plain, expected = train(tiny_cfg("META.NAME", "", "OUTPUT_DIR", str(tmp_path / "plain")))
    assert isinstance(with_meta._trainer.model, MetaDecoupledClassifier)
    for iteration, losses in expected.losses.items():
        assert record.losses[iteration]["total_loss"] == pytest.approx(losses["total_loss"], rel=1e-5)
    for (name, a), b in zip(weights(with_meta).items(), weights(plain).values()):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    "learner, stop_after",
    [
        (REWEIGHTER, 4),
        (REWEIGHTER, 6),
        (SAMPLER, 5),
        (IMAGE_SAMPLER, 4),
        (IMAGE_SAMPLER, 5),
        (IMAGE_SAMPLER, 7),
    ],
)
def test_resume_equals_uninterrupted(tiny_cfg, interrupt_and_compare, learner, stop_after):
    """4 is the last iteration of stage 1. Odd iterations of stage 2 (from 5) take no meta step."""
    options = (*learner, "META.PERIOD", 2, "META.LR", 0.1)
    resumed, tail, whole, _ = interrupt_and_compare(tiny_cfg, *options, stop_after=stop_after)
    assert sorted(tail.losses) == list(range(stop_after + 1, 9))
    assert torch.equal(resumed.meta.learner.logits, whole.meta.learner.logits)
    a, b = weights(resumed), weights(whole)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_period_and_size_of_meta_batches(tiny_cfg, train, monkeypatch):
    sizes = []
    take = MetaDecoupledClassifier._meta_batch

    def counted(self):
        batch = take(self)
        sizes.append((self.meta.iteration, len(batch[0].per_image)))
        return batch

    monkeypatch.setattr(MetaDecoupledClassifier, "_meta_batch", counted)
    train(tiny_cfg(*REWEIGHTER, "META.PERIOD", 3, "META.IMS_PER_BATCH", 4))
    assert sizes == [(0, 4), (3, 4)]


def test_sampler_and_loss_of_meta_batches(tiny_cfg, train):
    def meta(*options):
        trainer = LongTailTrainer(tiny_cfg(*REWEIGHTER, *options))
        trainer.build_stage(2)
        return trainer.meta

    assert type(meta().meta_loss).__name__ == "Softmax" and not meta().balance_rois
    sigmoids = ("MODEL.LONG_TAIL.LOSS", "Sigmoid", "DECOUPLE.LOSS", "BalancedSigmoid")
    assert type(meta(*sigmoids).meta_loss).__name__ == "Sigmoid"
    assert type(meta("META.LOSS", "BalancedSoftmax").meta_loss).__name__ == "BalancedSoftmax"
    assert meta("META.BALANCE_ROIS", True).balance_rois
    train(tiny_cfg(*REWEIGHTER, *sigmoids, "META.SAMPLER", "TrainingSampler"))
    with pytest.raises(ValueError, match="META.SAMPLER is 'Balanced'.*Known: ClassBalancedSampler"):
        LongTailTrainer(tiny_cfg(*REWEIGHTER, "META.SAMPLER", "Balanced"))


def test_meta_loss_has_the_prior_and_the_background_rule_of_stage_2(tiny_cfg):
    stage2 = ("DECOUPLE.PRIOR", "instance_count", "DECOUPLE.BACKGROUND", "official")
    cfg = tiny_cfg(*REWEIGHTER, *stage2, "META.LOSS", "BalancedSoftmax")
    loss = build_loss(cfg, stage=2)
    meta = build_meta_loss(cfg, loss)
    assert (meta.prior, meta.background) == (loss.prior, loss.background) == ("instance_count", "official")
    # With the same name it is the published, shifted meta loss.
    scores = torch.randn(9, loss.num_classes + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(9) * loss.num_classes // 8
    assert torch.equal(meta(scores, labels), loss(scores, labels))
    plain = build_meta_loss(tiny_cfg(*REWEIGHTER, *stage2), loss)
    expected = torch.nn.functional.cross_entropy(scores, labels)
    torch.testing.assert_close(plain(scores, labels), expected, rtol=1e-12, atol=0)
    assert abs(meta(scores, labels) - expected) > 0.1


def test_images_follow_the_rates(tiny_cfg, train):
    trainer, _ = train(tiny_cfg(*IMAGE_SAMPLER, "META.LR", 0.5, "DECOUPLE.MAX_ITER", 8))
    sampler = trainer.train_loader.sampler
    expected = sampler._class_factors * sampler._rates / sampler._rates.mean()
    assert sampler._rates.std() > 0
    # Images of a class alone, or with less wanted ones, are drawn by its rate.
    assert {round(float(r), 5) for r in sampler.repeat_factors} <= {round(float(r), 5) for r in expected}


def test_cascade_heads_share_the_rates(tiny_cfg, train):
    cascade = ("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    trainer, record = train(tiny_cfg(*cascade, *REWEIGHTER, "DECOUPLE.FEATURE_CACHE.ENABLED", True))
    assert {f"loss_cls_stage{k}" for k in range(3)} <= record.losses[5].keys()
    assert (trainer.meta.learner.rates != 0.5).any()


def test_contradictions_are_named(tiny_cfg):
    with pytest.raises(ValueError, match="DECOUPLE.ENABLED True"):
        LongTailTrainer(tiny_cfg(*REWEIGHTER, "DECOUPLE.ENABLED", False))
    with pytest.raises(ValueError, match="META.NAME is empty"):
        LongTailTrainer(tiny_cfg("DECOUPLE.SAMPLER_TRAIN", "MetaSampler", "META.NAME", ""))
    with pytest.raises(ValueError, match="META.SAMPLER"):
        LongTailTrainer(tiny_cfg(*REWEIGHTER, "META.SAMPLER", "MetaSampler"))
    with pytest.raises(ValueError, match="LOCE classifies features that it keeps.*LOCE.MEMORY_SIZE 0"):
        LongTailTrainer(tiny_cfg(*REWEIGHTER, "DECOUPLE.LOSS", "LOCE"))
    LongTailTrainer(tiny_cfg(*REWEIGHTER, "DECOUPLE.LOSS", "LOCE", "MODEL.LONG_TAIL.LOCE.MEMORY_SIZE", 0))


@pytest.mark.parametrize(
    "options, message",
    [
        (("META.NAME", "Reweighter"), "META.NAME is 'Reweighter'"),
        ((*REWEIGHTER, "META.PERIOD", 0), "META.PERIOD"),
        ((*REWEIGHTER, "META.LR", 0.0), "META.LR"),
        ((*REWEIGHTER, "META.LOSS", "Soft"), "META.LOSS is 'Soft'"),
        ((*REWEIGHTER, "META.LOSS", "Sigmoid"), "does not fit"),
    ],
)
def test_wrong_keys_are_named(tiny_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        LongTailTrainer(tiny_cfg(*options)).build_stage(2)


# ---- the feature cache


@pytest.fixture
def cache_cfg(tiny_cfg, tmp_path):
    def build(*options):
        return tiny_cfg(
            "DECOUPLE.FEATURE_CACHE.ENABLED", True, "DECOUPLE.FEATURE_CACHE.DIR", str(tmp_path / "cache"),
            "META.NAME", "",
            *options,
        )  # fmt: skip

    return build


def opened(cfg, module, records):
    return open_feature_cache(module, records, build_train_mapper(cfg, records), **feature_cache_options(cfg))


def key_of(cfg, module, records):
    options = feature_cache_options(cfg)
    return cache_key(module, records, **{k: options[k] for k in ("settings", "seed", "amp", "rois_per_image")})


def open_cache(cfg):
    """The cache of a fresh detector, what it stands for, and the records."""
    torch.manual_seed(0)
    trainer = LongTailTrainer(cfg)
    module = DecoupledClassifier(trainer.detector.train())
    records, _ = load_train_dicts(cfg)
    return opened(cfg, module, records), module, records


def test_cache_holds_what_the_trunk_gives(cache_cfg):
    cfg = cache_cfg("INPUT.MIN_SIZE_TRAIN", (64,), "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096)
    cache, module, records = open_cache(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    for i in (0, 5, len(records) - 1):
        stored = cache(cached_records(records)[i])
        with EventStorage():
            (direct,) = module.roi_batches([mapper(records[i])])
        # Every RoI is taken, in an order of chance: compare as sets.
        assert len(stored["roi_classes"][0]) == len(direct.gt_classes)
        assert torch.equal(stored["roi_classes"][0].sort()[0], direct.gt_classes.sort()[0])
        a, b = stored["roi_features"][0].float(), direct.features
        order = lambda x: x[x.sum(dim=1).argsort()]
        torch.testing.assert_close(order(a).sum(dim=0), order(b).sum(dim=0), rtol=2e-3, atol=2e-3)


def test_cache_is_found_again_and_never_mistaken(cache_cfg, monkeypatch):
    cfg = cache_cfg()
    first, module, records = open_cache(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(DecoupledClassifier, "roi_batches", None)  # nothing is computed again
        assert opened(cfg, module, records) == first
    keys = {key_of(cfg, module, records)}
    keys.add(key_of(cfg, module, records[1:]))
    keys.add(key_of(cache_cfg("DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE", 7), module, records))
    keys.add(key_of(cache_cfg("SEED", 77), module, records))
    keys.add(key_of(cache_cfg("INPUT.MIN_SIZE_TRAIN", (60,)), module, records))
    with torch.no_grad():
        module.detector.roi_heads.box_predictor.cls_score.weight += 1
        assert key_of(cfg, module, records) in keys  # what stage 2 trains does not count
        module.detector.roi_heads.box_head.fc1.weight += 1
        keys.add(key_of(cfg, module, records))
    assert len(keys) == 6


def test_fewer_rois(cache_cfg):
    cache, module, records = open_cache(cache_cfg("DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE", 5))
    assert all(len(cache(record)["roi_classes"][0]) <= 5 for record in cached_records(records))
    assert module.detector.roi_heads.batch_size_per_image == 16
    assert isinstance(cache, FeatureCache) and comm.get_world_size() == 1


def test_full_disk_is_named(cache_cfg, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="DECOUPLE.FEATURE_CACHE.DIR"):
        open_cache(cache_cfg())


def test_unwritable_folder_is_named(cache_cfg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file.* cannot be written to \(.*DECOUPLE.FEATURE_CACHE.DIR"):
        open_cache(cache_cfg("DECOUPLE.FEATURE_CACHE.DIR", str(tmp_path / "file")))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lt_det.engine.feature_cache._NpyWriter.append", full)
    with pytest.raises(OSError, match=r"cache could not be written to \(No space left.*DECOUPLE.FEATURE_CACHE.DIR"):
        open_cache(cache_cfg())
    assert not list((tmp_path / "cache").iterdir())  # nothing is left


@pytest.mark.parametrize("part", ["features", "classes", "offsets", "checksums"])
def test_damaged_cache_is_named(cache_cfg, part):
    cache, _, records = open_cache(cache_cfg())
    (file,) = cache.folder.glob(f"shard0_0_{part}.npy")
    content = bytearray(file.read_bytes())
    content[-8:] = bytes(8) if part == "offsets" else bytes([byte ^ 1 for byte in content[-8:]])
    file.write_bytes(content)
    whole, damaged = cached_records(records)[0], cached_records(records)[-1]
    fresh = FeatureCache(cache.folder, 1, 1)
    assert len(fresh(whole)["roi_classes"]) == 1
    with pytest.raises(OSError, match=rf"{cache.folder} cannot be used.*delete that folder"):
        fresh(damaged)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=rf"{cache.folder} cannot be used"):
        FeatureCache(cache.folder, 1, 1)(damaged)


def test_resume_with_cache(cache_cfg, train, tmp_path):
    cfg = cache_cfg(*IMAGE_SAMPLER, "SOLVER.CHECKPOINT_PERIOD", 1)
    train(cfg, stop_after=6)
    resumed, tail = train(cfg, resume=True)
    whole, record = train(
        cache_cfg(*IMAGE_SAMPLER, "SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", str(tmp_path / "whole"))
    )
    assert sorted(tail.losses) == [7, 8] and tail.losses == {i: record.losses[i] for i in (7, 8)}
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values()))
