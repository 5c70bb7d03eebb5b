"""A kind cluster whose nodes have simulated NICs, for machines with docker or podman.

Invariant: what needs a container engine is a thin shell (engine, up, down); devices, deciding and the way
they are handed back run without one, on a node that is any network namespace.
"""
