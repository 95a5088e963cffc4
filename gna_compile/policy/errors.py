"""What can be wrong with a policy, and with a policy on a given site."""

from __future__ import annotations

from collections.abc import Sequence

from gna_compile.reasons import Reason


class PolicyError(ValueError):
    """A policy that cannot be used as written.

    Attributes:
        problems: one line each, `file:line: key.path: what is wrong; what to do`. The message is
            these lines joined.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[PolicyError], tuple[tuple[str, ...]]]:
        return PolicyError, (self.problems,)


class PolicyMismatch(ValueError):
    """A valid rule that does not fit the tokens of one attention site, which then stays dense.

    Attributes:
        reason: the decline code for the report.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[type[PolicyMismatch], tuple[Reason, str]]:
        return PolicyMismatch, (self.reason, str(self))
