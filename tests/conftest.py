"""What all tests share: torchvision's operators, and where the real weights and data are."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxpress.frontend.sources import declare_torchvision_operators

# torchvision's compiled operators do not load beside a CPU-only torch; its Python part needs their names. This must
# happen before any test imports torchvision or timm.
declare_torchvision_operators()

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and data beside the checkout; tests that ask for it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real weights and data (../shared/data) are not here")
    return REAL_DATA
