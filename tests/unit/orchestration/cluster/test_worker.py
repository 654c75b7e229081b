"""A config reaches workers as it is: Ray pickles it, and nothing is dumped or validated again."""

from __future__ import annotations

import pytest
from ray import cloudpickle

from orchestration.config.compose import available, load_config
from orchestration.config.identity import identity
from orchestration.training.mesh import MeshShape


@pytest.mark.parametrize("method", [*available("method")[:3], "ride", "lfme"])
def test_a_config_that_was_sent_equals_the_original(method):
    config = load_config([f"method={method}"])
    sent = cloudpickle.loads(cloudpickle.dumps((config, config.dataset, MeshShape(3, 1))))
    assert sent == (config, config.dataset, MeshShape(3, 1))
    assert identity(sent[0]) == identity(config)
    assert all(type(a) is type(b) for (_, a), (_, b) in zip(sent[0].method, config.method, strict=True))
    with pytest.raises(ValueError, match="frozen"):
        sent[0].seed = 1
