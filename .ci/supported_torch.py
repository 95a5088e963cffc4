"""Prints the site-packages folder of an installed torch that this package supports, if there is one.

The Makefile asks this before it makes the virtual environment. Torch is not imported: reading its
version takes milliseconds, importing it takes seconds.
"""

import re
from importlib import metadata
from pathlib import Path

OLDEST, FIRST_UNSUPPORTED = (2, 11), (2, 14)

try:
    torch = metadata.distribution("torch")
except metadata.PackageNotFoundError:
    pass
else:
    numbers = re.match(r"(\d+)\.(\d+)", torch.version)
    if numbers and OLDEST <= tuple(map(int, numbers.groups())) < FIRST_UNSUPPORTED:
        print(Path(str(torch.locate_file(""))).resolve())
