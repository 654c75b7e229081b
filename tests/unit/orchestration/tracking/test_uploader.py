"""The uploader runs beside the driver, which must stay light."""

from __future__ import annotations

import sys

from orchestration.config.paths import code_root


def test_importing_the_driver_side_does_not_import_mlflow():
    import subprocess

    ours = "orchestration.tracking.uploader, orchestration.tracking.sender"
    code = f"import {ours}, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=code_root())
