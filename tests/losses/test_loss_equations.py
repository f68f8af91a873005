"""Each box-head loss against its paper's (or published code's) equation, row by row in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lt_det.losses import LOSS_REGISTRY
from lt_det.losses import functional as lf

K = 6
IMAGE_COUNT = [1, 4, 11, 60, 150, 900]
INSTANCE_COUNT = [1, 9, 30, 61, 1500, 4000]
PI = np.array(IMAGE_COUNT) / sum(IMAGE_COUNT)
Q = np.array(INSTANCE_COUNT) / sum(INSTANCE_COUNT)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5, K, K, K, K, K, 4, K])
    return torch.randn(len(labels), K + 9, dtype=torch.float64, generator=generator) * 2, labels


def build(name, statistics, **options):
    return LOSS_REGISTRY.get(name)(K, statistics=statistics, **options).double()


def close(actual, expected, rel=1e-9):
    assert float(actual) == pytest.approx(float(expected), rel=rel)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(z, on):
    return -math.log(sigmoid(z) if on else sigmoid(-z))


def cross_entropy(z, y):
    return -math.log(math.exp(z[y]) / sum(math.exp(v) for v in z))


def test_softmax(batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    close(build("Softmax", class_statistics)(z, y), F.cross_entropy(z, y))


@pytest.mark.parametrize("name, options, tau", [("BalancedSoftmax", {}, 1.0), ("LogitAdjusted", {"tau": 0.6}, 0.6)])
@pytest.mark.parametrize("rule", ["keep", "prior", "official"])
def test_background_rules(name, options, tau, rule, batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    if rule == "prior":
        options = {**options, "background_fraction": 0.75}
        a = [tau * math.log((K + 1) * 0.25 * p) for p in PI] + [tau * math.log((K + 1) * 0.75)]
    else:
        a = [tau * math.log(K * p) for p in PI] + [0.0]
    expected = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        shift = [0.0] * (K + 1) if rule == "official" and label == K else a
        expected += cross_entropy([v + s for v, s in zip(row, shift)], label)
    close(build(name, class_statistics, background=rule, **options)(z, y), expected / len(y))


@pytest.mark.parametrize("rule", ["keep", "prior", "official"])
def test_balanced_softmax_is_logit_adjustment_to_the_last_bit(rule, batch, class_statistics):
    """So that its training end to end is logit adjustment's, and one row of the benchmark is both."""
    results = []
    for name in ("BalancedSoftmax", "LogitAdjusted"):
        scores = batch[0][:, : K + 1].float().requires_grad_()
        loss = LOSS_REGISTRY.get(name)(K, statistics=class_statistics, background=rule)(scores, batch[1])
        results.append((loss.detach(), *torch.autograd.grad(loss, scores)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("source", ["image_count", "instance_count", "sampled"])
def test_prior_sources(source, batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    a = torch.from_numpy(np.log(K * class_statistics.prior(source)))
    expected = F.cross_entropy(z + torch.cat([a, torch.zeros(1).double()]), y)
    close(build("BalancedSoftmax", class_statistics, prior=source)(z, y), expected)


def test_uniform_counts_give_softmax_and_scaling_changes_nothing(batch, class_statistics, statistics_with):
    z, y = batch[0][:, : K + 1], batch[1]
    uniform = statistics_with([7] * K, [9] * K)
    scaled = statistics_with([10 * n for n in IMAGE_COUNT], [10 * n for n in INSTANCE_COUNT], 10_000)
    for name in ("BalancedSoftmax", "LogitAdjusted"):
        for rule in ("keep", "official"):
            close(build(name, uniform, background=rule)(z, y), F.cross_entropy(z, y))
    for name in ("BalancedSoftmax", "LogitAdjusted", "BalancedSigmoid", "PairwiseMargin", "LDAM", "ECM"):
        loss, other = build(name, class_statistics), build(name, scaled)
        s = z[:, : loss.num_outputs(K)]
        close(loss(s, y), other(s, y))


def test_online_prior_counts_what_it_sees(batch):
    """By hand: counts plus one, of the foreground RoIs of this and earlier batches, in training only."""
    z, y = batch[0][:, : K + 1], batch[1]
    loss = build("BalancedSoftmax", None, prior="online")
    expected_counts = torch.ones(K, dtype=torch.float64)
    for _ in range(2):
        expected_counts += torch.bincount(y[y < K], minlength=K)
        a = (K * expected_counts / expected_counts.sum()).log()
        expected = F.cross_entropy(z + torch.cat([a, torch.zeros(1).double()]), y)
        close(loss(z, y), expected)
    loss.eval()
    close(loss(z, y), expected)
    assert loss.roi_count.tolist() == [*(expected_counts - 1).tolist(), 12.0]


def test_measured_background_fraction(batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    loss = build("BalancedSoftmax", class_statistics, background="prior")
    fraction = (6 + 1) / (14 + 2)
    a = [math.log((K + 1) * (1 - fraction) * p) for p in PI] + [math.log((K + 1) * fraction)]
    close(loss(z, y), F.cross_entropy(z + torch.tensor(a, dtype=torch.float64), y))


def test_balanced_sigmoid(batch, class_statistics):
    z, y = batch[0][:, :K], batch[1]
    loss = build("BalancedSigmoid", class_statistics)
    close(loss(z, y), lf.balanced_sigmoid_loss(z, y, [n / 1000 for n in IMAGE_COUNT]))
    torch.testing.assert_close(loss.activation(z)[:, :K], z.sigmoid())


def test_sigmoid(batch, class_statistics):
    z, y = batch[0][:, :K], batch[1]
    expected = sum(bce(row[c], c == label) for row, label in zip(z.tolist(), y.tolist()) for c in range(K))
    close(build("Sigmoid", class_statistics)(z, y), expected / len(y))


def margins_of(setting, tau):
    """delta of Menon et al. over K + 1 classes, background last, and alpha."""
    delta, alpha = np.zeros((K + 1, K + 1)), np.ones(K + 1)
    a = np.append(np.log(K * PI), 0.0)
    for y in range(K + 1):
        for c in range(K + 1):
            if setting == "logit_adjusted":
                delta[y, c] = tau * (a[c] - a[y])
            elif setting == "equalized" and y < K and c < K:
                delta[y, c] = tau * math.log(PI[c] / PI.max())
            elif setting == "ldam" and y < K:
                delta[y, c] = 0.3 * (PI[y] / PI.min()) ** -0.25
    if setting == "class_balanced":
        alpha[:K] = (1 / PI) / (Q / PI).sum()  # mean 1 over foreground RoIs, which follow the instance counts
    return torch.from_numpy(alpha), torch.from_numpy(delta)


@pytest.mark.parametrize("setting", ["logit_adjusted", "equalized", "class_balanced", "ldam"])
def test_pairwise_margin_settings(setting, batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    alpha, delta = margins_of(setting, 0.7)
    expected = lf.pairwise_margin_loss(z, y, alpha, delta)
    loss = build("PairwiseMargin", class_statistics, setting=setting, tau=0.7, max_margin=0.3)
    close(loss(z, y), expected)
    if setting == "logit_adjusted":
        close(loss(z, y), build("LogitAdjusted", class_statistics, tau=0.7)(z, y))


def test_equalized_margins_by_hand(statistics_with):
    """Menon et al., eq. 6 and 11 with F(z) = (z / max pi)^tau. Shares 1/4, 1/4, 1/2; all scores equal."""
    statistics = statistics_with([1, 1, 2], [1, 1, 2])
    z = torch.zeros(1, 4, dtype=torch.float64)  # three classes and background
    for tau, by_label in (
        # Label 0: classes 1 and 2 weigh F = 1/2 and 1, background 1; label 2: both others weigh 1/2.
        (1.0, {0: 1 + 0.5 + 1 + 1, 2: 1 + 0.5 + 0.5 + 1, 3: 4}),
        (2.0, {0: 1 + 0.25 + 1 + 1, 2: 1 + 0.25 + 0.25 + 1, 3: 4}),
    ):
        loss = LOSS_REGISTRY.get("PairwiseMargin")(3, statistics=statistics, setting="equalized", tau=tau)
        for label, total in by_label.items():
            close(loss.double()(z, torch.tensor([label])), math.log(total))
    # Their own example, F(z) = z^tau: log(1 + 1/4 + 1/2).
    delta = torch.tensor([0.25, 0.25, 0.5]).log().expand(3, 3)
    close(lf.pairwise_margin_loss(z[:, :3], torch.tensor([0]), torch.ones(3), delta), math.log(1.75))


def test_ldam(batch, class_statistics):
    cosine, y = batch[0][:, : K + 1].tanh(), batch[1]
    margins = [0.4 * n**-0.25 for n in IMAGE_COUNT] + [0.0]
    rows = []
    for row, label in zip(cosine.tolist(), y.tolist()):
        shifted = [20 * (v - (margins[label] if c == label else 0.0)) for c, v in enumerate(row)]
        rows.append(cross_entropy(shifted, label))
    loss = build("LDAM", class_statistics, max_margin=0.4, scale=20.0, beta=0.99)
    close(loss(cosine, y), sum(rows) / len(rows))
    torch.testing.assert_close(loss.activation(cosine), (20 * cosine).softmax(dim=1))

    effective = [0.01 / (1 - 0.99**n) for n in IMAGE_COUNT]
    weights = [*(e / np.dot(Q, effective) for e in effective), 1.0]  # mean 1 over foreground RoIs
    loss.set_drw(True)
    weighted = [weights[label] * row for row, label in zip(rows, y.tolist())]
    close(loss(cosine, y), sum(weighted) / sum(weights[label] for label in y.tolist()))
    assert "DRW on" in loss.describe()
    loss.set_drw(False)
    close(loss(cosine, y), sum(rows) / len(rows))


@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_focal(alpha, batch, class_statistics):
    z, y = batch[0][:, :K], batch[1]
    expected = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        for c, v in enumerate(row):
            p_t = sigmoid(v) if c == label else sigmoid(-v)
            a_t = 1.0 if alpha < 0 else alpha if c == label else 1 - alpha
            expected += -a_t * (1 - p_t) ** 1.5 * math.log(p_t)
    close(build("Focal", class_statistics, alpha=alpha, gamma=1.5)(z, y), expected / len(y))


@pytest.mark.parametrize("base", ["softmax", "sigmoid", "focal"])
def test_class_balanced(base, batch, class_statistics):
    z, y = batch[0][:, : K + 1 if base == "softmax" else K], batch[1]
    effective = [0.1 / (1 - 0.9**n) for n in IMAGE_COUNT]
    weights = [*(e / np.dot(Q, effective) for e in effective), 1.0]  # mean 1 over foreground RoIs
    expected = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        if base == "softmax":
            value = cross_entropy(row, label)
        else:
            value = 0.0
            for c, v in enumerate(row):
                p_t = sigmoid(v) if c == label else sigmoid(-v)
                value -= (1.0 if base == "sigmoid" else (1 - p_t) ** 2) * math.log(p_t)
        expected += weights[label] * value
    loss = build("ClassBalanced", class_statistics, base=base, beta=0.9)
    assert loss.num_outputs(K) == z.shape[1]
    close(loss(z, y), expected / len(y))


def test_seesaw(batch, class_statistics):
    z, y = batch[0][:, : K + 2], batch[1]
    loss = build("Seesaw", class_statistics)
    counts = torch.zeros(K, dtype=torch.float64)
    foreground = y < K
    for _ in range(2):  # counts include the batch itself, and add up
        value = loss(z, y)
        counts += torch.bincount(y[foreground], minlength=K)
        classes = lf.seesaw_loss(z[foreground, :K], y[foreground], counts, reduction="sum")
        close(value["loss_cls"], classes / len(y))
        close(value["loss_cls_objectness"], F.cross_entropy(z[:, K:], (~foreground).long()))
    probs = loss.activation(z)
    expected = z[:, :K].softmax(1) * z[:, K:].softmax(1)[:, :1]
    torch.testing.assert_close(probs, torch.cat([expected, z[:, K:].softmax(1)[:, 1:]], dim=1))


def confusion_by_hand(batches, momentum):
    """Row by row: the moving average of the probabilities that the rows of a class get, each row's sum 1."""
    matrix = torch.zeros(K, K, dtype=torch.float64)
    for probs, labels in batches:
        for c in set(labels.tolist()):
            row = matrix[c] * momentum + probs[labels == c].mean(dim=0) * (1 - momentum)
            matrix[c] = row / row.sum()
    return matrix


def balanced_by_hand(log_p, y, matrix, alpha):
    """(1 - alpha) CE + alpha KL of a row: the soft label is column y of the matrix, and 0 for background."""
    soft = [matrix[c, y].item() / matrix[:, y].sum().item() for c in range(K)]
    divergence = sum(t * (math.log(t) - log_p[c].item()) for c, t in enumerate(soft) if t > 0)
    return -(1 - alpha) * log_p[y].item() + alpha * divergence


def test_softmax_pcb(batch):
    z, y = batch[0][:, : K + 1], batch[1]
    loss = build("SoftmaxPCB", None, alpha=0.3, momentum=0.9, start=0.5, iterations=4)
    probs, foreground = z[:, :K].softmax(1), y < K
    for step in range(4):
        matrix = confusion_by_hand([(probs[foreground], y[foreground])] * (step + 1), 0.9)
        log_p = z.log_softmax(1)
        rows = [
            balanced_by_hand(log_p[i], y[i], matrix, 0.3) if step >= 2 and y[i] < K else -log_p[i, y[i]].item()
            for i in range(len(y))
        ]
        close(loss(z, y), sum(rows) / len(y))
        torch.testing.assert_close(loss.confusion, matrix)
    assert "from iteration 2 on" in loss.describe() and loss.batches == 4
    loss.eval()
    close(loss(z, y), sum(rows) / len(y))  # and keeps what it has learned as it is
    assert loss.batches == 4


def test_seesaw_pcb(batch):
    z, y = batch[0][:, : K + 2], batch[1]
    loss, plain = build("SeesawPCB", None, alpha=0.3, iterations=3), build("Seesaw", None)
    foreground = y < K
    matrix = confusion_by_hand([(z[foreground, :K].softmax(1), y[foreground])] * 3, 0.99)
    for _ in range(3):
        value, seesaw = loss(z, y), plain(z, y)
        close(value["loss_cls_objectness"], seesaw["loss_cls_objectness"])
    shifts = torch.zeros(len(y), K, dtype=torch.float64)
    counts = torch.bincount(y[foreground], minlength=K) * 3
    sigma = z[:, :K].softmax(1)
    for i in foreground.nonzero().flatten().tolist():
        for c in range(K):
            if c != y[i]:
                mitigation = min(1.0, (max(1, counts[c]) / max(1, counts[y[i]])).item() ** 0.8)
                compensation = max(1.0, (sigma[i, c] / max(sigma[i, y[i]].item(), 1e-2)).item() ** 2)
                shifts[i, c] = math.log(mitigation * compensation)
    log_p = (z[:, :K] + shifts).log_softmax(1)
    rows = [balanced_by_hand(log_p[i], y[i], matrix, 0.3) for i in range(len(y)) if y[i] < K]
    close(value["loss_cls"], sum(rows) / len(y))


def test_pcb_gradient_and_options():
    """The derivative is p - (1 - alpha) onehot - alpha t: the soft labels are constants."""
    loss = LOSS_REGISTRY.get("SoftmaxPCB")(2, alpha=0.5, start=0.0)
    z = torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True)
    loss(z, torch.tensor([0])).backward()
    expected = z.detach().softmax(1) - torch.tensor([[1.0, 0.0, 0.0]])  # class 1 was not seen: t is one-hot
    torch.testing.assert_close(z.grad, expected)
    for options in ({"alpha": 1.5}, {"start": -0.1}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match=f"SeesawPCB: {next(iter(options))} must lie in"):
            LOSS_REGISTRY.get("SeesawPCB")(2, **options)


def test_eql(batch, class_statistics):
    z, y = batch[0][:, :K], batch[1]
    rare = [n / 1000 < 0.05 for n in IMAGE_COUNT]
    assert rare == [True, True, True, False, False, False]
    expected = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        for c, v in enumerate(row):
            weight = 1 - (label < K) * rare[c] * (c != label)
            expected += weight * bce(v, c == label)
    close(build("EQL", class_statistics, rare_frequency=0.05)(z, y), expected / len(y))


def test_drop_loss(batch, class_statistics):
    z, y = batch[0][:, :K], batch[1]
    loss = build("DropLoss", class_statistics, rare_frequency=0.05)
    foreground_part = expected_kept = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        for c, v in enumerate(row):
            rare = IMAGE_COUNT[c] / 1000 < 0.05
            if label < K:
                foreground_part += (1 - rare * (c != label)) * bce(v, c == label)
            elif not rare:
                foreground_part += bce(v, False)
            else:
                expected_kept += bce(v, False)
    # 3 of the 8 foreground rows are of rare classes, so a negative is kept with probability 3/8.
    draws = torch.stack([loss(z, y) for _ in range(3000)]) * len(y)
    assert draws.mean().item() == pytest.approx(foreground_part + 3 / 8 * expected_kept, rel=0.02)
    assert draws.min().item() >= foreground_part - 1e-6
    assert draws.max().item() <= foreground_part + expected_kept + 1e-6
    # Without foreground nothing is dropped.
    background = y == K
    kept = sum(bce(v, False) for row in z[background].tolist() for v in row)
    close(loss(z[background], y[background]), kept / int(background.sum()))


def test_eqlv2(batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    loss = build("EQLv2", class_statistics)
    positive, negative = [0.0] * K, [0.0] * K
    ratio = [100.0] * K
    for _ in range(3):
        negative_weight = [sigmoid(12 * (r - 0.8)) for r in ratio] + [1.0]
        positive_weight = [1 + 4 * (1 - w) for w in negative_weight]
        expected = 0.0
        for row, label in zip(z.tolist(), y.tolist()):
            for c, v in enumerate(row):
                weight = positive_weight[c] if c == label else negative_weight[c]
                expected += weight * bce(v, c == label)
                if c < K and c == label:
                    positive[c] += weight * (1 - sigmoid(v))
                elif c < K:
                    negative[c] += weight * sigmoid(v)
        close(loss(z, y), expected / len(y), rel=1e-5)  # the weights are in float32
        ratio = [p / (n + 1e-10) for p, n in zip(positive, negative)]
    np.testing.assert_allclose(loss.positive_gradient.numpy(), positive, rtol=1e-5)
    np.testing.assert_allclose(loss.negative_gradient.numpy(), negative, rtol=1e-5)
    p = z.sigmoid()
    torch.testing.assert_close(loss.activation(z)[:, :K], p[:, :K] * (1 - p[:, K:]))


def test_acsl(batch, class_statistics):
    # With all background rows drawn (or none), nothing is left to chance. Groups by images: 2 rare, 2
    # common, 2 frequent.
    z, y = batch[0][:, : K + 1], batch[1]
    for rare, common in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        loss = build("ACSL", class_statistics, rare_fraction=rare, common_fraction=common)
        expected = 0.0
        for row, label in zip(z.tolist(), y.tolist()):
            for c, v in enumerate(row):
                if c == label:
                    weight = 1.0
                elif label < K:
                    weight = float(sigmoid(v) >= 0.7)
                else:
                    weight = (rare, rare, common, common, 1.0, 1.0)[c]
                expected += weight * bce(v, c == label)
        close(loss(z, y), expected / len(y))
    # Half of six background rows: exactly three of them, whichever.
    loss = build("ACSL", class_statistics, rare_fraction=0.5)
    scores = torch.zeros(6, K + 1, dtype=torch.float64, requires_grad=True)
    loss(scores, torch.full((6,), K)).backward()
    assert (scores.grad[:, 0] != 0).sum() == 3


def test_bags(batch, class_statistics):
    z, y = batch[0][:, : K + 5], batch[1]
    # Groups by instances at 10 and 100: {0, 1}, {2, 3}, {4, 5}; columns: classes, others of each group, fg,
    # bg.
    loss = build("BAGS", class_statistics, bin_edges=(10, 100), others_ratio=100.0)
    assert loss.num_outputs(K) == K + 5
    expected = 0.0
    for g, members in enumerate(([0, 1], [2, 3], [4, 5])):
        columns = [K + g, *members]
        rows = [
            cross_entropy([row[c] for c in columns], columns.index(label) if label in members else 0)
            for row, label in zip(z.tolist(), y.tolist())
        ]
        expected += sum(rows) / len(rows)
    rows = [cross_entropy(row[K + 3 :], int(label == K)) for row, label in zip(z.tolist(), y.tolist())]
    close(loss(z, y), expected + sum(rows) / len(rows))
    probs = loss.activation(z)
    group = z[:, [K + 1, 2, 3]].softmax(1)
    objectness = z[:, K + 3 :].softmax(1)
    torch.testing.assert_close(probs[:, 2:4], group[:, 1:] * objectness[:, :1])
    torch.testing.assert_close(probs[:, K], objectness[:, 1])


def test_bags_samples_others(class_statistics):
    # Two rows of group 0, eighteen others, ratio 2: the group counts six rows, always with the two, and
    # averages over them.
    loss = build("BAGS", class_statistics, bin_edges=(10, 100), others_ratio=2.0)
    labels = torch.tensor([0, 1] + [K] * 18)
    scores = torch.zeros(20, K + 5, dtype=torch.float64, requires_grad=True)
    value = loss(scores, labels)
    value.backward()
    touched = scores.grad[:, 0] != 0
    assert touched.sum() == 6 and touched[:2].all()
    # Groups 1 and 2 have no row of their own and no loss; objectness is over all rows.
    assert (scores.grad[:, 2:6] == 0).all()
    close(value.detach(), math.log(3) + math.log(2))


def test_loce(batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    loss = build("LOCE", class_statistics)
    score = [0.01] * K
    probs = z.softmax(dim=1)
    for _ in range(2):
        for c in range(K):
            score[c] = 0.9 * score[c] + 0.1 * probs[y == c, c].mean().item()
        shift = torch.tensor([*score, 0.01], dtype=torch.float64).log()
        close(loss(z, y), F.cross_entropy(z + shift, y))
    # A class that the batch lacks keeps its score; evaluation changes nothing.
    before = loss.mean_score.clone()
    loss(z[:1], y[:1])
    assert loss.mean_score[0] != before[0] and torch.equal(loss.mean_score[1:], before[1:])
    before = loss.mean_score.clone()
    loss.eval()(z, y)
    assert torch.equal(loss.mean_score, before)


def test_ecm(batch, class_statistics):
    z, y = batch[0][:, : K + 1], batch[1]
    n = [*IMAGE_COUNT, 2.5 * sum(IMAGE_COUNT)]
    expected = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        for c, v in enumerate(row):
            rest = sum(n) - n[c]
            # The published form: exp(z + log w+^-1) against exp(-z + log w-^-1), quarter powers as margins.
            both = n[c] ** 0.25 + rest**0.25
            on = math.exp(v) * both / rest**0.25
            off = math.exp(-v) * both / n[c] ** 0.25
            a = rest / n[c]
            weight = a * math.log((1 + a) / a)
            expected -= weight * math.log((on if c == label else off) / (on + off))
    close(build("ECM", class_statistics, background_ratio=2.5)(z, y), expected / len(y))


# Against Detectron2.


@pytest.mark.parametrize("num_sampled", [2, 7, 12, 200])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_federated_equals_detectron2(num_sampled, power):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

    num_classes, num_rows = 60, 33
    generator = torch.Generator().manual_seed(0)
    image_count = torch.randint(1, 500, (num_classes,), generator=generator)
    theirs = FastRCNNOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        num_classes=num_classes,
        use_fed_loss=True,
        use_sigmoid_ce=True,
        get_fed_loss_cls_weights=lambda: image_count.float() ** power,
        fed_loss_num_classes=num_sampled,
    )
    statistics = SimpleNamespace(
        image_count=image_count.numpy(), instance_count=image_count.numpy(), num_images=1000, names=None
    )
    ours = LOSS_REGISTRY.get("Federated")(
        num_classes,
        statistics=statistics,
        num_sampled=num_sampled,
        frequency_power=power,
        background_column=True,
    )
    assert ours.num_outputs(num_classes) == num_classes + 1
    scores = torch.randn(num_rows, num_classes + 1, generator=generator)
    for labels in (
        torch.randint(0, num_classes + 1, (num_rows,), generator=generator),
        torch.full((num_rows,), num_classes),
        torch.cat([torch.arange(5), torch.full((num_rows - 5,), num_classes)]),
    ):
        losses, gradients = [], []
        for function in (theirs.sigmoid_cross_entropy_loss, ours):
            z = scores.clone().requires_grad_()
            torch.manual_seed(11)
            try:
                value = function(z, labels)
            except RuntimeError:  # Detectron2 fails where fewer classes have a weight than it wants to draw
                assert function is not ours and num_sampled > num_classes
                return
            value.backward()
            losses.append(value.detach())
            gradients.append(z.grad)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.activation(scores), scores.sigmoid())


def test_sigmoid_equals_detectron2(batch, class_statistics):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

    theirs = FastRCNNOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        num_classes=K,
        use_sigmoid_ce=True,
    )
    z, y = batch[0][:, : K + 1], batch[1]
    ours = build("Sigmoid", class_statistics, bias_prior=0.0, background_column=True)
    close(ours(z, y), theirs.sigmoid_cross_entropy_loss(z, y))
    assert (ours.initial_bias(K) == theirs.cls_score.bias).all()


def gumbel_bce(z, on):
    """The published code's steps: clamp, probability, binary cross entropy of it, clamp."""
    p = math.exp(-math.exp(-min(max(z, -4.0), 10.0)))
    return min(-math.log(p) if on else -math.log1p(-p), 20.0)


def test_gumbel_sigmoid(batch, class_statistics):
    z, y = batch[0][:, :K].clone(), batch[1]
    z[0, 0], z[1, 1], z[2, 3], z[9, 0] = -7.0, -3.5, 12.0, -9.0  # beyond the clamps
    expected = sum(gumbel_bce(v, c == label) for row, label in zip(z.tolist(), y.tolist()) for c, v in enumerate(row))
    loss = build("GumbelSigmoid", class_statistics)
    close(lf.gumbel_sigmoid_loss(z, y), expected / len(y), rel=1e-8)  # log1p of a rounded p above
    close(loss(z, y), expected / len(y), rel=1e-8)
    assert gumbel_bce(-3.5, True) == 20.0
    # The gradient is that of torch's own operations on the same steps, also where they clamp.
    z.requires_grad_()
    p = (-(-z.clamp(-4, 10)).exp()).exp()
    target = F.one_hot(y, K + 1)[:, :K].to(p)
    published = F.binary_cross_entropy(p, target, reduction="none").clamp(0, 20).sum() / len(y)
    (theirs,) = torch.autograd.grad(published, z)
    (ours,) = torch.autograd.grad(lf.gumbel_sigmoid_loss(z, y), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
    assert ours[0, 0] == 0 and ours[1, 1] == 0
    inner = batch[0][:, :K].clamp(-2.9, 9.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lf.gumbel_sigmoid_loss(x, y), inner)
    assert torch.autograd.gradgradcheck(lambda x: lf.gumbel_sigmoid_loss(x, y), inner)
    torch.testing.assert_close(loss.activation(z)[:, :K], p)
    start = loss.activation(loss.initial_bias(K)[None])
    torch.testing.assert_close(start[:, :K], torch.full((1, K), 0.001), rtol=1e-6, atol=0)
    for bad in (torch.full((len(y),), K + 1), y[:3]):
        with pytest.raises(ValueError, match="labels must"):
            lf.gumbel_sigmoid_loss(z, bad)
    assert lf.gumbel_sigmoid_loss(z[:0], y[:0]).item() == 0


def test_gol(batch, class_statistics):
    """Foreground rows leave out the negatives of rare classes; background rows keep each with probability 3/8."""
    z, y = batch[0][:, :K], batch[1]
    loss = build("GOL", class_statistics, rare_frequency=0.05)
    certain = drawn = 0.0
    for row, label in zip(z.tolist(), y.tolist()):
        for c, v in enumerate(row):
            rare = IMAGE_COUNT[c] / 1000 < 0.05
            if rare and label == K:
                drawn += gumbel_bce(v, False)
            elif not rare or c == label:
                certain += gumbel_bce(v, c == label)
    values = torch.stack([loss(z, y) for _ in range(3000)]) * len(y)
    assert values.mean().item() == pytest.approx(certain + 3 / 8 * drawn, rel=0.02)
    assert values.min().item() >= certain - 1e-6 and values.max().item() <= certain + drawn + 1e-6
    close(loss(z[y < K], y[y < K]), certain_foreground(z, y) / int((y < K).sum()), rel=1e-8)


def certain_foreground(z, y):
    return sum(
        gumbel_bce(v, c == label)
        for row, label in zip(z.tolist(), y.tolist())
        for c, v in enumerate(row)
        if label < K and (c == label or IMAGE_COUNT[c] / 1000 >= 0.05)
    )
