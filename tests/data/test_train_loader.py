import itertools
import pickle
import random
import time

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import samplers as d2
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Sampler

from lt_det.config import get_lt_det_cfg
from lt_det.data import (
    RepeatFactorTrainingSampler,
    TrainingSampler,
    build_train_loader,
    build_train_loader_from_config,
    register_dataset,
    repeat_factors_from_category_frequency,
    sampler_by_name,
)
from lt_det.data.train_loader import _BatchDraws

# A third of the images is wider than high.
DICTS = [{"image_id": i, "width": 20 if i % 3 == 0 else 10, "height": 15} for i in range(17)]


def mapper(record):
    """Draws from all three sources of random numbers, and tells the record."""
    return (record["image_id"], random.random(), float(np.random.rand()), float(torch.rand(())))


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def loader(**options):
    options = {"total_batch_size": 4, "seed": 11, **options}
    sampler = options.pop("sampler", None) or RepeatFactorTrainingSampler(np.linspace(0.4, 2.6, 17), seed=3)
    return build_train_loader(DICTS, options.pop("mapper", mapper), sampler, **options)


@pytest.fixture
def as_rank(monkeypatch):
    def pretend(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return pretend


# ---------------------------------------------------------------- sampler by name


def test_sampler_by_name():
    """The name that the yaml key takes, and the same stream as the sampler itself."""
    dicts = [{**record, "annotations": [{"category_id": int(i < 2)}]} for i, record in enumerate(DICTS)]
    factors = repeat_factors_from_category_frequency(dicts, 0.5)
    assert factors.max() > 1
    options = {"total_batch_size": 4, "seed": 11}
    by_name = build_train_loader(
        dicts, mapper, "RepeatFactorTrainingSampler", sampler_options={"repeat_threshold": 0.5}, **options
    )
    assert take(by_name, 9) == take(
        build_train_loader(dicts, mapper, RepeatFactorTrainingSampler(factors, seed=11), **options), 9
    )
    subset = sampler_by_name("RandomSubsetTrainingSampler", dicts, random_subset_ratio=0.5, seed=1)
    assert subset.repeat_factors.sum() == 8
    with pytest.raises(ValueError, match="is 'Absent'.*Known: ClassBalancedSampler"):
        sampler_by_name("Absent", dicts)
    with pytest.raises(ValueError, match="MetaSampler follows what the meta step"):
        sampler_by_name("MetaSampler", dicts)
    for name, options, message in (
        ("RepeatFactorTrainingSampler", {"repeat_treshold": 0.5}, "no option repeat_treshold; did you mean repeat_thr"),
        (
            "ClassBalancedSampler",
            {"repeat_threshold": 0.5},
            "ClassBalancedSampler has no option repeat_threshold. .* none",
        ),
        ("TrainingSampler", {"random_subset_ratio": 0.5}, "no option random_subset_ratio"),
        ("WeightedTrainingSampler", {}, "reads a yaml config"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler_by_name(name, dicts, **options)
    with pytest.raises(ValueError, match="MetaSampler has no option batch_size"):
        build_train_loader(dicts, mapper, "MetaSampler", sampler_options={"batch_size": 2}, total_batch_size=4)
    with pytest.raises(ValueError, match="sampler_options are for a sampler that is given by its name"):
        loader(sampler_options={"repeat_threshold": 0.5})


# ---------------------------------------------------------------- grouping


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 1000))
def test_grouping_equals_detectron2s(wide, batch_size, seed):
    dicts = [{"index": i, "width": 2 if w else 1, "height": 1} for i, w in enumerate(wide)]
    stream = list(itertools.islice(iter(TrainingSampler(len(wide), seed=seed)), 60))
    theirs = [
        [d["index"] for d in batch] for batch in AspectRatioGroupedDataset([dicts[i] for i in stream], batch_size)
    ]
    batches = _BatchDraws(stream, batch_size, np.array(wide), rank=0, world_size=1)
    assert [[index for _, index in batch] for batch in batches] == theirs
    for batch in batches:
        assert [stream[draw] for draw, _ in batch] == [index for _, index in batch]


def test_batches_have_one_orientation_unless_told_otherwise():
    def mixed(batches):
        return [len({i % 3 == 0 for i, *_ in batch}) > 1 for batch in batches]

    assert not any(mixed(take(loader(), 20)))
    assert any(mixed(take(loader(aspect_ratio_grouping=False), 20)))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
def test_resumed_equals_uninterrupted(workers, grouping):
    whole = take(loader(aspect_ratio_grouping=grouping), 14)
    assert len({sample for batch in whole for sample in batch}) == 14 * 4  # no random number comes twice
    for start in (0, 1, 6, 13) if workers == 0 else (0, 5):
        resumed = take(loader(aspect_ratio_grouping=grouping, num_workers=workers, start_iteration=start), 14 - start)
        assert resumed == whole[start:]


def test_iterating_again_and_state_go_on():
    whole = take(loader(), 9)
    first = loader()
    assert take(first, 3) == whole[:3]
    assert first.iteration == 3
    assert take(first, 2) == whole[3:5]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert take(second, 4) == whole[5:]


def test_passing_over_reads_no_image():
    read = []

    def recording(record):
        read.append(record["image_id"])
        return mapper(record)

    whole = take(loader(), 1001)
    (last,) = take(loader(mapper=recording, start_iteration=1000), 1)
    assert last == whole[1000]
    assert len(read) == 4


def test_training_process_keeps_its_random_numbers():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = states()
    take(loader(), 3)
    take(loader(num_workers=1), 1)
    assert states() == before
    with pytest.raises(ZeroDivisionError):
        take(loader(mapper=lambda record: random.random() / 0), 1)
    assert states() == before


def test_seed_changes_augmentation_and_nothing_else():
    one, other = take(loader(), 6), take(loader(seed=12), 6)
    assert [[s[0] for s in b] for b in one] == [[s[0] for s in b] for b in other]
    for a, b in zip(itertools.chain(*one), itertools.chain(*other)):
        assert a[1] != b[1] and a[2] != b[2] and a[3] != b[3]


def test_two_ranks_see_together_what_one_sees(as_rank):
    whole = take(loader(aspect_ratio_grouping=False), 10)
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        half = loader(aspect_ratio_grouping=False, start_iteration=4)
        assert half.batch_size == 2
        parts.append(take(half, 6))
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole[4:]]


