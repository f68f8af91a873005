from types import SimpleNamespace

import numpy as np
import pytest
import torch

IMAGE_COUNT = [1, 4, 11, 60, 150, 900]
INSTANCE_COUNT = [1, 9, 30, 61, 1500, 4000]


def make_statistics(image_count=IMAGE_COUNT, instance_count=INSTANCE_COUNT, num_images=1000):
    """What losses need of ClassStatistics; "sampled" is the square root of the instance counts."""
    image_count, instance_count = np.array(image_count), np.array(instance_count)
    image_count.setflags(write=False)
    instance_count.setflags(write=False)
    sources = {
        "image_count": image_count,
        "instance_count": instance_count,
        "sampled": np.sqrt(instance_count),
    }
    return SimpleNamespace(
        image_count=image_count,
        instance_count=instance_count,
        num_images=num_images,
        names=tuple(f"thing{i}" for i in range(len(image_count))),
        prior=lambda source: sources[source] / sources[source].sum(),
    )


@pytest.fixture(autouse=True)
def double_precision(request):
    """Tests compute in float64, so that no processor's order of summation decides, unless they are marked ``float32``:
    those of half precision and of what is kept in float32."""
    if "float32" in request.keywords:
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def class_statistics():
    return make_statistics()


@pytest.fixture
def statistics_with():
    return make_statistics
