"""Making VFs as the node policy says: what is to be done, and what this driver has done before.

Invariant: only what this driver made is ever changed or removed, and never under somebody who uses it. What
that is stands in a record that was written before the first change.
"""
