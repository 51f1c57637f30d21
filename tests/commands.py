"""Reads what a command said; `call` (conftest.py) gives (exit code, stdout, stderr)."""


def refused(result, *words, code=2):
    """The command failed with one line that says all of `words`."""
    got, _, err = result
    assert got == code, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
