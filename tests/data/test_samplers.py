import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import build as d2_build
from detectron2.data import samplers as d2
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st

from lt_det.data import (
    SAMPLER_REGISTRY,
    ClassBalancedSampler,
    InstanceAwareRepeatFactorSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
    build_sampler,
    class_balanced_repeat_factors,
    expected_counts,
    instance_aware_repeat_factors,
    repeat_factors_from_category_frequency,
    sampler_by_name,
    samplers_with_options,
)
from lt_det.declaration import declared_options, documented_arguments
from lt_det.engine import get_lt_det_cfg

DATA_SETS = st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=30)


def records(categories_of_images):
    return [{"annotations": [{"category_id": c} for c in categories]} for categories in categories_of_images]


# image: 0 has class 0 twice and class 1; 1 has class 0; 2 has nothing; 3 has class 0 and class 2
HAND = records([[0, 0, 1], [0], [], [0, 2]])


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


# ---------------------------------------------------------------- repeat factors


@given(DATA_SETS, st.floats(0, 2), st.booleans())
def test_repeat_factors_equal_detectron2(images, threshold, sqrt):
    dicts = records(images)
    expected = d2.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, threshold, sqrt)
    actual = repeat_factors_from_category_frequency(dicts, threshold, sqrt)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_repeat_factors_by_hand():
    # frequencies: class 0 in 3 of 4 images, classes 1 and 2 in 1 of 4
    assert repeat_factors_from_category_frequency(HAND, 1.0).tolist() == [
        2.0,
        pytest.approx(math.sqrt(4 / 3)),
        1.0,
        2.0,
    ]


def naive_irfs(images, threshold):
    """The paper's equations with loops: r(I) = max over c of max(1, sqrt(t / sqrt(f_i f_b)))."""
    total = sum(map(len, images))
    factors = []
    for image in images:
        best = 1.0
        for c in image:
            f_image = sum(c in other for other in images) / len(images)
            f_instance = sum(other.count(c) for other in images) / total
            best = max(best, math.sqrt(threshold / math.sqrt(f_image * f_instance)))
        factors.append(best)
    return factors


@given(DATA_SETS, st.floats(0, 2))
def test_instance_aware_factors_follow_the_paper(images, threshold):
    actual = instance_aware_repeat_factors(records(images), threshold)
    np.testing.assert_allclose(actual, naive_irfs(images, threshold), rtol=1e-6)


def test_instance_aware_factors_by_hand():
    # 6 instances: class 0 four times, classes 1 and 2 once.
    # f(0) = sqrt(3/4 * 4/6), f(1) = f(2) = sqrt(1/4 * 1/6)
    zero, rare = math.sqrt(1 / math.sqrt(0.5)), math.sqrt(1 / math.sqrt(1 / 24))
    np.testing.assert_allclose(instance_aware_repeat_factors(HAND, 1.0), [rare, zero, 1.0, rare], rtol=1e-6)


@given(DATA_SETS)
def test_class_balanced_factors_follow_the_official_rule(images):
    dicts = records(images)
    count = {c: sum(c in image for image in images) for image in images for c in image}
    expected = [max((len(images) / count[c] for c in image), default=1.0) for image in images]
    np.testing.assert_allclose(class_balanced_repeat_factors(dicts, normalize=False), expected, rtol=1e-6)
    normalised = class_balanced_repeat_factors(dicts).double().numpy()
    np.testing.assert_allclose(normalised * np.mean(expected), expected, rtol=1e-5)
    assert normalised.mean() == pytest.approx(1.0, rel=1e-5)


def test_bad_input_of_repeat_factors():
    with pytest.raises(ValueError, match="data set is empty"):
        repeat_factors_from_category_frequency([], 0.1)
    with pytest.raises(ValueError, match="Image 8 has category_id -1"):
        class_balanced_repeat_factors([{"image_id": 8, "annotations": [{"category_id": -1}]}])
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="REPEAT_THRESHOLD"):
            repeat_factors_from_category_frequency(HAND, threshold)


def test_data_set_without_any_annotation():
    dicts = [{"annotations": []}, {}]
    assert repeat_factors_from_category_frequency(dicts, 0.1).tolist() == [1.0, 1.0]
    assert class_balanced_repeat_factors(dicts).tolist() == [1.0, 1.0]
    assert expected_counts(dicts, 3).tolist() == [0.0, 0.0, 0.0]


def test_expected_counts_by_hand():
    assert expected_counts(HAND, 4).tolist() == [4.0, 1.0, 1.0, 0.0]
    counts = expected_counts(HAND, 4, torch.tensor([2.0, 0.5, 9.0, 1.5]))
    assert counts.dtype == np.float64 and counts.tolist() == [2 * 2 + 0.5 + 1.5, 2.0, 1.5, 0.0]
    crowd = [{"annotations": [{"category_id": 1, "iscrowd": 1}, {"category_id": 1, "iscrowd": 0}]}]
    assert expected_counts(crowd, 2, [3.0]).tolist() == [0.0, 3.0]
    with pytest.raises(ValueError, match="category_id 2, but there are 2 classes"):
        expected_counts(HAND, 2)
    with pytest.raises(ValueError, match="4 images need as many"):
        expected_counts(HAND, 3, [1.0])