def test_samplers_of_detectron2_work_too(as_rank):
    as_rank(1, 2)
    theirs = loader(sampler=d2.TrainingSampler(17, seed=3))
    ours = loader(sampler=TrainingSampler(17, seed=3))
    assert take(theirs, 8) == take(ours, 8)


# ---------------------------------------------------------------- samplers with a state


class Countdown(Sampler):
    """A stream that depends on what has been told to the sampler, so that it cannot be replayed."""

    resumable_by_replay = False

    def __init__(self):
        self.value = 1
        self.step = 1

    def __iter__(self):
        while True:
            self.value = (self.value * 5 + self.step) % 17
            yield self.value

    def state_dict(self):
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state):
        self.value, self.step = state["value"], state["step"]


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_that_cannot_be_replayed(workers):
    def run(first, stop_at, states):
        batches = []
        train = loader(sampler=Countdown(), num_workers=workers)
        if states:
            train.load_state_dict(states.pop())
        for i, batch in enumerate(train, start=first):
            batches.append(batch)
            if i == 4:
                train.sampler.step = 2  # as a learner would change its rates
            if i + 1 == stop_at:
                states.append(train.state_dict())
                return batches

    whole = run(0, 14, [])
    for stop in (3, 7):
        states = []
        assert run(0, stop, states) + run(stop, 14, states) == whole


def test_sampler_that_cannot_be_replayed_refuses_a_start_iteration():
    with pytest.raises(ValueError, match="Countdown cannot be replayed.*load_state_dict"):
        loader(sampler=Countdown(), start_iteration=2)


# ---------------------------------------------------------------- mappers, errors


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_images_are_replaced_alike(workers):
    def picky(record):
        return None if record["image_id"] < 8 else mapper(record)

    batches = take(loader(mapper=picky, num_workers=workers), 8)
    assert all(len(batch) == 4 and all(sample[0] >= 8 for sample in batch) for batch in batches)
    assert batches == take(loader(mapper=picky), 8)


