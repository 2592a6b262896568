"""The tests on every version of torch and Python: `python -m tests.matrix --help`.

Needs nothing but Python and pip: what it runs has environments of its own.
"""
