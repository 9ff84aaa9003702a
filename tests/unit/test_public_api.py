"""The names that `longlive` offers."""

import subprocess
import sys

import longlive


def test_every_public_name_is_there_and_comes_from_where_it_lives():
    for name in longlive.__all__:
        assert getattr(longlive, name).__module__.startswith("longlive.")
    assert set(longlive.__all__) <= set(dir(longlive))


def test_importing_the_package_imports_no_torch():
    code = "import sys, longlive; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
