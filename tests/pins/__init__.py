"""Outputs of an earlier commit, pinned: integers on every machine, floats bit for bit on the machine that wrote them.

`cases.py` lists what is run, `calls.py` is the only file that knows the library, `stored.py` writes and compares.
The exact mass where queries are masked was written anew when it became a score of the operator: rows that
`query_mask` leaves out no longer count in it.
"""
