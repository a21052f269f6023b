"""Fixtures of the tests of Megatron-Core."""

from tests.support.megatron_policies import policies  # noqa: F401
