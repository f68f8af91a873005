"""GML: its supervised loss, and the training branch against the paper's equation evaluated in float64."""

import copy
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from lt_det.gml import MutualInformation, Projection
from lt_det.losses import LOSS_REGISTRY
from lt_det.losses import functional as lf
from lt_det.losses.gml import MIN_TEMPERATURE

GML = LOSS_REGISTRY.get("GML")
K, D, KEY_D = 6, 5, 4
COUNTS = torch.tensor([1, 4, 11, 60, 150, 900], dtype=torch.float64)
OPTIONS = {"queue_size": 30, "queue_base": 2, "projection_dim": 3, "hidden_dim": 4, "projection_norm": "LN"}


def make_statistics(image_count=COUNTS, instance_count=(1, 9, 30, 61, 1500, 4000)):
    return SimpleNamespace(image_count=image_count, instance_count=instance_count, num_images=1000)


def build(*, fill=(0, 0, 1, 2, 3, 3, 3, 4, 4, 5, 5, 5), seed=0, double=True, **options):
    """A branch with keys of the classes in ``fill``, whose box ids are 100, 101, ..."""
    torch.manual_seed(seed)
    loss = GML(K, statistics=make_statistics(), **{**OPTIONS, **options})
    branch = MutualInformation(loss, D, KEY_D)
    for name, parameter in branch.named_parameters():
        if name == "log_temperature":  # temperatures that differ
            parameter.data += 0.3 * torch.randn(parameter.shape)
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    if double:
        branch.double()
    labels = torch.tensor(fill, dtype=torch.int64)
    branch.insert(torch.randn(len(fill), KEY_D), labels, 100 + torch.arange(len(fill)))
    return branch


