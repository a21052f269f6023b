import pytest

pytest.register_assert_rewrite("tests.support")  # before it is imported

from entcov import _cpu  # noqa: E402
from tests.emulator import build, emulated  # noqa: E402
from tests.support import on_device  # noqa: E402

SUPPORTED_ISAS = [name for name in ("avx512", "avx2", "baseline") if _cpu.set_isa(name)]
_cpu.set_isa(SUPPORTED_ISAS[0])
on_device.install()


def pytest_collection_modifyitems(items):
    on_device.skip_what_only_the_cpu_does(items)


@pytest.fixture(params=SUPPORTED_ISAS if on_device.DEVICE is None else [on_device.DEVICE])
def isa(request):
    """Runs the test once on every instruction set that this CPU has, or once on the device of ENTCOV_TEST_DEVICE."""
    if on_device.DEVICE is not None:
        yield request.param
        return
    before = _cpu.isa()
    assert _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(scope="session")
def products():
    """What tests/emulator builds: {name: extension or library}."""
    return build.build_all()


@pytest.fixture(scope="session")
def kernels(products):
    """entcov._cuda with the emulated kernels."""
    return emulated.load(products["plain"])
