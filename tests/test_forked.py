"""Programs that are forked end, write and are killed as programs that start from nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import forked
import pytest

SAYS = """
import json, os, sys
told = {"arguments": sys.argv[1:], "folder": os.getcwd(), "variable": os.environ.get("TOLD"), "name": __name__}
print(json.dumps(told))
print("an error", file=sys.stderr)
"""
ENDS = {
    "well": "pass", "by a code": "import sys; sys.exit(7)", "with words": "import sys; sys.exit('why')",
    "by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "by an error": "{}['x']",
}  # fmt: skip


@pytest.mark.parametrize("form", ["script", "module", "code"])
def test_it_is_told_what_a_program_is_told(tmp_path, form):
    here = tmp_path / "a b"
    here.mkdir()
    (here / "says.py").write_text(SAYS)
    first = {"script": [here / "says.py"], "module": ["-m", "says"], "code": ["-c", SAYS]}[form]
    done = forked.run(*first, "x=1 2", "路", environment={"TOLD": "this"}, folder=here)
    assert (done.returncode, done.stderr) == (0, "an error\n")
    expected = {"arguments": ["x=1 2", "路"], "folder": str(here), "variable": "this", "name": "__main__"}
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_a_program_does(how):
    done = forked.run("-c", ENDS[how])
    real = subprocess.run([sys.executable, "-c", ENDS[how]], capture_output=True, text=True, check=False)
    assert done.returncode == real.returncode
    assert done.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_it_can_be_killed_and_waited_for():
    process = forked.start("-c", "import time; time.sleep(600)")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.kill()  # of nobody


def test_one_program_leaves_nothing_to_the_next():
    assert forked.run("-c", "import os, sys; os.environ['LEFT'] = '1'; sys.left = 1").returncode == 0
    looks = "import os, sys; sys.exit('LEFT' in os.environ or hasattr(sys, 'left'))"
    assert forked.run("-c", looks).returncode == 0


def test_a_program_that_imports_itself_sees_its_own_environment(tmp_path):
    (tmp_path / "toy_of_tests.py").write_text("import os\nTOLD = os.environ.get('TOLD')\n"
                                              "if __name__ == '__main__':\n    import toy_of_tests\n"
                                              "    print(toy_of_tests.TOLD)\n")  # fmt: skip
    for told in ("one", "two"):
        done = forked.run(tmp_path / "toy_of_tests.py", environment={"TOLD": told})
        assert done.stdout == f"{told}\n"


def test_what_cannot_be_imported_is_said():
    with pytest.raises(ImportError, match="no_such_module"):
        forked.preload(["no_such_module"])
    assert forked.run("-c", "pass").returncode == 0  # the server lives on
