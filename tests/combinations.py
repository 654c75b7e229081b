"""Combinations of methods, mixings and second stages, as words of a command."""

BESIDE = [
    "method=ride",
    "method.stages.train.views=[crop_flip]",
    "method.stages.train.auxiliaries.contrast={name: paco, queue_size: 128, dim: 8, weight: 0.2}",
    "method.stages.train.auxiliaries.centres={name: dro_lt, weight: 0.1}",
]
LOUD = [f"method.stages.train.mixing.quiet_{end}=0" for end in ("first", "last")]  # CMO mixes the epochs compared
COMBINED = {
    "LDAM + DRW + mixup + cRT, host": (
        "train",
        ["method=ldam_drw", "mix=mixup", "then=crt", "method.stages.train.class_weights.after_epoch=1"],
    ),
    "RIDE + CMO": ("train", ["method=ride", "mix=cmo", *LOUD]),
    "BSCE + CMO": ("train", ["method=balanced_softmax", "mix=cmo", *LOUD]),
    "RIDE + CMO + H2T": ("h2t", ["method=ride", "mix=cmo", "then=h2t", *LOUD]),
    "LADE + CutMix": ("train", ["method=lade", "mix=cutmix"]),
    "ACE + Remix": ("train", ["method=ace", "mix=remix"]),
    "LDAM + DRW + mixup + cRT": ("crt", ["method=ldam_drw", "mix=mixup", "then=crt"]),
    "MiSLAS": ("mislas", ["method=mislas"]),
    "MiSLAS + H2T": ("h2t", ["method=mislas_h2t"]),
    "RIDE + PaCo + DRO-LT": ("train", BESIDE),
    "RIDE + PaCo + DRO-LT + H2T": ("h2t", [*BESIDE, "then=h2t"]),
    "GCL, second stage": ("gcl", ["method=gcl"]),
    "GCL + H2T": ("h2t", ["method=gcl_h2t"]),
    "logit-adjusted TADE": (
        "train",
        [
            "method=tade",
            "method.stages.train.objective.name=per_expert",
            "method.stages.train.objective.of=[{name: logit_adjustment, tau: .5},{name: lade},{name: inverse_softmax}]",
        ],
    ),
    "cosine head + cRT": ("crt", ["method=ce", "method.head.name=cosine", "then=crt"]),
}
"""The stage that is of interest, and the words. All with three experts."""
COMBINED = {name: (stage, [*words, "method.num_experts=3"]) for name, (stage, words) in COMBINED.items()}
