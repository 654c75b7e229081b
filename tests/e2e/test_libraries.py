"""A run loads no library that it does not use: each costs every process of it up to 2 s before its first step."""

import subprocess
import sys

CODE = """
import sys
from pathlib import Path

from orchestration.results.pictures import draw_report
from tests import short_runs

draw_report(short_runs.train(Path(sys.argv[1]), "ride"), print)
unused = {"torch._dynamo", "torch._inductor", "torchvision", "sklearn", "pandas", "deepspeed", "mlflow", "ray"}
loaded = unused & sys.modules.keys()

from orchestration.cli import main

assert main(["plan", "method=ride", "then=h2t", "dataset=digits_lt"]) == 0
loaded |= (unused - {"ray"}) & sys.modules.keys()
sys.exit(", ".join(sorted(loaded)) or 0)
"""


def test_training_its_pictures_and_a_plan_load_only_what_they_use(tmp_path):
    command = [sys.executable, "-c", CODE, tmp_path / "run"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "was not drawn" not in run.stdout
