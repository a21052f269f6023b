import pytest

from entcov import _cpu

SUPPORTED_ISAS = [name for name in ("avx512", "avx2", "baseline") if _cpu.set_isa(name)]
_cpu.set_isa(SUPPORTED_ISAS[0])


@pytest.fixture(params=SUPPORTED_ISAS)
def isa(request):
    """Runs the test once on every instruction set that this CPU has."""
    before = _cpu.isa()
    assert _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)
