"""Tests of a trainer's plug-in are skipped where the trainer is not installed. In the trainer's own environment, which
scripts/test_plugins.sh names in ENTCOV_ENVIRONMENT, a skip is a failure: the trainer would be missing by mistake."""

import os

import pytest

ENVIRONMENT = os.environ.get("ENTCOV_ENVIRONMENT")


def no_skip(report):
    if ENVIRONMENT is not None and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in the environment of {ENVIRONMENT}: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return no_skip((yield))