def test_mapper_that_takes_nothing():
    with pytest.raises(RuntimeError, match="returned None for 11 images in a row"):
        take(loader(mapper=lambda record: None), 1)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(total_batch_size=0), "IMS_PER_BATCH"),
        (dict(start_iteration=-1), "start_iteration"),
        (dict(seed=-1), "seed must not be negative"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        loader(**options)


def test_bad_data_sets(as_rank):
    with pytest.raises(ValueError, match="training set is empty"):
        build_train_loader([], mapper, total_batch_size=2, seed=1)
    with pytest.raises(ValueError, match="Image 5 has no width and height.*ASPECT_RATIO_GROUPING"):
        build_train_loader([{"image_id": 5}], mapper, total_batch_size=2, seed=1)
    as_rank(0, 3)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH \(4\).*number of processes \(3\)"):
        loader(sampler=TrainingSampler(17, seed=1))


def test_finite_sampler_ends():
    assert len(list(loader(sampler=list(range(10)), aspect_ratio_grouping=False))) == 2
    assert list(loader(sampler=list(range(10)), aspect_ratio_grouping=False, start_iteration=5)) == []


# ---------------------------------------------------------------- from a config


@pytest.fixture
def config(lvis_content, write_json, lvis_images, clean_catalogs):
    cfg = get_lt_det_cfg()
    cfg.DATASETS.REGISTER = [["loader_lvis", str(write_json(lvis_content)), str(lvis_images)]]
    cfg.DATASETS.TRAIN = ("loader_lvis",)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 48, 64)
    return cfg


def contents(batches):
    return [
        [(d["image_id"], d["image"].shape, d["instances"].gt_boxes.tensor.tolist(), len(d["instances"])) for d in batch]
        for batch in batches
    ]


def test_real_mapper_resumes_from_a_config(config):
    whole = contents(take(build_train_loader_from_config(config, seed=5), 10))
    assert len({sample[1] for batch in whole for sample in batch}) > 3  # augmentation is at work
    assert {sample[0] for batch in whole for sample in batch} == {4, 7}  # the empty image is filtered
    assert contents(take(build_train_loader_from_config(config, seed=5, start_iteration=6), 4)) == whole[6:]
    config.DATALOADER.NUM_WORKERS = 2
    assert contents(take(build_train_loader_from_config(config, seed=5, start_iteration=8), 2)) == whole[8:]


def test_empty_images_are_kept_if_asked(config):
    config.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    for name in ("RepeatFactorTrainingSampler", "InstanceAwareRepeatFactorSampler", "ClassBalancedSampler"):
        batches = take(build_train_loader_from_config(config, seed=5, sampler_name=name), 30)
        empty = [d for batch in batches for d in batch if d["image_id"] == 9]
        assert empty and all(len(d["instances"]) == 0 for d in empty)


def test_dicts_and_mapper_may_be_given(config):
    dicts = [dict(record, annotations=[]) for record in DICTS]
    register_dataset("loader_given", config.DATASETS.REGISTER[0][1], config.DATASETS.REGISTER[0][2])
    config.DATASETS.TRAIN = ("loader_given",)
    batches = take(build_train_loader_from_config(config, seed=5, dataset_dicts=dicts, mapper=mapper), 3)
    assert all(sample[0] in range(17) for batch in batches for sample in batch)


def test_two_data_sets_with_weights(config, lvis_content, write_json, lvis_images):
    lvis_content["annotations"] = [a for a in lvis_content["annotations"] if a["image_id"] == 4]
    config.DATASETS.REGISTER = config.DATASETS.REGISTER + [
        ["loader_more", str(write_json(lvis_content, "more.json")), str(lvis_images)]
    ]
    config.DATASETS.TRAIN = ("loader_lvis", "loader_more")
    config.DATASETS.TRAIN_REPEAT_FACTOR = [("loader_more", 4.0)]
    config.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    train = build_train_loader_from_config(config, seed=5)
    assert train.sampler.repeat_factors.tolist() == [1.0, 1.0, 4.0]


def test_wrong_number_of_classes_names_key_and_number(config):
    config.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(
        ValueError,
        match="NUM_CLASSES is 80, but data set 'loader_lvis' has 4 .*Set MODEL.ROI_HEADS.NUM_CLASSES to 4",
    ):
        build_train_loader_from_config(config, seed=5)
    config.MODEL.ROI_HEADS.NUM_CLASSES = 4
    dicts = [dict(DICTS[0], annotations=[{"category_id": 6}])]
    config.DATASETS.TRAIN = ("not_registered",)
    with pytest.raises(ValueError, match="class indices up to 6. Set MODEL.ROI_HEADS.NUM_CLASSES to 7"):
        build_train_loader_from_config(config, seed=5, dataset_dicts=dicts)
    config.MODEL.META_ARCHITECTURE = "RetinaNet"
    config.MODEL.RETINANET.NUM_CLASSES = 6
    with pytest.raises(ValueError, match="Set MODEL.RETINANET.NUM_CLASSES to 7"):
        build_train_loader_from_config(config, seed=5, dataset_dicts=dicts)


