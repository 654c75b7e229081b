"""An exported ensemble as an MLflow model: tensors, JSON and our code, nothing pickled.

The code travels under a name made from what it says, `expertail_<digest>`, with imports to match. So it is found in a
process that has imported another `experts`, another `orchestration`, or the model of another version of ours.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

from experts.data.names import readable
from orchestration.storage.files import read_json

_PACKAGES = ("experts", "aggregation")
_REQUIREMENTS = ("mlflow", "numpy", "Pillow", "pydantic", "safetensors", "scikit-learn", "torch", "torchvision")
_FROM = re.compile(rf"^(\s*)from ({'|'.join(_PACKAGES)})\b", re.MULTILINE)
_IMPORT = re.compile(rf"^(\s*)import ({'|'.join(_PACKAGES)})$", re.MULTILINE)


def save_pyfunc(scratch: Path, export: Path, model: Any) -> None:
    """Write an exported ensemble as an MLflow model, `scratch`/model.

    Args:
        scratch: an empty folder.
        export: folder of the ensemble.
        model: MLflow's description of it, which is completed.
    """
    import mlflow

    code = _copy_code(scratch)
    described = read_json(export / "model.json")
    versions = {package: importlib.metadata.version(package).split("+")[0] for package in _REQUIREMENTS}
    warnings.filterwarnings("ignore", message=".*input example was not provided.*")
    mlflow.pyfunc.save_model(
        scratch / "model",
        loader_module=f"{code.name}.aggregation.pyfunc",
        data_path=str(export),
        code_paths=[str(code)],
        mlflow_model=model,
        signature=_signature(described),
        pip_requirements=[f"{package}=={version}" for package, version in versions.items()],
        metadata={
            "class_names": [readable(name) for name in described["class_names"]],
            "preprocessing": described["preprocessing"],
        },
    )


def _copy_code(scratch: Path) -> Path:
    """Copy our packages below a name of their own; return the folder."""
    written: dict[str, str] = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(folder.rglob("*.py")):
            written[f"{package}/{path.relative_to(folder).as_posix()}"] = path.read_text("utf-8")
    digest = hashlib.sha256("".join(f"{place}\0{text}\0" for place, text in written.items()).encode()).hexdigest()
    code = scratch / f"expertail_{digest[:12]}"
    for place, text in written.items():
        (code / place).parent.mkdir(parents=True, exist_ok=True)
        inside = _IMPORT.sub(rf"\1from {code.name} import \2", _FROM.sub(rf"\1from {code.name}.\2", text))
        (code / place).write_text(inside, "utf-8")
    (code / "__init__.py").write_text('"""expertail\'s experts and aggregation, as they were when this was saved."""\n')
    return code


def _signature(described: dict[str, Any]) -> Any:
    """Return the names and types of an answer's fields, and of the parameter `top`.

    Pictures have no one type for MLflow, which would convert or refuse most forms of them: it is given none.
    """
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    said = Object([Property("class", DataType.string), Property("probability", DataType.double)])
    experts = Object([Property(name, said) for name in described["expert_names"]])
    fields: dict[str, Any] = {
        "class": DataType.string, "probability": DataType.double, "top": Array(said), "experts": experts,
        "disagreement": DataType.double,
    }  # fmt: skip
    outputs = Schema([ColSpec(kind, name) for name, kind in fields.items()])
    return ModelSignature(None, outputs, ParamSchema([ParamSpec("top", DataType.long, 3)]))
