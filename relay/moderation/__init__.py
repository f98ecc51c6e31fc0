"""Reports, decisions and what follows from them; rules of the operator's own at every door.

The files of this folder are one slice and share its tables. `assembled.py` builds the parts.
"""