def test_expected_counts_are_what_the_sampler_draws():
    rng = np.random.default_rng(0)
    dicts = records([rng.integers(0, 5, rng.integers(0, 4)).tolist() for _ in range(40)])
    factors = class_balanced_repeat_factors(dicts)
    expected = expected_counts(dicts, 5, factors)
    epochs = 400
    sampler = RepeatFactorTrainingSampler(factors, seed=3)
    drawn = take(sampler, int(factors.sum().round()) * epochs)
    counts = expected_counts(dicts, 5, np.bincount(drawn, minlength=40)) / epochs
    np.testing.assert_allclose(counts, expected, rtol=0.03)


# ---------------------------------------------------------------- streams


@given(st.integers(1, 30), st.integers(0, 2**31 - 1), st.booleans())
def test_training_sampler_has_detectron2s_stream(size, seed, shuffle):
    count = 3 * size + 1
    assert take(TrainingSampler(size, shuffle, seed), count) == take(d2.TrainingSampler(size, shuffle, seed), count)


@given(st.lists(st.floats(0, 4, width=32), min_size=1, max_size=20), st.integers(0, 2**31 - 1), st.booleans())
def test_repeat_factor_sampler_has_detectron2s_stream(factors, seed, shuffle):
    factors = torch.tensor([1.0, *factors])
    ours = RepeatFactorTrainingSampler(factors, shuffle=shuffle, seed=seed)
    theirs = d2.RepeatFactorTrainingSampler(factors, shuffle=shuffle, seed=seed)
    assert take(ours, 100) == take(theirs, 100)


def test_subset_sampler_has_detectron2s_stream():
    ours = RandomSubsetTrainingSampler(20, 0.3, seed_shuffle=1, seed_subset=2)
    theirs = d2.RandomSubsetTrainingSampler(20, 0.3, seed_shuffle=1, seed_subset=2)
    drawn = take(ours, 60)
    assert drawn == take(theirs, 60)
    assert sorted(set(drawn)) == torch.nonzero(ours.repeat_factors).flatten().tolist()
    assert len(set(drawn)) == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainingSampler(7, seed=5),
        lambda: RandomSubsetTrainingSampler(9, 0.5, seed_shuffle=5, seed_subset=6),
        lambda: RepeatFactorTrainingSampler([0.3, 2.5, 1.0, 1.7], seed=5),
    ],
)
def test_ranks_take_turns(monkeypatch, make):
    whole = take(make(), 90)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        assert take(make(), 30) == whole[rank::3]


def test_iterating_again_starts_again():
    sampler = RepeatFactorTrainingSampler([0.3, 2.5, 1.0, 1.7], seed=5)
    assert take(sampler, 50) == take(sampler, 50)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: TrainingSampler(0, seed=1), "positive int"),
        (lambda: TrainingSampler(2.0, seed=1), "positive int"),
        (lambda: RandomSubsetTrainingSampler(5, 0.1, seed_shuffle=1), "RANDOM_SUBSET_RATIO"),
        (lambda: RandomSubsetTrainingSampler(5, 1.1, seed_shuffle=1), "RANDOM_SUBSET_RATIO"),
        (lambda: RepeatFactorTrainingSampler([], seed=1), "shape"),
        (lambda: RepeatFactorTrainingSampler([1.0, float("nan")], seed=1), "finite"),
        (lambda: RepeatFactorTrainingSampler([1.0, -1.0], seed=1), "not negative"),
        (lambda: RepeatFactorTrainingSampler([0.0, 0.0], seed=1), "not all zero"),
    ],
)
def test_bad_input_of_samplers(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# ---------------------------------------------------------------- registry


def config(name):
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN = name
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATASETS.TRAIN = ("one", "two")
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("two", 3.0)]
    return cfg


@pytest.mark.parametrize(
    "name, kind, factors",
    [
        ("TrainingSampler", TrainingSampler, None),
        (
            "RepeatFactorTrainingSampler",
            RepeatFactorTrainingSampler,
            repeat_factors_from_category_frequency(HAND, 1.0),
        ),
        (
            "InstanceAwareRepeatFactorSampler",
            InstanceAwareRepeatFactorSampler,
            instance_aware_repeat_factors(HAND, 1.0),
        ),
        ("ClassBalancedSampler", ClassBalancedSampler, class_balanced_repeat_factors(HAND)),
        ("WeightedTrainingSampler", RepeatFactorTrainingSampler, torch.tensor([1.0, 3.0, 3.0, 3.0])),
    ],
)
def test_samplers_by_name(name, kind, factors):
    sampler = build_sampler(config(name), HAND, seed=4, dataset_sizes=[1, 3])
    assert type(sampler) is kind
    assert sampler.resumable_by_replay
    if factors is None:
        assert sampler.repeat_factors is None
    else:
        assert torch.equal(sampler.repeat_factors, factors)
    again = build_sampler(config("TrainingSampler"), HAND, seed=4, name=name, dataset_sizes=[1, 3])
    assert take(sampler, 30) == take(again, 30)


