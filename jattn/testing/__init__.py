"""The conformance suite and the tolerance policy, importable, so that users can check mechanisms of their own.

from jattn.testing import assert_conforms

def test_conformance():
    assert_conforms(my_module.ENTRY)
"""

from jattn.testing.conformance import CheckResult, assert_conforms, check_mechanism, checks_of, run_checks
from jattn.testing.tolerance import assert_within_policy, within_policy

__all__ = [
    "CheckResult",
    "assert_conforms",
    "assert_within_policy",
    "check_mechanism",
    "checks_of",
    "run_checks",
    "within_policy",
]
