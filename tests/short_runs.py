"""Run folders as training leaves them, after two steps of each stage."""

from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import export_finals
from orchestration.storage.run_folder import RunFolder
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

WORDS = ["dataset=digits_lt", "engine.name=torch", "engine.threads=1", "dataset.image_size=8", "tracking.enabled=false"]


def train(path, method, *words, stages=2):
    """Make the folder of a run of `stages` stages."""
    config = load_config([f"method={method}", *WORDS, *words])
    dataset, folder = open_dataset(config.dataset), RunFolder(path)
    counts = dataset.counts_C.tolist()
    folder.write_config(config)
    folder.record_start(config, [], {})
    folder.write_data({
        "dataset": config.dataset.name, "class_names": list(dataset.class_names), "counts": counts,
        "total": sum(counts), "digest": dataset.digest, "image_shape": dataset.raw_image_shape, "groups": {},
    })  # fmt: skip
    checkpoints, saved = Checkpoints(path, list(config.method.stages)), None
    for stage in list(config.method.stages)[:stages]:
        trainer = StageTrainer(config, stage, dataset, Mesh(mesh_shape(config.method.num_experts, 1)))
        if saved is not None:
            trainer.start_from(str(saved))
        trainer.train(2)
        writing = checkpoints.begin()
        entries = trainer.save(str(writing))
        state = {"stage": stage, **trainer.state(), "total_steps": 2, "best": None, "last": None}
        saved = checkpoints.complete(writing, checkpoints.name(stage, 2), entries, state)
        trainer.close()
    members = {"ensemble": {"top1": {"all": 0.5}, "nll": 1.0, "ece": 0.1, "per_class": [0.5] * 10}}
    folder.write_evaluation("last", {"split": "test", "stage": stage, "epoch": 1, "step": 2, "members": members})
    export_finals(config, folder, stage, saved)
    folder.close()
    return path
