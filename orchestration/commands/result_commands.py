"""The commands on finished runs: the options of each, and what it does with them.

Each imports its own libraries, which take seconds.
"""

from __future__ import annotations

import argparse

from orchestration.commands.options import Command, add_overrides
from orchestration.config.messages import show


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride-digits_lt-s0")
    parser.add_argument(
        "--model", choices=("best", "last"), help="which of its models (default: both; with --distribution: best)"
    )
    parser.add_argument(
        "--weights",
        metavar="RULE",
        help="how experts are weighted on other test distributions: uniform, test-time (learnt without labels), "
        "known-prior, or numbers, e.g. 0.2,0.3,0.5 (best and last mean --model)",
    )
    parser.add_argument(
        "--distribution",
        metavar="D[,D...]",
        help="uniform, forward-<ratio>, backward-<ratio>, or published for all the published ones (default: uniform)",
    )
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="the split to measure on (default: test)"
    )
    parser.add_argument("--stage", metavar="STAGE", help="which of several final stages, e.g. crt (default: all)")
    text = "images of no known class, a folder or a text file of paths: open-set F-measure, AUROC, accuracy"
    parser.add_argument("--unknown", metavar="PATH", help=text)
    text = "with --unknown: an image whose highest probability is below is rejected (default: 0.1, as published)"
    parser.add_argument("--threshold", type=float, metavar="P", help=text)
    add_overrides(parser, "where the data is now, e.g. dataset.root=..., or test_time.lr=..., views.blur=...")


def _evaluate(options: argparse.Namespace) -> int:
    from orchestration.commands.evaluate import evaluate

    how = (options.weights, options.model, options.distribution, options.split, options.overrides, options.stage)
    show(evaluate(options.run, *how, options.unknown, options.threshold))
    return 0


def _predict_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, an exported model's folder, or an MLflow model, e.g. models:/NAME/1"
    parser.add_argument("source", metavar="RUN|MODEL", help=text)
    parser.add_argument("files", nargs="+", metavar="FILE|FOLDER", help="images of any format and size")
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of a run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes named for each image (default: 3)")
    parser.add_argument("--csv", metavar="FILE", help="write CSV; - writes it to standard output")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file cannot be read, not only if all")


def _predict(options: argparse.Namespace) -> int:
    from orchestration.commands.predict import Options, predict

    how = Options(options.model, options.stage, options.top, options.csv)
    text, unread = predict(options.source, options.files, how)
    complete = show(text)
    return 1 if not complete or (unread and options.strict) else 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, an exported model's folder, or an MLflow model, e.g. models:/NAME/1"
    parser.add_argument("source", metavar="RUN|MODEL", help=text)
    text = "file to write; .onnx or .pt2 says the form, else each form adds its ending"
    parser.add_argument("out", metavar="OUT", help=text)
    for form, text in (
        ("onnx", "for ONNX Runtime and others"),
        ("torch", "torch.export, for PyTorch without our code"),
    ):
        parser.add_argument(f"--{form}", dest="forms", action="append_const", const=form, help=text)
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of a run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")


def _export(options: argparse.Namespace) -> int:
    from orchestration.commands.export import Options, export

    show(export(options.source, options.out, Options(options.model, options.stage, tuple(options.forms or ()))))
    return 0


def _regions_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride_h2t-digits_lt-s0")
    parser.add_argument(
        "--classes", metavar="A,B[,...]", help="ids or names (default: the most frequent class and the rarest)"
    )
    parser.add_argument(
        "--stage", metavar="STAGE", help="which of several final stages (default: the last that trains heads)"
    )
    add_overrides(parser, "where the data is now, e.g. dataset.root=...")


def _regions(options: argparse.Namespace) -> int:
    from orchestration.results.regions import draw_regions
    from orchestration.storage.location import local_run

    with local_run(options.run) as run:
        show(draw_regions(run, options.classes, options.overrides, options.stage))
    return 0


def _features_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride-digits_lt-s0")
    parser.add_argument("--classes", metavar="A,B[,...]", help="ids or names (default: some of each group)")
    text = "principal components, or t-SNE of scikit-learn (default: pca)"
    parser.add_argument("--projection", choices=("pca", "tsne"), default="pca", help=text)
    parser.add_argument("--stage", metavar="STAGE", help="which stage (default: all that have steps)")
    add_overrides(parser, "where the data is now, e.g. dataset.root=...")


def _features(options: argparse.Namespace) -> int:
    from orchestration.results.features import draw_chosen
    from orchestration.storage.location import local_run

    with local_run(options.run) as run:
        show(draw_chosen(run, options.classes, options.projection, options.overrides, options.stage))
    return 0


def _import_weights_options(parser: argparse.ArgumentParser) -> None:
    text = "state dict from torchvision, or from Caffe converted to PyTorch"
    parser.add_argument("source", metavar="SOURCE", help=text)
    text = "the .safetensors file to write, for method.backbone_weights"
    parser.add_argument("target", metavar="TARGET", help=text)


def _import_weights(options: argparse.Namespace) -> int:
    from orchestration.storage.pretrained import import_weights

    show(f"{import_weights(options.source, options.target)}\nwritten to {options.target}")
    return 0


def _promote_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, or a study's folder: its best run by the split that chose the epochs"
    parser.add_argument("run", metavar="RUN|STUDY", help=text)
    parser.add_argument("--alias", default="best", help="the alias to set (default: best)")
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of the run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")
    parser.add_argument("--uri", help="tracking server (default: the run's own)")


def _promote(options: argparse.Namespace) -> int:
    from orchestration.commands.promote import promote

    show(promote(options.run, options.model, options.stage, options.alias, options.uri))
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    text = "the folder of a study, run folders, or folders that hold runs"
    parser.add_argument("targets", nargs="+", metavar="STUDY|RUN", help=text)
    parser.add_argument(
        "--baseline", metavar="LABEL", help="the row to compare with (default: the study's, or the first)"
    )
    text = "which model of each run: of the last epoch, or of the best one (default: the study's, or last)"
    parser.add_argument("--model", choices=("last", "best"), help=text)
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (default: report/ beside the runs)")


def _report(options: argparse.Namespace) -> int:
    from orchestration.commands.report import report

    show(report(options.targets, options.baseline, options.model, options.out))
    return 0


def _sync_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, or the folder of a study for all its runs"
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_argument("--uri", help="tracking server (default: the run's own)")


def _sync(options: argparse.Namespace) -> int:
    from orchestration.commands.sync import sync_run

    problem = sync_run(options.run, options.uri)
    show(problem or "tracking: the server has everything of this run")
    return 1 if problem else 0


RESULTS: dict[str, Command] = {
    "evaluate": Command("Measure a saved run again and print its table.", _evaluate_options, _evaluate),
    "report": Command("Compare finished runs: tables, intervals, pictures, one page.", _report_options, _report),
    "predict": Command("Say what a trained ensemble takes image files for.", _predict_options, _predict),
    "export": Command(
        "Write a trained ensemble as one file for other programs: ONNX or torch.export.", _export_options, _export
    ),
    "regions": Command(
        "Draw decision regions before and after a last stage that trains only heads.", _regions_options, _regions
    ),
    "features": Command(
        "Draw features of test images on a plane, before and after each stage.", _features_options, _features
    ),
    "import-weights": Command(
        "Convert a PyTorch file of a ResNet or ResNeXt to safetensors.", _import_weights_options, _import_weights
    ),
    "promote": Command("Give the alias `best` in MLflow's registry to a run's model.", _promote_options, _promote),
    "sync": Command("Upload to MLflow what is still missing of a run.", _sync_options, _sync),
}
