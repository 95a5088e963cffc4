"""Runs import-linter on the checkout.

An editable installation redirects imports and adds the checkout itself to the package's path, and
import-linter would take tests and benchmarks for parts of the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

from importlinter.cli import lint_imports_command

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, str(Path(__file__).parent.parent))
lint_imports_command()