def test_subset_by_name():
    sampler = build_sampler(config("RandomSubsetTrainingSampler"), HAND, seed=4)
    assert len(set(take(sampler, 40))) == 2


def test_weighted_category_sampler_by_hand():
    # In the second data set class 0 is in 2 of 3 images and class 2 in 1 of 3; in the first, all in 1 of 1.
    sampler = build_sampler(config("WeightedCategoryTrainingSampler"), HAND, seed=4, dataset_sizes=[1, 3])
    expected = [1.0, 3 * math.sqrt(3 / 2), 3.0, 3 * math.sqrt(3)]
    np.testing.assert_allclose(sampler.repeat_factors, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["WeightedTrainingSampler", "WeightedCategoryTrainingSampler"])
def test_weighted_samplers_equal_detectron2s(monkeypatch, name):
    parts = {"one": HAND[:1], "two": HAND[1:]}
    monkeypatch.setattr(d2_build, "get_detection_dataset_dicts", lambda names, **_: parts[names[0]])
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 4)
    category = name == "WeightedCategoryTrainingSampler"
    theirs = d2_build._build_weighted_sampler(config(name), enable_category_balance=category)
    ours = build_sampler(config(name), HAND, seed=4, dataset_sizes=[1, 3])
    assert take(ours, 60) == take(theirs, 60)


def test_weighted_samplers_name_what_is_wrong():
    cfg = config("WeightedTrainingSampler")
    with pytest.raises(ValueError, match="size of each data set"):
        build_sampler(cfg, HAND, seed=1)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("three", 2.0)]
    with pytest.raises(ValueError, match="TRAIN_REPEAT_FACTOR names .*'three'"):
        build_sampler(cfg, HAND, seed=1, dataset_sizes=[1, 3])


def test_unknown_sampler_lists_those_there_are():
    message = r"SAMPLER_TRAIN is 'ClassBalanced'.*did you mean ClassBalancedSampler\? Known: .*TrainingSampler"
    with pytest.raises(ValueError, match=message):
        build_sampler(config("ClassBalanced"), HAND, seed=1)


def test_threshold_of_zero_is_a_warning(caplog):
    cfg = config("RepeatFactorTrainingSampler")
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.0
    build_sampler(cfg, HAND, seed=1)
    assert "no image is repeated" in caplog.text


def test_config_of_a_detectron2_without_repeat_sqrt():
    cfg = config("RepeatFactorTrainingSampler")
    expected = build_sampler(cfg, HAND, seed=1).repeat_factors
    del cfg.DATALOADER["REPEAT_SQRT"]
    assert torch.equal(build_sampler(cfg, HAND, seed=1).repeat_factors, expected)
    cfg.DATALOADER.REPEAT_SQRT = False
    linear = repeat_factors_from_category_frequency(HAND, 1.0, sqrt=False)
    assert torch.equal(build_sampler(cfg, HAND, seed=1).repeat_factors, linear)


class EveryNth(TrainingSampler):
    """Every nth image.

    Args:
        size: number of images.
    """

    def __init__(self, size, nth):
        super().__init__(size, shuffle=False, seed=0)
        self._nth = nth

    def _epoch(self, generator):
        return super()._epoch(generator)[:: self._nth]

    @classmethod
    def from_records(cls, dataset_dicts, *, every_nth: int = 2, seed=None):
        """
        Args:
            every_nth: so many images further.
        """
        return cls(len(dataset_dicts), every_nth)


def test_own_sampler_declares_its_options():
    """Config key, check and call follow from the arguments of ``from_records``."""
    SAMPLER_REGISTRY.register(EveryNth)
    try:
        cfg = get_lt_det_cfg()
        assert cfg.DATALOADER.EVERY_NTH == 2
        cfg.DATALOADER.EVERY_NTH = 3
        assert take(build_sampler(cfg, HAND, seed=1, name="EveryNth"), 3) == [0, 3, 0]
        assert take(sampler_by_name("EveryNth", HAND), 3) == [0, 2, 0]
        assert documented_arguments(EveryNth)["every_nth"] == "so many images further."
    finally:
        del SAMPLER_REGISTRY._obj_map["EveryNth"]
    assert "EVERY_NTH" not in get_lt_det_cfg().DATALOADER


@pytest.mark.parametrize("name, sampler", samplers_with_options())
def test_every_option_of_a_sampler_is_explained(name, sampler):
    assert not [o.name for o in declared_options(sampler) if not o.comment]


def test_own_sampler_by_a_function():
    def reversed_order(cfg, dataset_dicts, *, seed, dataset_sizes):
        return list(range(len(dataset_dicts)))[::-1]

    SAMPLER_REGISTRY.register(reversed_order)
    try:
        assert build_sampler(config("reversed_order"), HAND, seed=1) == [3, 2, 1, 0]
    finally:
        del SAMPLER_REGISTRY._obj_map["reversed_order"]
