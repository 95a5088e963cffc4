"""Prints the site-packages folder of an installed torch that this package supports, if there is one.

The Makefile asks this before it makes the virtual environment. Torch is not imported: reading its
version takes milliseconds, importing it takes seconds.
"""

import re
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
oldest = re.search(r'"torch>=(\d+)\.(\d+)"', PYPROJECT.read_text())
assert oldest is not None, "pyproject.toml requires no torch"

try:
    torch = metadata.distribution("torch")
except metadata.PackageNotFoundError:
    pass
else:
    numbers = re.match(r"(\d+)\.(\d+)", torch.version)
    if numbers and tuple(map(int, oldest.groups())) <= tuple(map(int, numbers.groups())):
        print(Path(str(torch.locate_file(""))).resolve())
