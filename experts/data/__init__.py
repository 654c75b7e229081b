"""Images to batches: sources, long-tailed selection, samplers, per-image augmentation on the device.

Read in this order: `config` (what can be said), `dataset.open_dataset` (files to stores), `batches.TrainBatches`
(stores to batches). Everything random is keyed by `random.key`, so a batch is a pure function of where training stands.
"""

from experts.data.batches import Batch, EvalBatches, TrainBatches
from experts.data.config import DatasetConfig
from experts.data.dataset import Dataset, open_dataset

__all__ = ["Batch", "Dataset", "DatasetConfig", "EvalBatches", "TrainBatches", "open_dataset"]
