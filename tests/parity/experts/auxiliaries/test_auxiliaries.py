"""Auxiliaries against numbers worked out by hand or by published code, and queues over several steps.

Where a class says Official, the numbers come from running the published code on a CPU with the inputs shown; others are
the formula by hand. All are rounded to 6 decimals.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experts.auxiliaries.attached import Following, attach
from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.dro_lt import DroLT, robust_loss
from experts.auxiliaries.paco import PaCo
from experts.auxiliaries.queue import EMPTY, Queue
from experts.auxiliaries.supcon import SupCon, supervised_contrast
from experts.auxiliaries.triplet import triplet_loss
from experts.backbones.resnet_cifar import ResNetCifar
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.linear import LinearHead
from experts.progress import Progress

NOW = Progress(1, 2)
YES, NO = torch.tensor(True), torch.tensor(False)


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected, dtype=found.dtype), rtol=0, atol=1e-6)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def unit(*values):
    return F.normalize(rows(*values), dim=1)


class TestSupCon:
    q = rows([1, 0], [0.6, 0.8], [0.8, 0.6], [-1, 0])
    y = torch.tensor([0, 1, 0, 1])

    def test_the_mean_over_anchors_is_that_of_the_card(self):
        close(supervised_contrast(self.q, self.y, 0.5), 1.427312)

    @pytest.mark.parametrize(("pair", "losses"), [((0, 2), (0.529241, 0.882895)), ((1, 3), (3.545862, 0.751251))])
    def test_the_anchors_of_a_class_have_the_losses_of_the_card(self, pair, losses):
        """With labels of their own, the other two are no anchors."""
        y = torch.tensor([1, 2, 3, 4])
        y[list(pair)] = 0
        close(supervised_contrast(self.q, y, 0.5), sum(losses) / 2)

    def test_two_views_of_a_batch_are_one_set_of_vectors(self):
        piece = SupCon(SupCon.Config(temperature=0.5), 2, torch.tensor([2, 2])).double()
        seen = Seen(self.q[[0, 1, 2, 3]].view(2, 2, 2), None, None, torch.tensor([0, 1]))
        close(piece.loss(seen, NOW), 1.427312)

    def test_an_anchor_without_a_positive_is_left_out(self):
        q = torch.cat([self.q, rows([0, 1])])
        y = torch.tensor([0, 1, 0, 1, 2])
        scores = (q @ q.T / 0.5).numpy()
        loss = [
            np.log(sum(np.exp(scores[i, a]) for a in range(5) if a != i)) - scores[i, p]
            for i, p in ((0, 2), (1, 3), (2, 0), (3, 1))
        ]
        close(supervised_contrast(q, y, 0.5), float(np.mean(loss)))


class TestTriplet:
    a, p, n = [1, 0], [0.8, 0.6], [0.6, 0.8]

    def test_one_triplet_is_that_of_the_card(self):
        """d(a, p) = 0.4 and d(a, n) = 0.8, so 0.1; the second anchor has d = 0.4 and d(p, n) = 0.08, so 0.82."""
        for mining in ("all", "hardest"):
            close(triplet_loss(rows(self.a, self.p, self.n), torch.tensor([0, 0, 1]), 0.5, mining), (0.1 + 0.82) / 2)

    def test_the_hardest_are_the_farthest_positive_and_the_nearest_negative(self):
        vectors, y = unit([1, 0.1], [1, 0.7], [0.2, 1], [-1, 0.3], [0, -1]), torch.tensor([0, 0, 0, 1, 1])
        d = [[sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for v in vectors.tolist()] for u in vectors.tolist()]
        expected = []
        for i in range(5):
            positives = [d[i][j] for j in range(5) if y[i] == y[j] and i != j]
            negatives = [d[i][j] for j in range(5) if y[i] != y[j]]
            expected.append(max(0.0, max(positives) - min(negatives) + 0.2))
        close(triplet_loss(vectors, y, 0.2, "hardest"), sum(expected) / 5)

    def test_a_class_with_one_image_and_a_batch_of_one_class_give_nothing(self):
        vectors = rows(self.a, self.p, self.n)
        for mining in ("all", "hardest"):
            assert triplet_loss(vectors, torch.tensor([0, 1, 2]), 0.5, mining) == 0
            assert triplet_loss(vectors, torch.tensor([0, 0, 0]), 0.5, mining) == 0


class TestPaCoOfficial:
    q, k = unit([1, 0.2], [-0.3, 1]), unit([0.9, 0.1], [0, 1])
    queue, labels = unit([1, 1], [-1, 0.5], [0.2, -1]), torch.tensor([0, 1, 2])
    z, y = rows([1.2, -0.3, 0.1], [0.2, 0.7, -0.5]), torch.tensor([0, 1])

    def piece(self, **settings):
        config = PaCo.Config(queue_size=3, dim=2, **settings)
        piece = PaCo(config, 2, torch.tensor([100, 40, 10])).double()
        piece.queue.keys_Kd.copy_(self.queue)
        piece.queue.labels_K.copy_(self.labels)
        return piece

    def seen(self):
        return Seen(self.q[None], self.k, self.z, self.y)

    @pytest.mark.parametrize(
        ("settings", "loss"),
        [
            ({"alpha": 0.05, "temperature": 0.2}, 4.766113),
            ({"alpha": 0.01, "temperature": 0.05}, 19.136208),
            ({"alpha": 1, "temperature": 0.07}, 5.719722),
            ({"alpha": 0.05, "temperature": 0.2, "keys": False}, 3.734867),
        ],
    )
    def test_the_loss_is_that_of_the_card(self, settings, loss):
        close(self.piece(**settings).loss(self.seen(), NOW), loss)

    def test_gamma_is_a_factor_of_the_vectors_in_the_sum(self):
        pi = np.array([100, 40, 10]) / 150
        s_class = self.z.numpy() + np.log(pi + 1e-9)
        u = torch.cat([self.q, self.k, self.queue]).numpy()
        uy = np.array([0, 1, 0, 1, 0, 1, 2])
        total = 0.0
        for i in range(2):
            s = self.q.numpy()[i] @ u.T / 0.2
            others = [j for j in range(7) if j != i]
            log_sum = np.log(np.exp(s_class[i]).sum() + 0.3 * sum(np.exp(s[j]) for j in others))
            same = [j for j in others if uy[j] == i]
            along = (s_class[i, i] - log_sum) + 0.05 * sum(s[j] - log_sum for j in same)
            total -= along / (1 + 0.05 * len(same)) / 2
        close(self.piece(gamma=0.3).loss(self.seen(), NOW), total)

    def test_what_is_not_filled_counts_nothing(self):
        piece = self.piece()
        piece.queue.labels_K[1:] = EMPTY
        short = PaCo(PaCo.Config(queue_size=1, dim=2), 2, torch.tensor([100, 40, 10])).double()
        short.queue.keys_Kd.copy_(self.queue[:1])
        short.queue.labels_K.copy_(self.labels[:1])
        torch.testing.assert_close(piece.loss(self.seen(), NOW), short.loss(self.seen(), NOW), rtol=1e-12, atol=0)


class TestDroLTOfficial:
    f, y = rows([1, 0], [0, 1], [2, 0], [0, 3]), torch.tensor([0, 1, 0, 2])
    train, labels = rows([1, 0], [3, 0], [0, 1], [0, 3], [0, 2], [1, 3]), torch.tensor([0, 0, 1, 1, 2, 2])
    weights = rows(1, 0.5, 0.25)

    def centres(self):
        piece = DroLT(DroLT.Config(), 2, torch.tensor([2, 2, 2])).double()
        piece.before_epoch(piece.statistics(self.train, self.labels), NOW)
        return piece.mean_CD

    def test_centres_are_class_means(self):
        close(self.centres(), [[2.0, 0.0], [0.0, 2.0], [0.5, 2.5]])

    def losses(self, radius_B, images=4):
        given = self.f[:images], self.y[:images], self.centres(), rows(*radius_B)
        return robust_loss(*given), robust_loss(*given, weight_C=self.weights)

    @pytest.mark.parametrize(("radius", "loss", "weighted"), [(0, 0.775145, 0.848895), (1, 1.233279, 1.206636)])
    def test_the_loss_is_that_of_the_card(self, radius, loss, weighted):
        for found, expected in zip(self.losses([radius] * 4), (loss, weighted), strict=True):
            close(found, expected)

    def test_published_code_mixes_up_the_radii_of_images(self):
        """For radii 0.5, 1, 2 of the classes it has these losses, which belong to the radii of images here."""
        published = rows(0.5, 1, 2)[self.y[self.y.argsort(stable=True).argsort()]]
        assert published.tolist() == [0.5, 0.5, 1, 2]
        for found, expected in zip(self.losses(published), (1.317588, 1.137123), strict=True):
            close(found, expected)

    def test_an_image_has_the_radius_of_its_class(self):
        piece = DroLT(DroLT.Config(), 2, torch.tensor([2, 2, 2])).double()
        piece.before_epoch(piece.statistics(self.train, self.labels), NOW)
        piece.radius_C.data = rows(0.5, 1, 2)
        loss, _ = self.losses([0.5, 1, 0.5, 2])
        torch.testing.assert_close(piece.loss(Seen(self.f[None], None, None, self.y), NOW), loss)

    def test_a_class_that_the_batch_lacks_still_divides_where_classes_are_weighted(self):
        plain, weighted = self.losses([1, 1, 1], images=3)
        close(weighted, 0.803464)
        close(plain, 0.903135)

    def test_weights_are_counts_over_the_largest(self):
        piece = DroLT(DroLT.Config(weighted=True), 2, torch.tensor([40, 20, 10])).double()
        assert piece.weight_C.tolist() == self.weights.tolist()


class TestQueue:
    def pushed(self, *batches, size=4, ok=YES):
        queue = Queue(size, 1).double()
        for batch in batches:
            queue.push(rows(*([value] for value in batch)), torch.tensor(batch, dtype=torch.int64), ok)
        return queue

    def test_the_newest_keys_are_kept_and_the_oldest_go_first(self):
        queue = self.pushed([0, 1], [2, 3], [4, 5])
        assert queue.labels_K.tolist() == [4, 5, 2, 3]
        assert queue.keys_Kd.flatten().tolist() == [4, 5, 2, 3]
        assert queue.next == 2

    def test_partial_batches_push_what_they_have_and_wrap_round(self):
        queue = self.pushed([0, 1], [2], [3, 4], [5, 6])
        assert queue.labels_K.tolist() == [4, 5, 6, 3]
        assert queue.next == 3

    def test_it_begins_empty_with_directions(self):
        queue = Queue(5, 3)
        assert queue.labels_K.tolist() == [EMPTY] * 5
        torch.testing.assert_close(queue.keys_Kd.norm(dim=1), torch.ones(5))

    def test_nothing_moves_where_the_step_was_not_finite(self):
        queue = self.pushed([0, 1])
        before = {name: value.clone() for name, value in queue.state_dict().items()}
        queue.push(rows([math.nan], [math.nan]), torch.tensor([7, 8]), NO)
        assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


class TestMomentumCopy:
    def model(self):
        parts = EnsembleConfig(
            ResNetCifar.Config(depth=8),
            LinearHead.Config(),
            num_classes=3,
            expert_names=("a",),
            reduce_dimension=False,
        )
        model = build_ensemble(parts, seed=0)
        configs = {"p": PaCo.Config(queue_size=4, dim=2)}
        attach(model, configs, parts, torch.tensor([3, 2, 1]), seed=0, stage="train")
        return model.double()

    def test_it_follows_by_its_momentum_for_several_steps(self):
        """With m = 0.75: after w0, w1, w2 it is 0.75 (0.75 w0 + 0.25 w1) + 0.25 w2."""
        model = self.model()
        following = Following(model, 0.75)
        expert, twin = model.experts["a"], model.experts["a"].momentum_copy
        pairs = [
            (model.trunk, model.trunk_copy),
            (expert.features, twin["features"]),
            (expert.auxiliaries["p"].embed, twin["embed"]["p"]),
        ]
        starts = [{n: p.detach().clone() for n, p in module.named_parameters()} for module, _ in pairs]
        for factor in (2.0, 3.0):
            for (module, _), start in zip(pairs, starts, strict=True):
                with torch.no_grad():
                    for name, parameter in module.named_parameters():
                        parameter.copy_(factor * start[name])
            following.step(YES)
            following.step(NO)
        part = 0.75 * (0.75 + 0.25 * 2) + 0.25 * 3
        for (_, copy), start in zip(pairs, starts, strict=True):
            found = dict(copy.named_parameters())
            assert found.keys() == start.keys()
            for name, value in start.items():
                torch.testing.assert_close(found[name].detach(), part * value, rtol=1e-12, atol=1e-14)

    def test_the_head_the_queue_and_the_loss_have_no_copy(self):
        twin = self.model().experts["a"].momentum_copy
        assert set(twin) == {"features", "embed"}
        assert not any(isinstance(module, Queue) for module in twin.modules())
        assert isinstance(twin["embed"]["p"], nn.Module)
