"""OLTR's head, loss and attention, element by element.

Origin of the arrays: numbers computed by hand and in NumPy from the published code's formulas
(zhmiao/OpenLongTailRecognition-OLTR, commit f50e375: MetaEmbeddingClassifier, CosNormClassifier, DiscCentroidsLoss),
six decimals. Beside them a float64 transcription of the same formulas, to 1e-12.

Shapes: B images, D features, C classes.
"""

import numpy as np
import pytest
import torch

from experts.methods.oltr import CentroidMargin, MetaEmbeddingHead, ModulatedAttention, centroid_loss

CENTRES = torch.tensor([[1.0, 0], [0, 1], [-1, -1]], dtype=torch.float64)
FEATURES = torch.tensor([[0.8, 0.2], [0.1, 1.5], [1.1, -0.1]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0])
NUMBERS = {
    "weight": [[0.5, -0.2], [0.1, 0.3], [-0.4, 0.2]],
    "bias": [0, 0.1, -0.1],
    "selector_weight": [[0.3, 0.1], [-0.2, 0.4]],
    "selector_bias": [0.05, 0],
    "class_weight": [[1, 0], [0, 2], [-1, -1]],
}
DECIMALS = {"atol": 6e-7, "rtol": 0}  # of the arrays


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_with(centre_CD, **values):
    classes, width = centre_CD.shape
    head = MetaEmbeddingHead(MetaEmbeddingHead.Config(), width, classes).double()
    head.memory.centre_CD.data = centre_CD.clone()
    for name, value in values.items():
        getattr(head, name).data = torch.as_tensor(value, dtype=torch.float64)
    return head


class TestCentroidLoss:
    def test_value_and_gradients(self):
        features_BD, centre_CD = FEATURES.clone().requires_grad_(), CENTRES.clone().requires_grad_()
        loss = centroid_loss(features_BD, LABELS, centre_CD)
        attract = centroid_loss(FEATURES, LABELS, CENTRES, repel=0.0)
        torch.testing.assert_close(attract, torch.tensor(0.06, dtype=torch.float64), **DECIMALS)
        torch.testing.assert_close((loss - attract) / 0.01, torch.tensor(7.32, dtype=torch.float64), atol=1e-4, rtol=0)
        torch.testing.assert_close(loss, torch.tensor(0.1332, dtype=torch.float64), **DECIMALS)
        to_features, to_centres = torch.autograd.grad(loss, [features_BD, centre_CD])
        expected = [[-0.072444, 0.065778], [0.032889, 0.157778], [0.026222, -0.032889]]
        torch.testing.assert_close(to_features, torch.tensor(expected, dtype=torch.float64), **DECIMALS)
        expected = [[0.009111, -0.007778], [-0.012444, -0.087556], [0.011111, 0.010222]]
        torch.testing.assert_close(to_centres, torch.tensor(expected, dtype=torch.float64), **DECIMALS)

    @pytest.mark.parametrize("scale", [0.3, 3.0], ids=["pushed", "far enough"])
    def test_the_formula_image_by_image(self, scale):
        images, width, classes = 7, 4, 5
        features_BD = (scale * draw(images, width, seed=0)).requires_grad_()
        centre_CD = (scale * draw(classes, width, seed=1)).requires_grad_()
        labels_B = torch.tensor([0, 3, 3, 1, 0, 3, 4])
        loss = centroid_loss(features_BD, labels_B, centre_CD)
        to_features, to_centres = torch.autograd.grad(loss, [features_BD, centre_CD])

        v, m, y = features_BD.detach().numpy(), centre_CD.detach().numpy(), labels_B.numpy()
        others = [(b, c) for b in range(images) for c in range(classes) if c != y[b]]
        mean = sum(((v[b] - m[c]) ** 2).sum() for b, c in others) / (images * classes)
        assert (mean < 10) == (scale == 0.3)
        repel = 0.01 * max(0.0, 10 - mean)
        assert loss.item() == pytest.approx(
            sum(((v[b] - m[y[b]]) ** 2).sum() for b in range(images)) / 2 / images + repel
        )
        push_v, push_m = np.zeros_like(v), np.zeros_like(m)
        for b, c in others if mean < 10 else []:
            push_v[b] -= 0.02 * (v[b] - m[c]) / (images * classes)
            push_m[c] += 0.02 * (v[b] - m[c]) / (images * classes)
        counts = np.bincount(y, minlength=classes)
        pull_m = np.stack(
            [sum((m[c] - v[b] for b in range(images) if y[b] == c), np.zeros(width)) for c in range(classes)]
        )
        np.testing.assert_allclose(to_features.numpy(), (v - m[y]) / images + push_v, rtol=0, atol=1e-12)
        np.testing.assert_allclose(to_centres.numpy(), pull_m / (1 + counts)[:, None] / images + push_m, atol=1e-12)

    def test_a_replica_gives_its_share_of_the_centres_gradient(self):
        """Every replica computes the whole loss, and what reaches the head's centres directly is a D-th of it."""
        from experts.auxiliaries.auxiliary import Seen
        from experts.progress import Progress

        head = head_with(CENTRES)
        auxiliary = CentroidMargin(CentroidMargin.Config(), 2, torch.tensor([3, 2, 1]))
        auxiliary.meet(head)
        assert not list(auxiliary.parameters())
        found = []
        for replicas in (1, 4):
            loss = auxiliary.loss(Seen(FEATURES[None], None, None, LABELS, replicas), Progress(1, 1, 0, 1))
            found.append(torch.autograd.grad(loss, head.memory.centre_CD)[0])
        torch.testing.assert_close(found[0], 4 * found[1])


