"""Everything that a machine with a GPU proves about this package, by one command that needs no network and no environment variable.

python -m benchmarks.gpu --out DIR --minutes 9

__main__.py   the arguments, what is refused before any work, the order of things
phases.py     one phase: a command in a session of its own, its time, and what is made of its results
build.py  tests.py  outcomes.py  sanitize.py  training.py   the phases that are not in other folders
summary.py    the table at the end
"""
