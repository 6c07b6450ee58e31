"""The small world of tests/integration and its runner of commands, for the hard tests too."""

import importlib.util
import sys
from pathlib import Path

INTEGRATION = Path(__file__).parents[1] / "integration"
sys.path.insert(0, str(INTEGRATION))
_spec = importlib.util.spec_from_file_location("integration_fixtures", INTEGRATION / "conftest.py")
_fixtures = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _fixtures
_spec.loader.exec_module(_fixtures)

world, pictures, artefacts = _fixtures.world, _fixtures.pictures, _fixtures.artefacts
