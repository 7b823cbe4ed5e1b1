"""The optional dependencies: which packages belong to which extra, and an error that names the extra if one is missing.

The plain installation is the server's: it publishes copies, aggregates updates and audits without any library that trains or
reads text. Extras can only add packages, so this is the only way in which a server can do without them.
Every function that needs an extra asks for it first, before it reads or writes anything.
"""

from importlib.util import find_spec

from mpunlearn.errors import MissingPackageError

EXTRAS = {
    "audit": ("scipy",),
    "client": ("accelerate", "huggingface_hub", "rouge_score", "scipy", "tokenizers", "transformers"),
    "data": ("datasets", "pyarrow"),
    "figures": ("matplotlib",),
    "lm-eval": ("lm_eval",),
    "lora": ("peft",),
    "network": ("flwr", "fsspec", "h11", "httpx", "psutil", "uvicorn"),
    "ray": ("ray",),
    "s3": ("obstore", "s3fs"),
}
"""Extra → the modules that this package imports from it. pyproject.toml has the same table with versions."""


def needs(extra: str, what: str) -> None:
    """Checks that the packages of an extra are installed. Nothing is imported.

    Args:
        extra: a key of `EXTRAS`.
        what: what needs it: a command, an option or a file.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    if missing := [module for module in EXTRAS[extra] if find_spec(module) is None]:
        names = ", ".join(module.replace("_", "-") for module in missing)
        isnt = "which is" if len(missing) == 1 else "which are"
        raise MissingPackageError(
            f"{what}: needs {names}, {isnt} not installed; run `pip install 'mpunlearn[{extra}]'`, or 'mpunlearn[all]' for "
            "all features"
        )