class TestMetaEmbedding:
    def test_what_the_memory_adds_and_the_scores(self):
        head = head_with(CENTRES, **NUMBERS)
        expected = [[0.066452, -0.013839], [-0.024093, 0.081465], [0.119815, -0.045011]]
        torch.testing.assert_close(head.infused(FEATURES), torch.tensor(expected, dtype=torch.float64), **DECIMALS)
        expected = [
            [15.159198, 3.257029, -13.022239],
            [0.743151, 15.482967, -11.473598],
            [15.707293, -1.867279, -9.786367],
        ]
        # The published scores were computed in float32.
        torch.testing.assert_close(head(FEATURES), torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=0)

    def test_the_formula_in_numpy(self):
        images, width, classes = 6, 5, 4
        head = head_with(draw(classes, width, seed=2))
        features_BD = draw(images, width, seed=3)
        with torch.no_grad():
            found = head(features_BD).numpy()
        at = {name: value.detach().numpy() for name, value in head.named_parameters()}
        v, m = features_BD.numpy(), at["memory.centre_CD"]
        scores = v @ at["weight"].T + at["bias"]
        share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        infused = np.tanh(v @ at["selector_weight"].T + at["selector_bias"]) * (share @ m)
        nearest = np.linalg.norm(v[:, None] - m, axis=2).min(axis=1, keepdims=True)
        x = 10 / nearest * (v + infused)
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        w = at["class_weight"] / np.linalg.norm(at["class_weight"], axis=1, keepdims=True)
        np.testing.assert_allclose(found, 16 * (norm / (1 + norm) * x / norm) @ w.T, rtol=0, atol=1e-12)

    def test_a_feature_on_a_centre_has_finite_scores_and_gradients_which_do_not_reach_the_centres(self):
        head = head_with(CENTRES, **NUMBERS)
        features_BD = torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64, requires_grad=True)
        scores_BC = head(features_BD)
        gradients = torch.autograd.grad(
            scores_BC.square().sum(), [features_BD, head.memory.centre_CD], allow_unused=True
        )
        assert torch.isfinite(scores_BC).all() and torch.isfinite(gradients[0]).all() and gradients[1] is None


class TestModulatedAttention:
    def test_it_begins_as_the_identity_and_is_then_the_formula(self):
        images, channels, side = 2, 4, 3
        attention = ModulatedAttention(ModulatedAttention.Config(), channels, side).double()
        x = draw(images, channels, side, side, seed=4)
        assert torch.equal(attention(x), x)
        attention.back.weight.data = draw(channels, 2, 1, 1, seed=5)
        with torch.no_grad():
            found = attention(x).numpy()
        at = {name: value.detach().numpy() for name, value in attention.named_parameters()}

        def layer(name, flat):
            bias = at.get(f"{name}.bias", np.zeros(1))[:, None]
            return at[f"{name}.weight"][:, :, 0, 0] @ flat + bias

        for b, image in enumerate(x.numpy()):
            flat = image.reshape(channels, side * side)
            theta, phi, g = (layer(name, flat) for name in ("theta", "phi", "g"))
            f = np.exp(theta.T @ phi)
            r = layer("back", (f / f.sum(axis=1, keepdims=True) @ g.T).T)
            a = np.exp(at["where.weight"] @ image.ravel() + at["where.bias"])
            expected = flat + a / a.sum() * r
            np.testing.assert_allclose(found[b].reshape(channels, -1), expected, rtol=0, atol=1e-12)