def test_data_sets_of_different_classes(config, lvis_content, write_json, lvis_images):
    lvis_content["categories"][0]["name"] = "wasp"
    register_dataset("loader_other", write_json(lvis_content, "other.json"), lvis_images)
    config.DATASETS.TRAIN = ("loader_lvis", "loader_other")
    with pytest.raises(ValueError, match="same classes in the same order, but 'loader_other'"):
        build_train_loader_from_config(config, seed=5)


@pytest.mark.parametrize(
    "train, complaint",
    [((), "DATASETS.TRAIN is empty"), (("loader_nothing",), "no data set 'loader_nothing'")],
)
def test_data_sets_that_are_not_there(config, train, complaint):
    config.DATASETS.TRAIN = train
    with pytest.raises((ValueError, KeyError), match=complaint):
        build_train_loader_from_config(config, seed=5)


def test_the_order_is_that_of_a_stock_sampler_with_the_same_seed(config):
    """As ``TrainingSampler(size, seed=cfg.SEED)`` of newer Detectron2's loader."""
    config.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    config.DATALOADER.ASPECT_RATIO_GROUPING = False
    ours = build_train_loader_from_config(config, seed=23, mapper=lambda record: record)
    images = [record["image_id"] for record in ours.records]
    theirs = itertools.islice(d2.TrainingSampler(len(images), seed=23), 20)
    assert [r["image_id"] for batch in take(ours, 10) for r in batch] == [images[i] for i in theirs]


@pytest.mark.parametrize("ahead", [1, 3])
def test_workers_load_so_many_batches_ahead(ahead, tmp_path):
    def leaves_a_trace(record):
        (tmp_path / str(len(list(tmp_path.iterdir())))).touch()
        return record

    draws = loader(mapper=leaves_a_trace, num_workers=1, prefetch_factor=ahead, aspect_ratio_grouping=False)
    batches = iter(draws)
    next(batches)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 4 * (1 + ahead) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) == 4 * (1 + ahead)


def test_images_are_pinned_where_there_is_a_gpu(recwarn):
    draws = loader(mapper=lambda record: {"image": torch.zeros(2)}, pin_memory=True)
    (batch,) = take(draws, 1)
    if torch.cuda.is_available():
        assert all(record["image"].is_pinned() for record in batch)
    else:  # torch says that it was asked for
        assert any("pin_memory" in str(w.message) for w in recwarn)
    recwarn.clear()
    (batch,) = take(loader(mapper=lambda record: {"image": torch.zeros(2)}), 1)
    assert not any(record["image"].is_pinned() for record in batch) and not recwarn.list


def test_lazy_config(config):
    name, json_file, image_root = config.DATASETS.REGISTER[0]
    register_dataset(name, json_file, image_root)
    train = L(build_train_loader)(
        dataset_dicts=L(get_detection_dataset_dicts)(names=name),
        mapper=mapper,
        sampler=L(RepeatFactorTrainingSampler)(
            repeat_factors=L(repeat_factors_from_category_frequency)(
                dataset_dicts="${...dataset_dicts}", repeat_thresh=0.9
            ),
            seed=5,
        ),
        total_batch_size=2,
        seed=5,
    )
    expected = take(build_train_loader_from_config(config, seed=5, mapper=mapper), 5)
    assert take(instantiate(train), 5) == expected


def test_workers_may_be_spawned():
    # Start methods other than fork send these two to the workers.
    loaded = loader(mapper=lambda record: record["image_id"])._loader
    dataset, init = pickle.loads(pickle.dumps((loaded.dataset, loaded.worker_init_fn)))
    assert dataset[(0, 6)] == 6
    before = random.getstate()
    try:
        init(0)
        assert random.getstate() != before
    finally:
        random.setstate(before)


def test_real_photographs(shared_dir, config):
    folder = shared_dir / "data" / "lvis_val_64"
    config.DATASETS.REGISTER = [["loader_photographs", str(folder / "lvis_val_64.json"), str(folder / "images")]]
    config.DATASETS.TRAIN = ("loader_photographs",)
    config.MODEL.ROI_HEADS.NUM_CLASSES = 1230
    whole = contents(take(build_train_loader_from_config(config, seed=5), 6))
    assert contents(take(build_train_loader_from_config(config, seed=5, start_iteration=3), 3)) == whole[3:]