def draw(rows=14, seed=1, dtype=torch.float64):
    """RoIs of all classes, some of whose boxes have keys (102 is the only key of class 1), and background."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, K + 1, (rows,), generator=generator)
    box_ids = torch.randint(98, 112, (rows,), generator=generator)
    if rows > 4:
        labels[:5] = torch.tensor([1, 1, 0, K, K])
        box_ids[:5] = torch.tensor([102, 7, 100, 100, -1])
    return features, labels, box_ids


def mlp(projection, x):
    """Linear, norm, ReLU, Linear, L2 norm, from the weights; the norm is over rows (BN) or columns (LN)."""
    x = x @ projection.hidden.weight.T
    over = 0 if isinstance(projection.norm, torch.nn.BatchNorm1d) else 1
    x = (x - x.mean(over, keepdim=True)) / (x.var(over, correction=0, keepdim=True) + 1e-5).sqrt()
    x = (x * projection.norm.weight + projection.norm.bias).clamp(min=0)
    x = x @ projection.out.weight.T + projection.out.bias
    return x / x.norm(dim=1, keepdim=True)


def equation(branch, features, labels, box_ids, key_features, key_labels, key_ids, *, own_keys="hidden"):
    """Sum over foreground RoIs of -log(pi_y S_y / sum_c pi_c S_c), and the number of those that have a loss."""
    foreground = labels < K
    queries = mlp(branch.query_projection, features[foreground])
    keys = mlp(branch.key_projection, key_features)
    temperature = branch.log_temperature.exp().expand(K)
    prior, terms = COUNTS / COUNTS.sum(), []
    for q, y, box in zip(queries, labels[foreground].tolist(), box_ids[foreground].tolist()):
        joint = {}
        for c in range(K):
            own = [
                k for k, label, i in zip(keys, key_labels, key_ids) if label == c and (own_keys == "seen" or i != box)
            ]
            if own:
                kernel = torch.stack([((q * k).sum() / temperature[c]).exp() for k in own])
                joint[c] = prior[c] * kernel.mean()
        if y in joint:
            terms.append(-(joint[y] / sum(joint.values())).log())
    return sum(terms), len(terms)


def contents(branch):
    keys, offsets, ids = branch.queues.contents()
    labels = torch.repeat_interleave(torch.arange(K), offsets.diff()).tolist()
    return keys.to(torch.float64), labels, ids.tolist()


def gradients(branch):
    return {name: p.grad.clone() for name, p in branch.named_parameters()}


@torch.no_grad()
def descend(parameters, learning_rate):
    for parameter in parameters:
        parameter -= learning_rate * parameter.grad


# The branch.


@pytest.mark.parametrize("norm", ["LN", "BN"])
@pytest.mark.parametrize("temperature", ["class", "shared"])
def test_value_and_gradient_of_the_published_rule(norm, temperature):
    """Queries, keys, features have the gradient of L_GML over all keys, temperatures that of L_GML without own keys."""
    branch = build(projection_norm=norm, learn_temperature=temperature, beta=0.7)
    assert GML(K).own_keys == "seen" and GML(K).learn_temperature == "shared"
    features, labels, box_ids = draw()
    expected = {}
    for own_keys in ("seen", "hidden"):
        branch.zero_grad()
        x = features.clone().requires_grad_()
        total, rows = equation(branch, x, labels, box_ids, *contents(branch), own_keys=own_keys)
        (0.7 * total / len(labels)).backward()
        expected[own_keys] = (0.7 * total.detach() / len(labels), x.grad, gradients(branch), rows)
    value, x_grad, grads, rows = expected["seen"]
    # A box with the only key of its class has a loss.
    assert rows == (labels < K).sum() > expected["hidden"][-1]
    assert not torch.allclose(grads["log_temperature"], expected["hidden"][2]["log_temperature"])
    grads = {**grads, "log_temperature": expected["hidden"][2]["log_temperature"]}

    branch.zero_grad()
    x = features.clone().requires_grad_()
    loss = branch(x, labels, box_ids)["loss_gml"]
    loss.backward()
    actual = (loss.detach(), x.grad, gradients(branch))
    torch.testing.assert_close(actual, (value, x_grad, grads), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["LN", "BN"])
@pytest.mark.parametrize("temperature", ["class", "shared"])
def test_value_and_gradient_with_own_keys_hidden(norm, temperature):
    branch = build(projection_norm=norm, learn_temperature=temperature, beta=0.7, own_keys="hidden")
    assert branch.log_temperature.shape == ((K,) if temperature == "class" else (1,))
    features, labels, box_ids = draw()
    results = []
    for reference in (False, True):
        branch.zero_grad()
        x = features.clone().requires_grad_()
        if reference:
            total, rows = equation(branch, x, labels, box_ids, *contents(branch))
            loss = 0.7 * total / len(labels)
            # Their own box holds the only key of their class.
            alone = ((labels == 1) & (box_ids == 102)) | ((labels == 2) & (box_ids == 103))
            assert alone.any() and rows == (labels < K).sum() - alone.sum()
        else:
            losses = branch(x, labels, box_ids)
            assert set(losses) == {"loss_gml"}
            loss = losses["loss_gml"]
        loss.backward()
        results.append((loss.detach(), x.grad, gradients(branch)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    (_, x_grad, grads), _ = results
    assert (x_grad[labels == K] == 0).all()
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_empty_classes_are_left_out():
    # Classes 1, 3 and 5 have no key: their RoIs have no loss, and no other RoI pays for them.
    branch = build(fill=(0, 0, 2, 2, 4), learn_temperature="class")
    features, labels, box_ids = draw(rows=20)
    labels[5:11] = torch.arange(6)
    loss = branch(features.requires_grad_(), labels, box_ids)["loss_gml"]
    total, rows = equation(branch, features, labels, box_ids, *contents(branch), own_keys="seen")
    assert rows < (labels < K).sum()
    torch.testing.assert_close(loss, total / 20, rtol=1e-9, atol=1e-12)
    loss.backward()
    for c in (1, 3, 5):
        assert (features.grad[labels == c] == 0).all() and branch.log_temperature.grad[c] == 0
    assert all(p.grad.isfinite().all() for p in branch.parameters())


def test_agrees_with_the_function_without_queues():
    branch = build(learn_temperature="", temperature=0.2)
    assert "log_temperature" not in dict(branch.named_parameters())
    features, labels, _ = draw()
    keys, key_labels, _ = contents(branch)
    foreground = labels < K
    expected = lf.gaussian_mixture_likelihood_loss(
        branch.query_projection(features[foreground]),
        labels[foreground],
        branch.key_projection(keys),
        torch.tensor(key_labels),
        COUNTS,
        temperature=branch.temperature.item(),
        reduction="sum",
    )
    loss = branch(features, labels, torch.full_like(labels, -1))["loss_gml"]
    torch.testing.assert_close(loss, expected / len(labels), rtol=1e-9, atol=1e-12)


def test_uniform_prior_and_one_key_a_class_is_a_softmax():
    torch.manual_seed(0)
    statistics = make_statistics([50] * K, [70] * K)
    options = {**OPTIONS, "queue_size": K, "queue_base": 1, "learn_temperature": ""}
    loss = GML(K, statistics=statistics, **options)
    branch = MutualInformation(loss, D, KEY_D).double()
    branch.insert(torch.randn(K, KEY_D), torch.arange(K).flip(0), 100 + torch.arange(K))
    features, labels, _ = draw()
    foreground = labels < K
    keys = branch.key_projection(branch.queues.keys)
    scores = branch.query_projection(features[foreground]) @ keys.T / branch.temperature
    actual = branch(features, labels, torch.zeros_like(labels))["loss_gml"]
    expected = F.cross_entropy(scores, labels[foreground], reduction="sum") / len(labels)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.float32
def test_only_ratios_of_counts_matter():
    values = []
    for factor in (1, 16):
        torch.manual_seed(0)
        statistics = make_statistics(COUNTS * factor)
        branch = MutualInformation(GML(K, statistics=statistics, **OPTIONS), D, KEY_D)
        branch.insert(torch.randn(9, KEY_D), torch.arange(9) % K, torch.arange(9))
        features, labels, box_ids = draw(dtype=torch.float32)
        values.append((branch.queues.sizes, branch(features, labels, box_ids + 1000)["loss_gml"]))
    torch.testing.assert_close(*values)


def test_queues_follow_the_prior():
    sizes = build().queues.sizes.tolist()
    # 30 - 6 * 2 = 18 slots by 1 : 4 : 11 : 60 : 150 : 900.
    assert sum(sizes) == 30 and sizes[:3] == [2, 2, 2] and sizes[-1] == 2 + 14
    statistics = make_statistics()
    online = MutualInformation(GML(K, statistics=statistics, prior="online", **OPTIONS), D, KEY_D)
    instance = MutualInformation(GML(K, statistics=statistics, prior="instance_count", **OPTIONS), D, KEY_D)
    assert torch.equal(online.queues.sizes, instance.queues.sizes)
    assert torch.equal(online.log_prior, instance.log_prior)
    with pytest.raises(ValueError, match="needs class statistics"):
        MutualInformation(GML(K, prior="online"), D, KEY_D)
    with pytest.raises(ValueError, match="QUEUE_SIZE"):
        build(queue_size=11)


NOTHING = {
    "no RoI": (draw(0), ()),
    "background only": ((draw()[0], torch.full((14,), K), draw()[2]), ()),
    "empty queues": (draw(), (True,)),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_nothing_to_compare_is_zero_with_a_gradient_for_all(name, norm):
    (features, labels, box_ids), empty = NOTHING[name]
    branch = build(projection_norm=norm, alpha=0.5, **({"fill": ()} if empty else {}))
    features = features.clone().requires_grad_()
    scores = torch.rand(len(labels), K + 1, requires_grad=True, dtype=torch.float64)
    losses = branch(features, labels, box_ids, scores=scores, teacher_logits=scores.detach() * 30)
    sum(losses.values()).backward()
    assert losses["loss_gml"].item() == 0
    assert losses["loss_distill"].item() == pytest.approx(0, abs=1e-12)
    assert features.grad.shape == features.shape and (features.grad == 0).all()
    assert all((p.grad == 0).all() for p in branch.parameters())


def test_every_roi_without_a_key():
    branch = build(fill=(1,))
    features, labels, box_ids = (x[:1] for x in draw())
    loss = branch(features.requires_grad_(), labels, box_ids)["loss_gml"]
    loss.backward()
    assert loss.item() == 0 and (features.grad == 0).all()
    assert all((p.grad == 0).all() for p in branch.parameters())


def test_batch_norm_of_one_row():
    projection = Projection(D, 4, 3, "BN")
    x = torch.randn(1, D)
    projection(torch.randn(50, D) + 2)  # running statistics that are not those of the start
    mean = projection.norm.running_mean.clone()
    one = projection(x)
    assert torch.equal(projection.norm.running_mean, mean) and one.isfinite().all()
    torch.testing.assert_close(one, projection.eval()(x))
    # A branch meets it with a single foreground RoI, or a single key.
    branch = build(projection_norm="BN", fill=(0,))
    loss = branch(torch.randn(1, D, dtype=torch.float64), torch.tensor([0]), torch.tensor([5]))["loss_gml"]
    assert loss.item() == 0  # the only class


def test_temperatures_stay_in_the_range_of_float32_and_can_return():
    branch = build(learn_temperature="class")
    with torch.no_grad():
        branch.log_temperature[:3] = math.log(1e-4)
    features, labels, box_ids = draw()
    branch(features, labels, box_ids)["loss_gml"].backward()
    torch.testing.assert_close(branch.temperature[:3], torch.full((3,), MIN_TEMPERATURE, dtype=torch.float64))
    assert (branch.log_temperature.grad[:3] != 0).all()


def test_learned_temperature_falls_for_compact_classes():
    """Keys alike within a class and apart between classes are told apart best by a low temperature."""
    branch = build(learn_temperature="shared", temperature=0.5, fill=())
    branch.insert(torch.eye(KEY_D)[:2].repeat(5, 1) * 9, torch.arange(2).repeat(5), torch.arange(10))
    keys, labels, _ = contents(branch)
    queries = branch.key_projection(keys).detach()
    assert (queries[0] @ queries[-1]).item() < 0.99
    branch.query_projection = torch.nn.Identity()
    temperatures, values = [branch.temperature.item()], []
    for _ in range(30):
        branch.zero_grad()
        loss = branch.mixture_loss(queries, torch.tensor(labels), torch.full((len(keys),), -1))
        loss.backward()
        descend([branch.log_temperature], 0.5)
        temperatures.append(branch.temperature.item())
        values.append(loss.item())
    assert temperatures[-1] < temperatures[0] and values[-1] < values[0]


# Distillation.


def test_distillation_equation():
    branch = build(alpha=0.5, distillation_temperature=2.0, supervised_temperature=0.1)
    assert branch.distils
    features, labels, box_ids = draw()
    generator = torch.Generator().manual_seed(3)
    scores, teacher = (torch.randn(14, K + 1, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for reference in (False, True):
        s, t = scores.clone().requires_grad_(), teacher.clone().requires_grad_()
        if reference:
            total = 0.0
            rows = [r for r in range(14) if labels[r] < K]
            for r in rows:
                p, q = (t[r].detach() / 2.0).softmax(0), (s[r] / 0.1 / 2.0).softmax(0)
                total = total + (p * (p / q).log()).sum()
            loss = 0.5 * 2.0**2 * total / 14
        else:
            loss = branch(features, labels, box_ids, scores=s, teacher_logits=t)["loss_distill"]
        loss.backward()
        assert t.grad is None
        results.append((loss.detach(), s.grad))
    torch.testing.assert_close(*results)


def test_a_student_that_agrees_has_nothing_to_learn():
    branch = build(alpha=1.0)
    features, labels, box_ids = draw()
    scores = torch.rand(14, K + 1, dtype=torch.float64, requires_grad=True)
    teacher = scores.detach() * 30 + torch.arange(14)[:, None]  # a softmax does not see constants
    loss = branch(features, labels, box_ids, scores=scores, teacher_logits=teacher)["loss_distill"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9) and scores.grad.abs().max() < 1e-9


# State, ranks, precision.


@pytest.mark.float32
def test_state_dict_continues():
    branch = build(double=False, projection_norm="BN")
    features, labels, box_ids = draw(dtype=torch.float32)
    branch(features, labels, box_ids)
    state = copy.deepcopy(branch.state_dict())
    assert not any("loss" in key for key in state)
    other = build(double=False, projection_norm="BN", seed=5, fill=())
    other.load_state_dict(state)
    values = []
    for each in (branch, other):
        torch.manual_seed(9)
        each.insert(torch.randn(7, KEY_D), torch.arange(7) % K, torch.arange(7))
        values.append(each(features, labels, box_ids)["loss_gml"])
    assert torch.equal(*values)
    assert torch.equal(other.queues.box_ids, branch.queues.box_ids)


def test_fixed_temperature_is_no_state():
    state = build(learn_temperature="").state_dict()
    assert "log_temperature" not in state and "log_prior" not in state


@pytest.mark.float32
def test_bfloat16_queue():
    full, half = build(double=False), build(double=False, queue_dtype="bfloat16")
    assert half.queues.keys.dtype == torch.bfloat16
    batch = draw(dtype=torch.float32)
    expected, actual = full(*batch)["loss_gml"], half(*batch)["loss_gml"]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    actual.backward()
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())


@pytest.mark.float32
@pytest.mark.parametrize("norm", ["LN", "BN"])
@pytest.mark.parametrize("queue_dtype", ["float32", "bfloat16"])
def test_autocast(norm, queue_dtype):
    branch = build(double=False, projection_norm=norm, queue_dtype=queue_dtype, alpha=1.0)
    features, labels, box_ids = draw(rows=40, dtype=torch.float32)
    scores = torch.rand(40, K + 1)
    inputs = {"scores": scores, "teacher_logits": scores.flip(0) * 30}
    expected = branch(features, labels, box_ids, **inputs)
    sum(expected.values()).backward()
    wanted = gradients(branch)
    branch.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = features.bfloat16().requires_grad_()
        half = {name: value.bfloat16() for name, value in inputs.items()}
        actual = branch(x, labels, box_ids, **half)
    assert all(value.dtype == torch.float32 for value in actual.values())
    # bfloat16 has 8 bits: cosines are off by up to 0.01, over temperatures of about 0.07.
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    sum(actual.values()).backward()
    assert x.grad.dtype == torch.bfloat16
    for name, gradient in gradients(branch).items():
        assert gradient.dtype == torch.float32
        cosine = F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
        assert cosine > 0.9, name


STEPS = 3
# In the second step the second rank has no foreground RoI and no key, in the third the first rank.
ROWS = [((20, 6), (9, 4)), ((8, 5), (0, 0)), ((0, 0), (12, 7))]


def rank_data(step, rank):
    rows, keys = ROWS[step][rank]
    features, labels, box_ids = draw(rows, seed=10 * step + rank)
    generator = torch.Generator().manual_seed(100 + 10 * step + rank)
    scores, logits = (torch.randn(rows, K + 1, generator=generator, dtype=torch.float64) for _ in range(2))
    inserted = (
        torch.randn(keys, KEY_D, generator=generator),
        torch.randint(0, K, (keys,), generator=generator),
        torch.randint(95, 115, (keys,), generator=generator),
    )
    return inserted, (features, labels, box_ids, scores.tanh(), logits)


def train(choose, average):
    """Three steps; what each gave, and the state afterwards."""
    branch = build(alpha=0.3, fill=())
    record = []
    for step in range(STEPS):
        inserted, (features, labels, box_ids, scores, logits) = choose(step)
        branch.insert(*inserted)
        losses = branch(features, labels, box_ids, scores=scores.requires_grad_(), teacher_logits=logits)
        branch.zero_grad()
        sum(losses.values()).backward()
        average(branch)
        record.append({"gradients": gradients(branch), **{k: v.detach() for k, v in losses.items()}})
        descend(branch.parameters(), 0.1)
    return record, branch.state_dict()


def average_over_ranks(branch):
    """What DistributedDataParallel does."""
    for parameter in branch.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2


def bfloat16_queues(choose):
    queues = build(queue_dtype="bfloat16", double=False, fill=()).queues
    for step in range(STEPS):
        queues.insert(*choose(step))
    assert queues.keys.dtype == torch.bfloat16
    return queues.state_dict()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    result = train(lambda step: rank_data(step, rank), average_over_ranks)
    queues = bfloat16_queues(lambda step: rank_data(step, rank)[0])
    torch.save((*result, queues), os.path.join(folder, f"{rank}.pth"))
    dist.destroy_process_group()


@pytest.mark.float32
def test_two_ranks_equal_one_process(server):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, args=(folder,), nprocs=2, start_method="forkserver")
        ranks = [torch.load(Path(folder) / f"{rank}.pth") for rank in (0, 1)]

    def together(step):
        parts = [rank_data(step, rank) for rank in (0, 1)]
        return tuple(tuple(torch.cat(pair) for pair in zip(*(p[i] for p in parts))) for i in (0, 1))

    record, state = train(together, lambda branch: None)
    queues = bfloat16_queues(lambda step: together(step)[0])
    for by_rank, final, by_rank_queues in ranks:
        torch.testing.assert_close(by_rank_queues, queues, rtol=0, atol=0)
        torch.testing.assert_close(final, state, rtol=1e-9, atol=1e-12)
        for one, two in zip(record, by_rank):
            torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-9, atol=1e-12)
    for step, one in enumerate(record):
        for name in ("loss_gml", "loss_distill"):
            mean = (ranks[0][0][step][name] + ranks[1][0][step][name]) / 2
            torch.testing.assert_close(mean, one[name], rtol=1e-9, atol=1e-12)


# The supervised loss.


def test_supervised_loss_by_hand():
    # Cosines of 0: the probability of a class is its prior times K, against 1 for background.
    statistics = make_statistics([1, 3], [1, 3])
    loss = GML(2, statistics=statistics, gamma=2.0)
    value = loss(torch.zeros(1, 3), torch.tensor([1]))
    assert value.item() == pytest.approx(2.0 * math.log((0.5 + 1.5 + 1.0) / 1.5), rel=1e-6)


def test_supervised_temperature_scales_cosines(class_statistics):
    loss = GML(K, statistics=class_statistics, supervised_temperature=0.1)
    plain = LOSS_REGISTRY.get("BalancedSoftmax")(K, statistics=class_statistics)
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20, K + 1, generator=generator) * 2 - 1
    labels = torch.randint(0, K + 1, (20,), generator=generator)
    torch.testing.assert_close(loss(cosines, labels), plain(cosines * 10, labels))
    torch.testing.assert_close(loss.activation(cosines), (cosines * 10).softmax(dim=1))


def test_options(class_statistics):
    loss = GML(K, statistics=class_statistics)
    assert loss.wants_cosine and loss.wants_keys
    assert not GML(K, statistics=class_statistics, beta=0.0).wants_keys
    assert GML(K, statistics=class_statistics, beta=0.0, alpha=0.1).wants_keys
    line = GML(K, statistics=class_statistics, beta=0.25, alpha=0.5).describe()
    assert "L_GML weight 0.25" in line and "distillation weight 0.5" in line and "T_s 0.03333" in line
    for options, message in [
        ({"supervised_temperature": 0.0}, "supervised_temperature must be positive"),
        ({"distillation_temperature": -1.0}, "distillation_temperature must be positive"),
        ({"beta": -1.0}, "beta"),
        ({"temperature": 0.01}, "at least 0.03"),
        ({"queue_dtype": "float16"}, "queue_dtype is 'float16'; choose one of 'float32', 'bfloat16'"),
        ({"learn_temperature": "row"}, "learn_temperature"),
        ({"own_keys": "some"}, "own_keys"),
        ({"projection_norm": "GN"}, "projection_norm"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"hidden_dim": -1}, "hidden_dim"),
        ({"background_fraction": 1.0}, "background_fraction"),
    ]:
        with pytest.raises(ValueError, match=message):
            GML(K, statistics=class_statistics, **options)


def test_hidden_width_and_one_line_for_the_log():
    branch = build(hidden_dim=0)
    assert branch.query_projection.hidden.weight.shape == (D, D)
    assert branch.key_projection.hidden.weight.shape == (KEY_D, KEY_D)
    assert branch.query_projection.out.out_features == branch.key_projection.out.out_features == 3
    line = branch.describe()
    assert "\n" not in line and "30 keys" in line and "12 filled" in line


def test_bad_arguments():
    branch = build(alpha=1.0)
    features, labels, box_ids = draw()
    scores = torch.zeros(14, K + 1)
    with pytest.raises(ValueError, match="needs scores and teacher_logits"):
        branch(features, labels, box_ids, scores=scores)
    with pytest.raises(ValueError, match=r"features must have shape \(14, 5\)"):
        branch(features[:, :3], labels, box_ids, scores=scores, teacher_logits=scores)
    with pytest.raises(ValueError, match=r"box_ids must have shape \(14,\)"):
        branch(features, labels, box_ids[:3], scores=scores, teacher_logits=scores)
    with pytest.raises(ValueError, match=r"teacher_logits must have shape \(14, 7\)"):
        branch(features, labels, box_ids, scores=scores, teacher_logits=scores[:, :K])
