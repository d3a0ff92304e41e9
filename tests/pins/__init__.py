"""Outputs of an earlier commit, pinned: integers on every machine, floats bit for bit on the machine that wrote them.

`cases.py` lists what is run, `calls.py` is the only file that knows the library, `stored.py` writes and compares.
"""
